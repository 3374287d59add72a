"""What each camera saw: light, frozen pictures, a camera that moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

from bitvla.data.check import rules
from bitvla.data.check.rules import Finding
from bitvla.data.check.source import Floats, Source
from bitvla.data.lerobot import Place, pictures_file, read_pictures
from bitvla.errors import BitvlaError


class CameraRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a camera saw, a number an episode (NaN where the video ended early)."""

    name: str
    moves_with_robot: bool
    luminance: list[float]
    contrast: list[float]
    shift: list[float]
    """Of the first frame against the reference, as a share of the width."""
    frozen_frames: int


def watch_camera(
    dataset: Source, camera: str, findings: list[Finding], progress: Callable[[int], None]
) -> CameraRecord:
    """Every frame of one camera, episode by episode; of a broken file the first finding says enough."""
    count = len(dataset.episodes)
    luminance, contrast = np.full(count, np.nan), np.full(count, np.nan)
    first = np.zeros((count, rules.THUMBNAIL, rules.THUMBNAIL), np.uint8)
    travel, frozen = np.full(count, np.nan), {}
    broken: set[Place] = set()
    for episode, row in dataset.episodes.iterrows():
        path = pictures_file(dataset.root, dataset.info, row, camera)
        if path in broken:
            continue
        seen = _Watch(_motion(dataset, episode))
        try:
            for frame in read_pictures(dataset.root, dataset.info, row, camera, "gray"):
                seen.add(frame)
        except BitvlaError as error:
            broken.add(path)
            findings.append(
                rules.BROKEN_VIDEO.found(
                    subject=f"camera '{camera}', episode {episode}",
                    value=str(error),
                    threshold=f"{row['length']} frames at {dataset.fps:g} a second",
                )
            )
            continue
        if not seen.count:  # the table's own finding says so
            continue
        luminance[episode], contrast[episode] = seen.luminance / seen.count, seen.contrast / seen.count
        first[episode] = _thumbnail(seen.first)
        travel[episode] = _edge_change(first[episode], _thumbnail(seen.last))
        if seen.longest:
            frozen[int(episode)] = seen.longest
        progress(int(episode) + 1)
    usable = ~np.isnan(luminance)
    shift = np.full(count, np.nan)
    moving = bool(usable.any() and np.median(travel[usable]) > rules.STATIC_PIXELS)
    if usable.any() and not moving:
        reference = np.median(first[usable][: rules.REFERENCES], axis=0)
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


def _motion(dataset: Source, episode: Any) -> Floats:
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
        elif _difference(self._anchor, frame) > rules.FROZEN_PIXELS:
            self._anchor, self._begin = frame.astype(np.int16), self.count
        elif self._moved() and self.count - self._begin >= rules.FROZEN_STEPS:
            self.longest = max(self.longest, self.count - self._begin)
        self.luminance += float(frame.mean())
        self.contrast += float(frame.std())
        self.last, self.count = frame, self.count + 1

    def _moved(self) -> bool:
        if self.count >= len(self.state):
            return False
        return float(np.abs(self.state[self.count] - self.state[self._begin]).max()) > rules.FROZEN_MOTION


