"""An instruction, or a conversation, -> token ids, with places for images, proprio and action slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bitvla.config import LanguageModelConfig, PolicyConfig
from bitvla.errors import BitvlaError

ASK_FOR_A_LETTER = "\nAnswer with the option's letter from the given choices directly"  # as lmms-eval asks
NO_TOWER = "the model has no vision tower, so it sees no images; give one that was packed from a vision-language model"
LONGEST_INSTRUCTION = 10_000  # characters: counting the tokens of a message full of them would take a minute
SLOT_ID = 1  # what the reference feeds as an action placeholder; its embedding is replaced by zeros


class Prompt:
    """Builds the token sequence of a policy; one instance a policy, cheap to call for every observation.

    The sequence is: prompt (with image and proprio tokens) | action slots | stop token. Where an action is written as
    tokens, it ends with the prompt.
    """

    def __init__(self, config: PolicyConfig, tokenizer: Tokenizer) -> None:
        self._prompt = config.processing.prompt
        self._tokenizer = tokenizer
        self._num_slots = config.action.num_slots
        num_image_tokens = config.vision.num_patches * len(config.processing.cameras)
        self._images = self._prompt.image_token * num_image_tokens
        before_images = self._prompt.template.partition("{images}")[0]
        self.begins_alike = "{instruction}" not in before_images  # every sequence, up to its first image token
        self.image_id = special_id(tokenizer, self._prompt.image_token)
        self.proprio_id = special_id(tokenizer, self._prompt.proprio_token)
        self.stop_id = special_id(tokenizer, self._prompt.stop_token)
        self.pad_id = special_id(tokenizer, self._prompt.pad_token)
        self._reserved = set(tokenizer.get_added_tokens_decoder())
        if SLOT_ID in (self.image_id, self.proprio_id):
            raise BitvlaError(f"the tokenizer's image or proprio token has id {SLOT_ID}, which marks action slots")
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if size > config.language.vocab_size:
            raise BitvlaError(
                f"the tokenizer has {size} tokens, the policy's embedding only {config.language.vocab_size} rows: "
                "this tokenizer belongs to another model"
            )
        said = self._reserved & {self.image_id, *encode(tokenizer, self._prompt.template)}
        if config.action.bins and max(said, default=0) >= config.language.vocab_size - config.action.bins:
            raise BitvlaError(
                f"the prompt's token {tokenizer.id_to_token(max(said))} (id {max(said)}) is one of the last "
                f"{config.action.bins} tokens, which are actions; enlarge language.vocab_size, now "
                f"{config.language.vocab_size}"
            )

    def ids(self, instruction: str) -> NDArray[np.int64]:
        """Token ids (length,) of the whole sequence for `instruction`.

        Raises BitvlaError for an instruction that is no text, empty, too long, or would smuggle in special tokens.
        """
        if not isinstance(instruction, str):
            raise BitvlaError(f"the instruction is {instruction!r:.60}, not a text; say what the robot should do")
        if not instruction.strip():
            raise BitvlaError(f"the instruction is empty ({instruction!r}); say what the robot should do")
        if len(instruction) > LONGEST_INSTRUCTION:
            raise BitvlaError(f"the instruction has {len(instruction)} characters; shorten it ({instruction[:40]}...)")
        text = " ".join(instruction.split())
        if self._prompt.lower_case:
            text = text.lower()
        words = encode(self._tokenizer, text)
        if self._reserved & set(words):
            raise BitvlaError(f"the instruction contains reserved tokens ({text[:60]!r}); remove them")
        length = len(words)
        if length > self._prompt.max_instruction_tokens:
            raise BitvlaError(
                f"the instruction has {length} tokens, the policy was trained for at most "
                f"{self._prompt.max_instruction_tokens}; shorten it ({text[:40]}...)"
            )
        filled = self._prompt.template.replace("{images}", self._images).replace("{instruction}", text)
        ids = encode(self._tokenizer, filled)
        end = [*[SLOT_ID] * self._num_slots, self.stop_id] if self._num_slots else []
        return np.asarray([*ids, *end], dtype=np.int64)

    def slots(self, length: int) -> slice:
        """Positions of the action slots in a sequence of `length` tokens."""
        return slice(length - 1 - self._num_slots, length - 1) if self._num_slots else slice(length, length)

    def slot_states(self, length: int) -> slice:
        """Positions whose final hidden states the action is read from, one before each slot (as the reference does);
        where it is written as tokens, the last one, which the first token follows."""
        first = self.slots(length).start
        return slice(first - 1, first - 1 + max(1, self._num_slots))


class Chat:
    """Builds the tokens of a conversation: `begin`, then a `turn` and its answer, which a stop token ends, and so on.

    `stop_ids` are the tokens that end an answer; `image_id` stands for a patch of an image, -1 where none is seen.
    """

    def __init__(self, config: LanguageModelConfig, tokenizer: Tokenizer) -> None:
        self._chat, self._vision, self.tokenizer = config.chat, config.vision, tokenizer
        size, rows = tokenizer.get_vocab_size(with_added_tokens=True), config.language.vocab_size
        if size > rows:
            raise BitvlaError(
                f"the tokenizer has {size} tokens, the embedding only {rows} rows: it is of another model"
            )
        self.stop_ids = [special_id(tokenizer, token) for token in config.chat.stop_tokens]
        self.image_id = special_id(tokenizer, config.chat.image_token) if config.vision else -1
        self._reserved = set(tokenizer.get_added_tokens_decoder())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, whose special tokens count as such."""
        return encode(self.tokenizer, text)

    def begin(self) -> list[int]:
        """What every conversation begins with."""
        return self.encode(self._chat.begin)

    def turn(self, prompt: str, images: int = 0) -> list[int]:
        """What the user says, with that many images, up to where the answer begins.

        BitvlaError for a prompt that is empty or holds special tokens, and for images where the model sees none.
        """
        prompt = prompt.strip()
        if not prompt:
            raise BitvlaError("the prompt is empty; say something to the model")
        self._check_reserved("prompt", prompt)
        turn = self._chat.turn
        if images:
            if self._vision is None:
                raise BitvlaError(NO_TOWER)
            patches = " ".join([self._chat.image_token * self._vision.num_patches] * images)
            turn = self._chat.turn_with_images.replace("{images}", patches)
        return self.encode(turn.replace("{prompt}", prompt))

    def answer(self, text: str) -> list[int]:
        """An answer and its end, as a model learns to write it. BitvlaError for special tokens in it."""
        self._check_reserved("answer", text.strip())
        return [*self.encode(text.strip()), self.stop_ids[0]]

    def _check_reserved(self, name: str, text: str) -> None:
        if self._reserved & set(self.encode(text)):
            raise BitvlaError(f"the {name} contains reserved tokens ({text[:60]!r}); remove them")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, whose special tokens count as such; BitvlaError for one that has none."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception:  # of the library: half a surrogate pair, which a byte that is not UTF-8 becomes, is "no str"
        raise BitvlaError(
            f"{text[:60]!r} cannot become tokens: a character in it is not Unicode, or the tokenizer lacks it"
        ) from None
    return ids


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token; BitvlaError for a tokenizer without it."""
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise BitvlaError(f"the tokenizer lacks the special token {token}: it belongs to another model")
    return int(token_id)


def train_tokenizer(sentences: Sequence[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens: any text encodes, the corpus encodes shortly.

    BitvlaError where these cannot be the bytes and the special ones.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if (size := tokenizer.get_vocab_size()) > vocab_size:
        raise BitvlaError(
            f"language.vocab_size leaves {vocab_size} tokens to a new tokenizer, whose bytes and special tokens alone "
            f"are {size}; enlarge it by {size - vocab_size}"
        )
    return tokenizer
