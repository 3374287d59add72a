"""The executor: what it proves, what it plays, and how it ends. Time is simulated, except where it says so.

pytest tests/test_executor.py
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitvla.config import from_dict, to_dict
from bitvla.errors import BitvlaError
from bitvla.serve.executor import Answer, Executor, Request, Summary, ask
from bitvla.serve.guard import Axis, Guard, Limits
from bitvla.serve.joining import Joining, RealTimeChunking, Replace, TemporalEnsemble, WeightedAverage
from bitvla.serve.schedule import Plan, Settings, largest_delay, prove, settings_for, steps_of

MS = 1_000_000
PERIOD = 50 * MS
KINDS = ("displacement", "position", "gripper")
JOININGS: list[Joining] = [Replace(), WeightedAverage(new=0.3), TemporalEnsemble(decay=0.5), RealTimeChunking()]


class SimulatedClock:
    """Passes only when it is waited for, or when `jump` moves it."""

    def __init__(self) -> None:
        self.time = 7 * MS

    def now(self) -> int:
        return self.time

    def wait_until(self, moment: int) -> None:
        self.time = max(self.time, moment)

    def jump(self, nanoseconds: int) -> None:
        self.time += nanoseconds


class SimulatedWorker:
    """Answers after the given latencies (ns), the last of them for ever."""

    def __init__(self, policy: Any, clock: SimulatedClock, latencies: Iterable[int]) -> None:
        self._policy, self._clock, self._latencies = policy, clock, list(latencies)
        self.answers: list[Answer] = []
        self.submitted: list[Request] = []

    def submit(self, request: Request) -> None:
        latency = self._latencies.pop(0) if len(self._latencies) > 1 else self._latencies[0]
        self.submitted.append(request)
        self.answers.append(Answer(request.id, ask(self._policy, request), self._clock.now() + latency))

    def take(self) -> Answer | None:
        ready = [answer for answer in self.answers if answer.finished <= self._clock.now()]
        if ready:
            self.answers.remove(ready[0])
        return ready[0] if ready else None

    def close(self) -> None:
        pass


class Numbered:
    """Its actions tell where they come from: (call, index, noise). Continues a prefix, though not to the last bit."""

    def __init__(self, horizon: int, max_prefix: int = 0, fails_at: int = 0, error: Exception | None = None) -> None:
        self.horizon, self.max_prefix, self.calls, self.resets = horizon, max_prefix, 0, 0
        self._fails_at, self._error = fails_at, error
        self.prefixes: dict[int, np.ndarray] = {}

    def reset(self) -> None:
        self.resets += 1

    def act(self, observation: dict[str, Any], prefix: Any = None) -> np.ndarray:
        self.calls += 1
        if self._error and self.calls == self._fails_at:
            raise self._error
        chunk = np.random.default_rng(self.calls).normal(size=(self.horizon, 3)).astype(np.float32)
        chunk[:, 0], chunk[:, 1] = self.calls, np.arange(self.horizon)
        if prefix is not None:
            assert len(prefix) <= self.max_prefix
            self.prefixes[self.calls] = prefix
            chunk[: len(prefix)] = prefix + 0.001
        return chunk


class Recorder:
    """A robot that keeps what it was told and when; `busy` says how long (ns) each action keeps it."""

    def __init__(self, clock: Any = None, busy: Iterable[int] = (), on_step: Callable[[int], Any] = lambda n: None):
        self._clock, self._busy, self._on_step = clock, list(busy), on_step
        self.actions: list[np.ndarray] = []
        self.times: list[int] = []
        self.observed = 0

    def observe(self) -> dict[str, Any]:
        self.observed += 1
        return {"images": {}, "state": np.zeros(3, np.float32), "instruction": "go"}

    def step(self, action: np.ndarray) -> Any:
        self.actions.append(action.copy())
        if self._clock:
            self.times.append(self._clock.now())
            self._clock.jump(self._busy.pop(0) if self._busy else 0)
        return self._on_step(len(self.actions))


class Bench:
    """A policy, a robot and an executor in simulated time. The first two latencies are those of the warm-up."""

    def __init__(
        self,
        latencies: Iterable[int],
        horizon: int = 8,
        busy: Iterable[int] = (),
        on_step: Callable[[int], Any] = lambda n: None,
        policy: Any = None,
        **more: Any,
    ) -> None:
        kept = {name: more.pop(name) for name in ("log", "guard", "plan") if name in more}
        settings = {"control_hz": 20.0, "actions": KINDS, "warmup_calls": 1, "max_hold_s": 100.0, "slowest": 1.0}
        self.settings = Settings(**{**settings, **more})
        self.clock = SimulatedClock()
        self.policy = policy or Numbered(horizon, max_prefix=horizon)
        self.robot = Recorder(self.clock, busy, on_step)
        self.worker = SimulatedWorker(self.policy, self.clock, latencies)
        self.executor = Executor(self.policy, self.robot, self.settings, clock=self.clock, worker=self.worker, **kept)

    def run(self, steps: int | None = 60) -> Summary:
        return self.executor.run(steps)


def log_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- the proof ---------------------------------------------------------------------------


@given(
    horizon=st.integers(1, 40), latency=st.integers(1, 3000), lagged=st.booleans(), hz=st.sampled_from([5.0, 20, 80])
)
def test_the_proof_is_the_inequality(horizon: int, latency: int, lagged: bool, hz: float) -> None:
    settings = Settings(control_hz=hz, actions=KINDS, alignment="lagged" if lagged else "time_aligned")
    steps = math.ceil(latency * hz / 1000 - 1e-9)
    holds = steps <= horizon if lagged else 2 * steps <= horizon
    if holds:
        plan = prove(settings, horizon, [latency * MS])
        assert plan.proven
        assert plan.delay == steps
        assert plan.tolerated_ms >= plan.latency_ms
    else:
        with pytest.raises(BitvlaError, match="actions would run out"):
            prove(settings, horizon, [latency * MS])


def test_a_refusal_names_the_figures_and_what_would_do() -> None:
    settings = Settings(control_hz=20.0, actions=KINDS)
    with pytest.raises(BitvlaError) as refusal:
        prove(settings, 16, [612 * MS] * 20)
    assert str(refusal.value) == (
        "actions would run out: 99 % of the policy's calls take up to 612 ms, 13 steps at 20 Hz, and 2 x 13 > 16, the "
        "horizon (time_aligned). Possible are control_hz up to 13.07; a latency up to 400 ms; a horizon from 26; "
        "alignment 'lagged' (13 <= 16); mode 'synchronous' (it would stand still for 13 steps at each chunk)"
    )
    slower = msgspec.structs.replace(settings, control_hz=13.07)
    lagged = msgspec.structs.replace(settings, alignment="lagged")
    assert prove(slower, 16, [612 * MS]).proven
    assert not prove(msgspec.structs.replace(settings, control_hz=13.08, allow_gaps=True), 16, [612 * MS]).proven
    assert prove(settings, 16, [400 * MS]).proven
    assert prove(settings, 26, [612 * MS]).proven
    assert prove(lagged, 16, [612 * MS]).proven
    assert not prove(msgspec.structs.replace(settings, mode="synchronous"), 16, [612 * MS]).proven


def test_the_bound_is_a_quantile_that_was_measured() -> None:
    settings = Settings(control_hz=20.0, actions=KINDS)
    latencies = [n * MS for n in range(1, 101)]
    assert prove(settings, 16, latencies[::-1]).latency_ms == 99
    assert prove(settings, 16, latencies[:20]).latency_ms == 20


def test_the_control_rate_and_the_execute_horizon_come_from_the_policy_file() -> None:
    settings = settings_for({"control_hz": 20.0, "execute_horizon": 3}, KINDS, max_hold_s=3.0)
    assert (settings.control_hz, settings.replan_every, settings.max_hold_s) == (20.0, 3, 3.0)
    # Three of five cannot be played when an answer takes two: asked for earlier.
    assert prove(settings, 5, [51 * MS]).replan == 3
    assert prove(msgspec.structs.replace(settings, replan_every=5), 5, [51 * MS]).replan == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_hz": 0.0}, "control_hz 0.0"),
        ({"control_hz": math.nan}, "control_hz nan"),
        ({"actions": ()}, "actions is empty"),
        ({"replan_every": 0}, "replan_every 0"),
        ({"quantile": 99.0}, "quantile 99.0"),
        ({"max_hold_s": math.inf}, "max_hold_s inf"),
        ({"slowest": 0.0}, "slowest 0.0"),
        ({"alignment": "lagged", "joining": TemporalEnsemble()}, "'lagged' goes with joining 'replace'"),
        ({"mode": "synchronous", "joining": WeightedAverage()}, "'synchronous' goes with joining 'replace'"),
        ({"joining": WeightedAverage(new=0.0)}, "joining.new 0.0"),
        ({"joining": TemporalEnsemble(decay=math.nan)}, "joining.decay nan"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BitvlaError, match=message):
        Bench([MS], **changes)


@pytest.mark.parametrize("joining", JOININGS)
def test_settings_survive_a_file(joining: Joining) -> None:
    settings = Settings(control_hz=20.0, actions=KINDS, joining=joining)
    assert from_dict(Settings, json.loads(msgspec.json.encode(to_dict(settings))), "test") == settings


def test_an_impossible_setting_moves_nothing(tmp_path: Path) -> None:
    bench = Bench([450 * MS], horizon=16, log=tmp_path / "run.jsonl")
    with pytest.raises(BitvlaError, match="2 x 9 > 16"):
        bench.run()
    assert bench.robot.actions == []
    assert "2 x 9 > 16" in log_of(tmp_path / "run.jsonl")[-1]["refused"]


def test_a_policy_without_prefix_cannot_be_conditioned() -> None:
    with pytest.raises(BitvlaError, match="takes none"):
        Bench([100 * MS], joining=RealTimeChunking(), policy=Numbered(8)).run()
    with pytest.raises(BitvlaError, match=r"would freeze 2 actions .* up to 1"):
        Bench([100 * MS], joining=RealTimeChunking(), policy=Numbered(8, max_prefix=1)).run()


def test_a_stop_while_the_policy_is_measured_does_not_wait_for_all_calls() -> None:
    class Slow(Numbered):
        def act(self, observation: dict[str, Any], prefix: Any = None) -> np.ndarray:
            if self.calls == 3:
                bench.executor.stop()
            return super().act(observation, prefix)

    bench = Bench([MS], policy=Slow(8), warmup_calls=1000)
    with pytest.raises(BitvlaError, match="nothing has moved"):
        bench.run()
    assert bench.policy.calls == 4
    assert not bench.robot.actions


def test_a_plan_can_be_used_again() -> None:
    plan = Bench([MS, 90 * MS]).run().plan
    again = Bench([90 * MS], plan=plan)
    summary = again.run(40)
    assert (summary.plan, summary.played, summary.held) == (plan, 40, 0)
    assert again.worker.submitted[0].step == 0
    assert len(again.worker.submitted) <= 11  # none to measure
    with pytest.raises(BitvlaError, match=r"needs \(8, 3\)"):
        Bench([90 * MS], plan=plan, horizon=9).run()
    with pytest.raises(BitvlaError, match="actions would run out"):
        Bench([90 * MS], plan=plan, control_hz=60.0).run()


# -- supply ------------------------------------------------------------------------------


@st.composite
def provable(draw: st.DrawFn) -> dict[str, Any]:
    """A setting that is proven, latencies up to what the plan tolerates, and a robot that is sometimes slow."""
    horizon = draw(st.integers(2, 20))
    lagged = draw(st.booleans())
    joining = Replace() if lagged else draw(st.sampled_from(JOININGS))
    settings = {
        "alignment": "lagged" if lagged else "time_aligned",
        "joining": joining,
        "replan_every": draw(st.none() | st.integers(1, horizon)),
    }
    full = Settings(control_hz=20.0, actions=KINDS, **settings)
    bound = draw(st.integers(1, largest_delay(full, horizon) * PERIOD))
    plan = prove(full, horizon, [bound], max_prefix=horizon)
    longest = round(plan.tolerated_ms * MS)
    latencies = [*draw(st.lists(st.integers(1, longest), max_size=30)), longest]
    busy = draw(st.lists(st.integers(0, PERIOD * 3 // 2), max_size=40))
    return {"latencies": [MS, bound, *latencies], "horizon": horizon, "busy": busy, **settings}


@given(provable())
def test_actions_never_run_out_where_the_proof_holds(setting: dict[str, Any]) -> None:
    bench = Bench(**setting)
    summary = bench.run(80)
    assert (summary.played, summary.held, summary.gaps, summary.idle_s) == (80, 0, 0, 0)
    assert summary.plan.proven
    assert min(np.diff(bench.robot.times[:80])) >= PERIOD


@given(
    horizon=st.integers(1, 16),
    delays=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    wanted=st.integers(1, 16),
    lagged=st.booleans(),
)
def test_every_gap_is_counted(horizon: int, delays: list[int], wanted: int, lagged: bool) -> None:
    """Against a calculation from chunk to chunk, without control steps."""
    wanted = min(wanted, horizon)
    alignment = "lagged" if lagged else "time_aligned"
    bench = Bench(
        [MS, *(delay * PERIOD for delay in [delays[0], *delays])],
        horizon=horizon,
        alignment=alignment,
        replan_every=wanted,
        allow_gaps=True,
        slowest=1.0,
    )
    summary = bench.run(100)
    assert summary.played == 100
    assert (summary.held, summary.gaps) == gaps(horizon, delays, wanted, lagged, 100)
    assert summary.idle_s == pytest.approx(summary.held * 0.05)


def gaps(horizon: int, delays: list[int], wanted: int, lagged: bool, steps: int) -> tuple[int, int]:
    """Steps without an action, and how many times there are some."""
    endless = iter([*delays, *[delays[-1]] * 2 * steps])
    seen = [delays[0], next(endless)]  # warm-up and the first chunk
    held = count = 0
    anchor = step = 0
    while True:
        replan = max(0 if lagged else 1, min(wanted, horizon - max(seen[0], *seen[1:][-20:])))
        end = anchor + horizon
        asked = max(step, anchor + replan)
        if end >= steps:
            return held, count
        delay = next(endless)
        seen.append(delay)
        missing = max(0, asked + delay - end)
        held, count = held + missing, count + (missing > 0)
        step = asked + delay - missing
        anchor = step if lagged else asked


def test_synchronous_stands_still_for_each_inference() -> None:
    bench = Bench([MS, 120 * MS], horizon=8, mode="synchronous", replan_every=5)
    summary = bench.run(20)
    assert (summary.played, summary.held, summary.waited, summary.gaps) == (20, 0, 9, 0)
    assert [(int(a[0]), int(a[1])) for a in bench.robot.actions[:9]] == [
        (3, 0), (3, 1), (3, 2), (3, 3), (3, 4), (0, 4), (0, 4), (0, 4), (4, 0),
    ]  # fmt: skip
    assert summary.idle_s == pytest.approx(0.45)


def test_synchronous_is_refused_where_it_would_stand_too_long() -> None:
    with pytest.raises(BitvlaError, match="longer than the robot may stand still"):
        Bench([1200 * MS], mode="synchronous", max_hold_s=1.0).run()


# -- what is played ----------------------------------------------------------------------


@given(provable())
def test_every_action_is_what_the_log_says(tmp_path_factory: pytest.TempPathFactory, setting: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    bench = Bench(**setting, log=path)
    bench.run(40)
    lines = log_of(path)
    chunks: dict[int, Any] = {}
    played = iter(bench.robot.actions)
    joining = bench.settings.joining
    for line in lines:
        if "chunk" in line:
            chunks[line["chunk"]] = line
        if "kind" not in line:
            continue
        action = next(played)
        assert line["action"] == pytest.approx(action.tolist(), abs=0)
        total = sum(w * np.array(chunks[c]["actions"][row]) for c, row, w in line["sources"])
        np.testing.assert_allclose(action, total, rtol=1e-6, atol=1e-6)
        for chunk, row, _ in line["sources"]:
            assert chunks[chunk]["anchor"] + row == line["step"]
        np.testing.assert_allclose(action, by_definition(joining, chunks, line["step"]), rtol=1e-5, atol=1e-6)


def by_definition(joining: Joining, chunks: dict[int, Any], step: int) -> Any:
    """The action for a step from all chunks that have arrived, by each method's formula."""
    rows = [
        (np.array(chunk["actions"][step - chunk["anchor"]]), step - chunk["anchor"] >= chunk["frozen"])
        for chunk in chunks.values()
        if 0 <= step - chunk["anchor"] < len(chunk["actions"])
    ]
    values = [row for row, _ in rows]
    if isinstance(joining, Replace):
        return values[-1]
    if isinstance(joining, RealTimeChunking):
        return [row for row, free in rows if free][-1]
    if isinstance(joining, WeightedAverage):
        planned = values[0]
        for value in values[1:]:
            planned = (1 - joining.new) * planned + joining.new * value
        return planned
    weights = np.exp(-joining.decay * np.arange(len(values)))
    return np.einsum("i,ij->j", weights / weights.sum(), values)


