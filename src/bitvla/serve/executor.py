"""Plays chunks of actions at the control rate while the next chunk is computed.

    executor = Executor(policy, robot, settings_for(policy.info(), actions), log="run.jsonl")
    summary = executor.run(steps=400)

Before anything moves it measures the policy and proves that actions cannot run out (`schedule.prove`). In each control
step it takes the answer that may have come, asks for the next chunk if it is time, sends one action, writes one line
to the log, and waits for the next step. When actions run out nevertheless:

    hold   at once: displacements zero, positions and grippers at their last command. Never an old motion again.
    slow   when the late chunk is there: the control rate sinks until the inequality holds again, down to `slowest`.
    stop   after `max_hold_s` without an action, or without control.

Steps count motion: while the robot stands still, no action of a chunk passes unplayed. However a run ends (goal,
`stop()`, Ctrl-C, an error of policy, robot or guard), the last command is to hold.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from bitvla.config import Record
from bitvla.errors import BitvlaError
from bitvla.serve.guard import Guard
from bitvla.serve.joining import Chunk, RealTimeChunking, Source, Timeline
from bitvla.serve.schedule import SECOND, Pace, Plan, Settings, check, prove

Action = NDArray[np.float32]
CLOSE_SECONDS = 10  # a call that is still running at the end may take so long to be waited for
WARMUP_SECONDS = 120  # a first call that takes longer never ends
KEPT = 1 << 16  # steps that percentiles look back on, so that memory does not grow


class Robot(Protocol):
    """What the executor drives: a robot, or a simulator (`bitvla.sim.base.Simulator` is one)."""

    def observe(self) -> dict[str, Any]:
        """The observation now. Quick: cameras deliver their latest image."""
        ...

    def step(self, action: Action) -> bool | None:
        """Take one action float32 (dim,), without waiting until it is carried out; True when the task is done."""
        ...


class Policy(Protocol):
    """What the executor asks. A policy for real-time chunking also has `max_prefix`, the longest frozen prefix that it
    takes, and act(observation, prefix=...): float32 (n, dim), the first n <= max_prefix actions, which are decided."""

    def reset(self) -> None: ...

    def act(self, observation: dict[str, Any], /) -> Action: ...


class Clock(Protocol):
    """Time in nanoseconds."""

    def now(self) -> int: ...

    def wait_until(self, moment: int) -> None: ...


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> int:
        return time.monotonic_ns()

    def wait_until(self, moment: int) -> None:
        time.sleep(max(0, moment - time.monotonic_ns()) / SECOND)


class Request(NamedTuple):
    """An observation on its way to the policy. `step`: the control step that it belongs to; `observed`: when (ns) that
    began, so that a latency is from looking to having."""

    id: int
    step: int
    observed: int
    observation: dict[str, Any]
    prefix: Action | None


class Answer(NamedTuple):
    """What came back, and when (ns): a chunk or the error that was raised."""

    id: int
    value: Any
    finished: int


class Worker(Protocol):
    """Computes chunks beside the control loop. The executor submits one request at a time."""

    def submit(self, request: Request) -> None: ...

    def take(self) -> Answer | None:
        """The next answer, or None at once."""
        ...

    def close(self) -> None:
        """Wait, not for ever, until the policy is free again: it may not be made for two callers."""
        ...


class ThreadWorker:
    """Asks the policy in a thread. The thread is a daemon: a policy that never answers does not keep the program."""

    def __init__(self, policy: Policy, clock: Clock) -> None:
        self._policy, self._clock = policy, clock
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="policy", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._requests.put(request)

    def take(self) -> Answer | None:
        with contextlib.suppress(queue.Empty):
            return self._answers.get_nowait()
        return None

    def close(self) -> None:
        self._requests.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            value = ask(self._policy, request)
            self._answers.put(Answer(request.id, value, self._clock.now()))


def ask(policy: Any, request: Request) -> Any:
    """The policy's chunk for a request, or the exception that it raised."""
    try:
        if request.prefix is None:
            return policy.act(request.observation)
        return policy.act(request.observation, prefix=request.prefix)
    except Exception as error:  # whatever it is, the control loop must hear of it
        return error


