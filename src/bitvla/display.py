"""What a command prints: plain data for people, or one JSON document."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

if TYPE_CHECKING:
    from bitvla.data.check import Checkup
    from bitvla.evaluate.result import Comparison, Drop, Result
    from bitvla.evaluate.statistics import Paired, Rate
    from bitvla.evaluate.vqa import VqaResult

_AGAIN = "the same command tries these alone again"


def as_json(result: Any) -> str:
    """A result as an indented JSON document; NumPy values become numbers and lists, paths text, NaN null."""
    return msgspec.json.format(msgspec.json.encode(result, enc_hook=_encode), indent=2).decode()


def show(result: Any) -> None:
    """Print a result to standard output: an entry a line, records of the same fields as a table."""
    # A file or a pipe has no width; tables need one that does not break their cells.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    _put(msgspec.to_builtins(result, enc_hook=_encode), console)


def evaluation(result: Result) -> dict[str, Any]:
    """What a person wants to know of an evaluation's result."""
    rates = result.tasks | {"all": result.total}
    summary: dict[str, Any] = {
        "tasks": [
            {
                "task": task,
                "success": f"{rate.successes}/{rate.total}",
                "%": f"{100 * rate.rate:.1f}",
                "95 % interval": _interval(rate),
            }
            for task, rate in rates.items()
        ],
        **({"failures": result.failures} if result.failures else {}),
        **({"against the unperturbed suite": [_drop(drop) for drop in result.drops]} if result.drops else {}),
        "milliseconds a chunk (median)": result.latency and result.latency.p50,
        "policy process MB (peak)": result.policy_peak_bytes / 1e6,
    }
    return summary | ({"episodes that could not run": f"{result.errors}; {_AGAIN}"} if result.errors else {})


def answers(result: VqaResult) -> dict[str, Any]:
    """What a person wants to know of a model's answers to questions."""
    summary: dict[str, Any] = {
        "questions": [
            {
                "category": name,
                "right": f"{rate.successes}/{rate.total}",
                "%": f"{100 * rate.rate:.1f}",
                "95 % interval": _interval(rate),
            }
            for name, rate in [*result.categories.items(), ("all", result.total)]
        ],
        "answers without a letter": result.without_letter,
        "milliseconds a question (median)": result.latency and result.latency.p50,
    }
    summary |= {"questions that could not be asked": f"{result.errors}; {_AGAIN}"} if result.errors else {}
    return summary | ({"questions without choices, skipped": result.skipped} if result.skipped else {})


def comparison(result: Comparison) -> dict[str, Any]:
    """What a person wants to know of a comparison, a minus b."""
    pairs = result.tasks | {"all": result.total}
    rows = [
        {
            "task": task,
            "a %": f"{100 * pair.a.rate:.1f}",
            "b %": f"{100 * pair.b.rate:.1f}",
            "only a": pair.only_a,
            "only b": pair.only_b,
            "a - b": f"{100 * pair.difference:+.1f}",
            "95 % interval": _interval(pair),
            "p": pair.p_value,
        }
        for task, pair in pairs.items()
    ]
    kinds = [{"failure": kind, "a": a, "b": b} for kind, (a, b) in result.failures.items()]
    return {"a": result.a, "b": result.b, "pair by pair": rows} | ({"failures": kinds} if kinds else {})


def _drop(drop: Drop) -> dict[str, Any]:
    return {
        "suite": drop.suite,
        "success": f"{drop.rate.successes}/{drop.rate.total}",
        "difference": f"{100 * drop.difference:+.1f}",
        "95 % interval": _interval(drop),
    }


def run(result: dict[str, Any]) -> dict[str, Any]:
    """What a person wants to know of a run on a robot."""
    rows = [
        {
            "ended": summary.ended,
            "seconds": summary.seconds,
            "actions": summary.played,
            "gaps": summary.gaps,
            "idle s": summary.idle_s,
            "overruns": summary.overruns,
            "latency ms (p50, p99)": (
                "-" if summary.latency_ms is None else f"{summary.latency_ms.p50:.1f}, {summary.latency_ms.p99:.1f}"
            ),
            "clipped": sum(summary.clipped.values()),
        }
        for summary in result["episodes"]
    ]
    plan = result["episodes"][0].plan
    proof = f"no gap while answers take up to {plan.tolerated_ms:.0f} ms" if plan.proven else "not proven"
    return {**result, "plan": f"ask {plan.replan} actions in; {proof}", "episodes": rows}


