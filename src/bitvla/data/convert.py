"""Demonstrations in other layouts, written as a LeRobotDataset v3: LIBERO's HDF5, and RLDS in TFRecords.

Neither says at what rate its actions were played, nor whether its pictures were turned after they were taken: the
caller does, and `meta/conversion.json` of the new dataset keeps it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitvla.config import Record, to_dict
from bitvla.data import hdf5, rlds
from bitvla.data.lerobot import Episode, LeRobotWriter, claim, read_episodes, read_info
from bitvla.errors import BitvlaError

NO_OP = 1e-4  # norm of an action without its gripper, below which it does nothing (OpenVLA-OFT)
_BATCH_BYTES = 1 << 29  # of pictures, held in memory before they are written


class Settings(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a conversion is; a folder holds one. `cameras`: the source's name of each camera of the result."""

    source: str
    cameras: dict[str, str]
    fps: float
    rotate180: bool
    drop_no_ops: bool


def convert(
    source: Path,
    out: Path,
    *,
    cameras: Mapping[str, str] | None = None,
    fps: float = 20.0,
    rotate180: bool = False,
    drop_no_ops: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, last: None,
) -> dict[str, Any]:
    """Convert every demonstration under `source` into the dataset `out`, or go on doing so; returns a summary.

    Args:
        source: an HDF5 file of LIBERO or a folder of them, or a folder in which TFDS wrote TFRecords (RLDS).
        cameras: the source's camera by the name that it gets; by default LIBERO's two, as "full" and "wrist".
        fps: actions a second, which no source says; LIBERO has 20.
        rotate180: turn the pictures by 180 degrees: those of a source that were turned get back as they were taken.
        drop_no_ops: leave out the steps that OpenVLA-OFT leaves out: those that do not move, unless the gripper is
            told something else than at the last step that was kept.

    Raises:
        BitvlaError: a source of neither kind, damaged, or without these cameras; a folder that holds something else.
    """
    out = Path(out)
    layout, files = _layout(Path(source))
    chosen = dict(cameras or layout.CAMERAS)
    settings = Settings(
        source=Path(source).resolve().name, cameras=chosen, fps=fps, rotate180=rotate180, drop_no_ops=drop_no_ops
    )
    demonstrations = list[tuple[str, Callable[[], Episode]]]()
    for path in files:
        found = layout.demonstrations(path, chosen)
        if not found:
            raise BitvlaError(f"{path} holds no demonstration; copy it again, or remove it")
        demonstrations += found
    with claim(out, "conversion", to_dict(settings)):
        kept = read_episodes(out, read_info(out))["source"] if (out / "meta" / "info.json").exists() else []
        done = len(kept)
        if list(kept) != [name for name, _ in demonstrations[:done]]:
            raise BitvlaError(
                f"{source} no longer begins with the {done} demonstrations that {out} was converted from; convert all "
                "of it into another folder"
            )
        frames, dropped, batch = 0, 0, list[Episode]()
        for number, (name, read) in enumerate(demonstrations[done:], start=done + 1):
            whole = read()
            episode = _as_wanted(whole, settings, name)
            frames, dropped = frames + episode.length, dropped + whole.length - episode.length
            batch.append(episode)
            if number == len(demonstrations) or sum(_picture_bytes(one) for one in batch) > _BATCH_BYTES:
                _writer(out, batch[0], fps, layout).append(batch)
                batch = []
            progress(number, len(demonstrations), name)
    return {"out": str(out), "fps": fps, "episodes": len(demonstrations), "frames_now": frames,
            "converted_now": len(demonstrations) - done, "no_ops_dropped_now": dropped}  # fmt: skip


def _layout(source: Path) -> tuple[Any, list[Path]]:
    """The module that reads what is under `source`, and its files."""
    if not source.exists():
        raise BitvlaError(f"{source} does not exist; name a file or folder of demonstrations")
    found = [(layout, files) for layout in (hdf5, rlds) if (files := _files(source, layout.PATTERN))]
    if len(found) != 1:
        raise BitvlaError(
            f"{source} holds {'both' if found else 'neither'} HDF5 files ({hdf5.PATTERN}) "
            f"{'and' if found else 'nor'} TFRecords ({rlds.PATTERN}); name a file or folder of one kind"
        )
    return found[0]


def _files(source: Path, pattern: str) -> list[Path]:
    if source.is_file() and source.match(pattern):
        return [source]
    # Not those of hidden folders: what was fetched from the Hub has notes of the same names in .cache.
    files = sorted(path for path in source.rglob(pattern) if "/." not in f"/{path.relative_to(source)}")
    shards = (re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", path.name) for path in files)
    for (name, total), count in Counter(shard.groups() for shard in shards if shard).items():
        if count % int(total):  # several folders may have them
            raise BitvlaError(
                f"{source} lacks some of the {int(total)} files {name}-*: fetch them all, or name one file"
            )
    return files


def _as_wanted(whole: Episode, settings: Settings, name: str) -> Episode:
    arrays: dict[str, NDArray[Any]] = {**whole.images, **whole.vectors}
    lengths = {key: len(values) for key, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise BitvlaError(f"{name} is half-written: it has {lengths} frames; remove it from the source")
    for key, values in whole.vectors.items():
        if not np.isfinite(values).all():
            raise BitvlaError(f"'{key}' of {name} is not finite; remove the demonstration from the source")
    if not whole.task.strip():
        raise BitvlaError(f"{name} has no instruction; write one, or remove the demonstration from the source")
    turn = slice(None, None, -1 if settings.rotate180 else None)
    kept = moving(whole.vectors["action"]) if settings.drop_no_ops else np.arange(whole.length)
    if not len(kept):
        raise BitvlaError(f"{name} has no step that does anything; remove it from the source")
    images = {camera: frames[kept][:, turn, turn] for camera, frames in whole.images.items()}
    vectors = {key: values[kept] for key, values in whole.vectors.items()}
    return Episode(images, vectors, whole.task, {"source": name})


def moving(actions: NDArray[np.float32]) -> NDArray[np.int64]:
    """Steps of (T, n) `actions` that do something; the last value is the gripper's (OpenVLA-OFT, is_noop)."""
    kept: list[int] = []
    for step, action in enumerate(actions):
        same_gripper = not kept or action[-1] == actions[kept[-1], -1]
        if not (same_gripper and np.linalg.norm(action[:-1]) < NO_OP):
            kept.append(step)
    return np.asarray(kept, dtype=np.int64)


def _picture_bytes(episode: Episode) -> int:
    return sum(frames.nbytes for frames in episode.images.values())


def _writer(out: Path, first: Episode, fps: float, layout: Any) -> LeRobotWriter:
    """One that refuses, as it is made anew for each batch, a batch of other sizes."""
    names: Mapping[str, Sequence[str]] = layout.NAMES
    return LeRobotWriter(
        out,
        robot_type=layout.ROBOT,
        fps=fps,
        cameras={camera: (frames.shape[1], frames.shape[2]) for camera, frames in first.images.items()},
        vectors={
            key: names.get(key, [str(i) for i in range(values.shape[1])]) for key, values in first.vectors.items()
        },
    )
