"""Training windows: one observation and the actions that follow it, as numbers or as tokens.

The batch of a pass is a pure function of (data, config, step), so that a resumed run sees what an uninterrupted one
would have seen, on any number of processes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
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
from bitvla.processing.vectors import normalize, value_tokens
from bitvla.train.config import Augmentation

Ids = NDArray[np.int64]

UNKNOWN = -100  # what cross-entropy ignores
VALIDATION_EVERY = 25  # about one episode in so many is never trained on


class Window(NamedTuple):
    """Inputs of the network and its targets."""

    inputs: Batch
    actions: Tensor  # float (B, horizon, dim), normalised; of a flow the velocities (B, K, horizon, dim) towards them
    # bool (B, horizon), of a flow (B, 1, horizon): False past the episode's end, and where actions are given as decided
    valid: Tensor
    auxiliary: Tensor  # float (B, E): standardised privileged state, E may be 0
    keypoints: Tensor  # float (B, V, K, 2): where things are in the network's images, K may be 0


class TokenWindow(NamedTuple):
    """Inputs of a network that writes actions as tokens, the known ones among them, and its targets."""

    inputs: Batch  # tokens of prompt and action, but for the last one, which nothing follows
    targets: Tensor  # int64 (B, D): tokens of the action, counted from the first bin; UNKNOWN in front of a shorter one


class Windows(Dataset[Window]):
    """Item i is the batch of pass i (`split="train"`) or the i-th validation batch."""

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
        flow_samples: int = 0,
        split: str = "train",
        balance_tasks: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.name = dataset.root.name
        self._config, self._augmentation, self._seed = config, augmentation, seed
        self._prefix_dropout = prefix_dropout
        self._flow_samples = flow_samples if config.action.flow else 0
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        cameras = [camera.name for camera in config.processing.cameras]
        self._images = [dataset.images(name) for name in cameras]
        state = dataset.state if config.action.state_dim else dataset.state[:, :0]
        self._state = normalize(state, config.processing.state)
        self._actions = normalize(dataset.action, config.processing.action)
        self._auxiliary = _standardize(dataset)
        nothing = np.zeros((dataset.num_frames, len(self._images), 0, 2), dtype=np.float32)
        views = [dataset.cameras.index(name) for name in cameras]
        self._keypoints = nothing if dataset.keypoints is None else dataset.keypoints[:, views]
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
        """Frames of the batch of pass `step`, of all processes: every frame once an epoch, in random order."""
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
        changes = draws(self._seed, 0, step, (self._batch_size, len(self._images), 5))[share]
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
        window = Window(
            inputs,
            actions=actions,
            valid=torch.from_numpy((steps < ends) & ~decided),
            auxiliary=torch.from_numpy(self._auxiliary[frames]),
            keypoints=torch.from_numpy(self._points(frames, changes)),
        )
        if not self._flow_samples:
            return window
        shape = (self._batch_size, self._flow_samples, 1 + horizon * self._config.action.dim)
        return _flowing(window, torch.from_numpy(decided), torch.from_numpy(draws(self._seed, 3, step, shape)[share]))

    def _prefix_lengths(self, step: int) -> NDArray[np.int64]:
        """How many actions are given as decided in each window (B,) of the whole batch of `step`."""
        most = self._config.action.max_prefix
        none, length = draws(self._seed, 1, step, (self._batch_size, 2)).T
        return np.where((most == 0) | (none < self._prefix_dropout), 0, 1 + (length * most).astype(np.int64))

    def where(self, step: int) -> str:
        """Where this process's share of the batch comes from, for messages."""
        frames = self.indices(step)[self._rank :: self._world_size]
        return f"episodes {', '.join(map(str, np.unique(self._episode[frames])))} of {self.name}"

    def origin(self, place: float) -> str:
        """Where the window at `place` in [0, 1) comes from."""
        return f"episode {self._episode[self._at(place)[0]]} of {self.name}"

    def _at(self, place: float) -> Ids:
        return self._frames[[int(place * len(self._frames))]]

    def example(self, place: float, changes: NDArray[np.float64]) -> tuple[NDArray[np.float32], Ids, Ids]:
        """Pixels (V, 3, size, size), prompt and action tokens of the frame at `place` in [0, 1)."""
        frame = self._at(place)
        pixels = self._pixels(frame, changes[None, : len(self._images)])[0]
        prompt = self._token_ids[self._episode[frame[0]]]
        return pixels, prompt[prompt != self._pad_id], value_tokens(self._actions[frame[0]], self._config.action.bins)

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


