"""A language model that writes: a prompt in, with images or without, text out token by token. NumPy and native kernels
only."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from bitvla.bundle import Bundle, read_language_model
from bitvla.config import LanguageModelConfig
from bitvla.errors import BitvlaError
from bitvla.processing.images import image_patches
from bitvla.processing.prompt import NO_TOWER, Chat
from bitvla.runtime.network import Cache, Decoder, Floats, Linear, Span, VisionTower, Workspace, stored_linear
from bitvla.runtime.policy import parse_tokenizer, use_threads
from bitvla.runtime.selftest import choose_isa

Image = NDArray[np.uint8]
PREFILL_BLOCK = 512  # tokens of a prompt that pass the decoder together: a long prompt needs no more memory


class Sampler:
    """Chooses tokens. Greedy at temperature 0; else from the likeliest tokens whose probabilities reach `top_p`.

    The same seed makes the same choices. Raises BitvlaError for a temperature below 0 or `top_p` outside (0, 1].
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 <= temperature < np.inf:
            raise BitvlaError(f"the temperature is {temperature}; give 0 for the likeliest token, or more")
        if not 0 < top_p <= 1:
            raise BitvlaError(f"top_p is {top_p}; give a share of the probability, above 0 and at most 1")
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    def choose(self, logits: Floats) -> int:
        """One token for logits (V,)."""
        if self._temperature == 0:
            return int(np.argmax(logits))
        # Differences first: a small temperature must not overflow.
        weights = np.exp((logits.astype(np.float64) - logits.max()) / self._temperature)
        kept = np.arange(len(weights)) if self._top_p == 1 else _likeliest(weights, self._top_p)
        reached = np.cumsum(weights[kept])
        return int(kept[np.searchsorted(reached[:-1], self._random.random() * reached[-1], side="right")])


