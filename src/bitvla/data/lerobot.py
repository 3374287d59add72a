"""LeRobotDataset v3.0 on disk: written in whole batches of episodes, read as arrays.

    meta/info.json                       what is in it; renamed into place last, so it is the commit point of a batch
    meta/tasks.parquet  meta/stats.json
    meta/episodes/chunk-000/file-000.parquet     a row an episode
    data/chunk-000/file-000.parquet              a row a frame
    videos/<camera key>/chunk-000/file-000.mp4   the same frames, in the same order

Every batch adds one file of each kind. Files that `info.json` does not count are leftovers of an interrupted batch.
Pictures may also be in the tables, as PNG or JPEG (`"dtype": "image"`). What is read may lie wherever fsspec reaches.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import av
import msgspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from upath import UPath

import bitvla
from bitvla.config import Record
from bitvla.data.pictures import Images, Pictures, user_cache
from bitvla.errors import BitvlaError, meant
from bitvla.files import put, write_whole
from bitvla.processing.images import read_image

Place = Path | UPath  # on this machine, or wherever fsspec reaches

VERSION = "v3.0"
IMAGE_PREFIX = "observation.images."
ONE_IMAGE = "observation.image"
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
CONSTANT = 1e-6  # q99 - q01 of a dimension that does not move
FAR_OFF = 0.10  # share of the values outside q01 to q99, which leave 2 % there by definition
_FILES_PER_CHUNK = 1000
_PLACE = ["data/chunk_index", "data/file_index"]  # of an episode's table
_DEFAULT_FEATURES = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


@dataclass(frozen=True)
class Episode:
    """One demonstration: images uint8 (T, H, W, 3) by camera, vectors float32 (T, n) by feature, and its sentence.

    `extra` holds further facts (numbers, strings) that become columns of the episode table.
    """

    images: Mapping[str, NDArray[np.uint8]]
    vectors: Mapping[str, NDArray[np.float32]]
    task: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.vectors["action"])


@contextlib.contextmanager
def alone(root: Path, work: str) -> Iterator[None]:
    """Have `root` for this `work` ("recording") alone; BitvlaError while another process has it, or if none can."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)  # the folder itself is locked: no file to be left behind
    except OSError as error:
        raise BitvlaError(f"cannot write to {root}: {error.strerror}; choose another folder") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BitvlaError(f"another {work} is writing {root} now; wait for it or choose another folder") from None
        except OSError as error:  # of some network drives
            raise BitvlaError(f"{root} cannot be locked ({error.strerror}); choose a folder on a local disk") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claim(root: Path, work: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Have `root` `alone` for this `work`; BitvlaError where it holds another, or something else."""
    with alone(root, work):
        path = root / "meta" / f"{work}.json"
        if not path.exists():
            # Empty folders and temporary files are of an earlier try, as on a full disk.
            if any(not file.is_dir() and file.suffix != ".tmp" for file in root.rglob("*")):
                raise BitvlaError(f"{root} is not empty and holds no {work} of bitvla; choose another folder")
            write_whole(path, json.dumps(settings).encode())
        elif json.loads(path.read_text()) != settings:
            raise BitvlaError(f"{root} holds a {work} with other settings ({path.read_text()}); choose another folder")
        yield


class LeRobotWriter:
    """Appends batches of episodes to a dataset. `vectors` gives the names of each vector feature's dimensions.

    `lossless` videos hold every pixel as it was, in more space.
    """

    def __init__(
        self,
        root: Path,
        *,
        robot_type: str,
        fps: float,
        cameras: Mapping[str, tuple[int, int]],
        vectors: Mapping[str, Sequence[str]],
        lossless: bool = False,
    ) -> None:
        self.root, self.fps, self._coding = Path(root), fps, _LOSSLESS if lossless else _SMALL
        images = {
            IMAGE_PREFIX + name: _video_feature(height, width, fps, self._coding)
            for name, (height, width) in cameras.items()
        }
        values = {
            key: {"dtype": "float32", "shape": [len(names)], "names": list(names)} for key, names in vectors.items()
        }
        self._info: dict[str, Any] = {
            "codebase_version": VERSION,
            "robot_type": robot_type,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 500,
            "fps": int(fps) if float(fps).is_integer() else fps,
            "splits": {"train": "0:0"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH,
            "features": {**values, **images, **_DEFAULT_FEATURES},
        }
        self._files = 0
        existing = self.root / "meta" / "info.json"
        if existing.exists():
            info = read_info(self.root)
            if info["features"] != self._info["features"] or info["fps"] != self._info["fps"]:
                raise BitvlaError(
                    f"{self.root} holds a dataset with other features or another rate; choose another folder"
                )
            self._info = info
            self._files = len(read_episodes(self.root, info)[_PLACE].drop_duplicates())

    @property
    def num_episodes(self) -> int:
        return int(self._info["total_episodes"])

    def append(self, episodes: Sequence[Episode]) -> None:
        """Add `episodes` as one batch: all of them or, when anything fails, none."""
        features = {key: feature for key, feature in self._info["features"].items() if key not in _DEFAULT_FEATURES}
        for index, episode in enumerate(episodes, start=self.num_episodes):
            if not episode.length:
                raise BitvlaError(f"episode {index} for the dataset {self.root} has no frame; leave it out")
            for camera, frames in episode.images.items():
                if frames.dtype != np.uint8:
                    raise BitvlaError(f"the pictures of '{camera}' in episode {index} are {frames.dtype}, not uint8")
            images = {IMAGE_PREFIX + camera: frames.shape for camera, frames in episode.images.items()}
            found = {key: values.shape for key, values in episode.vectors.items()} | images
            length = max(shape[0] for shape in found.values())
            wanted = {key: (length, *feature["shape"]) for key, feature in features.items()}
            for key in sorted(found.keys() | wanted.keys()):
                if found.get(key) != wanted.get(key):  # the encoder would stretch pictures of another size
                    raise BitvlaError(
                        f"'{key}' of episode {index} has the shape {found.get(key)}; the dataset {self.root} needs "
                        f"{wanted.get(key)}"
                    )
        place = {"chunk_index": self._files // _FILES_PER_CHUNK, "file_index": self._files % _FILES_PER_CHUNK}
        tasks = self._tasks(episodes)
        rows = self._episode_rows(episodes, place)
        for key, feature in self._info["features"].items():
            if feature["dtype"] == "video":
                path = self.root / _VIDEO_PATH.format(video_key=key, **place)
                camera = key.removeprefix(IMAGE_PREFIX)
                _write_video(path, (frame for e in episodes for frame in e.images[camera]), self.fps, self._coding)
        _write_table(self.root / _DATA_PATH.format(**place), self._frame_table(episodes, tasks))
        _write_table(self.root / _EPISODES_PATH.format(**place), pd.DataFrame(rows))
        _write_table(
            self.root / "meta" / "tasks.parquet",
            pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(list(tasks), name="task")),
            index=True,
        )
        info = dict(self._info)
        info["total_episodes"] += len(episodes)
        info["total_frames"] += sum(episode.length for episode in episodes)
        info["total_tasks"] = len(tasks)
        info["splits"] = {"train": f"0:{info['total_episodes']}"}
        _write_json(self.root / "meta" / "stats.json", _dataset_stats(self.root, info))
        _write_json(self.root / "meta" / "info.json", info)
        self._info, self._files = info, self._files + 1

    def _tasks(self, episodes: Sequence[Episode]) -> dict[str, int]:
        known: list[str] = []
        if self.num_episodes:
            known = list(pd.read_parquet(self.root / "meta" / "tasks.parquet").index[: self._info["total_tasks"]])
        return {task: i for i, task in enumerate(dict.fromkeys([*known, *(episode.task for episode in episodes)]))}

    def _frame_table(self, episodes: Sequence[Episode], tasks: Mapping[str, int]) -> pd.DataFrame:
        lengths = [episode.length for episode in episodes]
        frame_index = np.concatenate([np.arange(length) for length in lengths])
        columns: dict[str, Any] = {
            key: list(np.concatenate([episode.vectors[key] for episode in episodes]).astype(np.float32))
            for key in episodes[0].vectors
        }
        columns["timestamp"] = (frame_index / self.fps).astype(np.float32)
        columns["frame_index"] = frame_index
        columns["episode_index"] = np.repeat(self.num_episodes + np.arange(len(episodes)), lengths)
        columns["index"] = self._info["total_frames"] + np.arange(len(frame_index))
        columns["task_index"] = np.repeat([tasks[episode.task] for episode in episodes], lengths)
        return pd.DataFrame(columns)

    def _episode_rows(self, episodes: Sequence[Episode], place: Mapping[str, int]) -> list[dict[str, Any]]:
        rows, begin, file_frame = [], int(self._info["total_frames"]), 0
        for i, episode in enumerate(episodes):
            row: dict[str, Any] = {
                "episode_index": self.num_episodes + i,
                "tasks": [episode.task],
                "length": episode.length,
                "dataset_from_index": begin,
                "dataset_to_index": begin + episode.length,
                "data/chunk_index": place["chunk_index"],
                "data/file_index": place["file_index"],
                "meta/episodes/chunk_index": place["chunk_index"],
                "meta/episodes/file_index": place["file_index"],
            }
            for camera, images in episode.images.items():
                key = IMAGE_PREFIX + camera
                row[f"videos/{key}/chunk_index"] = place["chunk_index"]
                row[f"videos/{key}/file_index"] = place["file_index"]
                row[f"videos/{key}/from_timestamp"] = file_frame / self.fps
                row[f"videos/{key}/to_timestamp"] = (file_frame + episode.length) / self.fps
                row |= _flat_stats(key, _image_stats(images))
            for key, values in episode.vectors.items():
                row |= _flat_stats(key, _vector_stats(values))
            rows.append(row | dict(episode.extra))
            begin, file_frame = begin + episode.length, file_frame + episode.length
        return rows


class Conventions(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a dataset is stored otherwise than its robot has it; nothing of it can be read from the data.

    `cameras`: the names of the robot's cameras, and of the same ones in the data; the others are not seen. `rotate180`:
    the pictures were turned after they were taken. `control_hz`: the rate of the actions, where `fps` is not it.
    `held_out`: numbers of the episodes that are never trained on, as `bitvla data check --split` proposes them; none:
    about one in 25, chosen by chance.
    """

    cameras: dict[str, str] = msgspec.field(default_factory=dict)
    rotate180: bool = False
    control_hz: float | None = None
    held_out: tuple[int, ...] = ()


AS_STORED = Conventions()


class LeRobotDataset:
    """A LeRobotDataset v3.0 as arrays; checked when it is opened.

    `source` is a folder, an address of any file system that fsspec knows, or an id on the Hugging Face Hub.
    Decoded pictures take up to `cache_bytes` of disk, or as much as they need.

    Attributes (N frames): state (N, S), action (N, A) and environment_state (N, E) or None, float32; keypoints
    (N, cameras, things, 2) or None, float32, shares of the image's width and height; episode_index, frame_index (N,)
    int64; episode_ranges, task_strings by episode; held_out, episode numbers; stats by feature.

    Raises BitvlaError, naming the file or the episode, for anything that would silently spoil a training.
    """

    def __init__(
        self, source: str | os.PathLike[str], conventions: Conventions = AS_STORED, cache_bytes: int | None = None
    ) -> None:
        self.name, self.root, self._source = name_of(source), locate(source), os.fspath(source)
        self.info = read_info(self.root)
        self.features: dict[str, Any] = self.info["features"]
        self.fps = float(self.info["fps"] if conventions.control_hz is None else conventions.control_hz)
        if not 0 < self.fps < math.inf:
            raise BitvlaError(f"data.{self.name}.control_hz must be positive, it is {self.fps:g}")
        stored = cameras_of(self.features)
        if not stored:
            raise BitvlaError(
                f"the dataset {self.root} has no camera: no video or image called {IMAGE_PREFIX}NAME or {ONE_IMAGE}"
            )
        # The name of each camera here, and in the data.
        self._cameras = conventions.cameras or {camera: camera for camera in stored}
        for camera in self._cameras.values():
            if camera not in stored:
                raise BitvlaError(f"data.{self.name}.cameras names '{camera}', the dataset {self.root} has "
                                  f"{', '.join(stored) or 'no camera'}{meant(camera, stored)}")  # fmt: skip
        self.cameras = list(self._cameras)
        self.num_episodes, self.num_frames = int(self.info["total_episodes"]), int(self.info["total_frames"])
        if self.num_episodes == 0:
            raise BitvlaError(f"the dataset {self.root} holds no episode")
        self.held_out = conventions.held_out
        if not set(self.held_out) < set(range(self.num_episodes)):
            raise BitvlaError(
                f"data.{self.name}.held_out must be some, not all, of the episodes 0 to {self.num_episodes - 1}"
            )
        self.episodes = read_episodes(self.root, self.info)
        self._frames = self._frame_table()
        self.state = self.vectors("observation.state")
        self.action = self.vectors("action")
        key = "observation.environment_state"
        self.environment_state = self.vectors(key) if key in self.features else None
        self.keypoints = self._keypoints("observation.keypoints", list(stored), conventions.rotate180)
        self.episode_index = self._frames["episode_index"].to_numpy()
        self.frame_index = self._frames["frame_index"].to_numpy()
        self.episode_ranges = list(
            zip(self.episodes["dataset_from_index"], self.episodes["dataset_to_index"], strict=True)
        )
        self._check_episodes()
        self.task_strings = self._sentences()
        self._turned = conventions.rotate180
        self.pictures = Pictures(
            self._decode,
            folder=self._cache_folder(),
            shapes={camera: self.shape(camera) for camera in self.cameras},
            lengths=[end - begin for begin, end in self.episode_ranges],
            limit=cache_bytes,
        )
        self._drop_outdated()

    @cached_property
    def stats(self) -> dict[str, dict[str, list[float]]]:
        """min, max, mean, std, quantiles and count of each feature, as stored.

        BitvlaError where those of state and action are missing, constant, or of other data: such as the averages of
        its episodes' quantiles, which lerobot (0.4.4) writes.
        """
        path = self.root / "meta" / "stats.json"
        try:
            stats: dict[str, dict[str, list[float]]] = json.loads(self.stored_statistics())
        except ValueError as error:
            raise BitvlaError(f"{path} cannot be read ({error}); run: bitvla data statistics {self._source}") from None
        for key in ("observation.state", "action"):
            names = names_of(self.features[key])
            try:
                low, high = (np.asarray(stats[key][bound], float).reshape(len(names)) for bound in ("q01", "q99"))
            except (KeyError, TypeError, ValueError):
                raise BitvlaError(
                    f"{path} lacks the quantiles q01 and q99 of '{key}'; run: bitvla data statistics {self._source}"
                ) from None
            values = self.action if key == "action" else self.state
            shares = outside(values, low, high).mean(axis=0)
            for name, a, b, share in zip(names, low, high, shares, strict=True):
                if share > FAR_OFF + 2 / len(values):
                    raise BitvlaError(
                        f"{share:.0%} of the values of '{name}' of '{key}' in {self.root} are outside its q01 and q99 "
                        f"({a:g} and {b:g}); run: bitvla data statistics {self._source}"
                    )
                if not (np.isfinite(a) and np.isfinite(b) and b - a > CONSTANT):
                    raise BitvlaError(
                        f"'{name}' of '{key}' is constant or not finite (q01 {a}, q99 {b}) in {self.root}; leave it "
                        "out of the data, or record some in which it moves"
                    )
        return stats

    def stored_statistics(self) -> bytes:
        """The file of the statistics; BitvlaError where there is none."""
        path = self.root / "meta" / "stats.json"
        try:
            return path.read_bytes()
        except Exception as error:  # whatever a service says
            reason = _reason(error)
            raise BitvlaError(f"{path} cannot be read ({reason}); run: bitvla data statistics {self._source}") from None

    def _sentences(self) -> list[str]:
        """What is said in each episode."""
        path = self.root / "meta" / "tasks.parquet"
        tasks = read_table(path, needed=["task_index"])
        said = tasks.get("task", tasks.index)  # LeRobot has it as the index
        names = dict(zip(tasks["task_index"], said, strict=True))
        numbers = self._frames["task_index"].to_numpy()
        for episode, (begin, end) in enumerate(self.episode_ranges):
            number, *others = np.unique(numbers[begin:end])
            if others:
                change = int(np.argmax(numbers[begin:end] != numbers[begin]))
                raise BitvlaError(
                    f"episode {episode} of {self.root} has {1 + len(others)} tasks (frame {change} begins the second), "
                    "and is trained with one sentence; make each part an episode, or give all its frames one task_index"
                )
            if not isinstance(names.get(number), str):
                raise BitvlaError(f"{path} has no sentence for the task {number} of episode {episode}; copy it again")
        return [names[numbers[begin]] for begin, _ in self.episode_ranges]

    def shape(self, camera: str) -> tuple[int, int, int]:
        """Height, width and 3 of the pictures of `camera`; BitvlaError where there is no such camera."""
        if camera not in self._cameras:
            raise BitvlaError(f"the dataset has no camera '{camera}', it has {', '.join(self.cameras)}")
        return shape_of(self.features[cameras_of(self.features)[self._cameras[camera]]])

    def images(self, camera: str) -> Sequence[NDArray[np.uint8]]:
        """All frames of `camera`, each uint8 (H, W, 3); an episode is decoded when one of its frames is needed."""
        self.shape(camera)
        return Images(self.pictures, camera)

    def _decode(self, camera: str, episode: int) -> Iterator[NDArray[np.uint8]]:
        # A new one of a far root: connections do not survive the fork of a loader's worker.
        root = self.root if isinstance(self.root, Path) else UPath(self._source)
        frames = read_pictures(root, self.info, self.episodes.iloc[episode], self._cameras[camera])
        return (frame[::-1, ::-1] for frame in frames) if self._turned else frames

    def _cache_folder(self) -> Path:
        """In the dataset; of one that is far away or cannot be written to, among this user's caches. Other data have
        another name."""
        stats = self.root / "meta" / "stats.json"
        here = self.root / ".cache" if isinstance(self.root, Path) and os.access(self.root, os.W_OK) else None
        parts = (
            "" if here else self._source,
            json.dumps(self.info, sort_keys=True),
            self.stored_statistics().decode(errors="replace") if stats.exists() else "",
            f"{self._cameras} {self._turned}",
        )
        return (here or user_cache()) / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def _drop_outdated(self) -> None:
        """Delete the decoded pictures of a file that was replaced since, as by turned ones, and those of a dataset that
        has grown: folders of another name that are older than what names them."""
        if not isinstance(self.root, Path):
            return
        described = (self.root / "meta" / name for name in ("info.json", "stats.json"))
        written = max(path.stat().st_mtime for path in described if path.exists())
        for folder in (self.root / ".cache").glob("[0-9a-f]" * 16):
            with contextlib.suppress(FileNotFoundError):  # another process did
                if folder.name != self.pictures.folder.name and folder.stat().st_mtime < written:
                    shutil.rmtree(folder, ignore_errors=True)
        for camera, episode, when in self.pictures.kept():
            source = pictures_file(self.root, self.info, self.episodes.iloc[episode], self._cameras[camera])
            if source.exists() and source.stat().st_mtime > when:
                self.pictures.drop(camera, episode)

    def _frame_table(self) -> pd.DataFrame:
        places = self.episodes[_PLACE].drop_duplicates()
        pictures = {key for key, feature in self.features.items() if feature["dtype"] == "image"}
        needed = ("episode_index", "frame_index", "task_index")
        tables = [
            read_table(self.root / self.info["data_path"].format(chunk_index=chunk, file_index=file), pictures, needed)
            for chunk, file in places.itertuples(index=False)
        ]
        table = pd.concat(tables, ignore_index=True)
        if len(table) != self.num_frames:
            raise BitvlaError(f"{self.root} has {len(table)} frames in its tables, info.json says {self.num_frames}; "
                              "copy it again, or finish its recording")  # fmt: skip
        return table

    def vectors(self, key: str) -> NDArray[np.float32]:
        """A feature of every frame, float32 (N, n); BitvlaError where it is missing or not finite."""
        if key not in self.features:
            raise BitvlaError(f"the dataset {self.root} has no '{key}'")
        size, rows = self.features[key]["shape"][0], self._frames.get(key, [])
        if len(rows) == 0 or not all(np.size(row) == size for row in rows):  # LeRobot has one value as a plain number
            raise BitvlaError(f"the dataset {self.root} has no '{key}' of {size} values in every frame")
        values = np.stack(list(rows)).reshape(-1, size).astype(np.float32)
        if not np.isfinite(values).all():
            frame = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            episode = int(self._frames["episode_index"].iloc[frame])
            raise BitvlaError(f"'{key}' of episode {episode} in {self.root} is not finite (frame {frame})")
        return values

    def _keypoints(self, key: str, stored: list[str], turned: bool) -> NDArray[np.float32] | None:
        if key not in self.features:
            return None
        values = self.vectors(key)
        if values.shape[1] % (2 * len(stored)):
            raise BitvlaError(
                f"'{key}' of {self.root} has {values.shape[1]} values; it must hold u and v of the same things in each "
                f"of the {len(stored)} cameras"
            )
        seen = [stored.index(camera) for camera in self._cameras.values()]
        points = values.reshape(len(values), len(stored), -1, 2)[:, seen]
        return 1 - points if turned else points

    def _check_episodes(self) -> None:
        expected = 0
        for i, (begin, end) in enumerate(self.episode_ranges):
            inside = self.episode_index[begin:end]
            if begin != expected or end <= begin or len(inside) != end - begin or np.any(inside != i):
                raise BitvlaError(f"episode {i} of {self.root} is broken: frames {begin} to {end} do not belong to it; "
                                  "copy it again")  # fmt: skip
            if np.any(self.frame_index[begin:end] != np.arange(end - begin)):  # pictures are found by their place
                raise BitvlaError(f"episode {i} of {self.root} is broken: its frames are not numbered from 0 on")
            expected = end
        if expected != self.num_frames:
            raise BitvlaError(
                f"{self.root} is broken: its episodes have {expected} frames, its tables {self.num_frames}"
            )
        keys = cameras_of(self.features)
        for camera in self._cameras.values():
            self._check_film(f"videos/{keys[camera]}")

    def _check_film(self, film: str) -> None:
        """No episode may reach into the next one of its video, as where the encoder lost frames."""
        begin = f"{film}/from_timestamp"
        if begin not in self.episodes:  # pictures in the tables
            return
        table = self.episodes.sort_values(begin)
        room = table.groupby([f"{film}/chunk_index", f"{film}/file_index"])[begin].shift(-1) - table[begin]
        for episode in table["episode_index"][room < (table["length"] - 0.5) / self.info["fps"]]:
            raise BitvlaError(
                f"{film} of {self.root} has fewer frames of episode {episode} than its table: the next one begins "
                "before its end; record it again, or drop it"
            )


class _Coding(NamedTuple):
    """How frames become a video: the encoder of H.264, its format and options, and the format that readers see."""

    encoder: str
    pix_fmt: str
    options: dict[str, str]
    seen_as: str


# Half the colour would lose a marker of four pixels. A key frame every two frames, so that training tools can seek;
# quality near the original.
_SMALL = _Coding("libx264", "yuv444p", {"crf": "17", "g": "2", "preset": "veryfast"}, "yuv444p")
_LOSSLESS = _Coding("libx264rgb", "rgb24", {"qp": "0", "g": "10", "preset": "ultrafast"}, "gbrp")


def _video_feature(height: int, width: int, fps: float, coding: _Coding) -> dict[str, Any]:
    info = {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": coding.seen_as,
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }
    names = ["height", "width", "channels"]
    return {"dtype": "video", "shape": [height, width, 3], "names": names, "info": info}


def _write_video(path: Path, frames: Iterator[NDArray[np.uint8]], fps: float, coding: _Coding) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.mp4")
    with av.open(str(temporary), "w") as container:
        stream: Any = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(coding.encoder, rate=Fraction(fps).limit_denominator(1000))
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt, stream.options = coding.pix_fmt, coding.options
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    put(temporary, path)


def read_pictures(
    root: Place, info: Mapping[str, Any], episode: pd.Series[Any], camera: str, pixels: str = "rgb24"
) -> Iterator[NDArray[np.uint8]]:
    """The frames of a camera in one episode (a row of the episode table), uint8 (H, W, 3), or (H, W) with "gray".

    Raises BitvlaError where the file cannot be decoded, or has fewer of them, of another size, or at another rate.
    """
    key = cameras_of(info["features"])[camera]
    height, width, _ = shape_of(info["features"][key])
    path, number = pictures_file(root, info, episode, camera), episode["episode_index"]
    length, count = int(episode["length"]), 0
    if info["features"][key]["dtype"] == "video":
        frames = _read_video(path, float(episode[f"videos/{key}/from_timestamp"]), length, float(info["fps"]), pixels)
    else:
        frames = _read_stored(path, key, int(number), pixels)
    for frame in frames:
        if frame.shape[:2] != (height, width):
            raise BitvlaError(
                f"{path} has a picture of {frame.shape[0]} x {frame.shape[1]} pixels in episode {number}, info.json "
                f"says {height} x {width} of '{key}': write the true size there, or record it again"
            )
        yield frame
        count += 1
    if count != length:
        raise BitvlaError(
            f"{path} has {count} of the {length} frames of episode {number}: it is truncated; copy or record it again"
        )


def pictures_file(root: Place, info: Mapping[str, Any], episode: pd.Series[Any], camera: str) -> Place:
    """The file that holds a camera's frames of an episode: a video, or the table of its frames."""
    key = cameras_of(info["features"])[camera]
    is_video = info["features"][key]["dtype"] == "video"
    kind, folder = ("video_path", f"videos/{key}") if is_video else ("data_path", "data")
    place = {name: int(episode[f"{folder}/{name}"]) for name in ("chunk_index", "file_index")}
    return root / info[kind].format(video_key=key, **place)


def _read_video(path: Place, begin: float, length: int, fps: float, pixels: str) -> Iterator[NDArray[np.uint8]]:
    """Up to `length` frames from `begin` seconds on."""
    first = last = begin
    count = 0
    try:
        with path.open("rb") as file, av.open(file, "r") as container:
            if not container.streams.video:
                raise BitvlaError(f"{path} holds no pictures; copy it again")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if begin > 0:
                # To a key frame before; some frames early, as frames are stored in another order than they are shown.
                container.seek(int(max(0.0, begin - 8 / fps) * av.time_base))
            for frame in container.decode(stream):
                if frame.time < begin - 0.5 / fps:
                    continue
                if not count and frame.time > begin + 0.5 / fps:
                    raise BitvlaError(f"{path} has no frame at {begin:g} s, where an episode begins; copy it again")
                first, last, count = first if count else frame.time, frame.time, count + 1
                yield frame.to_ndarray(format=pixels).astype(np.uint8, copy=False)
                if count == length:
                    break
    except BitvlaError:
        raise
    except Exception as error:  # FFmpeg's, and whatever a service says
        raise BitvlaError(f"{path} cannot be decoded: {_reason(error)}") from None
    if abs(last - first - (count - 1) / fps) > 0.5 / fps and count > 1:
        rate = (count - 1) / (last - first or math.inf)
        raise BitvlaError(
            f"{path} runs at {rate:.4g} frames a second, info.json says {fps:g}: mend fps there, or drop the episode "
            "where frames were lost"
        )


def _read_stored(path: Place, key: str, episode: int, pixels: str) -> Iterator[NDArray[np.uint8]]:
    """The encoded pictures in the column `key` of a table, read a row group at a time."""
    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file)
            for group in range(table.num_row_groups):
                own = np.asarray(table.read_row_group(group, columns=["episode_index"])["episode_index"]) == episode
                if not own.any():
                    continue
                stored = table.read_row_group(group, columns=[key])[key].to_pylist()
                for row in np.flatnonzero(own):
                    content = stored[row] and stored[row]["bytes"]
                    if content is None:
                        raise BitvlaError(f"'{key}' in {path} lacks a picture of episode {episode}; copy it again")
                    frame = read_image(content, f"a picture of episode {episode}, '{key}' in {path},")
                    yield np.asarray(Image.fromarray(frame).convert("L")) if pixels == "gray" else frame
    except BitvlaError:
        raise
    except Exception as error:  # Parquet's, and whatever a service says
        raise BitvlaError(f"'{key}' in {path} cannot be decoded: {_reason(error)}") from None


