"""The data doctor: what is wrong with a dataset, before a training finds out.

Tables and videos are streamed, one file at a time; what is kept is a few numbers and one small image an episode and
a camera. Every threshold is a constant below, and every finding names what it was compared with.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.cluster.vq import kmeans2, vq
from scipy.stats import spearmanr

from bitvla.data.lerobot import IMAGE_PREFIX, read_episodes, read_info, read_table, read_video
from bitvla.errors import BitvlaError
from bitvla.files import write_whole

Grade = Literal["error", "warning", "note"]
Progress = Callable[[int, int, str], None]
Floats = NDArray[np.float64]

OUTSIDE_WARNING, OUTSIDE_ERROR = 0.04, 0.10  # of the values; q01 and q99 leave 2 % outside by definition
CONSTANT = 1e-6  # q99 - q01, as training refuses it
JITTER, GAP = 0.01, 1.5  # of the frame period: an uneven step, a step that lost frames
STILL = 1e-3  # of a dimension's range: a step of the state that is no motion
NO_OPS = 0.10  # share of the steps
STATIC_PIXELS = 4.0  # gray levels, the median over the edges of a picture: below, the camera stood still
FROZEN_PIXELS = 2.0  # gray levels in the block that changes most; a video codec stays below
FROZEN_MOTION, FROZEN_STEPS = 0.10, 3  # of the state's range, and frames, passed under one and the same image
CAMERA_SHIFT = 0.02  # of the image's width
SCORE, GRAY_LEVELS = 5.0, 8.0  # modified z-score of an outlier, and the least difference that counts
DRIFT = 0.5  # rank correlation of luminance with the episode's number
RECOVERIES = 0.10  # share of the episodes; recordings of this project hold 20 %
IMBALANCE = 5.0  # most over least episodes of a task
THIN_CLUSTER = 0.02  # share of the episodes
MIN_CLUSTERS, MAX_CLUSTERS, HELD_OUT = 5, 12, 0.10  # enough that one is about a tenth
THUMBNAIL, BLOCK, REFERENCES = 64, 8, 25


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong: what, how much of it, compared with what, and what to do."""

    grade: Grade
    check: str
    subject: str
    value: str
    threshold: str
    fix: str


class Dimension(msgspec.Struct, frozen=True, kw_only=True):
    """One dimension of a feature: what it spans, and the share of its values outside the stored quantiles."""

    feature: str
    name: str
    low: float
    high: float
    q01: float | None
    q99: float | None
    outside: float | None


class CameraRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a camera saw, a number an episode (NaN where the video ended early)."""

    name: str
    moves_with_robot: bool
    luminance: list[float]
    contrast: list[float]
    shift: list[float]
    """Of the first frame against the reference, as a share of the width."""
    frozen_frames: int


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """Episodes by where they begin: the cluster and the place of each on the two main axes."""

    clusters: list[int]
    sizes: list[int]
    axes: list[tuple[float, float]]
    held_out: int
    """The cluster that the split keeps for evaluation."""


class Checkup(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured; `passed` is False with any error."""

    dataset: str
    passed: bool
    episodes: int
    frames: int
    fps: float
    horizon: int
    findings: list[Finding]
    lengths: list[int]
    no_op_share: float
    recovery_share: float | None
    tasks: dict[str, int]
    sentences: int
    dimensions: list[Dimension]
    cameras: list[CameraRecord]
    coverage: Coverage | None


