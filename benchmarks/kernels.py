"""Speed of the native kernels, as a share of what this machine can do at that moment.

    python benchmarks/kernels.py [--json] [--threads 1 2] [--isa NAME] [--rounds 5] [--peers] [--only product]

A shared machine changes its speed from minute to minute, so each figure is the median, over interleaved rounds, of the
ratio to a ceiling measured right before and right after it: int8 dot products on registers only for matrix products,
plain reading of memory for matrix-vector products.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from peers_int8 import PeerProcess, available, seconds_of

from bitvla import _native as native
from bitvla.quantization import STEPS, Packing, code_columns, pack, packed_shape

# Name, M tokens, N rows, K columns.
PRODUCTS = [
    ("language gate, up", 630, 6912, 2560),
    ("language down", 630, 2560, 6912),
    ("language query, output", 630, 2560, 2560),
    ("vision fc1", 512, 4304, 1152),
    ("vision fc2", 512, 1152, 4304),
    ("vision query, output", 512, 1152, 1152),
    ("nano query, output", 120, 192, 192),
    ("nano gate, up", 120, 768, 192),
    ("nano down", 120, 192, 768),
]
VECTORS = [("language gate, up", 1, 6912, 2560), ("language down", 1, 2560, 6912), ("three tokens", 3, 6912, 2560)]
# Name, tokens, keys, heads, key-value heads, head dimension.
ATTENTION = [("language", 630, 630, 20, 5, 128), ("vision", 256, 256, 16, 16, 72), ("nano", 120, 120, 6, 6, 32)]
STREAM_MEGABYTES = 256  # of different weights in turn: no cache keeps them
CEILING_SECONDS = 0.02


def measure(
    timers: dict[str, Callable[[], float]], ceiling: Callable[[], float], work: float, rounds: int
) -> dict[str, Any]:
    """For each timer: median seconds, rate (`work` in 1e9 units a second) and share of the ceiling around it.

    A timer measures and gives the seconds of one call.
    """
    for timer in timers.values():
        timer()
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    shares: dict[str, list[float]] = {name: [] for name in timers}
    ceilings = [ceiling()]
    for _ in range(rounds):
        for name, timer in timers.items():
            taken = timer()
            time.sleep(0.05)  # for the time that idle threads of some libraries spin
            ceilings.append(ceiling())
            seconds[name].append(taken)
            shares[name].append(work / taken / ((ceilings[-2] + ceilings[-1]) / 2))
    return {
        name: {
            "ms": statistics.median(seconds[name]) * 1e3,
            "rate": work / statistics.median(seconds[name]),
            "share": statistics.median(shares[name]),
            "ceiling": statistics.median(ceilings),
        }
        for name in timers
    }


def ternary_call(m: int, n: int, k: int, packing: Packing, copies: int = 1) -> Callable[[], None]:
    """A product with each of `copies` of the same weights, 0, 1 and -1 in equal parts."""
    rng = np.random.default_rng(0)
    codes = np.zeros((m, code_columns(k)), np.int8)
    codes[:, :k] = rng.integers(-128, 128, (m, k))
    scales, sums = np.ones(m, np.float32), codes.sum(axis=1, dtype=np.int32)
    packed = np.stack([pack(rng.integers(-1, 2, (n, k), np.int8), packing)] * copies)
    out = np.zeros((m, n), np.float32)

    def call() -> None:
        for weights in packed:
            native.ternary_linear(codes, scales, sums, weights, n, k, 1.0, None, out, packing=packing)

    return call


def attention_call(tokens: int, keys: int, heads: int, kv_heads: int, dim: int) -> Callable[[], None]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((tokens, heads * dim), np.float32)
    k, v = rng.standard_normal((2, keys, kv_heads * dim), np.float32)
    out = np.empty_like(q)
    return lambda: native.attention(q, k, v, heads, kv_heads, dim**-0.5, False, out)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    peers = available() if args.peers else []
    rows = []

    def add(kind: str, name: str, shape: list[int], threads: int, unit: str, result: dict[str, Any]) -> None:
        for system, figures in result.items():
            row = {"kind": kind, "name": name, "shape": shape, "threads": threads, "system": system, "unit": unit}
            rows.append(row | figures)
            show(rows[-1])

    for threads in args.threads:
        native.set_num_threads(threads)

        def int8_ceiling(threads: int = threads) -> float:
            return native.peak_int8_gmacs(CEILING_SECONDS, threads)

        def memory_ceiling(threads: int = threads) -> float:
            return native.peak_bandwidth_gbs(0.05, STREAM_MEGABYTES, threads)

        for name, m, n, k in PRODUCTS if "product" in args.only else []:
            with ExitStack() as processes:
                timers: dict[str, Callable[[], float]] = {
                    f"bitvla {packing}": partial(seconds_of, ternary_call(m, n, k, packing)) for packing in STEPS
                }
                for peer in peers:
                    timers[peer] = processes.enter_context(PeerProcess(peer, m, n, k, threads)).seconds
                result = measure(timers, int8_ceiling, m * n * k * 1e-9, args.rounds)
            add("product", name, [m, n, k], threads, "GMAC/s", result)
        for (name, m, n, k), packing in product(VECTORS if "vector" in args.only else [], STEPS):
            size = math.prod(packed_shape(n, k, packing))
            copies = int(STREAM_MEGABYTES * 1e6 / size)
            timers = {f"bitvla {packing}": partial(seconds_of, ternary_call(m, n, k, packing, copies))}
            result = measure(timers, memory_ceiling, size * copies * 1e-9, args.rounds)
            add("vector", name, [m, n, k], threads, "GB/s", result)
        for name, *shape in ATTENTION if "attention" in args.only else []:
            tokens, keys, heads, _, dim = shape
            work = 2 * tokens * keys * heads * dim * 1e-9
            timers = {"bitvla": partial(seconds_of, attention_call(*shape))}
            result = measure(timers, int8_ceiling, work, args.rounds)
            add("attention", name, shape, threads, "GMAC/s", result)
    return rows


def show(row: dict[str, Any]) -> None:
    shape = "x".join(map(str, row["shape"]))
    print(
        f"{row['threads']} thr  {row['kind']:9} {row['name']:22} {shape:16} {row['system']:17}"
        f" {row['ms']:9.3f} ms {row['rate']:7.1f} {row['unit']:6} {row['share']:6.1%} of {row['ceiling']:.0f}",
        file=sys.stderr,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", choices=native.available(), default=native.isa())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="also measure other libraries that are installed")
    kinds = ["product", "vector", "attention"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    args = parser.parse_args()
    native.set_isa(args.isa)
    rows = run(args)
    if args.json:
        document = {"isa": args.isa, "machine": platform.machine(), "rounds": args.rounds, "results": rows}
        print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