def inspection(result: dict[str, Any]) -> dict[str, Any]:
    """What a person wants to know of a policy file: of its history the stages, without their settings."""
    provenance = result.get("provenance", {})
    if "stage" not in provenance:
        return result
    kept = {name: provenance[name] for name in ("versions", "packed") if name in provenance}
    return result | {"provenance": {"stages (--json: all of their settings)": _stages(provenance), **kept}}


def _stages(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """What a checkpoint went through, the first stage first."""
    parents = provenance.get("parents", {})
    parent = parents.get("init") or parents.get("teacher")
    before = _stages(parent["provenance"]) if parent else []
    data = provenance.get("data", [])
    data = [data] if isinstance(data, dict) else data  # as it was until the mixtures
    return [
        *before,
        {
            "stage": provenance.get("stage", "published checkpoint"),
            "steps": provenance.get("steps"),
            "precision": provenance.get("config", {}).get("precision"),
            "frames": sum(part.get("frames", 0) for part in data) or None,
            "validation loss": provenance.get("validation", {}).get("loss"),
        },
    ]


def checkup(result: Checkup) -> dict[str, Any]:
    """What a person wants to know of a dataset's check."""
    return {
        "dataset": f"{result.dataset}: {result.episodes:,} episodes, {result.frames:,} frames at {result.fps:g} fps",
        "findings": msgspec.to_builtins(result.findings) or "none",
        "passed": result.passed,
    }


def _interval(value: Rate | Paired | Drop) -> str:
    return f"{100 * value.low:.1f} .. {100 * value.high:.1f}"


def _encode(value: Any) -> Any:
    """What msgspec does not know: NumPy values and paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _put(value: Any, console: Console, indent: int = 0) -> None:
    """Plain data for people: an entry a line, records of the same fields as a table."""

    def line(text: str) -> None:
        console.print(" " * indent + text, soft_wrap=True)

    if not isinstance(value, dict):
        line(_cell(value))
        return
    for name, item in value.items():
        if rows := _records(item):
            line(f"[bold]{_label(name)}[/bold]")
            console.print(Padding(_table(rows), (0, 0, 1, indent), expand=False))
        elif isinstance(item, dict) and item:
            line(f"[bold]{_label(name)}[/bold]")
            _put(item, console, indent + 2)
        else:
            line(f"{_label(name)}: {_cell(item)}")


def _records(item: Any) -> list[dict[str, Any]]:
    """The rows of a list of flat records, or of a dictionary of them by name; empty for anything else."""
    if isinstance(item, dict) and all(isinstance(row, dict) for row in item.values()):
        item = [{"": name, **row} for name, row in item.items()]
    if not isinstance(item, list) or not all(isinstance(row, dict) and row.keys() == item[0].keys() for row in item):
        return []
    return [] if any(isinstance(cell, dict) for row in item for cell in row.values()) else item


def _table(rows: list[dict[str, Any]]) -> Table:
    """A table with a row for each record; records of many fields stand side by side, a column each."""
    names, *cells = [list(rows[0]), *([*row.values()] for row in rows)]
    if len(names) > 8:
        names, *cells = [list(column) for column in zip(names, *cells, strict=True)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(names):
        numbers = all(isinstance(row[index], int | float) and not isinstance(row[index], bool) for row in cells)
        table.add_column(_label(name), justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(_cell, row))
    return table


def _label(name: object) -> str:
    # The name of a field is made readable; that of a file stays as it is.
    return _cell(name.replace("_", " ") if isinstance(name, str) and name.isidentifier() else name)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value) or "-"
    return escape(str(value))
