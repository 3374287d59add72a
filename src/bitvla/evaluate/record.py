"""What an evaluation is made of: the rules, the jobs, the episodes, the facts about policy and machine.

Plain typed records, light to import: they travel between the processes of an evaluation.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from bitvla.config import Camera
from bitvla.evaluate.failures import Failure


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Typed and immutable; an unknown or ill-typed field of a file is an error that names it."""


class Protocol(Record, frozen=True, kw_only=True):
    """The rules of an evaluation. Results are comparable when their protocols are equal.

    Episode i of a task starts from the simulator's initial state of seed `first_seed` + i, with the i-th of its
    held-out sentences (they rotate). With `groups`, the tasks of a group share one scene a seed and differ only in
    the sentence. The policy sees an observation every `execute_horizon` steps. An episode ends after `max_steps`, or
    as `stop` says: at the first step at which the environment's own predicate holds ("success"), or at which any
    task of the group is done ("first_done"). `benchmark_protocol` names the rules where a benchmark has several; its
    own sentences are then given instead of held-out ones.
    """

    simulator: str
    suite: str
    tasks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    episodes: int
    first_seed: int = 0
    max_steps: int
    execute_horizon: int
    image_size: int
    instructions: Literal["held-out", "benchmark"] = "held-out"
    stop: Literal["success", "first_done"] = "success"
    benchmark_protocol: str | None = None


class Header(Record, frozen=True, kw_only=True):
    """What must be the same for an unfinished evaluation to go on."""

    format: int
    protocol: Protocol
    policy: str
    precision: str
    prune: float = 0.0
    versions: dict[str, str]


class Job(Record, frozen=True, kw_only=True):
    """One episode to run."""

    task: str
    seed: int
    group: tuple[str, ...] = ()


class Seconds(Record, frozen=True, kw_only=True):
    """Where the wall time of an episode went. `policy` includes the transport to the policy's process."""

    total: float
    simulator: float
    render: float
    policy: float
    film: float = 0.0


class Episode(Record, frozen=True, kw_only=True):
    """What happened in one job. `error` is set when it could not be run; it then counts as a failure.

    `initial` is the state at the start: proprio, then the simulator's object positions. `chunk_ms` are the durations
    of the policy's calls, `policy_peak_bytes` the peak memory of its process so far. `outcome` holds the simulator's
    own measurements at the end, `done` the first task of the group that was done (None: nothing). `failure` is the kind
    of a failure, where the simulator knows enough to tell. `video` is a path relative to the result's file.
    """

    task: str
    seed: int
    group: tuple[str, ...] = ()
    instruction: str = ""
    success: bool = False
    steps: int = 0
    chunk_ms: tuple[float, ...] = ()
    seconds: Seconds | None = None
    initial: tuple[float, ...] = ()
    outcome: dict[str, Any] = {}
    done: str | None = None
    failure: Failure | None = None
    policy_peak_bytes: int = 0
    attempts: int = 1
    error: str | None = None
    video: str | None = None

    @property
    def job(self) -> Job:
        return Job(task=self.task, seed=self.seed, group=self.group)


class PolicyFacts(Record, frozen=True, kw_only=True):
    """The policy that ran. Sizes in bytes; `bf16_bytes` is what the same parameters take in bfloat16; `prune` the share
    of image tokens that it did without."""

    name: str
    source: str
    digest: str
    precision: str
    prune: float = 0.0
    isa: str
    threads: int
    parameters: int
    file_bytes: int
    bf16_bytes: int
    cameras: tuple[Camera, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    horizon: int
    execute_horizon: int
    control_hz: float
    load_seconds: float

    @property
    def title(self) -> str:
        pruned = f", {self.prune:.0%} of the image tokens left out" if self.prune else ""
        return f"{self.name} ({self.precision}{pruned})"


class Machine(Record, frozen=True, kw_only=True):
    cpu: str
    cores: int
    memory_bytes: int
    system: str


def jobs(protocol: Protocol) -> list[Job]:
    """Every episode of a protocol, all seeds of a task together (its scene is built once)."""
    seeds = range(protocol.first_seed, protocol.first_seed + protocol.episodes)
    if protocol.groups:
        return [Job(task=t, seed=s, group=group) for group in protocol.groups for t in group for s in seeds]
    return [Job(task=task, seed=seed) for task in protocol.tasks for seed in seeds]