@given(st.sampled_from(JOININGS), st.integers(1, 30))
def test_weights_are_an_average(joining: Joining, count: int) -> None:
    weights = joining.weights(count)
    assert weights.shape == (count,)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_a_frozen_prefix_is_what_is_played_meanwhile() -> None:
    bench = Bench([MS, 140 * MS], horizon=8, joining=RealTimeChunking(), replan_every=4)
    bench.run(40)
    actions = np.array(bench.robot.actions)
    requests = {request.id: request for request in bench.worker.submitted}
    assert len(bench.policy.prefixes) > 5
    for call, prefix in bench.policy.prefixes.items():
        start = requests[call].step
        assert len(prefix) == 3
        np.testing.assert_array_equal(prefix, actions[start : start + 3][: len(prefix)])


def test_an_early_chunk_waits_for_the_end_of_its_prefix() -> None:
    bench = Bench([MS, 140 * MS, 10 * MS], horizon=8, joining=RealTimeChunking(), replan_every=4)
    bench.run(20)
    # Asked for at 4 with three frozen actions; there from 5 on, in use from 7 on.
    assert [round(float(a[0])) for a in bench.robot.actions[:9]] == [3, 3, 3, 3, 3, 3, 3, 4, 4]


def test_an_answer_to_an_older_question_is_dropped(tmp_path: Path) -> None:
    bench = Bench([MS, 90 * MS], log=tmp_path / "run.jsonl")

    def meddle(step: int) -> None:
        if step == 10:
            bench.worker.answers.insert(0, Answer(1, np.full((8, 3), 99.0), bench.clock.now()))

    bench.robot._on_step = meddle
    summary = bench.run(30)
    assert summary.dropped == 1
    assert {"dropped": 1, "why": "superseded"} in log_of(tmp_path / "run.jsonl")
    assert max(action[0] for action in bench.robot.actions) < 99