def check(root: Path, *, horizon: int = 8, progress: Progress = lambda done, total, last: None) -> Checkup:
    """Measure the LeRobotDataset v3 at `root`. `horizon` is the number of actions in a chunk. Writes nothing.

    Raises BitvlaError when the folder is no dataset at all; anything else is a finding.
    """
    dataset = _Dataset(Path(root))
    if not len(dataset.episodes):
        raise BitvlaError(f"the dataset {root} holds no episode")
    total = len(dataset.episodes) * (1 + len(dataset.cameras))
    findings: list[Finding] = []
    table = _read_tables(dataset, findings, partial(_forward, progress, 0, total, "tables"))
    cameras: list[CameraRecord] = []
    for camera in dataset.cameras:
        begin = (1 + len(cameras)) * len(dataset.episodes)
        report = partial(_forward, progress, begin, total, camera)
        cameras.append(_camera(dataset, camera, findings, report))
    dimensions = _dimensions(dataset, table, findings)
    _timing(dataset, table, horizon, findings)
    tasks = _balance(dataset, findings)
    recoveries = _recoveries(dataset, findings)
    coverage = _coverage(dataset, table, findings)
    return Checkup(
        dataset=dataset.root.resolve().name,
        passed=not any(finding.grade == "error" for finding in findings),
        episodes=len(dataset.episodes),
        frames=sum(table.lengths),
        fps=dataset.fps,
        horizon=horizon,
        findings=sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.grade)),
        lengths=table.lengths,
        no_op_share=table.no_ops / max(1, table.steps),
        recovery_share=recoveries,
        tasks=tasks,
        sentences=len(set(dataset.sentences)),
        dimensions=dimensions,
        cameras=cameras,
        coverage=coverage,
    )


def _forward(progress: Progress, begin: int, total: int, what: str, done: int) -> None:
    progress(begin + done, total, what)


def split(checkup: Checkup) -> dict[str, list[int]]:
    """The proposed split: episode numbers to train on, and the region of the workspace held out."""
    if checkup.coverage is None:
        raise BitvlaError(f"{checkup.dataset} has too few usable episodes to hold a region out; record at least ten")
    inside = [cluster == checkup.coverage.held_out for cluster in checkup.coverage.clusters]
    return {
        "train": [i for i, held in enumerate(inside) if not held],
        "held_out": [i for i, held in enumerate(inside) if held],
    }


def write_split(checkup: Checkup, path: Path) -> Path:
    """Write `split` as JSON; the file appears whole or not at all."""
    text = json.dumps(split(checkup), indent=1)
    write_whole(path, text.encode())
    return path


# -- reading, without the refusals of training ---------------------------------------------------


class _Dataset:
    """Where things are. Unlike `LeRobotDataset` it opens what is broken, and never holds more than two tables."""

    def __init__(self, root: Path) -> None:
        self.root, self.info = root, read_info(root)
        self.fps = float(self.info["fps"])
        self.features: dict[str, Any] = self.info["features"]
        self.episodes = read_episodes(root, self.info)
        self.cameras = [
            key.removeprefix(IMAGE_PREFIX)
            for key, feature in self.features.items()
            if key.startswith(IMAGE_PREFIX) and feature["dtype"] == "video"
        ]
        wanted = ("observation.state", "action", "observation.environment_state")
        self.vectors = [key for key in wanted if key in self.features]
        self.sentences = [" ".join(tasks) for tasks in self.episodes["tasks"]]
        try:
            self.stats: dict[str, Any] = json.loads((root / "meta" / "stats.json").read_text())
        except (OSError, ValueError):
            self.stats = {}
        self._table = lru_cache(maxsize=2)(self._read)

    def _read(self, chunk: int, file: int) -> dict[int, pd.DataFrame]:
        table = read_table(self.root / self.info["data_path"].format(chunk_index=chunk, file_index=file))
        return {int(episode): rows for episode, rows in table.groupby("episode_index", sort=False)}

    def rows(self, episode: int) -> pd.DataFrame | None:
        """The frames of an episode, or None when its table does not hold them."""
        row = self.episodes.iloc[episode]
        return self._table(int(row["data/chunk_index"]), int(row["data/file_index"])).get(episode)

    def names(self, key: str) -> list[str]:
        feature = self.features[key]
        return list(feature.get("names") or [str(i) for i in range(feature["shape"][0])])

    def vector(self, rows: pd.DataFrame, key: str) -> Floats | None:
        """(T, n), or None when a row is missing or has another size."""
        size = len(self.names(key))
        if key not in rows or any(np.shape(value) != (size,) for value in rows[key]):
            return None
        return np.stack(list(rows[key])).astype(np.float64)

    def scale(self, key: str) -> Floats:
        """The range of each dimension by the stored quantiles, 1 where these say nothing."""
        size, stats = len(self.names(key)), self.stats.get(key, {})
        low, high = stats.get("q01") or [], stats.get("q99") or []
        if len(low) != size or len(high) != size:
            return np.ones(size)
        width = np.asarray(high, np.float64) - np.asarray(low, np.float64)
        return np.where(np.isfinite(width) & (width > CONSTANT), width, 1.0)