def _write_table(path: Path, table: pd.DataFrame, index: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    table.to_parquet(temporary, index=index)
    put(temporary, path)


def read_table(path: Place, without: Collection[str] = (), needed: Iterable[str] = ()) -> pd.DataFrame:
    """A Parquet file but for the columns `without`; BitvlaError where one that is `needed` is missing."""
    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file)
            names = [name for name in table.schema_arrow.names if name not in without]
            rows = table.read(columns=names).to_pandas()
    except Exception as error:  # Parquet's, and whatever a service says
        raise BitvlaError(f"{path} cannot be read: {_reason(error)}") from None
    for column in needed:
        if column not in rows:
            raise BitvlaError(f"{path} lacks the column '{column}': it is no table of a LeRobotDataset; copy it again")
    return rows


def _reason(error: Exception) -> str:
    """Why something cannot be read, in one line, without the path that the caller names."""
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2))
    put(temporary, path)


def name_of(source: str | os.PathLike[str]) -> str:
    """What a dataset is called: the last part of its path, address or id."""
    text = os.fspath(source)
    return text.rstrip("/").rpartition("/")[2] if "://" in text else os.path.basename(os.path.abspath(text))


def locate(source: str | os.PathLike[str]) -> Place:
    """The folder of a dataset: on this machine, on a file system that fsspec knows, or fetched from the Hub by its id.

    What is far away behaves like a path of this machine, to read from.
    """
    text = os.fspath(source)
    if "://" in text:
        try:
            root = UPath(text)
            root.exists()
        except Exception as error:  # a package that is missing, an unknown protocol, and whatever a service says
            raise BitvlaError(f"{text} cannot be reached: {' '.join(str(error).split())}") from None
        return Path(root.path) if root.protocol in ("file", "local") else root
    path = Path(text)
    if path.exists() or not bitvla.HUB_ID.fullmatch(text):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BitvlaError(
            f"{text} is not a folder here; to fetch a dataset from the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(text, repo_type="dataset"))
    except Exception as error:  # the hub's errors have no common base that promises a readable text
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BitvlaError(f"{text} is neither a folder here nor a dataset on the Hugging Face Hub ({reason})") from None


def cameras_of(features: Mapping[str, Any]) -> dict[str, str]:
    """The keys of the cameras by name, in the order of the dataset; a single one may be called observation.image."""
    return {
        "image" if key == ONE_IMAGE else key.removeprefix(IMAGE_PREFIX): key
        for key, feature in features.items()
        if (key.startswith(IMAGE_PREFIX) or key == ONE_IMAGE) and feature["dtype"] in ("video", "image")
    }


def shape_of(feature: Mapping[str, Any]) -> tuple[int, int, int]:
    """Height, width and 3 of a camera, whose pictures are read as RGB; some write the channels first."""
    sizes = [int(size) for size in feature["shape"]]
    if len(sizes) != 3:
        raise BitvlaError(f"info.json gives a camera the shape {sizes}; it must be height, width and channels")
    height, width = sizes[1:] if sizes[0] in (1, 3) and sizes[2] not in (1, 3) else sizes[:2]
    return height, width, 3


def outside(values: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of `values` (N, n) are not within `low` to `high` (n,), but for what a bound loses as text."""
    slack = 1e-6 * (1 + np.abs(values))
    return np.asarray((values < low - slack) | (values > high + slack))


def names_of(feature: Mapping[str, Any]) -> list[str]:
    """The name of each dimension of a vector; its number where the stored ones are not one a dimension."""
    stored, size = feature.get("names") or [], int(feature["shape"][0])
    if isinstance(stored, dict):  # by group of motors
        stored = [name for names in stored.values() for name in (names if isinstance(names, list) else [names])]
    return [str(name) for name in stored] if len(stored) == size else [str(i) for i in range(size)]


class _Version(msgspec.Struct):
    codebase_version: str


class _Feature(msgspec.Struct):
    dtype: str
    shape: list[int]


class _Info(msgspec.Struct):
    """What is read of info.json."""

    features: dict[str, _Feature]
    fps: float
    total_episodes: int
    total_frames: int
    data_path: str
    video_path: str | None = None


def read_info(root: Place) -> dict[str, Any]:
    """What is in the dataset; BitvlaError where there is none, or one of another version."""
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        version = msgspec.convert(info, _Version).codebase_version
        if version == VERSION:
            stored = msgspec.convert(info, _Info)
            if stored.video_path is None and any(f.dtype == "video" for f in stored.features.values()):
                raise ValueError("no video_path")
    except Exception as error:  # whatever a service says
        raise BitvlaError(
            f"{root} is not a LeRobotDataset: meta/info.json cannot be read ({_reason(error)}); give the folder that "
            "holds meta/, or an id on the Hugging Face Hub, owner/name"
        ) from None
    if version != VERSION:
        raise BitvlaError(
            f"{root} is a LeRobotDataset {version}, needed is {VERSION}; convert it with lerobot's "
            "convert_dataset_v21_to_v30"
        )
    if not info["fps"] > 0:
        raise BitvlaError(f"{root} has an fps of {info['fps']!r}: write the rate of the recording into meta/info.json")
    return dict(info)


def read_episodes(root: Place, info: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of the committed episodes, in order."""
    paths: list[Place] = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"), key=str)
    if not paths:
        raise BitvlaError(f"{root} has no episode table (meta/episodes); copy it again, or finish its recording")
    films = [f"videos/{key}" for key, feature in info["features"].items() if feature["dtype"] == "video"]
    places = [f"{kind}/{part}" for kind in ("data", *films) for part in ("chunk_index", "file_index")]
    begins = [f"{film}/from_timestamp" for film in films]
    needed = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index", *places, *begins)
    tables = [read_table(path, needed=needed) for path in paths]
    table = pd.concat(tables, ignore_index=True).sort_values("episode_index")
    table = table[table["episode_index"] < info["total_episodes"]].reset_index(drop=True)
    if len(table) != info["total_episodes"]:
        raise BitvlaError(f"{root} lists {len(table)} episodes, info.json says {info['total_episodes']}; copy it "
                          "again, or finish its recording")  # fmt: skip
    for column in needed:
        if (missing := table[column].isna()).any():
            number = table["episode_index"][missing].iloc[0]
            raise BitvlaError(f"{root} lists no '{column}' of episode {number} (meta/episodes); copy it again")
    return table


def _vector_stats(values: NDArray[Any]) -> dict[str, Any]:
    wide = values.astype(np.float64)
    return {
        "min": wide.min(0).tolist(),
        "max": wide.max(0).tolist(),
        "mean": wide.mean(0).tolist(),
        "std": wide.std(0).tolist(),
        # Those that the lerobot package has, which may normalise by any of them.
        **{f"q{percent:02}": np.quantile(wide, percent / 100, axis=0).tolist() for percent in (1, 10, 50, 90, 99)},
        "count": [len(wide)],
    }


def _image_stats(images: NDArray[np.uint8]) -> dict[str, Any]:
    """Per channel, in [0, 1], over a few frames; shape (3, 1, 1) as the lerobot package has it."""
    sample = images[:: max(1, len(images) // 8)].astype(np.float64) / 255
    kinds: dict[str, Callable[..., Any]] = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}
    stats = {name: [[[value]] for value in reduce(sample, axis=(0, 1, 2))] for name, reduce in kinds.items()}
    return {**stats, "count": [len(sample)]}


def _flat_stats(key: str, stats: Mapping[str, Any]) -> dict[str, Any]:
    return {f"stats/{key}/{name}": value for name, value in stats.items()}


def _dataset_stats(root: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Exact statistics of vectors over all frames; of images, the average over episodes."""
    episodes = read_episodes(root, info)
    places = episodes[_PLACE].drop_duplicates()
    tables = [
        read_table(root / _DATA_PATH.format(chunk_index=chunk, file_index=file))
        for chunk, file in places.itertuples(index=False)
    ]
    stats = _table_stats(pd.concat(tables, ignore_index=True), info["features"])
    for key, feature in info["features"].items():
        if feature["dtype"] == "video":
            columns = {name: episodes[f"stats/{key}/{name}"] for name in ("min", "max", "mean", "std", "count")}
            arrays = {name: np.stack([_nested(value) for value in column]) for name, column in columns.items()}
            stats[key] = {
                "min": arrays["min"].min(0).tolist(),
                "max": arrays["max"].max(0).tolist(),
                "mean": arrays["mean"].mean(0).tolist(),
                "std": arrays["std"].mean(0).tolist(),
                "count": [int(arrays["count"].sum())],
            }
    return stats


def _table_stats(frames: pd.DataFrame, features: Mapping[str, Any]) -> dict[str, Any]:
    stats = {}
    for key, feature in features.items():
        if key in frames and feature["dtype"].startswith(("float", "int")):
            try:
                values = np.stack([_nested(row) for row in frames[key]])
                stats[key] = _vector_stats(values if values.ndim > 1 else values[:, None])
            except (TypeError, ValueError):
                raise BitvlaError(f"'{key}' has not the same number of values in every frame; mend its table") from None
    return stats


def write_statistics(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Compute the statistics of all numbers in a dataset exactly, and write them into it; those of pictures stay.

    Raises BitvlaError where the dataset is broken, or cannot be written to.
    """
    dataset = LeRobotDataset(source)
    path = dataset.root / "meta" / "stats.json"
    stats, stored = _table_stats(dataset._frames, dataset.features), dict[str, Any]()
    try:
        with contextlib.suppress(FileNotFoundError, ValueError):  # what cannot be read is written anew
            stored = msgspec.convert(json.loads(path.read_text()), dict[str, Any])
        text = json.dumps(stored | stats, indent=2)
        if isinstance(path, Path):
            write_whole(path, text.encode())
        else:
            path.write_text(text)  # an object appears whole
    except OSError as error:
        raise BitvlaError(f"{path} cannot be written: {error}") from None
    return {"written": str(path), "frames": dataset.num_frames, "of": list(stats)}


def _nested(value: Any) -> NDArray[np.float64]:
    """Parquet gives nested lists back as arrays of arrays."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return np.stack([_nested(item) for item in value])
    return np.asarray(value, dtype=np.float64)