def test_a_chunk_that_saw_too_long_ago_is_dropped(tmp_path: Path) -> None:
    latencies = [MS, 90 * MS, 90 * MS, 90 * MS, 350 * MS, 90 * MS]
    bench = Bench(latencies, log=tmp_path / "run.jsonl", max_age_s=0.3)
    summary = bench.run(40)
    assert summary.dropped == 1
    late = [line["dropped"] for line in log_of(tmp_path / "run.jsonl") if line.get("why") == "late"]
    assert late == [5]
    assert 5 not in {int(action[0]) for action in bench.robot.actions}


def test_observations_are_taken_only_to_ask() -> None:
    bench = Bench([MS, 90 * MS])
    summary = bench.run(40)
    assert bench.robot.observed == len(bench.worker.submitted)
    assert summary.chunks <= len(bench.worker.submitted) - 2
    assert bench.policy.resets == 2  # the episode begins after the warm-up


# -- when something goes wrong -----------------------------------------------------------


def test_holding_is_zero_for_displacements_and_the_last_value_for_the_rest() -> None:
    bench = Bench([MS, 90 * MS, 90 * MS, 700 * MS, 90 * MS], horizon=4, policy=Numbered(4), on_step=lambda n: None)
    summary = bench.run(12)
    assert (summary.gaps, summary.held) == (1, 12)
    held = [n for n, action in enumerate(bench.robot.actions[:-1]) if action[0] == 0]
    assert len(held) == 12
    for n in held:
        np.testing.assert_array_equal(bench.robot.actions[n][1:], bench.robot.actions[held[0] - 1][1:])


