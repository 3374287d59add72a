"""Conversations about images as the windows that a vision-language model learns from."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from bitvla.config import ImageProcessing, VisionConfig
from bitvla.data.llava import Conversation, LlavaDataset, Picture
from bitvla.errors import BitvlaError
from bitvla.model.network import Batch
from bitvla.processing.images import crop_resized, to_pixels
from bitvla.processing.prompt import Chat
from bitvla.train.batches import UNKNOWN, Ids, TokenWindow, draws, held_out, jitter
from bitvla.train.config import Augmentation


def tokens(conversation: Conversation, chat: Chat, most: int) -> tuple[Ids, NDArray[np.bool_], int]:
    """Token ids (S,), which of them are the model's to write, and how many images are in them.

    Turns whose answer would not begin within `most` tokens are left out, the last answer is cut there; a conversation
    whose first turn does not fit is empty. BitvlaError for special tokens in what is said.
    """
    ids, written, images = chat.begin(), [False] * len(chat.begin()), 0
    for turn in conversation.turns:
        try:
            asked, answer = chat.turn(turn.prompt, turn.images), chat.answer(turn.answer)
        except BitvlaError as error:
            raise BitvlaError(f"{conversation.name}: {error}") from None
        if len(ids) + len(asked) >= most:
            break
        ids += [*asked, *answer]
        written += [False] * len(asked) + [True] * len(answer)
        images += turn.images
    if not any(written):
        return np.empty(0, np.int64), np.empty(0, bool), 0
    return np.asarray(ids[:most]), np.asarray(written[:most]), images


class Conversations(Dataset[TokenWindow]):
    """Item i is the batch of pass i, a window a conversation; only the tokens of answers, with their ends, are targets.

    Those about one image are all in one split.
    """

    def __init__(
        self,
        dataset: LlavaDataset,
        vision: VisionConfig,
        image: ImageProcessing,
        chat: Chat,
        *,
        batch_size: int,
        max_tokens: int,
        seed: int,
        augmentation: Augmentation | None,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._dataset, self._entries, self._epochs = dataset, dataset.entries, dict[int, Ids]()
        self._vision, self._image, self._chat = vision, image, chat
        self._batch_size, self._max_tokens, self._seed = batch_size, max_tokens, seed
        self._augmentation, self._rank, self._world_size = augmentation, rank, world_size
        if split == "train":
            _check_said(self._entries, chat)
        self._chosen = np.flatnonzero(
            [_apart(entry) == (split == "validation") and self._fits(entry) for entry in self._entries]
        )
        if not len(self._chosen) and split == "train":
            raise BitvlaError(
                f"no conversation fits into {max_tokens} tokens, of which an image takes {vision.num_patches}"
            )

    @property
    def num_frames(self) -> int:
        return len(self._chosen)

    def _fits(self, entry: Conversation) -> bool:
        """A token is at least a byte: only a long question has to be counted."""
        first = entry.turns[0]
        likely = len(first.prompt.encode()) + (1 + first.images) * (self._vision.num_patches + 256)
        return likely < self._max_tokens or len(tokens(entry, self._chat, self._max_tokens)[0]) > 0

    def prepare(self, step: int) -> None:
        """Nothing: an image is read when its batch is."""

    def where(self, step: int) -> str:
        """Where this process's share of the batch comes from, for messages."""
        return "; ".join(self._entries[i].name for i in self._indices(step)[self._rank :: self._world_size])

    def _indices(self, step: int) -> Ids:
        """The entries of the batch of pass `step`: each once an epoch, in random order."""
        positions = range(step * self._batch_size, (step + 1) * self._batch_size)
        return np.array([self._epoch(i // len(self._chosen))[i % len(self._chosen)] for i in positions])

    def _epoch(self, number: int) -> Ids:
        if number not in self._epochs:
            rng = np.random.default_rng([self._seed, number])
            order = self._chosen[rng.permutation(len(self._chosen))]
            order = order[np.argsort(self._dataset.turns(rng)[order], kind="stable")]
            recent = dict(list(self._epochs.items())[-1:])  # a batch may end one epoch and begin the next
            self._epochs = {**recent, number: order}
        return self._epochs[number]

    def __getitem__(self, step: int) -> TokenWindow:
        share = slice(self._rank, None, self._world_size)
        entries = [self._entries[i] for i in self._indices(step)[share]]
        changes = draws(self._seed, 0, step, (self._batch_size, 5))[share]
        rows = [tokens(entry, self._chat, self._max_tokens) for entry in entries]
        length = max(len(ids) for ids, _, _ in rows) - 1
        token_ids = np.zeros((len(rows), length), np.int64)
        padding, targets = np.ones((len(rows), length), bool), np.full((len(rows), length), UNKNOWN)
        for i, (ids, written, _) in enumerate(rows):
            begin = length - len(ids) + 1
            token_ids[i, begin:], padding[i, begin:] = ids[:-1], False
            targets[i, begin:] = np.where(written[1:], ids[1:], UNKNOWN)
        token_ids[padding] = self._chat.stop_ids[0]
        views = [
            self._pixels(picture, entry.name, change)
            for entry, (_, _, images), change in zip(entries, rows, changes, strict=True)
            for picture in entry.images[:images]
        ]
        size = self._vision.image_size
        if not views:  # a blank picture, which no token reads: several processes run the same parts
            views = [np.zeros((3, size, size), np.float32)]
        inputs = Batch(
            pixels=torch.from_numpy(np.stack(views)[None]),
            token_ids=torch.from_numpy(token_ids),
            padding=torch.from_numpy(padding),
            state=torch.zeros(len(rows), 0),
            prefix=torch.zeros(len(rows), 0, 0),
            decided=torch.zeros(len(rows), 0, dtype=torch.bool),
        )
        return TokenWindow(inputs, torch.from_numpy(targets))

    def _pixels(self, picture: Picture, name: str, changes: NDArray[np.float64]) -> NDArray[np.float32]:
        """float32 (3, size, size); `changes` (5,) in [0, 1): crop's place, then the jitter."""
        across, down = changes[:2] if self._augmentation and self._augmentation.random_crop else (0.5, 0.5)
        try:
            image = self._dataset.image(picture)
        except BitvlaError as error:
            raise BitvlaError(f"{name}: {error}") from None
        view = crop_resized(image, self._image, self._vision.image_size, (float(across), float(down)))
        if self._augmentation is not None:
            view = jitter(view[None, None], self._augmentation, changes[None, None, 2:])[0, 0]
        return to_pixels(view, self._image).transpose(2, 0, 1)


def _check_said(entries: Iterable[Conversation], chat: Chat) -> None:
    """BitvlaError for special tokens in what is said. Met in the middle of a run it would be too late: corrected data
    are other data, on which that run does not go on."""
    reserved = [re.escape(token.content) for token in chat.tokenizer.get_added_tokens_decoder().values()]
    suspicious = re.compile("|".join(reserved)).search
    for entry in entries:
        if any(suspicious(text) for turn in entry.turns for text in (turn.prompt, turn.answer)):
            tokens(entry, chat, sys.maxsize)


def _apart(entry: Conversation) -> bool:
    """By the path of its image within the data, wherever these lie."""
    return held_out((entry.images[0].name if entry.images else entry.turns[0].prompt).encode())
