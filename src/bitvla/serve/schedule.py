"""When to ask for the next chunk, and the proof that actions cannot run out.

Times below are in control steps of 1/f seconds. A chunk of H actions is asked for when `replan` actions of the one in
use have been played, and arrives `delay = ceil(f * latency)` steps later; there is one request at a time.

    step        0         s              s+d        H
    chunk A     |---------|--------------|----------|      asked for at 0, in use until B is there
    inference             |~~~~~~~~~~~~~~|
    chunk B               |.. too late ..|-- in use -----------|     time-aligned: index 0 belongs to step s
                                         |-- in use --------------------|      lagged: index 0 is played on arrival

Time-aligned, the actions for steps that have passed are skipped: each chunk must outlast waiting for the free worker
and one inference, max(s, d) + d <= H. Lagged, every action is played, d steps late: s + d <= H. Some s exists if

    time-aligned   2 * ceil(f * latency) <= H
    lagged             ceil(f * latency) <= H

The promise: as long as no inference takes longer than the bound that was put in, there is never a step without an
action. Mostly an inference may take longer, up to `tolerated_ms`, because it is asked for earlier than it must be.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bitvla.config import Record
from bitvla.errors import BitvlaError
from bitvla.serve.joining import Joining, RealTimeChunking, Replace

Kind = Literal["displacement", "position", "gripper"]
"""What an action value commands. To stand still is zero for a displacement (a motion in each step), and the last value
for a position (an absolute target) and for a gripper (what is held must not be dropped)."""

RECENT_CALLS = 20  # calls after which a slow one is forgotten
SECOND = 1_000_000_000  # clocks count whole nanoseconds, so that a schedule has no rounding


class Settings(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How chunks are played.

    control_hz: actions a second.
    actions: what each value of an action commands.
    mode: "synchronous" stands still while the next chunk is computed.
    alignment: "time_aligned" skips the actions of a chunk whose time has passed; "lagged" plays all of them, late.
    joining: how chunks that overlap become one action.
    replan_every: actions played of a chunk before the next is asked for, at most; None for half of the horizon
        (synchronous: all of it). Asking is moved earlier where the latency needs it.
    quantile, warmup_calls: the latency that must be borne is this quantile of so many calls before the start.
    max_hold_s: standing still for longer, or no control for longer, ends the run.
    slowest: when latency grows in a run, the control rate may sink to this share of control_hz.
    max_age_s: a chunk whose observation is older when it arrives is dropped.
    allow_gaps: start although actions may run out (for experiments).
    """

    control_hz: float
    actions: tuple[Kind, ...]
    mode: Literal["asynchronous", "synchronous"] = "asynchronous"
    alignment: Literal["time_aligned", "lagged"] = "time_aligned"
    joining: Joining = Replace()
    replan_every: int | None = None
    quantile: float = 0.99
    warmup_calls: int = 20
    max_hold_s: float = 1.0
    slowest: float = 0.5
    max_age_s: float | None = None
    allow_gaps: bool = False

    @property
    def period(self) -> int:
        """Nanoseconds of a control step at the full rate."""
        return round(SECOND / self.control_hz)

    @property
    def synchronous(self) -> bool:
        return self.mode == "synchronous"