def test_it_slows_down_when_latency_grows_and_recovers() -> None:
    latencies = [MS, 100 * MS, *[100 * MS] * 3, *[290 * MS] * 4, *[100 * MS] * 60]
    bench = Bench(latencies, horizon=8, slowest=0.5)
    summary = bench.run(300)
    periods = np.diff(bench.robot.times[:-1])
    # 290 ms in at most 4 of 8 steps: 72.5 ms a step.
    assert {int(period) for period in periods} == {PERIOD, 290 * MS // 4}
    assert periods[-1] == PERIOD
    assert summary.slowed > 0
    assert summary.gaps <= 1  # the first slow answer may come too late, no later one


def test_it_never_gets_slower_than_allowed() -> None:
    bench = Bench([MS, 100 * MS, 100 * MS, 900 * MS], horizon=8, slowest=0.8, max_hold_s=3.0)
    bench.run(40)
    assert max(np.diff(bench.robot.times)) == pytest.approx(PERIOD / 0.8)


def test_without_an_answer_it_stops(tmp_path: Path) -> None:
    bench = Bench([MS, 90 * MS, 90 * MS, 10**15], log=tmp_path / "run.jsonl", max_hold_s=0.5)
    with pytest.raises(BitvlaError, match="has not answered in time"):
        bench.run()
    summary = log_of(tmp_path / "run.jsonl")[-1]
    assert summary["ended"].startswith("the policy has not answered in time")
    assert (summary["played"], summary["held"]) == (8, 11)
    assert_last_is_hold(bench.robot)


def test_a_first_call_that_never_ends_is_given_up() -> None:
    bench = Bench([10**15])
    with pytest.raises(BitvlaError, match="first calls"):
        bench.run()
    assert bench.robot.actions == []


def assert_last_is_hold(robot: Recorder) -> None:
    np.testing.assert_array_equal(robot.actions[-1], [0, *robot.actions[-2][1:]])


@pytest.mark.parametrize(
    ("error", "message"),
    [(BitvlaError("the state is nan"), "the state is nan"), (ValueError("bad"), "the policy failed: ValueError: bad")],
)
def test_an_error_of_the_policy_stops_the_robot(tmp_path: Path, error: Exception, message: str) -> None:
    bench = Bench([MS, 90 * MS], policy=Numbered(8, fails_at=6, error=error), log=tmp_path / "run.jsonl")
    with pytest.raises(BitvlaError, match=message):
        bench.run()
    assert log_of(tmp_path / "run.jsonl")[-1]["ended"] == message
    assert_last_is_hold(bench.robot)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.full((8, 3), np.nan), "not finite"),
        (np.zeros((8, 2)), r"shape \(8, 2\)"),
        (np.zeros((7, 3)), r"shape \(7, 3\)"),
        (np.zeros(3), r"shape \(3,\)"),
        ("hello", "not an array"),
        (None, "answered"),
    ],
)
def test_an_unusable_answer_is_never_played(answer: Any, message: str) -> None:
    policy = Numbered(8)
    bench = Bench([MS, 90 * MS], policy=policy)
    good = policy.act
    policy.act = lambda observation: answer if policy.calls >= 5 else good(observation)  # type: ignore[method-assign]
    with pytest.raises(BitvlaError, match=message):
        bench.run()
    assert_last_is_hold(bench.robot)


