"""How fast a policy or a language model is on this machine, part by part, and how much of the machine it uses."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
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
views, prune = int(sys.argv[3]), float(sys.argv[4])
if views or prune:
    policy = Policy(with_views(policy.bundle, views) if views else policy.bundle, prune)
observation = next(golden_traces(policy.bundle))[0]
before = time.perf_counter()
policy.act(observation)
acted = time.perf_counter()
for _ in range(10):
    policy.act(observation)
from bitvla.runtime.machine import memory
print(json.dumps({
    "times": {"import_s": imported - start, "load_s": loaded - imported, "first_call_s": acted - before},
    "memory": memory(),
}))
"""


def bench(
    source: str | os.PathLike[str],
    threads: int | None = None,
    repeats: int = 50,
    views: int | None = None,
    prune: float = 0.0,
) -> dict[str, Any]:
    """Measure a policy file: latency for 1 to all threads (or just `threads`), startup and memory of a fresh process.

    `views` measures the network as if it had so many cameras, `prune` without that share of image tokens. A language
    model is measured writing; see `_writing`.

    Latencies are milliseconds, memory bytes, `gmacs_per_s` 10**9 multiply-adds a second of the whole network, `ceiling`
    what the processor's int8 dot products reach on registers alone in the same run, `share` their ratio. Energy, in
    joules, is measured where the processor shows its counters, and estimated from the arithmetic everywhere.
    """
    if is_language_model(Path(source)):
        return _writing(Path(source), threads, repeats, views, prune)
    policy = bitvla.load(source, threads, prune)
    if views:
        policy = Policy(with_views(policy.bundle, views), prune)
    observation = next(golden_traces(policy.bundle), None)
    if observation is None:
        raise BitvlaError(f"{source} holds no golden trace to measure with; pack it again")
    counts = [threads] if threads else range(1, native.num_threads() + 1)
    plan, cameras = policy.plan(observation[0]["instruction"]), len(policy.config.processing.cameras)
    length = plan.length - cameras * policy.network.pruned
    parts = work(policy.config, length, plan.fixed if policy.config.action.bins else 0)
    macs = sum(part.total for part in parts.values())
    before = native.num_threads()
    try:
        with Console(stderr=True).status("measuring"):
            runs = [_run(policy, observation[0], count, repeats, macs) for count in counts]
            startup = _startup(Path(str(policy.bundle.path)), threads or 1, views or 0, prune)
    finally:
        native.set_num_threads(before)
    return {
        "policy": policy.config.name,
        "sha256": policy.bundle.sha256,
        "bitvla": bitvla.__version__,
        "machine": {"processor": processor(), "cores": cores(), "python": platform.python_version()},
        "instruction_set": policy.isa,
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


def _percentiles(milliseconds: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{percent}_ms": float(np.percentile(milliseconds, percent)) for percent in (50, 95, 99)}


def _writing(path: Path, threads: int | None, repeats: int, views: int | None, prune: float) -> dict[str, Any]:
    """Measure a language model: `repeats` tokens after a prompt of `PROMPT_TOKENS`, one by one.

    `gb_per_s` counts the weights that a token reads, `share` is that of the memory bandwidth measured in the same run.
    """
    if views or prune:
        raise BitvlaError(f"{path} is a language model and has no views, to change or to prune")
    model = LanguageModel.load(path, threads)
    tensors, head = model.bundle.tensors, "language_model.model.embed_tokens.weight"
    sizes = {
        "decoder": sum(tensor.nbytes for name, tensor in tensors.items() if name != head),
        "head": tensors[head].nbytes,
    }
    before = native.num_threads()
    rows: list[dict[str, Any]] = []
    used: dict[str, int] = {}
    try:
        with Console(stderr=True).status("measuring"):
            for count in [threads] if threads else range(1, before + 1):
                native.set_num_threads(count)
                times = _token_times(model, repeats)
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
        "sha256": model.bundle.sha256,
        "bitvla": bitvla.__version__,
        "machine": {"processor": processor(), "cores": cores(), "python": platform.python_version()},
        "instruction_set": model.isa,
        "tokens": {"prompt": PROMPT_TOKENS, "written": repeats},
        "latency": rows,
        "memory": used,
    }


def _token_times(model: LanguageModel, tokens: int) -> NDArray[np.float64]:
    """Milliseconds of each token (tokens, parts) after a prompt; which tokens they are costs nothing more or less."""
    cache = Cache(model.config.language, PROMPT_TOKENS + WARM_UP + tokens)
    model.logits([0] * PROMPT_TOKENS, cache)
    times = []
    for _ in range(WARM_UP + tokens):
        model.logits([0], cache)
        times.append(list(model.timings.values()))
    return np.array(times[WARM_UP:])


def _startup(path: Path, threads: int, views: int, prune: float) -> dict[str, Any]:
    """Startup times and memory of a process that does nothing but run the policy."""
    command = [sys.executable, "-c", _STARTUP, *map(str, (path, threads, views, prune))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BitvlaError(f"a fresh process could not run the policy: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