class Mixture(Dataset[TokenWindow]):
    """Item i is the batch of pass i, of datasets with different cameras, rates and sizes of actions.

    Each window's dataset is chosen by the weights, then its frame, with replacement.
    """

    def __init__(
        self,
        parts: Sequence[Windows],
        weights: Mapping[str, float],
        config: PolicyConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._parts = [part for part in parts if part.num_frames]
        chances = np.asarray([weights[part.name] if weights else part.num_frames for part in self._parts], float)
        self._borders = np.cumsum(chances / chances.sum())[:-1]
        self._first_id = config.language.vocab_size - config.action.bins
        self._seed, self._batch_size, self._rank, self._world_size = seed, batch_size, rank, world_size
        self._pad_id = parts[0]._pad_id
        self._views = max(len(part._images) for part in parts)
        self._dim = max(part._config.action.dim for part in parts)
        self._length = max(part._token_ids.shape[1] + part._config.action.dim - 1 for part in parts)

    @property
    def num_frames(self) -> int:
        return sum(part.num_frames for part in self._parts)

    def __getitem__(self, step: int) -> TokenWindow:
        examples = [part.example(place, changes) for part, place, changes in self._chosen(step)]
        token_ids = torch.full((len(examples), self._length), self._pad_id)
        targets = torch.full((len(examples), self._dim), UNKNOWN)
        for i, (_, prompt, action) in enumerate(examples):
            sequence = np.concatenate([prompt, self._first_id + action[:-1]])
            token_ids[i, -len(sequence) :] = torch.from_numpy(sequence)
            targets[i, -len(action) :] = torch.from_numpy(action)
        inputs = Batch(
            pixels=torch.from_numpy(np.concatenate([pixels for pixels, _, _ in examples])[None]),
            token_ids=token_ids,
            padding=token_ids == self._pad_id,
            state=torch.zeros(len(examples), 0),
            prefix=torch.zeros(len(examples), 0, self._dim),
            decided=torch.zeros(len(examples), 0, dtype=torch.bool),
        )
        return TokenWindow(inputs, targets)

    def where(self, step: int) -> str:
        """Where this process's share of the batch comes from, for messages."""
        return "; ".join(dict.fromkeys(part.origin(place) for part, place, _ in self._chosen(step)))

    def _chosen(self, step: int) -> Iterator[tuple[Windows, float, NDArray[np.float64]]]:
        """This process's windows: a dataset, a place in it, and how it is augmented."""
        chances = draws(self._seed, 2, step, (self._batch_size, 2 + 5 * self._views))[self._rank :: self._world_size]
        for which, place, *changes in chances:
            part = self._parts[int(np.searchsorted(self._borders, which, side="right"))]
            yield part, place, np.reshape(changes, (self._views, 5))


def draws(seed: int, stream: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Random numbers in [0, 1) of the batch of pass `step`; `shape` begins with the size of the batch.

    A window's are given by its place in the run alone: the same on any number of processes, and whether a step is one
    large batch or several small ones.
    """
    bits = np.random.PCG64([seed, stream])
    return np.random.Generator(bits.advance(step * math.prod(shape))).random(shape)


def batches(windows: Windows | Mixture, steps: range) -> Iterator[Window | TokenWindow]:
    """The batches of `steps`, prepared ahead of time by another process."""
    return iter(DataLoader(windows, batch_size=None, sampler=steps, num_workers=1, prefetch_factor=3))


def _flowing(window: Window, decided: Tensor, chances: Tensor) -> Window:
    """`window` on the straight line from noise to its actions, where decided ones (B, horizon) have arrived.

    `chances` (B, K, 1 + horizon * dim) in [0, 1). Times are drawn as in pi0, more of them near the noise, where there
    is more to decide: 1 - u with u of Beta(1.5, 1).
    """
    actions = window.actions[:, None]
    time = torch.where(decided[:, None], 1, 1 - chances[..., :1] ** (2 / 3)).float()
    noise = torch.special.ndtri(chances[..., 1:].clamp(1e-9, 1 - 1e-9)).float().unflatten(-1, actions.shape[2:])
    inputs = window.inputs._replace(noisy=torch.lerp(noise, actions, time[..., None]), time=time)
    return window._replace(inputs=inputs, actions=actions - noise, valid=window.valid[:, None])


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
