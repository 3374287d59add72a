"""`bitvla run`: a policy, near or far, drives a robot through the executor."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitvla
from bitvla.config import Record
from bitvla.errors import BitvlaError
from bitvla.robot.base import Robot, check_fits, contradicts
from bitvla.serve.executor import Executor, Summary
from bitvla.serve.guard import Guard, Limits, limits_from, load_limits
from bitvla.serve.joining import Joining, RealTimeChunking, Replace, TemporalEnsemble, WeightedAverage
from bitvla.serve.schedule import Plan, settings_for

if TYPE_CHECKING:
    from bitvla.robot.recorder import Recorder

JOININGS: dict[str, type[Joining]] = {
    "replace": Replace,
    "weighted_average": WeightedAverage,
    "temporal_ensemble": TemporalEnsemble,
    "real_time_chunking": RealTimeChunking,
}


class Options(Record, frozen=True, kw_only=True):
    """How to run.

    seconds: an episode lasts so long, or until the robot says that it is done; 0 measures and proves, and moves
        nothing. control_hz: actions a second; None: the policy's rate, which may be lowered and not raised.
    limits: file of the guard's limits; None: the range of the training actions.
    record: folder of the dataset that gets every episode. log: file of the executor's log; episodes after the first
        get a number.
    timeout, token: of a remote policy. threads, prune: of a policy file; see `bitvla.load`.
    """

    seconds: float = 30.0
    episodes: int = 1
    control_hz: float | None = None
    joining: str = "replace"
    synchronous: bool = False
    lagged: bool = False
    max_hold_s: float = 1.0
    limits: Path | None = None
    record: Path | None = None
    log: Path | None = None
    timeout: float = 5.0
    token: str | None = None
    threads: int | None = None
    prune: float = 0.0


def run(source: str, make_robot: Callable[[Mapping[str, Any]], Robot], options: Options) -> dict[str, Any]:
    """Run the policy `source`, a file or the address of a server ("ws://host:8000"), on a robot.

    `make_robot` is called with the policy's `info()`. SIGTERM ends the run as `Executor.stop` does.
    Returns {"policy", "episodes": [Summary], "recording"}. Raises what the executor raises; the episode that runs is
    recorded nevertheless.
    """
    with contextlib.ExitStack() as stack:
        policy = stack.enter_context(_open(source, options))
        info = policy.info()
        robot = make_robot(info)
        stack.callback(robot.close)
        check_fits(robot, info)
        hz = _rate(info, options.control_hz)
        recorder = _recorder(stack, options, info, hz, robot)
        limits = load_limits(options.limits) if options.limits else _trained_limits(robot, info)
        _check_limits(limits, info)
        settings = settings_for(
            info,
            tuple(axis.kind for axis in limits.axes),
            control_hz=hz,
            joining=JOININGS[options.joining](),
            mode="synchronous" if options.synchronous else "asynchronous",
            alignment="lagged" if options.lagged else "time_aligned",
            max_hold_s=options.max_hold_s,
        )
        plan: Plan | None = None
        episodes: list[Summary] = []
        for episode in range(options.episodes):
            robot.start(episode)
            executor = Executor(
                policy,
                robot,
                settings,
                guard=Guard(limits, hz, info["state"]["names"]),
                log=_numbered(options.log, episode),
                recorder=recorder,
                plan=plan,
            )
            with _stopped_by_sigterm(executor), _saved(recorder):
                episodes.append(executor.run(round(options.seconds * hz)))
            plan = episodes[-1].plan
            if episodes[-1].ended == "stop":
                break
        return {"policy": info["name"], "episodes": episodes, "recording": options.record and str(options.record)}


@contextlib.contextmanager
def _open(source: str, options: Options) -> Iterator[Any]:
    if "://" not in source:
        yield bitvla.load(source, options.threads, options.prune)
        return
    if options.prune:
        raise BitvlaError(f"{source} is a server: give --prune to its `bitvla serve`")
    with bitvla.connect(source, options.token, options.timeout) as policy:
        yield policy


def _rate(info: Mapping[str, Any], wanted: float | None) -> float:
    trained = float(info["control_hz"])
    if wanted is not None and wanted > trained:
        raise BitvlaError(f"--hz {wanted:g} is faster than the {trained:g} Hz that the policy was trained at")
    return trained if wanted is None else wanted


def _trained_limits(robot: Robot, info: Mapping[str, Any]) -> Limits:
    if robot.actions is None:
        raise BitvlaError(
            f"the names {', '.join(robot.action_names)} do not tell which actions are positions and which are "
            "displacements; say it in a file of limits: --limits FILE"
        )
    return limits_from(info, robot.actions)


def _check_limits(limits: Limits, info: Mapping[str, Any]) -> None:
    names = [axis.name for axis in limits.axes]
    if names != info["action"]["names"]:
        raise BitvlaError(f"the limits are for {', '.join(names)}; the policy's actions are "
                          f"{', '.join(info['action']['names'])}")  # fmt: skip
    for axis in limits.axes:
        if contradicts(axis.name, axis.kind):
            raise BitvlaError(f"the limits call '{axis.name}' a {axis.kind}, which its name contradicts: to hold, the "
                              "robot would be told to move; correct its kind")  # fmt: skip


def _recorder(
    stack: contextlib.ExitStack, options: Options, info: Mapping[str, Any], hz: float, robot: Robot
) -> Recorder | None:
    if options.record is None:
        return None
    from bitvla.data.lerobot import alone
    from bitvla.robot.recorder import Recorder

    stack.enter_context(alone(options.record, "recording"))
    return Recorder(options.record, info, hz, type(robot).__name__)


def _numbered(log: Path | None, episode: int) -> Path | None:
    return log.with_stem(f"{log.stem}-{episode}") if log and episode else log


@contextlib.contextmanager
def _saved(recorder: Recorder | None) -> Iterator[None]:
    try:
        yield
    finally:
        if recorder:
            recorder.save()


@contextlib.contextmanager
def _stopped_by_sigterm(executor: Executor) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: executor.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