class Plan(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was found before the start. Steps are control steps at the full rate.

    latency_ms: the bound that the proof is for, from `calls` measured calls.
    delay, replan: d and s of the module's drawing.
    tolerated_ms: as long as no inference takes longer, actions do not run out (0: they do).
    proven: tolerated_ms is at least latency_ms.
    """

    horizon: int
    calls: int
    latency_ms: float
    delay: int
    replan: int
    tolerated_ms: float
    proven: bool


def settings_for(info: Mapping[str, Any], actions: Sequence[Kind], **changes: object) -> Settings:
    """Settings with the control rate that `policy.info()` tells, and its execute_horizon as `replan_every`."""
    known = {"control_hz": info["control_hz"], "replan_every": info["execute_horizon"]}
    return Settings(**{**known, "actions": tuple(actions), **changes})


def check(settings: Settings) -> Settings:
    """Return `settings`, or raise BitvlaError naming the first value that cannot be right."""
    s = settings
    rules = [
        (0 < s.control_hz <= 1000, f"control_hz {s.control_hz} is not within 0 and 1000"),
        (len(s.actions) > 0, "actions is empty: name what each value of an action commands"),
        (s.replan_every is None or s.replan_every >= 1, f"replan_every {s.replan_every} is not at least 1"),
        (0 < s.quantile <= 1, f"quantile {s.quantile} is not within 0 and 1"),
        (s.warmup_calls >= 1, f"warmup_calls {s.warmup_calls} is not at least 1"),
        (0 < s.max_hold_s < math.inf, f"max_hold_s {s.max_hold_s} is not a positive time"),
        (0 < s.slowest <= 1, f"slowest {s.slowest} is not within 0 and 1"),
        (s.max_age_s is None or s.max_age_s > 0, f"max_age_s {s.max_age_s} is not positive"),
        (s.alignment == "time_aligned" or isinstance(s.joining, Replace), "alignment 'lagged' goes with joining "
         "'replace' only: the other methods compare actions of the same moment"),
        (not (s.synchronous and not isinstance(s.joining, Replace)), "mode 'synchronous' goes with joining "
         "'replace' only: its chunks do not overlap"),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise BitvlaError(f"executor settings: {message}")
    s.joining.check()
    return settings


def steps_of(latency: int, period: int) -> int:
    """Control steps until an answer can be played, at least one; `latency` and `period` in nanoseconds."""
    return max(1, -(-latency // period))


def largest_delay(settings: Settings, horizon: int) -> int:
    """The most steps of delay for which some time to ask keeps actions from running out."""
    return horizon if settings.alignment == "lagged" else horizon // 2


def replan_at(settings: Settings, horizon: int, delay: int) -> int:
    """Actions of a chunk to play before the next is asked for, if an answer takes `delay` steps."""
    wanted = settings.replan_every or (horizon if settings.synchronous else max(1, horizon // 2))
    if settings.synchronous:
        return min(wanted, horizon)
    # Time-aligned, a chunk asked for before the last one has moved the robot would bring nothing new.
    return max(0 if settings.alignment == "lagged" else 1, min(wanted, horizon - delay))


def prove(settings: Settings, horizon: int, latencies: Sequence[int], max_prefix: int = 0) -> Plan:
    """Check, before anything moves, that chunks of `horizon` actions come fast enough.

    Args:
        latencies: measured nanoseconds from asking to having.
        max_prefix: the longest frozen prefix that the policy takes (0: it takes none).

    Raises:
        BitvlaError: they do not; with the figures, and the settings nearest to these that would do.
    """
    ordered = sorted(latencies)
    bound = ordered[math.ceil(settings.quantile * len(ordered)) - 1]
    delay = steps_of(bound, settings.period)
    replan = replan_at(settings, horizon, delay)
    proven = not settings.synchronous and delay <= largest_delay(settings, horizon)
    _check_supply(settings, horizon, bound, proven)
    if isinstance(settings.joining, RealTimeChunking):
        _check_prefix(settings, delay, max_prefix)
    return Plan(
        horizon=horizon,
        calls=len(ordered),
        latency_ms=bound / 1e6,
        delay=delay,
        replan=replan,
        tolerated_ms=min(horizon - replan, largest_delay(settings, horizon)) * settings.period / 1e6 if proven else 0.0,
        proven=proven,
    )


class Pace:
    """Control period (ns) and `replan`, kept in step with the latencies of a run.

    When the worst of the last calls would break the inequality, the period is stretched until it holds again, up to
    the slowest rate that is allowed; when they have passed, it returns. `delay` is the worst expected, in steps.
    """

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self._settings, self._plan = settings, plan
        self._recent: deque[int] = deque(maxlen=RECENT_CALLS)
        self.period, self.replan, self.delay = settings.period, plan.replan, plan.delay

    def measured(self, latency: int) -> None:
        """Take a call's latency (ns) into account."""
        settings, plan = self._settings, self._plan
        self._recent.append(latency)
        worst = max(round(plan.latency_ms * 1e6), *self._recent)
        if plan.proven:
            needed = -(-worst // largest_delay(settings, plan.horizon))
            self.period = max(settings.period, min(needed, int(settings.period / settings.slowest)))
        self.delay = steps_of(worst, self.period)
        self.replan = replan_at(settings, plan.horizon, self.delay)


def _check_supply(settings: Settings, horizon: int, bound: int, proven: bool) -> None:
    if settings.synchronous:
        if bound > settings.max_hold_s * SECOND:
            raise BitvlaError(
                f"a call of the policy takes {bound / 1e6:.0f} ms, longer than the robot may stand still "
                f"(max_hold_s {settings.max_hold_s:g}); raise max_hold_s or use a faster machine"
            )
    elif not proven and not settings.allow_gaps:
        raise BitvlaError(_impossible(settings, horizon, bound))


def _impossible(settings: Settings, horizon: int, bound: int) -> str:
    delay, most = steps_of(bound, settings.period), largest_delay(settings, horizon)
    factor = "" if settings.alignment == "lagged" else "2 x "
    # Rounded down, so that what is named can be put in.
    ways = [f"control_hz up to {math.floor(100 * most * SECOND / bound) / 100:g}"] if most else []
    ways += [f"a latency up to {most * settings.period / 1e6:.0f} ms"] if most else []
    ways.append(f"a horizon from {delay if settings.alignment == 'lagged' else 2 * delay}")
    if settings.alignment != "lagged" and delay <= horizon:
        ways.append(f"alignment 'lagged' ({delay} <= {horizon})")
    ways.append(f"mode 'synchronous' (it would stand still for {delay} steps at each chunk)")
    return (
        f"actions would run out: {100 * settings.quantile:g} % of the policy's calls take up to {bound / 1e6:.0f} ms, "
        f"{delay} steps at {settings.control_hz:g} Hz, and {factor}{delay} > {horizon}, the horizon "
        f"({settings.alignment}). Possible are {'; '.join(ways)}"
    )


def _check_prefix(settings: Settings, delay: int, max_prefix: int) -> None:
    if max_prefix == 0:
        raise BitvlaError(
            "joining 'real_time_chunking' needs a policy that takes a frozen prefix (an attribute max_prefix, and "
            "act(observation, prefix=...)), and this one takes none; use joining 'replace' or 'weighted_average'"
        )
    if delay > max_prefix:
        raise BitvlaError(
            f"joining 'real_time_chunking' would freeze {delay} actions at {settings.control_hz:g} Hz, the policy "
            f"takes a prefix of up to {max_prefix}; lower control_hz or use joining 'replace'"
        )