class Recorder(Protocol):
    """Is told of a whole run, while it happens and in the thread that controls the robot: must be quick."""

    def asked(self, request: Request) -> None:
        """The policy was asked."""
        ...

    def answered(self, chunk: Chunk, latency: int) -> None:
        """Its chunk is in use now, `latency` nanoseconds after looking."""
        ...

    def commanded(self, observation: dict[str, Any], planned: Action, step: Step) -> None:
        """A command was sent: the last observation before it, what was planned before the guard, and the log's line."""
        ...

    def ended(self, summary: Summary) -> None:
        """The run is over."""
        ...


class Distribution(Record, frozen=True, kw_only=True):
    """Percentiles of a quantity over the last steps of a run."""

    p50: float
    p95: float
    p99: float
    max: float


class Step(Record, frozen=True, kw_only=True):
    """One control step, a line of the log.

    kind: "play" an action; "hold" because none was there; "wait" for a synchronous policy.
    step: steps of motion before this one. sources: what the action was made of.
    queue: actions left after it. age_ms: of the observation behind its newest source.
    slack_ms: what was left of the control period when all work was done; negative: it was overrun.
    change: Euclidean norm of the change of commanded motion against the step before, in units of action, without
        grippers (for displacements a[n] - a[n-1]; for positions one difference more). jerk: of the next difference.
    seam: the first action of a new chunk.
    """

    time_ms: float
    kind: Literal["play", "hold", "wait"]
    step: int
    action: tuple[float, ...]
    sources: tuple[Source, ...]
    queue: int
    age_ms: float
    slack_ms: float
    change: float
    jerk: float
    seam: bool


class Summary(Record, frozen=True, kw_only=True):
    """A whole run. `idle_s`: standing still for want of actions; `gaps`: how often. `seam` and `inside`: the change of
    motion where a new chunk begins, and elsewhere. `clipped`: what the guard changed, steps by axis and rule."""

    ended: str
    plan: Plan
    seconds: float
    played: int
    held: int
    waited: int
    gaps: int
    idle_s: float
    overruns: int
    slowed: int
    chunks: int
    dropped: int
    latency_ms: Distribution | None
    queue: Distribution | None
    age_ms: Distribution | None
    slack_ms: Distribution | None
    seam: Distribution | None
    inside: Distribution | None
    jerk: Distribution | None
    clipped: dict[str, int]