def _difference(a: NDArray[np.int16], b: NDArray[np.uint8]) -> float:
    """Mean absolute difference in the block that differs most, gray levels."""
    height, width = (size // rules.BLOCK * rules.BLOCK for size in b.shape)
    difference = np.abs(a - b)[:height, :width].reshape(
        height // rules.BLOCK, rules.BLOCK, width // rules.BLOCK, rules.BLOCK
    )
    return float(difference.sum(axis=(1, 3)).max(initial=0) / rules.BLOCK**2)


def _thumbnail(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(frame).resize((rules.THUMBNAIL, rules.THUMBNAIL), Image.Resampling.BOX))


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
    if before < rules.STATIC_PIXELS:
        return 0.0
    window = np.outer(np.hanning(rules.THUMBNAIL), np.hanning(rules.THUMBNAIL))
    a, b = (np.fft.rfft2((x - np.mean(x)) * window) for x in (reference.astype(float), image.astype(float)))
    cross = b * np.conj(a)
    peak = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9), s=(rules.THUMBNAIL, rules.THUMBNAIL))
    dy, dx = (int(i) for i in np.unravel_index(int(np.argmax(peak)), peak.shape))
    dy, dx = (i - rules.THUMBNAIL if i > rules.THUMBNAIL // 2 else i for i in (dy, dx))
    if max(abs(dy), abs(dx)) > rules.THUMBNAIL // 4:
        return 0.0
    after = _edge_change(reference, np.roll(image, (-dy, -dx), axis=(0, 1)))
    return float(np.hypot(dy, dx)) / rules.THUMBNAIL if after < before / 2 else 0.0


def _camera_findings(
    camera: str, luminance: Floats, contrast: Floats, shift: Floats, frozen: dict[int, int], moving: bool,
    findings: list[Finding],
) -> None:  # fmt: skip
    if np.isnan(luminance).all():  # the video's own finding says why
        return
    if frozen:
        findings.append(
            rules.FROZEN.found(
                subject=f"camera '{camera}', {rules.named(frozen)}",
                value=f"one image for {max(frozen.values()) + 1} frames while the state moves",
                threshold=f"{rules.FROZEN_STEPS + 1} frames and {100 * rules.FROZEN_MOTION:g} % of the state's range",
            )
        )
    if len(moved := np.flatnonzero(shift > rules.CAMERA_SHIFT)):
        findings.append(
            rules.MOVED_CAMERA.found(
                subject=f"camera '{camera}', {rules.named(moved)}",
                value=f"background shifted by {100 * np.nanmax(shift):.1f} % of the width",
                threshold=f"{100 * rules.CAMERA_SHIFT:g} %",
            )
        )
    for rule, values in ((rules.ODD_LIGHTING, luminance), (rules.ODD_CONTRAST, contrast)):
        # A camera on the robot sees other things with every pose.
        limit = rules.GRAY_LEVELS * (3 if moving else 1)
        if len(odd := _outliers(values, limit)):
            worst = float(np.nanmax(np.abs(values[odd] - np.nanmedian(values))))
            findings.append(
                rule.found(
                    subject=f"camera '{camera}', {rules.named(odd)}",
                    value=f"{worst:.1f} gray levels off the median {np.nanmedian(values):.1f}",
                    threshold=f"{limit:g} gray levels and a modified z-score of {rules.SCORE:g}",
                )
            )
    _drift(camera, luminance, findings)


def _outliers(values: Floats, least: float) -> NDArray[np.int64]:
    """Episodes far from the median in units of the median absolute deviation (Iglewicz and Hoaglin 1993)."""
    distance = np.abs(values - np.nanmedian(values))
    deviation = max(float(np.nanmedian(distance)), 1e-9)
    return np.flatnonzero((0.6745 * distance / deviation > rules.SCORE) & (distance > least))


def _drift(camera: str, luminance: Floats, findings: list[Finding]) -> None:
    usable = np.flatnonzero(~np.isnan(luminance))
    if len(usable) < 10 or np.ptp(luminance[usable]) < rules.GRAY_LEVELS:
        return
    values = luminance[usable]
    third = len(values) // 3
    change = float(np.median(values[-third:]) - np.median(values[:third]))
    rank = float(spearmanr(usable, values).statistic)
    if abs(rank) > rules.DRIFT and abs(change) > rules.GRAY_LEVELS:
        findings.append(
            rules.LIGHTING_DRIFT.found(
                subject=f"camera '{camera}'",
                value=f"{change:+.1f} gray levels from the first to the last third (rank correlation {rank:+.2f})",
                threshold=f"{rules.GRAY_LEVELS:g} gray levels and {rules.DRIFT:g}",
            )
        )