@dataclass
class _Table:
    """What the tables say, gathered episode by episode."""

    lengths: list[int] = field(default_factory=list)
    starts: dict[str, list[Floats | None]] = field(default_factory=dict)
    low: dict[str, Floats] = field(default_factory=dict)
    high: dict[str, Floats] = field(default_factory=dict)
    outside: dict[str, Floats] = field(default_factory=dict)
    count: Counter[str] = field(default_factory=Counter)
    periods: list[float] = field(default_factory=list)
    gaps: dict[int, float] = field(default_factory=dict)
    uneven: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    no_ops: int = 0


def _read_tables(dataset: _Dataset, findings: list[Finding], progress: Callable[[int], None]) -> _Table:
    table = _Table(starts={key: [] for key in dataset.vectors})
    for episode in range(len(dataset.episodes)):
        rows = dataset.rows(episode)
        expected = int(dataset.episodes["length"].iloc[episode])
        found = 0 if rows is None else len(rows)
        table.lengths.append(found)
        if found != expected:
            findings.append(
                Finding(
                    grade="error",
                    check="episode",
                    subject=f"episode {episode}",
                    value=f"{found} frames",
                    threshold=f"{expected} in the episode table",
                    fix="record the episode again, or drop it",
                )
            )
        for key in dataset.vectors:
            _read_vector(dataset, table, episode, rows, key, findings)
        if rows is not None:
            _read_times(dataset, table, episode, rows)
        progress(episode + 1)
    return table


def _read_vector(
    dataset: _Dataset, table: _Table, episode: int, rows: pd.DataFrame | None, key: str, findings: list[Finding]
) -> None:
    values = None if rows is None else dataset.vector(rows, key)
    table.starts[key].append(None if values is None or not np.isfinite(values[0]).all() else values[0])
    if rows is None:
        return
    if values is None:
        findings.append(
            Finding(
                grade="error",
                check="vectors",
                subject=f"'{key}' of episode {episode}",
                value="missing, or another size",
                threshold=f"{len(dataset.names(key))} values in every frame",
                fix="record the episode again, or drop it",
            )
        )
        return
    bad = ~np.isfinite(values)
    findings += [
        Finding(
            grade="error",
            check="finite",
            subject=f"'{dataset.names(key)[index]}' of '{key}', episode {episode}",
            value=f"{int(bad[:, index].sum())} of {len(values)} values not finite, "
            f"first in frame {int(np.flatnonzero(bad[:, index])[0])}",
            threshold="0",
            fix="drop the episode, or mend its table and compute the statistics again",
        )
        for index in np.flatnonzero(bad.any(axis=0))
    ]
    good = values[~bad.any(axis=1)]
    if len(good):
        table.low[key] = np.minimum(table.low.get(key, good[0]), good.min(axis=0))
        table.high[key] = np.maximum(table.high.get(key, good[0]), good.max(axis=0))
        table.outside[key] = table.outside.get(key, np.zeros(good.shape[1])) + _outside(dataset, key, good)
        table.count[key] += len(good)
    if key == "observation.state" and len(good) > 1:
        step = np.abs(np.diff(good, axis=0) / dataset.scale(key)).max(axis=1)
        table.steps += len(step)
        table.no_ops += int((step < STILL).sum())


def _outside(dataset: _Dataset, key: str, values: Floats) -> Floats:
    low, high = _quantiles(dataset, key)
    if low is None or high is None:
        return np.zeros(values.shape[1])
    slack = 1e-6 * (1 + np.abs(values))  # the quantiles went through text
    return ((values < low - slack) | (values > high + slack)).sum(axis=0).astype(np.float64)


def _quantiles(dataset: _Dataset, key: str) -> tuple[Floats | None, Floats | None]:
    size, stats = len(dataset.names(key)), dataset.stats.get(key, {})
    bounds = [np.asarray(stats[name], np.float64) if stats.get(name) else None for name in ("q01", "q99")]
    low, high = (None if bound is None or bound.shape != (size,) else bound for bound in bounds)
    return low, high


