"""Synchronous against asynchronous execution: a simulated robot on a wall clock, a policy that takes its time.

    python benchmarks/closed_loop.py src/bitvla/policies/metaworld-mt10-nano.safetensors --json reports/closed_loop.json

Robot, policy and executor are three processes. The robot takes a command 20 times a second and moves one step with
each, also while the executor holds. The policy answers after a given share of its chunk's duration (16 actions: 0.8 s).
`--speed 2` lets everything, the latencies too, happen twice as fast. Asynchronous settings that the executor refuses
are run nevertheless, with gaps, and marked "unproven". Real-time chunking is for policies that were trained for it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bitvla.display import as_json
from bitvla.errors import BitvlaError
from bitvla.evaluate.process import Remote
from bitvla.evaluate.statistics import rate_of
from bitvla.robot.simulated import SimulatedRobot
from bitvla.serve.executor import Executor, Summary
from bitvla.serve.joining import RealTimeChunking
from bitvla.serve.schedule import Plan, Settings

HZ = 20.0
ACTIONS = ("displacement", "displacement", "displacement", "gripper")
TASKS = ("drawer-open-v3", "drawer-close-v3", "door-open-v3", "window-close-v3")
SHARES = (0.25, 0.45, 0.9, 2.0)
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"mode": "synchronous"},
    "asynchronous": {},
    "lagged": {"alignment": "lagged"},
    "real-time chunking": {"joining": RealTimeChunking()},
}
STEPS = 250  # actions after which an episode has failed


class SlowPolicy:
    """In its own process: answers `latency` seconds after it was asked."""

    def __init__(self, path: Path) -> None:
        import bitvla

        self._policy, self.latency = bitvla.load(path, threads=1), 0.0

    def info(self) -> dict[str, Any]:
        return self._policy.info()

    def chunk_seconds(self) -> float:
        return self._policy.config.action.horizon / HZ

    def execute_horizon(self) -> int:
        return self._policy.config.processing.execute_horizon

    def set_latency(self, latency: float) -> None:
        self.latency = latency

    def act(self, observation: dict[str, Any], prefix: Any) -> Any:
        start = time.perf_counter()
        chunk = self._policy.act(observation, prefix=prefix)
        time.sleep(max(0.0, self.latency - (time.perf_counter() - start)))
        return chunk


class RemotePolicy:
    """What the executor sees of it."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self.max_prefix: int = remote.call("info")["max_prefix"]

    def reset(self) -> None:
        pass

    def act(self, observation: dict[str, Any], prefix: Any = None) -> Any:
        return self._remote.call("act", observation, prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--episodes", type=int, default=5, help="of each task (default: 5)")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="latency, in chunks")
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster than life (default: 1)")
    parser.add_argument("--json", type=Path, help="write all episodes there")
    arguments = parser.parse_args()
    # Children find these classes by the name of the module; that of a running script would be theirs.
    import closed_loop as here

    with contextlib.ExitStack() as stack:
        policy = stack.enter_context(Remote(here.SlowPolicy, arguments.policy))
        policy.receive()
        info = policy.call("info")
        modes = [mode for mode in MODES if mode != "real-time chunking" or info["max_prefix"]]
        robots = {task: SimulatedRobot("metaworld", task, info) for task in arguments.tasks}
        for robot in robots.values():
            stack.callback(robot.close)
        results = [
            row
            for share, mode in track(
                [(share, mode) for share in arguments.shares for mode in modes],
                console=Console(stderr=True),
                description="settings",
            )
            for row in run(policy, robots, share, mode, arguments)
        ]
    show(results)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(as_json({"speed": arguments.speed, "control_hz": HZ, "episodes": results}))


def run(
    policy: Remote, robots: dict[str, SimulatedRobot], share: float, mode: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All episodes of one latency and mode. Lagged is left out where time-aligned works, or where it does not."""
    policy.call("set_latency", share * policy.call("chunk_seconds") / arguments.speed)
    settings = Settings(
        control_hz=HZ * arguments.speed,
        actions=ACTIONS,
        replan_every=policy.call("execute_horizon"),
        warmup_calls=5,
        max_hold_s=20.0,
        slowest=1.0,
        allow_gaps=mode == "asynchronous",
        **MODES[mode],
    )
    if mode == "lagged" and not 0.5 < share <= 1:
        return []
    plan: Plan | None = None
    rows = []
    for task, arm in robots.items():
        for seed in range(arguments.episodes):
            arm.start(seed)
            try:
                summary = Executor(RemotePolicy(policy), arm, settings, plan=plan).run(STEPS)
            except BitvlaError as error:
                print(f"{mode} at {share} chunks: {error}", file=sys.stderr)
                return []
            plan = summary.plan
            rows.append(row_of(mode, share, task, seed, arm.solved, summary, arguments.speed))
    return rows


def row_of(
    mode: str, share: float, task: str, seed: int, solved: bool, summary: Summary, speed: float
) -> dict[str, Any]:
    proven = summary.plan.proven or mode == "synchronous"
    return {
        "mode": mode if proven else f"{mode}, unproven",
        "latency": share,
        "task": task,
        "seed": seed,
        "success": solved,
        "seconds": summary.seconds * speed,
        "idle": summary.idle_s * speed,
        "summary": summary,
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "latency / chunk", "mode", "success", "95 %", "s to finish", "idle s", "gaps", "seam", "inside", "jerk"
    )
    for share, mode in dict.fromkeys((row["latency"], row["mode"]) for row in results):
        rows = [row for row in results if (row["latency"], row["mode"]) == (share, mode)]
        solved = [row for row in rows if row["success"]]
        rate = rate_of(row["success"] for row in rows)
        mean = {name: np.mean([row[name] for row in solved or rows]) for name in ("seconds", "idle")}
        smoothness = [
            np.mean([getattr(value, at) for row in rows if (value := getattr(row["summary"], name))])
            for name, at in (("seam", "p50"), ("inside", "p50"), ("jerk", "p95"))
        ]
        table.add_row(
            f"{share:g}",
            mode,
            f"{len(solved)}/{len(rows)}",
            f"{100 * rate.low:.0f}..{100 * rate.high:.0f}",
            f"{mean['seconds']:.2f}",
            f"{mean['idle']:.2f}",
            f"{np.mean([row['summary'].gaps for row in rows]):.1f}",
            *(f"{value:.2f}" for value in smoothness),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