class LanguageModel:
    """A loaded language model. Not for use by several threads at once: its buffers are used again by every call.

    `timings` holds the milliseconds that the last call of `logits` took, in the decoder and in the head.
    """

    def __init__(self, bundle: Bundle[LanguageModelConfig]) -> None:
        self.bundle, self.config = bundle, bundle.config
        bundle.check_finite()
        self.chat = Chat(self.config, parse_tokenizer(bundle.tokenizer()))
        language, vision, workspace = self.config.language, self.config.vision, Workspace()
        self.decoder = Decoder(language, bundle, workspace)
        self.vision = VisionTower(vision, bundle, workspace) if vision else None
        self.isa = choose_isa(self.parts)
        head = "model.embed_tokens" if self.config.tied else "lm_head"
        self.head = stored_linear(bundle.tensors, f"language_model.{head}")
        self.timings = {"decoder": 0.0, "head": 0.0}

    @classmethod
    def load(cls, path: Path, threads: int | None = None) -> LanguageModel:
        """Load the file of a language model. BitvlaError where it is missing, damaged or a policy."""
        use_threads(threads)
        return cls(read_language_model(Path(path)))

    @property
    def parts(self) -> list[VisionTower | Decoder | Linear]:
        """One of each thing that uses kernels of its own."""
        return [self.decoder, self.vision, self.vision.connector[0]] if self.vision else [self.decoder]

    def generate(
        self, prompt: str, *, images: Sequence[Image] = (), max_tokens: int = 256, sampler: Sampler | None = None
    ) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is written: a conversation of one turn."""
        return Conversation(self).say(prompt, images=images, max_tokens=max_tokens, sampler=sampler)

    def see(self, images: Sequence[Image]) -> Floats:
        """Images, uint8 (height, width, 3), -> the embeddings (images * P, H) of their tokens.

        BitvlaError where the model has no vision tower.
        """
        vision, processing = self.config.vision, self.config.image
        if self.vision is None or vision is None or processing is None:
            raise BitvlaError(NO_TOWER)
        features = np.empty((len(images), vision.num_patches, self.config.language.hidden_size), np.float32)
        for image, tokens in zip(images, features, strict=True):  # one by one, so that the tower's buffers stay small
            tokens[:] = self.vision.see(image_patches(image, processing, vision))
        return features.reshape(-1, features.shape[-1])

    def logits(self, ids: Iterable[int], cache: Cache, features: Floats | None = None) -> Floats:
        """Read tokens after those in `cache` -> logits (V,) of the token that follows; valid until the next call.

        `features` (n, H) are the embeddings of the image tokens among them. Raises BitvlaError where there are no
        tokens, or more than the cache has room for.
        """
        tokens = np.fromiter(ids, np.int64)
        if not 0 < len(tokens) <= cache.capacity - cache.length:
            raise BitvlaError(f"{len(tokens)} tokens after {cache.length}; there is room for 1 to {cache.capacity}")
        begin, seen = time.perf_counter(), 0
        for start in range(0, len(tokens), PREFILL_BLOCK):
            block = tokens[start : start + PREFILL_BLOCK]
            x = self.decoder.embedding_rows(block)
            if features is not None:
                (places,) = np.nonzero(block == self.chat.image_id)
                x[places] = features[seen : seen + len(places)]
                seen += len(places)
            state = self.decoder.run(x, [Span(len(block), slice(len(block) - 1, len(block)), cache)])
        middle = time.perf_counter()
        logits = self.decoder.workspace.floats("logits", 1, len(self.head.weight))
        self.head.apply(state, logits)
        self.timings = {"decoder": 1e3 * (middle - begin), "head": 1e3 * (time.perf_counter() - middle)}
        return logits[0]


class Conversation:
    """Turns of a user and answers of a model; what was said stays in the cache and is not computed again.

    `ids` holds every token so far; the last may not be in the cache yet. `milliseconds` says how long each token of the
    last answer took; the first one has the reading of the prompt in it.
    """

    def __init__(self, model: LanguageModel, after: Conversation | None = None) -> None:
        """`after` is one that has ended: what both begin with, images included, is not computed again."""
        self._model, self._after = model, after
        self.ids = model.chat.begin()
        self.milliseconds: list[float] = []
        self._cache = Cache(model.config.language, 0)
        self._images: list[Image] = []

    @property
    def ended(self) -> bool:
        """Did the model end its last answer itself? Otherwise it was cut short."""
        return self.ids[-1] in self._model.chat.stop_ids

    def say(
        self, prompt: str, *, images: Sequence[Image] = (), max_tokens: int = 256, sampler: Sampler | None = None
    ) -> Iterator[str]:
        """The model's answer, piece by piece, of at most `max_tokens` tokens. Images are uint8 (height, width, 3), RGB.

        Raises BitvlaError for a prompt that is empty, holds special tokens, or does not fit into the context, and for
        images where the model sees none.
        """
        ids = self._model.chat.turn(prompt, len(images))
        if self.ids != self._model.chat.begin() and not self.ended:
            ids.insert(0, self._model.chat.stop_ids[0])
        most = self._model.config.language.max_positions
        needed = len(self.ids) + len(ids)
        if needed >= most:
            raise BitvlaError(f"the conversation has {needed} tokens, the model was built for {most}; begin a new one")
        self.ids += ids
        self._images += images
        if self._after:
            self._take_cache(self._after)
            self._after = None
        self._cache = self._cache.grown(min(most, needed + max_tokens))
        return self._answer(max_tokens, sampler or Sampler())

    def _take_cache(self, earlier: Conversation) -> None:
        """Go on with the cache of `earlier`, up to the first token or image that differs."""
        self._cache, earlier._cache = earlier._cache, self._cache
        most = min(len(self.ids) - 1, self._cache.length)  # the last token is always read: the answer follows from it
        ids, others = np.array(self.ids[:most]), np.array(earlier.ids[:most])
        alike = [np.array_equal(one, other) for one, other in zip(self._images, earlier._images, strict=False)]
        of_images = np.cumsum(ids == self._model.chat.image_id)
        same = (ids == others) & (of_images <= [*alike, False].index(False) * self._patches)
        self._cache.length = int(np.append(same, False).argmin())

    @property
    def _patches(self) -> int:
        return self._model.config.vision.num_patches if self._model.config.vision else 0

    def _answer(self, max_tokens: int, sampler: Sampler) -> Iterator[str]:
        text = DecodeStream(skip_special_tokens=True)
        self.milliseconds = []
        for _ in range(min(max_tokens, self._cache.capacity - len(self.ids))):
            start = time.perf_counter()
            chosen = sampler.choose(self._next_logits())
            self.milliseconds.append(1e3 * (time.perf_counter() - start))
            self.ids.append(chosen)
            if chosen in self._model.chat.stop_ids:
                return
            if piece := text.step(self._model.chat.tokenizer, chosen):  # None within a character of several bytes
                yield piece

    def _next_logits(self) -> Floats:
        ids = self.ids[self._cache.length :]
        unread = ids.count(self._model.chat.image_id)
        if not unread:
            return self._model.logits(ids, self._cache)
        # The last ones. Where a reading was interrupted, that may be a part of the first of them.
        features = self._model.see(self._images[-math.ceil(unread / self._patches) :])
        return self._model.logits(ids, self._cache, features[len(features) - unread :])


def _likeliest(weights: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """The fewest tokens that have this share of all weights, the likeliest first."""
    order = np.argsort(-weights, kind="stable")
    reached = np.cumsum(weights[order])
    return order[: 1 + int(np.searchsorted(reached, share * reached[-1]))]
