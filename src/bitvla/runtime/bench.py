"""How fast a policy or a language model is on this machine, part by part, and how much of the machine it uses."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import bitvla
import bitvla._native as native
from bitvla.bundle import is_language_model
from bitvla.errors import BitvlaError
from bitvla.runtime.language import LanguageModel
from bitvla.runtime.machine import cores, memory, processor
from bitvla.runtime.network import Cache
from bitvla.runtime.policy import PARTS, Policy
from bitvla.runtime.verify import golden_traces, with_views
from bitvla.runtime.work import estimated_joules, processor_joules, work

WARM_UP = 5
CEILING_SECONDS = 0.3
BANDWIDTH_MEGABYTES = 512  # more than caches hold
PROMPT_TOKENS = 64

_STARTUP = """
import json, sys, time
start = time.perf_counter()
import bitvla
from bitvla.runtime.policy import Policy
imported = time.perf_counter()
policy = bitvla.load(sys.argv[1], threads=int(sys.argv[2]))
loaded = time.perf_counter()
from bitvla.runtime.verify import golden_traces, with_views
views, prune, batch = int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
if views or prune:
    policy = Policy(with_views(policy.bundle, views) if views else policy.bundle, prune)
observation = next(golden_traces(policy.bundle))[0]
before = time.perf_counter()
policy.act(observation)
acted = time.perf_counter()
for _ in range(10):
    policy.act(observation)
from bitvla.runtime.machine import memory
alone = memory()
for _ in range(3 if batch > 1 else 0):
    policy.act_batch([observation] * batch)
