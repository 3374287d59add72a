"""A recorded run put to another policy: the same observations, and how far its chunks are from the recorded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bitvla
from bitvla.data.lerobot import LeRobotDataset
from bitvla.errors import BitvlaError
from bitvla.robot.recorder import CHUNK, DECISION, DECISION_KEY, PLANNED

Progress = Callable[[int, int, str], None]
LISTED = 5  # of the chunks that differ most


def replay(
    recording: Path,
    policy: str,
    *,
    episode: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask the policy file `policy` what a recorded one was asked, and compare the chunks over their common rows.

    Returns errors (replayed minus recorded, absolute, in the robot's units) by dimension, each with the place of its
    largest, and the chunks that differ most, measured in shares of the recorded span of each dimension. Rows that
    the recorded policy was given as decided do not count.

    Raises:
        BitvlaError: `recording` is none, has no chunk, or the policy is for another robot.
    """
    dataset, asked = LeRobotDataset(recording), bitvla.load(policy, threads)
    if CHUNK not in dataset.features:
        raise BitvlaError(f"{recording} is a dataset but no recording of `bitvla run --record`: it has no '{CHUNK}'")
    info = asked.info()
    for key, names in (("observation.state", info["state"]["names"]), ("action", info["action"]["names"])):
        if dataset.features[key]["names"] != names:
            recorded = ", ".join(dataset.features[key]["names"])
            raise BitvlaError(f"'{key}' was recorded as {recorded}; {policy} has {', '.join(names)}: another robot")
    run = _Recording(dataset)
    rows = min(run.chunks.shape[1], info["horizon"])
    frames = [frame for frame in run.asked if episode is None or dataset.episode_index[frame] == episode]
    if not frames:
        raise BitvlaError(f"episode {episode} of {recording} holds no chunk; it has {dataset.num_episodes} episodes")
    frames = [frame for frame in frames if len(run.prefix(frame)) < rows]  # others were decided in all common rows
    errors = np.full((len(frames), rows, len(info["action"]["names"])), np.nan)
    for index, frame in enumerate(frames):
        prefix = run.prefix(frame)
        taken = prefix if 0 < len(prefix) <= asked.max_prefix else None
        chunk = asked.act(run.observation(frame), prefix=taken)
        answers = slice(len(prefix), rows)
        errors[index, answers] = np.abs(chunk[answers].astype(np.float64) - run.chunks[frame, answers])
        if progress:
            progress(index + 1, len(frames), f"frame {frame}")
    return {
        "recording": str(recording),
        "policy": info["name"],
        "sha256": info["sha256"],
        "recorded policies": sorted(set(map(str, dataset.episodes["policy"]))),
        "chunks": len(frames),
        "rows": rows,
        "identical": bool(np.nanmax(errors) == 0),
        "dimensions": _by_dimension(errors, frames, dataset, info),
        "most different": _most_different(errors, frames, dataset, run.span),
    }


class _Recording:
    """What was asked and answered, by frame."""

    def __init__(self, dataset: LeRobotDataset) -> None:
        self._dataset = dataset
        self._images = {camera: dataset.images(camera) for camera in dataset.cameras}
        self._planned, decisions = dataset.vectors(PLANNED), dataset.vectors(DECISION_KEY)
        columns = {name: decisions[:, DECISION.index(name)] for name in ("held", "latency_ms", "frozen")}
        self._played, self._frozen = columns["held"] == 0, columns["frozen"].astype(int)
        self.chunks: NDArray[np.float32] = dataset.vectors(CHUNK).reshape(
            dataset.num_frames, -1, dataset.action.shape[1]
        )
        answered = np.flatnonzero(columns["latency_ms"] > 0).tolist()
        # Where the run ended before its decided actions were played, they are not known.
        self.asked = [frame for frame in answered if len(self.prefix(frame)) == self._frozen[frame]]
        if not self.asked:
            raise BitvlaError(f"the recording {dataset.root} holds no chunk to compare")
        low, high = (np.quantile(self.chunks[self.asked], q, axis=(0, 1)) for q in (0.01, 0.99))
        self.span = np.maximum(high - low, 1e-6)

    def observation(self, frame: int) -> dict[str, Any]:
        dataset = self._dataset
        return {
            "images": {camera: images[frame] for camera, images in self._images.items()},
            "state": dataset.state[frame],
            "instruction": dataset.task_strings[dataset.episode_index[frame]],
        }

    def prefix(self, frame: int) -> NDArray[np.float32]:
        """The actions (n, dim) that were decided when the policy was asked: those that were then played."""
        _, end = self._dataset.episode_ranges[self._dataset.episode_index[frame]]
        played = frame + np.flatnonzero(self._played[frame:end])
        return self._planned[played[: self._frozen[frame]]]


def _by_dimension(
    errors: NDArray[np.float64], frames: list[int], dataset: LeRobotDataset, info: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for index, (name, unit) in enumerate(zip(info["action"]["names"], info["action"]["units"], strict=True)):
        error = errors[..., index]
        chunk, row = np.unravel_index(np.nanargmax(error), error.shape)
        rows.append({
            "dimension": name,
            "unit": unit,
            "mean": float(np.nanmean(error)),
            "p95": float(np.nanquantile(error, 0.95)),
            "max": float(np.nanmax(error)),
            **_place(dataset, frames[chunk]),
            "row": int(row),
        })  # fmt: skip
    return rows


def _most_different(
    errors: NDArray[np.float64], frames: list[int], dataset: LeRobotDataset, span: NDArray[np.float64]
) -> list[dict[str, Any]]:
    shares = np.nanmean(errors / span, axis=(1, 2))
    worst = np.argsort(-shares, kind="stable")[:LISTED]
    return [{**_place(dataset, frames[index]), "mean share of the span": float(shares[index])} for index in worst]


def _place(dataset: LeRobotDataset, frame: int) -> dict[str, Any]:
    return {"episode": int(dataset.episode_index[frame]), "frame": int(dataset.frame_index[frame])}