class Executor:
    """Drives `robot` with `policy`; see the module. One executor is one run.

    Args:
        policy: anything with `act(observation) -> float (horizon, dim)` and `reset()`, local or remote.
        guard: looks at every observation and every action before the robot does.
        log: JSON lines: settings and plan, every chunk, every step, the summary.
        recorder: is told all of that too, with an observation for every step (the robot is asked for it).
        plan: of an earlier run with the same policy; its latency is taken, and nothing is measured again.
        clock, worker: another time, another place to compute; for simulations and tests.

    Raises:
        BitvlaError: the settings cannot be right.
    """

    def __init__(
        self,
        policy: Policy,
        robot: Robot,
        settings: Settings,
        *,
        guard: Guard | None = None,
        log: str | Path | None = None,
        recorder: Recorder | None = None,
        plan: Plan | None = None,
        clock: Clock | None = None,
        worker: Worker | None = None,
    ) -> None:
        self._policy, self._robot, self._guard, self._recorder = policy, robot, guard, recorder
        self._settings = check(settings)
        self._plan = plan
        self._clock = clock or RealClock()
        self._worker = worker or ThreadWorker(policy, self._clock)
        self._journal = _Journal(Path(log) if log else None, settings)
        self._stop = threading.Event()
        self._requests = 0
        self._pending: Request | None = None
        self._step = 0
        self._last: Action | None = None
        self._still_since: int | None = None
        self._seen: dict[str, Any] | None = None  # the observation since the last command, if there was one

    def stop(self) -> None:
        """End the run at its next step; may be called from any thread."""
        self._stop.set()

    def run(self, steps: int | None = None) -> Summary:
        """Measure, prove, then play until the robot says it is done, `steps` actions are played, or `stop()`.

        Raises:
            BitvlaError: the setting is impossible (nothing has moved then), or the run had to end: no action or no
                control for max_hold_s, an unusable answer of the policy, the guard's refusal. The log has a summary.
            KeyboardInterrupt, and what the robot itself raises: passed on, after the last command.
        """
        if self._requests:
            raise BitvlaError("this executor has had its run; make a new one")
        ended = "error"
        try:
            self._prepare()
            ended = self._play(steps)
        except BaseException as error:
            ended = f"{type(error).__name__}: {error}".removeprefix("BitvlaError: ").rstrip(": ")
            raise
        finally:
            try:
                if self._last is not None:
                    self._robot.step(self._hold())
            finally:
                summary = self._journal.close(ended, self._guard)
                self._worker.close()
                if self._recorder and summary:
                    self._recorder.ended(summary)
        assert summary is not None  # only a run that failed before it began has none
        return summary

    # -- before the start ----------------------------------------------------------------

    def _prepare(self) -> None:
        """Find the plan, and get everything ready that depends on it."""
        self._policy.reset()
        max_prefix = getattr(self._policy, "max_prefix", 0)
        if self._plan is None:
            horizon, latencies = self._measure()
            plan = prove(self._settings, horizon, latencies, max_prefix)
            self._policy.reset()
        else:
            known = [round(self._plan.latency_ms * 1e6)]
            plan = prove(self._settings, self._plan.horizon, known, max_prefix)
            plan = msgspec.structs.replace(plan, calls=self._plan.calls)
        self._shape = (plan.horizon, len(self._settings.actions))
        self._pace = Pace(self._settings, plan)
        self._timeline = Timeline(self._settings.joining, plan.replan if self._settings.synchronous else plan.horizon)
        self._journal.begin(plan, self._clock.now())

    def _measure(self) -> tuple[int, list[int]]:
        """Call the policy as the run will: the horizon of its chunks, and latencies in nanoseconds."""
        latencies, horizon = [], 0
        for _ in range(self._settings.warmup_calls + 1):
            now = self._clock.now()
            asked = self._submit(now, self._robot.observe(), None)
            answer = self._wait_for_answer(asked)
            horizon = len(_checked(answer.value, None, len(self._settings.actions)))
            latencies.append(answer.finished - asked.observed)
        # The first call also loads and allocates; no call of the run is like it.
        return horizon, latencies[1:]

    def _wait_for_answer(self, asked: Request) -> Answer:
        while (answer := self._worker.take()) is None:
            if self._stop.is_set():
                raise BitvlaError("stopped while the policy was measured; nothing has moved")
            now = self._clock.now()
            if now - asked.observed > WARMUP_SECONDS * SECOND:
                raise BitvlaError(f"the policy has not answered its first calls within {WARMUP_SECONDS} s")
            self._clock.wait_until(now + SECOND // 1000)
        return answer

    # -- the control loop ----------------------------------------------------------------

    def _play(self, steps: int | None) -> str:
        due = self._clock.now()
        while not self._stop.is_set():
            if steps is not None and self._step >= steps:
                return "steps"
            now = self._clock.now()
            if now - due > self._settings.max_hold_s * SECOND:
                raise BitvlaError(f"the robot was without control for {(now - due) / SECOND:.2f} s; stopped")
            while (answer := self._worker.take()) is not None:
                self._receive(answer, now)
            if self._pending is None and self._is_time():
                self._ask(now)
            # A late start moves the grid: two actions are never closer than a period.
            due = (due if now - due < self._pace.period else now) + self._pace.period
            if self._command(now, due):
                return "done"
            now = self._clock.now()
            due = min(max(due, now), now + self._pace.period)  # the clock may have been set back
            self._clock.wait_until(due)
        return "stop"

    def _is_time(self) -> bool:
        newest = self._timeline.newest
        return newest is None or self._step - newest.anchor >= self._pace.replan

    def _ask(self, now: int) -> None:
        self._seen = observation = self._robot.observe()
        if self._guard:
            self._guard.observe(observation)
        prefix = None
        if isinstance(self._settings.joining, RealTimeChunking):
            longest = min(self._pace.delay, self._policy.max_prefix)  # type: ignore[attr-defined]
            prefix = self._timeline.prefix(self._step, longest)
        self._pending = self._submit(now, observation, prefix)
        if self._recorder:
            self._recorder.asked(self._pending)

    def _submit(self, now: int, observation: dict[str, Any], prefix: Action | None) -> Request:
        self._requests += 1
        request = Request(self._requests, self._step, now, observation, prefix)
        self._worker.submit(request)
        return request

    def _receive(self, answer: Answer, now: int) -> None:
        asked = self._pending
        if asked is None or answer.id != asked.id:
            self._journal.drop(answer.id, "superseded")
            return
        self._pending = None
        actions = _checked(answer.value, self._shape[0], self._shape[1])
        latency = answer.finished - asked.observed
        self._pace.measured(latency)
        oldest = self._settings.max_age_s
        if oldest is not None and now - asked.observed > oldest * SECOND:
            self._journal.drop(asked.id, "late")
            return
        anchor = self._step if self._settings.alignment == "lagged" else asked.step
        frozen = 0 if asked.prefix is None else len(asked.prefix)
        chunk = Chunk(asked.id, anchor, actions, asked.observed, frozen)
        self._timeline.add(chunk)
        self._journal.chunk(chunk, latency)
        if self._recorder:
            self._recorder.answered(chunk, latency)

    def _command(self, now: int, due: int) -> bool:
        """Send the action of this step, or hold; True when the robot is done."""
        planned = self._timeline.at(self._step)
        sources: tuple[Source, ...] = ()
        if planned is None:
            self._check_still(now)
            if self._last is None:
                return False  # nothing has moved yet, so there is nothing to hold
            wanted = action = self._hold()
            if self._guard:
                self._guard.rest()
        else:
            self._still_since = None
            wanted, sources = planned
            action = self._guard(wanted) if self._guard else wanted
        if self._recorder and self._seen is None:
            self._seen = self._robot.observe()
        self._last = action  # before it is sent: an interruption while sending must be followed by the last command
        done = bool(self._robot.step(action))
        newest = self._timeline.newest
        assert newest is not None
        line = self._journal.step(
            now=now,
            kind="play" if sources else "wait" if self._settings.synchronous else "hold",
            step=self._step,
            action=action,
            sources=sources,
            queue=max(0, self._timeline.left(self._step) - 1),
            age=now - newest.observed,
            slack=due - self._clock.now(),
            period=self._pace.period,
        )
        if self._recorder and self._seen is not None:
            self._recorder.commanded(self._seen, wanted, line)
        self._seen = None
        self._step += bool(sources)
        return done

    def _check_still(self, now: int) -> None:
        self._still_since = now if self._still_since is None else self._still_since
        still = now - self._still_since
        if still > self._settings.max_hold_s * SECOND:
            raise BitvlaError(
                f"the policy has not answered in time: no action for {still / SECOND:.2f} s (max_hold_s "
                f"{self._settings.max_hold_s:g}); stopped"
            )

    def _hold(self) -> Action:
        """The command to stand still."""
        assert self._last is not None
        moves = np.array([kind == "displacement" for kind in self._settings.actions])
        return np.where(moves, np.float32(0), self._last)


def _checked(value: Any, horizon: int | None, dim: int) -> Action:
    """The policy's answer as float32 (horizon, dim), or BitvlaError; `horizon` None: any."""
    if isinstance(value, BitvlaError):
        raise value
    if isinstance(value, Exception):
        raise BitvlaError(f"the policy failed: {type(value).__name__}: {value}") from value
    try:
        actions = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise BitvlaError(f"the policy answered {type(value).__name__}, not an array of actions") from None
    if actions.ndim != 2 or actions.shape[1] != dim or actions.shape[0] != (horizon or max(1, actions.shape[0])):
        raise BitvlaError(
            f"the policy answered an array of shape {actions.shape}; the robot needs ({horizon or 'horizon'}, {dim})"
        )
    if not np.isfinite(actions).all():
        raise BitvlaError("the policy answered a value that is not finite; refusing to play it")
    return actions.copy()


class _Journal:
    """Writes the log, and keeps what the summary tells."""

    def __init__(self, path: Path | None, settings: Settings) -> None:
        self._settings = settings
        self._plan: Plan | None = None
        self._file: IO[bytes] | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("wb", buffering=0)  # what was done is on disk even if the machine dies
            except OSError as error:
                raise BitvlaError(f"cannot write the log {path}: {error.strerror}; choose another place") from None
        self._moves = np.array([kind != "gripper" for kind in settings.actions])
        self._positions = np.array([kind == "position" for kind in settings.actions])
        self._counts = dict.fromkeys(("play", "hold", "wait", "gaps", "overruns", "slowed", "chunks", "dropped"), 0)
        self._idle = self._start = self._now = 0
        self._kept = {
            name: deque[float](maxlen=KEPT)
            for name in ("latency_ms", "queue", "age_ms", "slack_ms", "seam", "inside", "jerk")
        }
        self._command: Action | None = None
        self._motion = self._turn = np.zeros(len(settings.actions))
        self._chunk, self._kind = 0, "play"

    def begin(self, plan: Plan, now: int) -> None:
        self._plan, self._start, self._now = plan, now, now
        self._write({"settings": self._settings, "plan": plan})

    def chunk(self, chunk: Chunk, latency: int) -> None:
        self._counts["chunks"] += 1
        self._kept["latency_ms"].append(latency / 1e6)
        facts = {"chunk": chunk.id, "anchor": chunk.anchor, "frozen": chunk.frozen, "latency_ms": latency / 1e6}
        self._write(facts | {"actions": chunk.actions.tolist()})

    def drop(self, chunk: int, why: str) -> None:
        self._counts["dropped"] += 1
        self._write({"dropped": chunk, "why": why})

    def step(
        self,
        *,
        now: int,
        kind: Literal["play", "hold", "wait"],
        step: int,
        action: Action,
        sources: tuple[Source, ...],
        queue: int,
        age: int,
        slack: int,
        period: int,
    ) -> Step:
        counts, kept = self._counts, self._kept
        change, jerk = self._differences(action)
        seam = bool(sources) and sources[-1].chunk != self._chunk
        counts[kind] += 1
        counts["gaps"] += kind == "hold" and self._kind == "play"
        counts["overruns"] += slack < 0
        counts["slowed"] += period > self._settings.period
        self._idle += 0 if sources else period
        self._chunk, self._kind, self._now = (sources[-1].chunk if sources else self._chunk), kind, now
        for name, value in (("queue", queue), ("slack_ms", slack / 1e6), ("jerk", jerk)):
            kept[name].append(value)
        if sources:
            kept["age_ms"].append(age / 1e6)
            kept["seam" if seam else "inside"].append(change)
        line = Step(
            time_ms=(now - self._start) / 1e6,
            kind=kind,
            step=step,
            action=tuple(action.tolist()),
            sources=sources,
            queue=queue,
            age_ms=age / 1e6,
            slack_ms=slack / 1e6,
            change=change,
            jerk=jerk,
            seam=seam,
        )
        self._write(line)
        return line

    def _differences(self, action: Action) -> tuple[float, float]:
        """Norms of the first and second difference of motion; before the first action the robot stood still."""
        before = action if self._command is None else self._command
        motion = np.where(self._positions, action.astype(np.float64) - before, action)
        turn = motion - self._motion
        jerk = turn - self._turn
        self._command, self._motion, self._turn = action, motion, turn
        return float(np.linalg.norm(turn[self._moves])), float(np.linalg.norm(jerk[self._moves]))

    def close(self, ended: str, guard: Guard | None) -> Summary | None:
        """Write and return the summary; None if the run never began."""
        summary = None
        if self._plan is not None:
            counts = self._counts
            summary = Summary(
                ended=ended,
                plan=self._plan,
                seconds=(self._now - self._start) / SECOND,
                played=counts["play"],
                held=counts["hold"],
                waited=counts["wait"],
                gaps=counts["gaps"],
                idle_s=self._idle / SECOND,
                overruns=counts["overruns"],
                slowed=counts["slowed"],
                chunks=counts["chunks"],
                dropped=counts["dropped"],
                clipped=guard.report() if guard else {},
                **{name: _distribution(values) for name, values in self._kept.items()},
            )
        self._write(summary or {"refused": ended})
        if self._file is not None:
            self._file.close()
        return summary

    def _write(self, record: Any) -> None:
        if self._file is not None:
            try:
                self._file.write(msgspec.json.encode(record) + b"\n")
            except OSError as error:
                raise BitvlaError(f"cannot write the log: {error.strerror}; free some space") from None


def _distribution(values: deque[float]) -> Distribution | None:
    if not values:
        return None
    p50, p95, p99, most = np.percentile(values, [50, 95, 99, 100]).tolist()
    return Distribution(p50=p50, p95=p95, p99=p99, max=most)