print(json.dumps({
    "times": {"import_s": imported - start, "load_s": loaded - imported, "first_call_s": acted - before},
    "memory": alone,
    "batch_memory": memory(),
}))
"""


def bench(
    source: str | os.PathLike[str],
    threads: int | None = None,
    repeats: int = 50,
    views: int | None = None,
    prune: float = 0.0,
    batch: int = 1,
) -> dict[str, Any]:
    """Measure a policy file: latency for 1 to all threads (or just `threads`), startup and memory of a fresh process.

    `views` measures the network as if it had so many cameras, `prune` without that share of image tokens. `batch` adds
    calls of 1, 2, 4 ... up to so many observations: what each costs beside the others, and the memory of the largest. A
    language model is measured writing; see `_writing`.

    Latencies are milliseconds, memory bytes, `gmacs_per_s` 10**9 multiply-adds a second of the whole network, `ceiling`
    what the processor's int8 dot products reach on registers alone in the same run, `share` their ratio. Energy, in
    joules, is measured where the processor shows its counters, and estimated from the arithmetic everywhere.
    """
    if is_language_model(Path(source)):
        if views or prune or batch > 1:
            raise BitvlaError(f"{source} is a language model: it has neither views nor batches, and nothing to prune")
        return _writing(Path(source), threads, repeats)
    policy = bitvla.load(source, threads, prune)
    if views:
        policy = Policy(with_views(policy.bundle, views), prune)
    traces = [observation for observation, *_ in golden_traces(policy.bundle)]
    if not traces:
        raise BitvlaError(f"{source} holds no golden trace to measure with; pack it again")
    counts = [threads] if threads else range(1, native.num_threads() + 1)
    plan, cameras = policy.plan(traces[0]["instruction"]), len(policy.config.processing.cameras)
    length = plan.length - cameras * policy.network.pruned
    parts = work(policy.config, length, plan.fixed if policy.config.action.bins else 0)
    macs = sum(part.total for part in parts.values())
    before = native.num_threads()
    try:
        with Console(stderr=True).status("measuring"):
            runs = [_run(policy, traces[0], count, repeats, macs) for count in counts]
            together = list(islice(cycle(traces), batch))
            batches = [row for count in counts if batch > 1 for row in _batches(policy, together, count, repeats)]
            startup = _startup(Path(str(policy.bundle.path)), threads or 1, views or 0, prune, batch)
    finally:
        native.set_num_threads(before)
    return {
        "policy": policy.config.name,
        **_circumstances(policy),
        "views": cameras,
        "prune": prune,
        "tokens": {
            "vision": policy.config.vision.num_patches * cameras,
            "decoder": length,
            "action slots": policy.config.action.num_slots,
        },
        "million_multiply_adds": [
            {"part": name} | {kind: round(count / 1e6, 1) for kind, count in part._asdict().items()}
            for name, part in parts.items()
        ],
        "latency": [row for run in runs for row in run.latency],
        "throughput": [run.throughput for run in runs],
        # Arithmetic alone, in 7 nm, by counting; what was measured is in `throughput`.
        "estimated_joules_per_call": estimated_joules(parts),
        "startup": startup["times"],
        "memory": startup["memory"],
    } | ({"batches": batches, "batch_memory": startup["batch_memory"]} if batches else {})


def _circumstances(measured: Policy | LanguageModel) -> dict[str, Any]:
    return {
        "sha256": measured.bundle.sha256,
        "bitvla": bitvla.__version__,
        "machine": {"processor": processor(), "cores": cores(), "python": platform.python_version()},
        "instruction_set": measured.isa,
    }


class _Run(NamedTuple):
    latency: list[dict[str, Any]]
    throughput: dict[str, Any]


def _run(policy: Policy, observation: dict[str, Any], threads: int, repeats: int, macs: int) -> _Run:
    native.set_num_threads(threads)
    for _ in range(WARM_UP):
        policy.act(observation)
    times = np.empty((repeats, len(PARTS)))
    energy = processor_joules()
    for row in times:
        policy.act(observation)
        row[:] = [policy.timings[part] for part in PARTS]
    used = None if energy is None else (processor_joules() or 0) - energy
    columns = {part: times[:, index] for index, part in enumerate(PARTS)} | {"total": times.sum(axis=1)}
    latency = [{"threads": threads, "part": part} | _percentiles(values) for part, values in columns.items()]
    rate = macs / float(np.median(times[:, 1:].sum(axis=1))) / 1e6
    ceiling = native.peak_int8_gmacs(CEILING_SECONDS, threads)
    throughput = {
        "threads": threads,
        "calls_per_s": 1e3 / float(np.median(columns["total"])),
        # A robot that waits for each chunk and then plays the part of it that the policy was made for.
        "control_hz": 1e3 * policy.config.processing.execute_horizon / float(np.percentile(columns["total"], 95)),
        "gmacs_per_s": rate,
        "ceiling": ceiling,
        "share": rate / ceiling,
        # Of whole processor packages, whatever else ran on them; None where their counters cannot be read.
        "measured_joules_per_call": used / repeats if used and used > 0 else None,
    }
    return _Run(latency, throughput)


def _batches(policy: Policy, observations: Sequence[Any], threads: int, repeats: int) -> list[dict[str, Any]]:
    """Calls of 1, 2, 4 ... and all of the observations, in turns, so that whatever else runs meets all of them."""
    native.set_num_threads(threads)
    sizes = [*(1 << bit for bit in range((len(observations) - 1).bit_length())), len(observations)]
    times = np.empty((WARM_UP + repeats, len(sizes)))
    for row in times:
        for index, size in enumerate(sizes):
            start = time.perf_counter()
            policy.act_batch(observations[:size])
            row[index] = 1e3 * (time.perf_counter() - start)
    rates = 1e3 * np.array(sizes) / np.median(times[WARM_UP:], axis=0)
    return [
        {"threads": threads, "observations": size}
        | _percentiles(values)
        | {"observations_per_s": float(rate), "gain": float(rate / rates[0])}
        for size, values, rate in zip(sizes, times[WARM_UP:].T, rates, strict=True)
    ]


def _percentiles(milliseconds: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{percent}_ms": float(np.percentile(milliseconds, percent)) for percent in (50, 95, 99)}


def _writing(path: Path, threads: int | None, repeats: int) -> dict[str, Any]:
    """Measure a language model: `repeats` tokens after a prompt of `PROMPT_TOKENS`, one by one.

    `gb_per_s` counts the weights that a token reads, `share` is that of the memory bandwidth measured in the same run.
    """
    model = LanguageModel.load(path, threads)
    layers = (
        tensor for name, tensor in model.bundle.tensors.items() if name.startswith("language_model.model.layers.")
    )
    sizes = {"decoder": sum(tensor.nbytes for tensor in layers), "head": model.head.weight.nbytes}
    before = native.num_threads()
    rows: list[dict[str, Any]] = []
    used: dict[str, int] = {}
    try:
        with Console(stderr=True).status("measuring"):
            for count in [threads] if threads else range(1, before + 1):
                native.set_num_threads(count)
                times = token_times(model, repeats)
                used = used or memory()  # before that of the next line
                bandwidth = native.peak_bandwidth_gbs(CEILING_SECONDS, BANDWIDTH_MEGABYTES, count)
                for (part, size), values in zip(sizes.items(), times.T, strict=True):
                    rate = size / float(np.median(values)) / 1e6
                    rows.append(
                        {"threads": count, "part": part}
                        | _percentiles(values)
                        | {"gb_per_s": rate, "bandwidth": bandwidth, "share": rate / bandwidth}
                    )
    finally:
        native.set_num_threads(before)
    return {
        "model": model.config.name,
        **_circumstances(model),
        "tokens": {"prompt": PROMPT_TOKENS, "written": repeats},
        "latency": rows,
        "memory": used,
    }


def token_times(model: LanguageModel, tokens: int) -> NDArray[np.float64]:
    """Milliseconds of each token (tokens, parts) after a prompt; which tokens they are costs nothing more or less.

    BitvlaError where they are more than the model was built for.
    """
    most = model.config.language.max_positions
    if PROMPT_TOKENS + WARM_UP + tokens > most:
        raise BitvlaError(f"{tokens} tokens after {PROMPT_TOKENS + WARM_UP} do not fit into the {most} of the model")
    cache = Cache(model.config.language, PROMPT_TOKENS + WARM_UP + tokens)
    model.logits([0] * PROMPT_TOKENS, cache)
    times = []
    for _ in range(WARM_UP + tokens):
        model.logits([0], cache)
        times.append(list(model.timings.values()))
    return np.array(times[WARM_UP:])


def _startup(path: Path, threads: int, views: int, prune: float, batch: int) -> dict[str, Any]:
    """Startup times and memory of a process that does nothing but run the policy; then its memory after a batch."""
    command = [sys.executable, "-c", _STARTUP, *map(str, (path, threads, views, prune, batch))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]  # killed, for its memory
        raise BitvlaError(f"a fresh process could not run the policy: {said[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