def _read_times(dataset: _Dataset, table: _Table, episode: int, rows: pd.DataFrame) -> None:
    if "timestamp" not in rows or len(rows) < 2:
        return
    steps = np.diff(rows["timestamp"].to_numpy(np.float64))
    table.periods.append(float(np.median(steps)))
    period = 1 / dataset.fps
    if steps.max() > GAP * period:
        table.gaps[episode] = float(steps.max())
    # Stored as float32: far into a long episode the last bits are coarse.
    slack = max(JITTER * period, 4 * float(np.spacing(np.float32(rows["timestamp"].max()))))
    deviation = float(np.abs(steps - np.median(steps)).max())
    if deviation > slack:
        table.uneven[episode] = deviation


# -- the tables' findings ------------------------------------------------------------------------


def _dimensions(dataset: _Dataset, table: _Table, findings: list[Finding]) -> list[Dimension]:
    dimensions = []
    for key in dataset.vectors:
        if key not in table.low:
            continue
        low, high = _quantiles(dataset, key)
        trained = key != "observation.environment_state"  # that one only describes the scene
        if trained and (low is None or high is None):
            findings.append(
                Finding(
                    grade="error",
                    check="statistics",
                    subject=f"'{key}'",
                    value="no q01 and q99 in meta/stats.json",
                    threshold=f"one each for {', '.join(dataset.names(key))}",
                    fix="compute the statistics again",
                )
            )
        for i, name in enumerate(dataset.names(key)):
            q01, q99 = (None if bound is None else float(bound[i]) for bound in (low, high))
            known = q01 is not None and q99 is not None
            dimension = Dimension(
                feature=key,
                name=name,
                low=float(table.low[key][i]),
                high=float(table.high[key][i]),
                q01=q01,
                q99=q99,
                outside=float(table.outside[key][i]) / table.count[key] if known else None,
            )
            dimensions.append(dimension)
            if trained and known:
                findings += _judge(dimension)
    return dimensions


def _judge(dimension: Dimension) -> Iterator[Finding]:
    subject = f"'{dimension.name}' of '{dimension.feature}'"
    assert dimension.q01 is not None
    assert dimension.q99 is not None
    assert dimension.outside is not None
    width = dimension.q99 - dimension.q01
    if not width > CONSTANT:  # also NaN
        yield Finding(
            grade="error",
            check="statistics",
            subject=subject,
            value=f"constant or not finite: q01 {dimension.q01:.6g}, q99 {dimension.q99:.6g}",
            threshold=f"q99 - q01 above {CONSTANT:g}",
            fix="leave the dimension out, or record episodes in which it varies",
        )
    elif dimension.outside > OUTSIDE_WARNING:
        severe = dimension.outside > OUTSIDE_ERROR
        yield Finding(
            grade="error" if severe else "warning",
            check="quantiles",
            subject=subject,
            value=f"{100 * dimension.outside:.1f} % of the values outside q01 to q99",
            threshold=f"{100 * (OUTSIDE_ERROR if severe else OUTSIDE_WARNING):g} %",
            fix="the statistics are of other data: compute them again",
        )


