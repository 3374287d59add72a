"""What counts as wrong: every threshold, and every rule with its grade and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from bitvla.data.lerobot import FAR_OFF

Grade = Literal["error", "warning", "note"]

OUTSIDE_WARNING, OUTSIDE_ERROR = 0.04, FAR_OFF  # of the values; training refuses the latter
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
MIN_SPLIT = 10  # episodes
THUMBNAIL, BLOCK, REFERENCES = 64, 8, 25


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong: what, how much of it, compared with what, and what to do."""

    grade: Grade
    check: str
    subject: str
    value: str
    threshold: str
    fix: str


class Rule(msgspec.Struct, frozen=True):
    """Something that can be wrong, how bad that is, and what to do."""

    grade: Grade
    check: str
    fix: str

    def found(self, *, subject: str, value: str, threshold: str) -> Finding:
        """This rule broken by `subject`: it has `value`, allowed is `threshold`."""
        return Finding(
            grade=self.grade, check=self.check, subject=subject, value=value, threshold=threshold, fix=self.fix
        )


BROKEN_TABLE = Rule("error", "table", "copy the file again, or drop its episodes")
MISSING_FRAMES = Rule("error", "episode", "record the episode again, or drop it")
MISSING_VECTORS = Rule("error", "vectors", "record the episode again, or drop it")
NOT_FINITE = Rule("error", "finite", "drop the episode, or mend its table and compute the statistics again")
REFUSED = Rule("error", "training", "mend what it names, or record again")
NO_QUANTILES = Rule("error", "statistics", "compute them: bitvla data statistics DATASET")
CONSTANT_DIMENSION = Rule("error", "statistics", "leave the dimension out, or record episodes in which it varies")
OFF_QUANTILES = Rule("warning", "quantiles", "not the statistics of these data: bitvla data statistics DATASET")
FAR_OFF_QUANTILES = Rule("error", "quantiles", "not the statistics of these data: bitvla data statistics DATASET")
NO_TIMES = Rule("error", "timestamps", "write them into the tables: frame_index / fps, where the rate was even")
WRONG_RATE = Rule("error", "timestamps", "set fps to the rate of the recording, or write the timestamps again")
DROPPED_FRAMES = Rule("error", "dropped frames", "drop these episodes, or resample them to even steps")
UNEVEN_STEPS = Rule("warning", "timestamps", "resample to even steps: a chunk's actions are played at a fixed rate")
SHORT_EPISODES = Rule(
    "warning", "length", "drop them, or train with a shorter horizon: their chunks are mostly padding"
)
STANDING_STILL = Rule("warning", "no-ops", "drop such steps before training: a policy learns to wait from them")
NO_INSTRUCTION = Rule("error", "sentences", "write what the episode shows into the tasks")
UNBALANCED = Rule("warning", "balance", "record more of this task, or weigh it higher")
FEW_RECOVERIES = Rule(
    "warning", "recoveries", "record about 20 % of the episodes from a slip, a miss or a push that is corrected"
)
UNMARKED_RECOVERIES = Rule(
    "note", "recoveries", "record about 20 % of the episodes from a slip, a miss or a push that is corrected"
)
BROKEN_VIDEO = Rule("error", "video", "copy or record the file again, or mend meta/info.json where that is wrong")
FROZEN = Rule("error", "frozen frames", "drop these episodes; look for a camera that stalls or a bus that is too slow")
MOVED_CAMERA = Rule(
    "warning", "moved camera", "put the camera back, or augment with shifts; evaluate with the camera where it is now"
)
ODD_LIGHTING = Rule("warning", "lighting", "look at these episodes: a lamp, the exposure, or something before the lens")
ODD_CONTRAST = Rule("warning", "contrast", "look at these episodes: a lamp, the exposure, or something before the lens")
LIGHTING_DRIFT = Rule(
    "warning", "lighting drift", "fix exposure and lamps, shuffle the order of the tasks, or augment the brightness"
)
THIN_REGION = Rule("warning", "coverage", "record more episodes that begin there, or drop these")


def named(episodes: Iterable[int]) -> str:
    """Episode numbers for a sentence: runs as ranges, the first few of many."""
    numbers = sorted(int(i) for i in episodes)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    more = f" and others ({len(numbers)} in all)" if len(text) > 6 else ""
    return f"episode{'s' if len(numbers) > 1 else ''} {', '.join(text[:6])}{more}"
