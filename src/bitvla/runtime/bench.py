"""How fast a policy is on this machine, part by part, and how much of the processor it uses."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import bitvla
import bitvla._native as native
from bitvla.config import PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.runtime.machine import cores, processor
from bitvla.runtime.policy import PARTS, Policy
from bitvla.runtime.verify import golden_traces

WARM_UP = 5
CEILING_SECONDS = 0.3

_STARTUP = """
import json, sys, time
start = time.perf_counter()
import bitvla
from bitvla.runtime.policy import Policy
imported = time.perf_counter()
policy = bitvla.load(sys.argv[1], threads=int(sys.argv[2]))
loaded = time.perf_counter()
from bitvla.runtime.verify import golden_traces
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


def bench(source: str | os.PathLike[str], threads: int | None = None, repeats: int = 50) -> dict[str, Any]:
    """Measure a policy file: latency for 1 to all threads (or just `threads`), startup and memory of a fresh process.

    Latencies are milliseconds, memory bytes, `gmacs_per_s` 10**9 multiply-adds a second of the whole network, `ceiling`
    what the processor's int8 dot products reach on registers alone in the same run, `share` their ratio.
    """
    policy = bitvla.load(source, threads)
    observation = next(golden_traces(policy.bundle), None)
    if observation is None:
        raise BitvlaError(f"{source} holds no golden trace to measure with; pack it again")
    counts = [threads] if threads else range(1, native.num_threads() + 1)
    macs, tokens = multiply_adds(policy.config, policy.plan(observation[0]["instruction"]).length)
    before = native.num_threads()
    try:
        with Console(stderr=True).status("measuring"):
            runs = [_run(policy, observation[0], count, repeats, sum(macs.values())) for count in counts]
            startup = _startup(Path(str(policy.bundle.path)), threads or 1)
    finally:
        native.set_num_threads(before)
    return {
        "policy": policy.config.name,
        "sha256": policy.bundle.sha256,
        "bitvla": bitvla.__version__,
        "machine": {"processor": processor(), "cores": cores(), "python": platform.python_version()},
        "instruction_set": policy.isa,
        "tokens": tokens,
        "million_multiply_adds": {part: round(count / 1e6, 1) for part, count in macs.items()},
        "latency": [row for run in runs for row in run.latency],
        "throughput": [run.throughput for run in runs],
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
    for row in times:
        policy.act(observation)
        row[:] = [policy.timings[part] for part in PARTS]
    columns = {part: times[:, index] for index, part in enumerate(PARTS)} | {"total": times.sum(axis=1)}
    latency = [
        {"threads": threads, "part": part}
        | {f"p{percent}_ms": float(np.percentile(values, percent)) for percent in (50, 95, 99)}
        for part, values in columns.items()
    ]
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
    }
    return _Run(latency, throughput)


def multiply_adds(config: PolicyConfig, length: int) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-adds of one call by part, attention included, and its tokens by part, for a sequence of `length`."""
    vision, language, action = config.vision, config.language, config.action
    patches, cameras = vision.num_patches, len(config.processing.cameras)
    seen, slots, width, hidden = patches * cameras, action.num_slots, vision.hidden_size, language.hidden_size
    vision_layer = width * (4 * width + 2 * vision.intermediate_size) + 2 * patches * width
    connector = width * hidden + hidden * hidden
    keys = language.num_layers * length * 2 * hidden * language.num_kv_heads * language.head_dim
    rows = (language.num_layers - 1) * length + slots  # the last layer computes only what the head reads
    other = hidden * (2 * hidden + 3 * language.intermediate_size) + 2 * length * hidden
    head_width = action.head_hidden_size
    head = action.slots_per_step * hidden * head_width + action.head_blocks * head_width**2 + head_width * action.dim
    macs = {
        "vision": seen * (3 * vision.patch_size**2 * width + vision.num_layers * vision_layer + connector),
        "decoder": keys + rows * other + hidden * (action.state_dim + hidden),
        "head": action.horizon * head,
    }
    return macs, {"vision": seen, "decoder": length, "action slots": slots}


def _startup(path: Path, threads: int) -> dict[str, Any]:
    """Startup times and memory of a process that does nothing but run the policy."""
    command = [sys.executable, "-c", _STARTUP, str(path), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BitvlaError(f"a fresh process could not run the policy: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
