"""Training windows: one observation and the chunk of actions that follows it.

The batch of a step is a pure function of (data, config, step), so that a resumed run sees what an uninterrupted one
would have seen, on any number of processes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitvla.config import PolicyConfig
from bitvla.data.lerobot import LeRobotDataset
from bitvla.model.network import Batch
from bitvla.processing.images import crop_resized, to_pixels
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import normalize
from bitvla.train.config import Augmentation

VALIDATION_EVERY = 25  # about one episode in so many is never trained on


class Window(NamedTuple):
    """Inputs of the network and its targets."""

    inputs: Batch
    actions: Tensor  # float (B, horizon, dim), normalised
    valid: Tensor  # bool (B, horizon): False past the end of the episode, and where actions are given as decided
    auxiliary: Tensor  # float (B, E): standardised privileged state, E may be 0
    keypoints: Tensor  # float (B, V, K, 2): where things are in the network's images, K may be 0


class Windows(Dataset[Window]):
    """Item i is the batch of step i (`split="train"`) or the i-th validation batch."""

    def __init__(
        self,
        dataset: LeRobotDataset,
        config: PolicyConfig,
        prompt: Prompt,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None,
        prefix_dropout: float = 1.0,
        split: str = "train",
        balance_tasks: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._config, self._augmentation, self._seed = config, augmentation, seed
        self._prefix_dropout = prefix_dropout
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._images = [dataset.images(camera.name) for camera in config.processing.cameras]
        self._state = normalize(dataset.state, config.processing.state)
        self._actions = normalize(dataset.action, config.processing.action)
        self._auxiliary = _standardize(dataset)
        nothing = np.zeros((dataset.num_frames, len(self._images), 0, 2), dtype=np.float32)
        self._keypoints = nothing if dataset.keypoints is None else dataset.keypoints
        episodes = np.asarray(dataset.episode_index)
        self._episode = episodes
        self._episode_end = np.asarray([end for _, end in dataset.episode_ranges])
        held_out = np.array([_held_out(episode) for episode in range(len(dataset.episode_ranges))])[episodes]
        self._frames = np.flatnonzero(held_out if split == "validation" else ~held_out)
        if balance_tasks:
            self._frames = _balanced(self._frames, _task_of_frames(dataset))
        self._token_ids = _left_padded([prompt.ids(text) for text in dataset.task_strings], prompt.pad_id)
        self._pad_id = prompt.pad_id

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Frames of the batch of `step`, of all processes: every frame once an epoch, in random order."""
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        chosen = np.empty(self._batch_size, dtype=np.int64)
        for epoch in np.unique(positions // len(self._frames)):
            order = np.random.default_rng([self._seed, int(epoch)]).permutation(len(self._frames))
            now = positions // len(self._frames) == epoch
            chosen[now] = self._frames[order[positions[now] % len(self._frames)]]
        return chosen

    def __getitem__(self, step: int) -> Window:
        share = slice(self._rank, None, self._world_size)
        frames = self.indices(step)[share]
        # Drawn by place in the whole batch: a window is augmented alike on any number of processes.
        changes = np.random.default_rng([self._seed, step]).random((self._batch_size, len(self._images), 5))[share]
        horizon = self._config.action.horizon
        episode = self._episode[frames]
        ends = self._episode_end[episode][:, None]
        steps = frames[:, None] + np.arange(horizon)
        actions = torch.from_numpy(self._actions[np.minimum(steps, ends - 1)])
        decided = np.arange(horizon) < self._prefix_lengths(step)[share, None]
        most = self._config.action.max_prefix
        token_ids = torch.from_numpy(self._token_ids[episode])
        inputs = Batch(
            pixels=torch.from_numpy(self._pixels(frames, changes)),
            token_ids=token_ids,
            padding=token_ids == self._pad_id,
            state=torch.from_numpy(self._state[frames]),
            prefix=actions[:, :most],
            decided=torch.from_numpy(decided[:, :most]),
        )
        return Window(
            inputs,
            actions=actions,
            valid=torch.from_numpy((steps < ends) & ~decided),
            auxiliary=torch.from_numpy(self._auxiliary[frames]),
            keypoints=torch.from_numpy(self._points(frames, changes)),
        )

    def _prefix_lengths(self, step: int) -> NDArray[np.int64]:
        """How many actions are given as decided in each window (B,) of the whole batch of `step`."""
        random = np.random.default_rng([self._seed, step, 1])
        lengths = random.integers(1, max(1, self._config.action.max_prefix) + 1, self._batch_size)
        none = self._config.action.max_prefix == 0
        return np.where(none | (random.random(self._batch_size) < self._prefix_dropout), 0, lengths)

    def _points(self, frames: NDArray[np.int64], changes: NDArray[np.float64]) -> NDArray[np.float32]:
        """Keypoints float32 (B, V, K, 2) where the crop of `_pixels` puts them; outside [0, 1) they are not seen."""
        processing = self._config.processing.image
        points, side = self._keypoints[frames], math.sqrt(processing.crop_area)
        if processing.rotate180:
            points = 1 - points
        corner = (1 - side) * self._offsets(changes)[:, :, None]
        return ((points - corner) / side).astype(np.float32)

    def _offsets(self, changes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The place (B, V, 2) of each view's crop: across and down, in [0, 1)."""
        random_crop = self._augmentation is not None and self._augmentation.random_crop
        return changes[..., :2] if random_crop else np.full_like(changes[..., :2], 0.5)

    def _pixels(self, frames: NDArray[np.int64], changes: NDArray[np.float64]) -> NDArray[np.float32]:
        """float32 (B, V, 3, size, size); `changes` (B, V, 5) in [0, 1): crop's place, then the jitter."""
        processing, size = self._config.processing.image, self._config.vision.image_size
        offsets = self._offsets(changes)
        images = np.empty((len(frames), len(self._images), size, size, 3), dtype=np.uint8)
        for i, frame in enumerate(frames):
            for view, camera in enumerate(self._images):
                across, down = offsets[i, view]
                images[i, view] = crop_resized(camera[frame], processing, size, (float(across), float(down)))
        if self._augmentation is not None:
            images = _jitter(images, self._augmentation, changes[..., 2:])
        return np.ascontiguousarray(to_pixels(images, processing).transpose(0, 1, 4, 2, 3))


def batches(windows: Windows, steps: range) -> Iterator[Window]:
    """The batches of `steps`, prepared ahead of time by another process."""
    return iter(DataLoader(windows, batch_size=None, sampler=steps, num_workers=1, prefetch_factor=3))


def _held_out(episode: int) -> bool:
    """By a hash of its index, so that no regular order of the tasks lines up with it."""
    return zlib.crc32(episode.to_bytes(4, "little")) % VALIDATION_EVERY == 0


def _jitter(images: NDArray[np.uint8], augmentation: Augmentation, changes: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Brightness, contrast and saturation of images (B, V, ...), from `changes` (B, V, 3) in [0, 1)."""
    strengths = (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    factors = (1 + (2 * changes - 1) * strengths).astype(np.float32)
    brightness, contrast, saturation = (factors[..., i, None, None, None] for i in range(3))
    x = images.astype(np.float32) * brightness
    mean = x.mean(axis=(2, 3, 4), keepdims=True)
    x = mean + (x - mean) * contrast
    grey = x.mean(axis=4, keepdims=True)
    x = grey + (x - grey) * saturation
    return np.clip(x, 0, 255).astype(np.uint8)


def _standardize(dataset: LeRobotDataset) -> NDArray[np.float32]:
    """The privileged state float32 (N, E): how far it is from the mean of its task, in deviations within tasks.

    Which task it is, a picture tells at once; where things are in it is what the tower shall learn.
    """
    values = dataset.environment_state
    if values is None:
        return np.zeros((dataset.num_frames, 0), dtype=np.float32)
    task = _task_of_frames(dataset)
    means = np.stack([values[task == number].mean(axis=0) for number in range(task.max() + 1)])
    away = values - means[task]
    return (away / np.maximum(away.std(axis=0), 1e-3)).astype(np.float32)


def _task_of_frames(dataset: LeRobotDataset) -> NDArray[np.int64]:
    """Numbers (N,) of the tasks of all frames: the simulator's tasks, or else the sentences."""
    columns = dataset.episodes
    tasks = columns["env_task"] if "env_task" in columns else np.asarray(dataset.task_strings)
    _, task = np.unique(np.asarray(tasks, dtype=str), return_inverse=True)
    return task[dataset.episode_index]


def _balanced(frames: NDArray[np.int64], task: NDArray[np.int64]) -> NDArray[np.int64]:
    """`frames` with those of the shorter tasks repeated until every task has as many."""
    groups = [frames[task[frames] == number] for number in np.unique(task[frames])]
    return np.concatenate([np.resize(group, max(map(len, groups))) for group in groups])


def _left_padded(sequences: list[NDArray[np.int64]], pad_id: int) -> NDArray[np.int64]:
    length = max(len(ids) for ids in sequences)
    return np.stack([np.pad(ids, (length - len(ids), 0), constant_values=pad_id) for ids in sequences])