def _timing(dataset: _Dataset, table: _Table, horizon: int, findings: list[Finding]) -> None:
    period = 1 / dataset.fps
    if table.periods and abs(np.median(table.periods) - period) > JITTER * period:
        findings.append(
            Finding(
                grade="error",
                check="timestamps",
                subject="the rate of the timestamps",
                value=f"{1 / float(np.median(table.periods)):.4g} Hz",
                threshold=f"{dataset.fps:g} fps in meta/info.json, within {100 * JITTER:g} %",
                fix="set fps to the rate of the recording, or write the timestamps again",
            )
        )
    elif table.gaps:
        worst = max(table.gaps.values())
        findings.append(
            Finding(
                grade="error",
                check="dropped frames",
                subject=_named(table.gaps),
                value=f"{1e3 * worst:.4g} ms between two frames",
                threshold=f"{1e3 * GAP * period:.4g} ms",
                fix="drop these episodes, or resample them to even steps",
            )
        )
    if uneven := {k: v for k, v in table.uneven.items() if k not in table.gaps}:
        findings.append(
            Finding(
                grade="warning",
                check="timestamps",
                subject=_named(uneven),
                value=f"{1e3 * max(uneven.values()):.3g} ms off the even step",
                threshold=f"{1e3 * JITTER * period:.3g} ms",
                fix="resample to even steps: a chunk's actions are played at a fixed rate",
            )
        )
    if short := [i for i, length in enumerate(table.lengths) if length < horizon]:
        findings.append(
            Finding(
                grade="warning",
                check="length",
                subject=_named(short),
                value=f"{min(table.lengths)} frames in the shortest",
                threshold=f"the horizon, {horizon}",
                fix="drop them, or train with a shorter horizon: their chunks are mostly padding",
            )
        )
    if table.no_ops > NO_OPS * max(1, table.steps):
        findings.append(
            Finding(
                grade="warning",
                check="no-ops",
                subject="steps in which the state does not move",
                value=f"{100 * table.no_ops / table.steps:.1f} %",
                threshold=f"{100 * NO_OPS:g} %",
                fix="drop such steps before training: a policy learns to wait from them",
            )
        )


def _balance(dataset: _Dataset, findings: list[Finding]) -> dict[str, int]:
    tasks = Counter(_tasks(dataset))
    if empty := [i for i, sentence in enumerate(dataset.sentences) if not sentence.strip()]:
        findings.append(
            Finding(
                grade="error",
                check="sentences",
                subject=_named(empty),
                value="no instruction",
                threshold="one sentence an episode",
                fix="write what the episode shows into the tasks",
            )
        )
    (most, many), (least, few) = tasks.most_common(1)[0], tasks.most_common()[-1]
    # Sentences that were varied on purpose are no tasks; only counts that mean something are compared.
    comparable = "env_task" in dataset.episodes or len(tasks) <= len(dataset.episodes) / 5
    if comparable and many > IMBALANCE * few:
        findings.append(
            Finding(
                grade="warning",
                check="balance",
                subject=f"task '{least}'",
                value=f"{few} episodes; '{most}' has {many}",
                threshold=f"{IMBALANCE:g} times as many",
                fix=f"record more of '{least}', or weigh it higher",
            )
        )
    return dict(tasks.most_common())


def _tasks(dataset: _Dataset) -> list[str]:
    column = dataset.episodes.get("env_task")
    return dataset.sentences if column is None else [str(task) for task in column]


def _recoveries(dataset: _Dataset, findings: list[Finding]) -> float | None:
    column = dataset.episodes.get("recovery")
    share = None if column is None else float(column.astype(bool).mean())
    if share is None or share < RECOVERIES:
        findings.append(
            Finding(
                grade="note" if share is None else "warning",
                check="recoveries",
                subject="episodes that begin in a failed state",
                value="not marked: no column 'recovery'" if share is None else f"{100 * share:.1f} %",
                threshold=f"{100 * RECOVERIES:g} %",
                fix="record about 20 % of the episodes from a slip, a miss or a push that is corrected",
            )
        )
    return share


# -- cameras -------------------------------------------------------------------------------------


