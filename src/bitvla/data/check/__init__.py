"""The data doctor: what is wrong with a dataset, before a training finds out.

Tables and videos are streamed, one file at a time; what is kept is a few numbers and one small image an episode and
a camera. What shows no error is then opened as training opens it, with its numbers in memory. Thresholds are in
`rules`, and every finding names what it was compared with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from bitvla.data.check import rules
from bitvla.data.check.cameras import CameraRecord, watch_camera
from bitvla.data.check.rules import Finding
from bitvla.data.check.source import Source
from bitvla.data.check.tables import Dimension, check_times, count_tasks, dimensions_of, read_tables, recovery_share
from bitvla.data.check.workspace import Coverage, coverage_of
from bitvla.data.lerobot import LeRobotDataset, locate, name_of
from bitvla.errors import BitvlaError
from bitvla.files import write_whole

Progress = Callable[[int, int, str], None]


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


def check(
    root: str | os.PathLike[str], *, horizon: int = 8, progress: Progress = lambda done, total, last: None
) -> Checkup:
    """Measure the LeRobotDataset v3 at `root`: a folder, an address that fsspec knows, or an id on the Hub.

    `horizon` is the number of actions in a chunk. Writes nothing.

    Raises BitvlaError when the folder is no dataset at all; anything else is a finding.
    """
    dataset = Source(locate(root))
    if not len(dataset.episodes):
        raise BitvlaError(f"the dataset {root} holds no episode")
    total = len(dataset.episodes) * (1 + len(dataset.cameras))
    findings: list[Finding] = []
    table = read_tables(dataset, findings, partial(_forward, progress, 0, total, "tables"))
    cameras: list[CameraRecord] = []
    for camera in dataset.cameras:
        begin = (1 + len(cameras)) * len(dataset.episodes)
        report = partial(_forward, progress, begin, total, camera)
        cameras.append(watch_camera(dataset, camera, findings, report))
    dimensions = dimensions_of(dataset, table, findings)
    check_times(dataset, table, horizon, findings)
    tasks = count_tasks(dataset, findings)
    recoveries = recovery_share(dataset, findings)
    coverage = coverage_of(dataset, table, findings)
    if all(finding.grade != "error" for finding in findings):
        _open_as_training_does(root, findings)
    return Checkup(
        dataset=name_of(root),
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


def _open_as_training_does(root: str | os.PathLike[str], findings: list[Finding]) -> None:
    """What passes is not refused later."""
    try:
        LeRobotDataset(root)
    except BitvlaError as error:
        findings.append(rules.REFUSED.found(subject="opening the dataset", value=str(error), threshold="no refusal"))


def _forward(progress: Progress, begin: int, total: int, what: str, done: int) -> None:
    progress(begin + done, total, what)


def split(checkup: Checkup) -> dict[str, list[int]]:
    """The proposed split: episode numbers to train on, and the region of the workspace held out."""
    if checkup.coverage is None:
        raise BitvlaError(
            f"no region of {checkup.dataset} can be held out: that takes at least {rules.MIN_SPLIT} episodes "
            f"({checkup.episodes} are there), each with a finite state in its first frame, and not all from one place; "
            "mend what was found, or record more"
        )
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
