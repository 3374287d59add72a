"""The demonstration: the shipped policy drives the simulator through ten tasks; a table and an HTML report."""

from __future__ import annotations

import statistics
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bitvla.errors import BitvlaError
from bitvla.evaluate.policy_host import PolicySource
from bitvla.evaluate.record import Episode
from bitvla.evaluate.report import plain_task, report
from bitvla.evaluate.result import Result
from bitvla.evaluate.rollout import evaluate
from bitvla.evaluate.worker import SimulatorSource

SHIPPED = "metaworld-mt10-nano.safetensors"
REPORT_FOLDER = Path("reports") / "demo"


def demo(
    policy: PolicySource | Path | None = None,
    out: Path | None = None,
    processes: int | None = None,
    *,
    env: SimulatorSource = "metaworld",
    suite: str = "mt10",
) -> dict[str, Any]:
    """Run one unseen episode of every task with held-out sentences, and write `out`/report.html.

    Args:
        policy: a policy file; by default the shipped one.
        out: folder of the record, the films and the report (default: reports/demo).
        processes: simulators side by side.

    Returns what the command prints: an entry an episode, memory, sizes and the report's path.

    Raises:
        BitvlaError: no policy is there, or the simulator cannot run; with the command that mends it.
    """
    folder = out or REPORT_FOLDER
    console = Console(stderr=True)

    def told(episode: Episode) -> None:
        verdict = "[green]done[/green]" if episode.success else "[red]not done[/red]"
        console.print(f"{plain_task(episode.task)}: “{escape(episode.instruction)}” {verdict}, {episode.steps} steps")

    with as_file(files("bitvla").joinpath("policies", SHIPPED)) as shipped:
        source = shipped if policy is None else policy
        if isinstance(source, Path) and not source.is_file():
            raise BitvlaError(f"there is no policy file {source}; give one with --policy FILE")
        console.print(f"running {source.name if isinstance(source, Path) else 'a policy'} closed loop in {env}")
        result = evaluate(
            source,
            env=env,
            suite=suite,
            episodes=1,
            processes=processes,
            out=folder / "result.json",
            films=folder / "films",
            resume=False,
            on_episode=told,
            console=console,
        )
    page = report(folder / "result.json", folder / "report.html")
    return _summary(result) | {"report": str(page.resolve())}


def _summary(result: Result) -> dict[str, Any]:
    policy = result.policy
    return {
        "episodes": [_row(episode, result) for episode in result.episodes],
        "tasks_done": f"{result.total.successes} of {result.total.total}",
        "policy_process_peak_MB": result.policy_peak_bytes / 1e6,
        "policy_file_MB": policy.file_bytes / 1e6,
        "same_weights_in_bf16_MB": policy.bf16_bytes / 1e6,
        "instruction_set": policy.isa,
        "seconds": result.wall_seconds,
    }


def _row(episode: Episode, result: Result) -> dict[str, Any]:
    """Control rate reached: actions that a call delivers over the time that it takes."""
    milliseconds = statistics.median(episode.chunk_ms) if episode.chunk_ms else None
    return {
        "task": plain_task(episode.task),
        "instruction": episode.instruction,
        "success": episode.success,
        "steps": episode.steps,
        "ms_a_chunk": milliseconds,
        "control_Hz": 1e3 * result.protocol.execute_horizon / milliseconds if milliseconds else None,
    }
