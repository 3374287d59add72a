"""Training windows: one observation and the actions that follow it, as numbers or as tokens.

The batch of a pass is a pure function of (data, config, step), so that a resumed run sees what an uninterrupted one
would have seen, on any number of processes. Where decoded pictures may not take the disk that all would need, an epoch
goes through groups of random episodes, one after the other: a group is trained on while the next is decoded.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import sys
import time
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bitvla.config import PolicyConfig
from bitvla.data.lerobot import LeRobotDataset
from bitvla.errors import BitvlaError
from bitvla.model.network import Batch
from bitvla.processing.images import crop_resized, to_pixels
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import network_actions, normalize, value_tokens
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
    """Inputs of a network that writes tokens, an action's or an answer's, with the known ones, and its targets."""

    inputs: Batch  # all tokens but the last one, which nothing follows
    # int64 (B, D), of what follows the last D tokens: those of the action, counted from the first bin, or of the
    # vocabulary; UNKNOWN where nothing is to be learnt.
    targets: Tensor


class Epoch(NamedTuple):
    """The order in which frames are seen once, group by group."""

    frames: Ids
    ends: Ids  # of each group, in `frames`
    episodes: list[Ids]  # of each group

    def group(self, position: int) -> int:
        """The group of the frame at `position`."""
        return int(np.searchsorted(self.ends, position, side="right"))


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
        self.name = dataset.name
        self._config, self._augmentation, self._seed = config, augmentation, seed
        self._prefix_dropout = prefix_dropout
        self._flow_samples = flow_samples if config.action.flow else 0
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        cameras = [camera.name for camera in config.processing.cameras]
        self._cameras, self._pictures = cameras, dataset.pictures
        self._images = [dataset.images(name) for name in cameras]
        state = dataset.state if config.action.state_dim else dataset.state[:, :0]
        self._state = normalize(state, config.processing.state)
        self._actions = network_actions(dataset.action, config.processing)
        self._auxiliary = _standardize(dataset)
        nothing = np.zeros((dataset.num_frames, len(self._images), 0, 2), dtype=np.float32)
        views = [dataset.cameras.index(name) for name in cameras]
        self._keypoints = nothing if dataset.keypoints is None else dataset.keypoints[:, views]
        episodes = np.asarray(dataset.episode_index)
        self._episode = episodes
        self._episode_end = np.asarray([end for _, end in dataset.episode_ranges])
        numbers = range(dataset.num_episodes)
        apart = np.isin(numbers, dataset.held_out)
        if not dataset.held_out:
            apart = np.array([held_out(number.to_bytes(4, "little")) for number in numbers])
        self._frames = np.flatnonzero(apart[episodes] == (split == "validation"))
        if balance_tasks and len(self._frames):  # a short dataset has none apart
            self._frames = _balanced(self._frames, _task_of_frames(dataset))
        sequences = [prompt.ids(text) for text in dataset.task_strings]
        if any(prompt.pad_id in ids for ids in sequences):
            raise BitvlaError(
                f"the prompt holds its own pad_token, {config.processing.prompt.pad_token}, which the network is made "
                "blind to; give policy.prompt another pad_token"
            )
        self._token_ids = _left_padded(sequences, prompt.pad_id)
        needed = self._token_ids.shape[1] + (config.action.dim if config.action.bins else 0)
        if needed > config.language.max_positions:
            raise BitvlaError(
                f"the sequences of {dataset.name} have up to {needed} tokens, language.max_positions is "
                f"{config.language.max_positions}; give a new policy that many, or shorten the longest instruction"
            )
        self._pad_id = prompt.pad_id
        self._group_bytes = _group_bytes(dataset, cameras)
        self._trains = split == "train"
        self._epochs: dict[int, Epoch] = {}
        self._ahead: tuple[int, int] | None = None
        self._loader: Thread | None = None

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Frames of the batch of pass `step`, of all processes: every frame once an epoch, in random order."""
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        chosen = np.empty(self._batch_size, dtype=np.int64)
        for epoch in np.unique(positions // len(self._frames)):
            now = positions // len(self._frames) == epoch
            chosen[now] = self._epoch(int(epoch)).frames[positions[now] % len(self._frames)]
        return chosen

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            rng = np.random.default_rng([self._seed, number])
            frames = self._frames[rng.permutation(len(self._frames))]
            episodes = np.unique(self._episode[frames])
            group = np.zeros(len(self._episode_end), dtype=np.int64)
            if self._group_bytes is not None:
                episodes = rng.permutation(episodes)
                sizes = self._pictures.bytes_of(self._cameras)[episodes]
                group[episodes] = (np.cumsum(sizes) - 1) // self._group_bytes
            frames = frames[np.argsort(group[self._episode[frames]], kind="stable")]
            ends = np.cumsum(np.bincount(group[self._episode[frames]]))
            members = [episodes[group[episodes] == i] for i in range(len(ends))]
            recent = dict(list(self._epochs.items())[-1:])  # a batch may end one epoch and begin the next
            self._epochs = {**recent, number: Epoch(frames, ends, members)}
        return self._epochs[number]

    def prepare(self, step: int) -> None:
        """Decode what the batch of `step` and those after it need, and show how far it is."""
        self.load(step * self._batch_size)

    def load(self, position: int) -> None:
        """Decode the group of the frame at `position` in the order of all epochs."""
        if not self.num_frames:
            return
        number, place = divmod(position, self.num_frames)
        epoch = self._epoch(number)
        # Without groups those held out are wanted soon, too.
        wanted = range(len(self._episode_end)) if self._group_bytes is None else epoch.episodes[epoch.group(place)]
        self._pictures.load(self._cameras, wanted, f"decoding {self.name}")

    def load_ahead(self, position: int) -> None:
        """Begin to decode the group after that one; whoever prepares batches on this machine takes a share."""
        if self._group_bytes is None or not self._trains:
            return
        number, place = divmod(position, self.num_frames)
        group = self._epoch(number).group(place) + 1
        number, group = (number, group) if group < len(self._epoch(number).ends) else (number + 1, 0)
        if self._ahead == (number, group):
            return
        self._ahead = (number, group)
        if self._loader is not None:
            self._loader.join()
        worker = get_worker_info()
        own, all_ = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = slice(self._rank * all_ + own, None, self._world_size * all_)
        self._loader = Thread(target=self._try_to_load, args=(self._epoch(number).episodes[group][share],), daemon=True)
        self._loader.start()

    def _try_to_load(self, episodes: Ids) -> None:
        with contextlib.suppress(BitvlaError):  # a batch that needs it will meet it again
            self._pictures.load(self._cameras, episodes)

    def __getitem__(self, step: int) -> Window:
        self.load_ahead(step * self._batch_size)
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

    def origin(self, position: int, place: float) -> str:
        """Where the window at `place` in [0, 1) of the group at `position` comes from."""
        return f"episode {self._episode[self._at(position, place)[0]]} of {self.name}"

    def _at(self, position: int, place: float) -> Ids:
        if self._group_bytes is None:
            return self._frames[[int(place * self.num_frames)]]
        number, position = divmod(position, self.num_frames)
        epoch = self._epoch(number)
        begin, end = np.concatenate([[0], epoch.ends])[epoch.group(position) :][:2]
        return epoch.frames[[begin + int(place * (end - begin))]]

    def example(
        self, position: int, place: float, changes: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], Ids, Ids]:
        """Pixels (V, 3, size, size), prompt and action tokens of that window's frame."""
        frame = self._at(position, place)
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
            images = jitter(images, self._augmentation, changes[..., 2:])
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
        self._shares = chances / chances.sum()
        self._borders = np.cumsum(self._shares)[:-1]
        self._first_id = config.language.vocab_size - config.action.bins
        self._seed, self._batch_size, self._rank, self._world_size = seed, batch_size, rank, world_size
        self._pad_id = parts[0]._pad_id
        self._views = max(len(part._images) for part in parts)
        self._dim = max(part._config.action.dim for part in parts)
        self._length = max(part._token_ids.shape[1] + part._config.action.dim - 1 for part in parts)

    @property
    def num_frames(self) -> int:
        return sum(part.num_frames for part in self._parts)

    def prepare(self, step: int) -> None:
        """Decode what the batch of `step` and those after it need, and show how far it is."""
        for part, position in self._positions(step * self._batch_size):
            part.load(position)

    def _positions(self, windows: int) -> list[tuple[Windows, int]]:
        """How many of so many first `windows` are of each dataset, on average: which of its groups is in use."""
        seen = windows * self._shares
        return [(part, int(count)) for part, count in zip(self._parts, seen, strict=True)]

    def __getitem__(self, step: int) -> TokenWindow:
        for part, position in self._positions(step * self._batch_size):
            part.load_ahead(position)
        examples = [part.example(position, place, changes) for part, position, place, changes in self._chosen(step)]
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
        windows = self._chosen(step)
        return "; ".join(dict.fromkeys(part.origin(position, place) for part, position, place, _ in windows))

    def _chosen(self, step: int) -> Iterator[tuple[Windows, int, float, NDArray[np.float64]]]:
        """This process's windows: a dataset, which group of it and where in that, and how it is augmented."""
        share = slice(self._rank, None, self._world_size)
        before = range(step * self._batch_size, (step + 1) * self._batch_size)[share]
        chances = draws(self._seed, 2, step, (self._batch_size, 2 + 5 * self._views))[share]
        for windows, (which, place, *changes) in zip(before, chances, strict=True):
            part, position = self._positions(windows)[int(np.searchsorted(self._borders, which, side="right"))]
            yield part, position, place, np.reshape(changes, (self._views, 5))