def _camera(dataset: _Dataset, camera: str, findings: list[Finding], progress: Callable[[int], None]) -> CameraRecord:
    count = len(dataset.episodes)
    luminance, contrast = np.full(count, np.nan), np.full(count, np.nan)
    first = np.zeros((count, THUMBNAIL, THUMBNAIL), np.uint8)
    travel, frozen = np.full(count, np.nan), {}
    key = f"videos/{IMAGE_PREFIX}{camera}"
    done = 0
    for (chunk, file), episodes in dataset.episodes.groupby([f"{key}/chunk_index", f"{key}/file_index"], sort=True):
        path = dataset.root / dataset.info["video_path"].format(
            video_key=IMAGE_PREFIX + camera, chunk_index=chunk, file_index=file
        )
        frames = read_video(path, "gray")
        position = 0
        for episode, begin in episodes[f"{key}/from_timestamp"].sort_values().items():
            length = int(dataset.episodes["length"].iloc[episode])
            skipped = round(begin * dataset.fps) - position
            seen = _Watch(_motion(dataset, episode))
            try:
                for _ in range(skipped):
                    next(frames)
                for _ in range(length):
                    seen.add(next(frames))
            except (StopIteration, BitvlaError) as error:
                findings.append(_broken_video(path, camera, episode, seen.count, length, error))
                break
            position += skipped + length
            luminance[episode], contrast[episode] = seen.luminance / length, seen.contrast / length
            first[episode] = _thumbnail(seen.first)
            travel[episode] = _edge_change(first[episode], _thumbnail(seen.last))
            if seen.longest:
                frozen[int(episode)] = seen.longest
            done += 1
            progress(done)
    usable = ~np.isnan(luminance)
    shift = np.full(count, np.nan)
    moving = bool(usable.any() and np.median(travel[usable]) > STATIC_PIXELS)
    if usable.any() and not moving:
        reference = np.median(first[usable][:REFERENCES], axis=0)
        shift[usable] = [_shift(reference, image) for image in first[usable]]
    _camera_findings(camera, luminance, contrast, shift, frozen, moving, findings)
    return CameraRecord(
        name=camera,
        moves_with_robot=moving,
        luminance=luminance.tolist(),
        contrast=contrast.tolist(),
        shift=shift.tolist(),
        frozen_frames=sum(frozen.values()),
    )


def _motion(dataset: _Dataset, episode: Any) -> Floats:
    """The state of an episode in units of its range, (T, n); empty where it is unknown."""
    rows = dataset.rows(int(episode))
    state = None if rows is None else dataset.vector(rows, "observation.state")
    return np.zeros((0, 1)) if state is None else np.nan_to_num(state / dataset.scale("observation.state"))


class _Watch:
    """The frames of one episode, one after the other. A stretch is frozen that shows one image for a long motion."""

    def __init__(self, state: Floats) -> None:
        self.state, self.count = state, 0
        self.luminance = self.contrast = 0.0
        self.first = self.last = np.zeros((1, 1), np.uint8)
        self.longest = 0
        self._anchor, self._begin = np.zeros((1, 1), np.int16), 0

    def add(self, frame: NDArray[np.uint8]) -> None:
        if self.count == 0:
            self.first, self._anchor = frame, frame.astype(np.int16)
        elif _difference(self._anchor, frame) > FROZEN_PIXELS:
            self._anchor, self._begin = frame.astype(np.int16), self.count
        elif self._moved() and self.count - self._begin >= FROZEN_STEPS:
            self.longest = max(self.longest, self.count - self._begin)
        self.luminance += float(frame.mean())
        self.contrast += float(frame.std())
        self.last, self.count = frame, self.count + 1

    def _moved(self) -> bool:
        if self.count >= len(self.state):
            return False
        return float(np.abs(self.state[self.count] - self.state[self._begin]).max()) > FROZEN_MOTION