def test_control_c_is_passed_on_after_the_last_command() -> None:
    def interrupt(step: int) -> None:
        if step == 10:
            raise KeyboardInterrupt

    bench = Bench([MS, 90 * MS], on_step=interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert len(bench.robot.actions) == 11
    np.testing.assert_array_equal(bench.robot.actions[-1][0], 0)


def test_stop_ends_the_run() -> None:
    bench = Bench([MS, 90 * MS], on_step=lambda step: bench.executor.stop() if step == 10 else None)
    summary = bench.run(None)
    assert (summary.ended, summary.played) == ("stop", 10)
    assert_last_is_hold(bench.robot)


def test_a_robot_that_is_done_ends_the_run() -> None:
    bench = Bench([MS, 90 * MS], on_step=lambda step: step == 10)
    assert (bench.run().ended, len(bench.robot.actions)) == ("done", 11)
    with pytest.raises(BitvlaError, match="has had its run"):
        bench.run()


def test_a_clock_that_is_set_back_does_not_keep_the_robot_waiting() -> None:
    bench = Bench([MS, 90 * MS], on_step=lambda step: bench.clock.jump(-400 * MS) if step == 10 else None)
    assert bench.run(40).played == 40
    elapsed = np.diff(bench.robot.times)
    assert elapsed[9] == PERIOD - 400 * MS
    assert set(elapsed[:9]) | set(elapsed[10:]) == {PERIOD}


def test_a_clock_that_jumps_a_little_costs_steps_and_no_burst() -> None:
    bench = Bench([MS, 90 * MS], on_step=lambda step: bench.clock.jump(400 * MS) if step == 10 else None, horizon=16)
    summary = bench.run(40)
    assert (summary.played, summary.overruns) == (40, 1)
    assert min(np.diff(bench.robot.times[:-1])) >= PERIOD


def test_waking_up_late_is_followed_by_a_whole_period() -> None:
    bench = Bench([MS, 90 * MS])
    wait = bench.clock.wait_until

    def oversleep(moment: int) -> None:
        wait(moment + (120 * MS if len(bench.robot.actions) == 10 else 0))

    bench.clock.wait_until = oversleep  # type: ignore[method-assign]
    bench.run(40)
    elapsed = np.diff(bench.robot.times)
    assert elapsed[9] == PERIOD + 120 * MS
    assert set(elapsed[:9]) | set(elapsed[10:]) == {PERIOD}


def test_after_a_slow_answer_it_asks_earlier_for_a_while() -> None:
    latencies = [MS, 90 * MS, 90 * MS, 90 * MS, 290 * MS, *[90 * MS] * 9, 290 * MS, 90 * MS]
    bench = Bench(latencies, horizon=16, replan_every=12)
    summary = bench.run(400)
    asked = np.diff([request.step for request in bench.worker.submitted[2:]])
    # 16 actions less the 6 steps of a slow answer, until 20 answers have passed.
    assert asked.tolist() == [12, 12, *[10] * 30, *[12] * (len(asked) - 32)]
    assert summary.gaps == 1  # the second slow answer is expected


def test_a_robot_without_control_for_too_long_is_stopped() -> None:
    bench = Bench([MS, 90 * MS], max_hold_s=0.5)
    wait = bench.clock.wait_until

    def suspended(moment: int) -> None:
        wait(moment + (600 * MS if len(bench.robot.actions) == 10 else 0))

    bench.clock.wait_until = suspended  # type: ignore[method-assign]
    with pytest.raises(BitvlaError, match=r"without control for 0\.60 s"):
        bench.run()
    assert_last_is_hold(bench.robot)


def test_the_guard_comes_last() -> None:
    axes = tuple(Axis(name=f"a{n}", kind=kind, low=-2.0, high=2.0) for n, kind in enumerate(KINDS))
    bench = Bench([MS, 90 * MS], guard=Guard(Limits(axes=axes), 20.0))
    summary = bench.run(40)
    assert np.abs(bench.robot.actions).max() == 2
    assert summary.clipped["a0: speed"] == 40  # the number of the call, from 3


# -- what is measured --------------------------------------------------------------------


def test_the_log_tells_depth_age_slack_change_and_jerk(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    bench = Bench([MS, 90 * MS], busy=[20 * MS] * 100, log=path)
    summary = bench.run(40)
    lines = log_of(path)
    assert lines[0]["settings"]["control_hz"] == 20
    assert from_dict(Plan, lines[0]["plan"], "log") == summary.plan
    assert from_dict(Summary, lines[-1], "log") == summary
    steps = [line for line in lines if "kind" in line]
    assert [step["step"] for step in steps] == list(range(40))
    assert {step["slack_ms"] for step in steps} == {30.0}
    # Asked for after 4 of 8, there 2 steps later: the third action of the new chunk leaves 5 behind it.
    assert [step["queue"] for step in steps[:8]] == [7, 6, 5, 4, 3, 2, 5, 4]
    assert [step["age_ms"] for step in steps[:8]] == [100, 150, 200, 250, 300, 350, 100, 150]
    assert [step["seam"] for step in steps[:8]] == [True, False, False, False, False, False, True, False]
    actions = np.array([step["action"] for step in steps], np.float64)
    motion = np.stack([actions[:, 0], np.diff(actions[:, 1], prepend=actions[0, 1])], axis=1)
    change = np.diff(motion, axis=0, prepend=0 * motion[:1])
    jerk = np.diff(change, axis=0, prepend=0 * change[:1])
    np.testing.assert_allclose([step["change"] for step in steps], np.linalg.norm(change, axis=1), rtol=1e-6)
    np.testing.assert_allclose([step["jerk"] for step in steps], np.linalg.norm(jerk, axis=1), rtol=1e-6)
    assert summary.jerk
    assert summary.jerk.max == pytest.approx(np.linalg.norm(jerk, axis=1).max())
    assert summary.age_ms
    assert summary.age_ms.max == 350


def test_a_log_that_cannot_be_written_is_refused_before_anything_moves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BitvlaError, match="cannot write the log"):
        Bench([MS], log=tmp_path / "file" / "run.jsonl")


# -- real time ---------------------------------------------------------------------------


class Sleepy(Numbered):
    def act(self, observation: dict[str, Any], prefix: Any = None) -> np.ndarray:
        time.sleep(0.003)
        return super().act(observation, prefix)


def test_it_runs_in_real_time_with_a_thread() -> None:
    robot = Recorder()
    settings = Settings(control_hz=100.0, actions=KINDS, warmup_calls=3, allow_gaps=True, max_hold_s=20.0)
    executor = Executor(Sleepy(20), robot, settings)
    summary = executor.run(40)
    assert summary.played == 40
    assert summary.seconds >= 0.38
    assert summary.chunks >= 2
    assert summary.latency_ms
    assert summary.latency_ms.p50 >= 3
    assert "policy" not in {thread.name for thread in threading.enumerate() if not thread.daemon}


class Alone(Numbered):
    """Does not bear two callers at once."""

    def __init__(self) -> None:
        super().__init__(20)
        self.inside = threading.Lock()

    def act(self, observation: dict[str, Any], prefix: Any = None) -> np.ndarray:
        assert self.inside.acquire(blocking=False)
        time.sleep(0.04)
        self.inside.release()
        return super().act(observation)


def test_when_a_run_has_ended_the_policy_is_free() -> None:
    policy = Alone()
    settings = Settings(control_hz=100.0, actions=KINDS, warmup_calls=1, allow_gaps=True, max_hold_s=20.0)
    plan = None
    for steps in (1, 11, 12, 13):  # ended while the next chunk is computed
        executor = Executor(policy, Recorder(), settings, plan=plan)
        plan = executor.run(steps).plan
        assert not policy.inside.locked()


PROGRAM = """
import numpy as np
from bitvla.serve.executor import Executor
from bitvla.serve.schedule import Settings

class Policy:
    def reset(self): pass
    def act(self, observation): return np.ones((10, 2), np.float32)

class Robot:
    def observe(self): return {}
    def step(self, action): print(*action, flush=True)

Executor(Policy(), Robot(), Settings(control_hz=50.0, actions=("displacement", "gripper"), allow_gaps=True)).run()
"""


def test_control_c_in_a_real_process_ends_with_the_hold_command() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "1.0 1.0\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().splitlines()[-1] == "0.0 1.0"
        assert process.stderr
        assert "KeyboardInterrupt" in process.stderr.read()


def test_steps_are_whole_and_at_least_one() -> None:
    assert [steps_of(latency * MS, PERIOD) for latency in (0, 1, 50, 51, 100)] == [1, 1, 1, 2, 2]