def draws(seed: int, stream: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Random numbers in [0, 1) of the batch of pass `step`; `shape` begins with the size of the batch.

    A window's are given by its place in the run alone: the same on any number of processes, and whether a step is one
    large batch or several small ones.
    """
    bits = np.random.PCG64([seed, stream])
    return np.random.Generator(bits.advance(step * math.prod(shape))).random(shape)


def batches(windows: Dataset[Any], steps: range, workers: int = 1) -> Generator[Window | TokenWindow]:
    """The batches of `steps`, in order, prepared ahead of time by other processes, which end with this iterator."""
    loader = DataLoader(
        _Told(windows),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=3,
        multiprocessing_context="fork",
        worker_init_fn=_begin,
    )
    # What is garbage here is not theirs to end: it may own threads (gRPC's servers do), for which they, who have none
    # of them, would wait for ever.
    gc.freeze()
    try:
        prepared: Any = iter(loader)
    finally:
        gc.unfreeze()
    try:
        for batch in prepared:
            if isinstance(batch, BitvlaError):
                raise batch
            yield batch
    finally:
        prepared._shutdown_workers()  # asks them to end, and waits for a while
        for process in prepared._workers:
            process.kill()


def _begin(worker: int) -> None:
    """What a process that prepares batches must not have of the main one.

    What stops a run is often sent to all of its processes (Ctrl-C, torchrun, a scheduler): the main one answers it, and
    still needs batches to end its step. It ends the others, or they end when it is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # A warning would go to the display of the progress, whose lock a thread may have held when this process was forked.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


@contextlib.contextmanager
def workers_alive() -> Iterator[None]:
    """A BitvlaError where a process that prepares batches was ended: PyTorch says so whatever the main one is doing."""
    try:
        try:
            yield
        except (ConnectionError, EOFError):  # it was sending a batch; PyTorch's own error is about to come
            time.sleep(1)
            raise
    except RuntimeError as error:
        if not of_workers(error):
            raise
        raise BitvlaError(
            f"a process that prepares batches was ended from outside ({' '.join(str(error).split())}), as where memory "
            "or shared memory (/dev/shm) runs out; give more of it or fewer workers, and run the same command again"
        ) from None


def of_workers(error: Exception) -> bool:
    """Does PyTorch say with this `error` that a process that prepares batches was ended?"""
    return str(error).startswith("DataLoader worker (pid")


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


class _Told(Dataset[Any]):
    """What is wrong with the data as an item: raised in another process, it would come with a traceback in its text."""

    def __init__(self, windows: Dataset[Any]) -> None:
        self._windows = windows

    def __getitem__(self, step: int) -> Any:
        try:
            return self._windows[step]
        except BitvlaError as error:
            return error


def _group_bytes(dataset: LeRobotDataset, cameras: Sequence[str]) -> int | None:
    """Decoded pictures of a group, or None where all fit: room for the last, this, the next, and one to validate."""
    sizes, limit = dataset.pictures.bytes_of(cameras), dataset.pictures.limit
    if limit is None or sizes.sum() <= limit:
        return None
    if limit < 8 * sizes.max():
        raise BitvlaError(
            f"--cache-size is too small for {dataset.name}: its share is {limit / 1e6:.2f} MB, of which its longest "
            f"episode takes {sizes.max() / 1e6:.2f} MB; make the share at least {math.ceil(8 * sizes.max() / 1e6)} MB"
        )
    return int(limit // 4 - sizes.max())


def held_out(name: bytes) -> bool:
    """By a hash of its name, so that no regular order of the tasks lines up with it."""
    return zlib.crc32(name) % VALIDATION_EVERY == 0


def jitter(images: NDArray[np.uint8], augmentation: Augmentation, changes: NDArray[np.float64]) -> NDArray[np.uint8]:
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