def _difference(a: NDArray[np.int16], b: NDArray[np.uint8]) -> float:
    """Mean absolute difference in the block that differs most, gray levels."""
    height, width = (size // BLOCK * BLOCK for size in b.shape)
    difference = np.abs(a - b)[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return float(difference.sum(axis=(1, 3)).max(initial=0) / BLOCK**2)


def _thumbnail(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(frame).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def _edge_change(reference: NDArray[Any], image: NDArray[Any]) -> float:
    """Median difference over the quarter of the pixels with the steepest edges in `reference`, gray levels."""
    steepness = np.hypot(*np.gradient(reference.astype(float)))
    edges = steepness >= np.quantile(steepness, 0.75)
    return float(np.median(np.abs(image.astype(float) - reference)[edges]))


def _shift(reference: NDArray[Any], image: NDArray[Any]) -> float:
    """How far `image` is `reference` moved, as a share of the width: the peak of the phase correlation (Kuglin and
    Hines 1975). A peak counts only if most edges changed and moving back makes the pictures more alike: other things
    before the camera do not move it.
    """
    before = _edge_change(reference, image)
    if before < STATIC_PIXELS:
        return 0.0
    window = np.outer(np.hanning(THUMBNAIL), np.hanning(THUMBNAIL))
    a, b = (np.fft.rfft2((x - np.mean(x)) * window) for x in (reference.astype(float), image.astype(float)))
    cross = b * np.conj(a)
    peak = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9), s=(THUMBNAIL, THUMBNAIL))
    dy, dx = (int(i) for i in np.unravel_index(int(np.argmax(peak)), peak.shape))
    dy, dx = (i - THUMBNAIL if i > THUMBNAIL // 2 else i for i in (dy, dx))
    if max(abs(dy), abs(dx)) > THUMBNAIL // 4:
        return 0.0
    after = _edge_change(reference, np.roll(image, (-dy, -dx), axis=(0, 1)))
    return float(np.hypot(dy, dx)) / THUMBNAIL if after < before / 2 else 0.0


def _broken_video(
    path: Path, camera: str, episode: Any, count: int, length: int, error: StopIteration | BitvlaError
) -> Finding:
    reason = f" ({error})" if isinstance(error, BitvlaError) else ""
    return Finding(
        grade="error",
        check="video",
        subject=f"camera '{camera}', episode {episode}",
        value=f"{path.name} ends after {count} of its frames{reason}",
        threshold=f"{length} frames",
        fix="the video is truncated: copy or record it again",
    )


def _camera_findings(
    camera: str, luminance: Floats, contrast: Floats, shift: Floats, frozen: dict[int, int], moving: bool,
    findings: list[Finding],
) -> None:  # fmt: skip
    if np.isnan(luminance).all():  # the video's own finding says why
        return
    if frozen:
        findings.append(
            Finding(
                grade="error",
                check="frozen frames",
                subject=f"camera '{camera}', {_named(frozen)}",
                value=f"one image for {max(frozen.values()) + 1} frames while the state moves",
                threshold=f"{FROZEN_STEPS + 1} frames and {100 * FROZEN_MOTION:g} % of the state's range",
                fix="drop these episodes; look for a camera that stalls or a bus that is too slow",
            )
        )
    if len(moved := np.flatnonzero(shift > CAMERA_SHIFT)):
        findings.append(
            Finding(
                grade="warning",
                check="moved camera",
                subject=f"camera '{camera}', {_named(moved)}",
                value=f"background shifted by {100 * np.nanmax(shift):.1f} % of the width",
                threshold=f"{100 * CAMERA_SHIFT:g} %",
                fix="put the camera back, or augment with shifts; evaluate with the camera where it is now",
            )
        )
    for name, values in (("lighting", luminance), ("contrast", contrast)):
        # A camera on the robot sees other things with every pose.
        limit = GRAY_LEVELS * (3 if moving else 1)
        if len(odd := _outliers(values, limit)):
            worst = float(np.nanmax(np.abs(values[odd] - np.nanmedian(values))))
            findings.append(
                Finding(
                    grade="warning",
                    check=name,
                    subject=f"camera '{camera}', {_named(odd)}",
                    value=f"{worst:.1f} gray levels off the median {np.nanmedian(values):.1f}",
                    threshold=f"{limit:g} gray levels and a modified z-score of {SCORE:g}",
                    fix="look at these episodes: a lamp, the exposure, or something before the lens",
                )
            )
    _drift(camera, luminance, findings)


def _outliers(values: Floats, least: float) -> NDArray[np.int64]:
    """Episodes far from the median in units of the median absolute deviation (Iglewicz and Hoaglin 1993)."""
    distance = np.abs(values - np.nanmedian(values))
    deviation = max(float(np.nanmedian(distance)), 1e-9)
    return np.flatnonzero((0.6745 * distance / deviation > SCORE) & (distance > least))


def _drift(camera: str, luminance: Floats, findings: list[Finding]) -> None:
    usable = np.flatnonzero(~np.isnan(luminance))
    if len(usable) < 10 or np.ptp(luminance[usable]) < GRAY_LEVELS:
        return
    values = luminance[usable]
    third = len(values) // 3
    change = float(np.median(values[-third:]) - np.median(values[:third]))
    rank = float(spearmanr(usable, values).statistic)
    if abs(rank) > DRIFT and abs(change) > GRAY_LEVELS:
        findings.append(
            Finding(
                grade="warning",
                check="lighting drift",
                subject=f"camera '{camera}'",
                value=f"{change:+.1f} gray levels from the first to the last third (rank correlation {rank:+.2f})",
                threshold=f"{GRAY_LEVELS:g} gray levels and {DRIFT:g}",
                fix="fix exposure and lamps, shuffle the order of the tasks, or augment the brightness",
            )
        )


# -- the workspace -------------------------------------------------------------------------------


def _coverage(dataset: _Dataset, table: _Table, findings: list[Finding]) -> Coverage | None:
    """Clusters of where episodes begin, in deviations from their task's mean, so that none of them is just a task."""
    keys = [key for key in dataset.vectors if key != "action"]
    starts = [
        [values for key in keys if (values := table.starts[key][i]) is not None] for i in range(len(table.lengths))
    ]
    usable = [i for i, parts in enumerate(starts) if len(parts) == len(keys)]
    if len(usable) < max(10, len(table.lengths)) or not keys:
        return None
    points = np.stack([np.concatenate(parts) for parts in starts])
    frame = pd.DataFrame(points)
    tasks = _tasks(dataset) if "env_task" in dataset.episodes else [""] * len(points)
    # Recoveries begin far from where a robot is switched on; they would be a cluster of their own.
    usual = ~dataset.episodes.get("recovery", pd.Series(np.zeros(len(points)))).to_numpy(bool)
    if usual.sum() < 10:
        usual[:] = True
    by_task = frame.where(pd.Series(usual), axis=0).groupby(np.array(tasks))
    spread = by_task.transform("std")
    relative = ((frame - by_task.transform("mean")) / spread.where(spread > CONSTANT)).fillna(0.0).to_numpy()
    relative = relative[:, relative.any(axis=0)]
    if not relative.shape[1]:
        return None
    labels = _cluster(relative, usual)
    sizes = np.bincount(labels)
    findings += [
        Finding(
            grade="warning",
            check="coverage",
            subject=f"region {cluster} of the workspace: {_named(np.flatnonzero(labels == cluster))}",
            value=f"{sizes[cluster]} of {len(points)} episodes begin there",
            threshold=f"{100 * THIN_CLUSTER:g} %",
            fix="record more episodes that begin there, or drop these",
        )
        for cluster in np.flatnonzero(sizes < THIN_CLUSTER * len(points))
    ]
    centered = relative - relative.mean(axis=0)
    axes = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
    held_out = int(np.argmin(np.abs(sizes / len(points) - HELD_OUT)))
    return Coverage(
        clusters=labels.tolist(), sizes=sizes.tolist(), axes=[(x, y) for x, y in axes.tolist()], held_out=held_out
    )


def _cluster(everything: Floats, usual: NDArray[np.bool_]) -> NDArray[np.int64]:
    """k-means of the usual points, with the number of clusters that the index of Calinski and Harabasz (1974) likes
    best; the others join the nearest.
    """
    points = everything[usual]
    best, labels = -np.inf, np.zeros(len(everything), np.int64)
    most = min(MAX_CLUSTERS, len(points) // 5)
    for count in range(min(MIN_CLUSTERS, most), most + 1):
        try:
            centers, candidate = kmeans2(points, count, minit="++", rng=0, missing="raise")
        except Exception:  # scipy's ClusterError: a cluster stayed empty, so there are fewer
            continue
        within = float(((points - centers[candidate]) ** 2).sum())
        between = float(((centers[candidate] - points.mean(axis=0)) ** 2).sum())
        score = between / max(1, count - 1) / max(within / (len(points) - count), 1e-12)
        if score > best:
            best, labels = score, vq(everything, centers)[0].astype(np.int64)
    return labels


def _named(episodes: Any) -> str:
    """Episode numbers for a sentence: runs as ranges, the first few of many."""
    numbers: Sequence[int] = sorted(int(i) for i in episodes)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    more = f" and others ({len(numbers)} in all)" if len(text) > 6 else ""
    return f"episode{'s' if len(numbers) > 1 else ''} {', '.join(text[:6])}{more}"
