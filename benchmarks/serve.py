"""What serving adds to a call of the policy: milliseconds over the bare call, on loopback, two 224 px images.

    python benchmarks/serve.py --calls 1000
    python benchmarks/serve.py --soak 30
    python benchmarks/serve.py --clients 8 --calls 200

The policy has random weights and is tiny, so that its own time, and how that varies, hides nothing; its observation is
that of a full-size one. Client and server are processes of their own. The overhead of a call over the socket is its
time less the median of the bare calls. `--soak` asks 20 times a second for so many minutes instead, and prints for each
the server's memory and the latency. `--clients` puts as many robots, each asking again at once, to two servers of the
shipped policy (or `--policy`), one of which computes what waits together: observations a second and the milliseconds of
a call, in rounds that take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import bitvla
from bitvla.config import Camera
from bitvla.runtime.verify import golden_traces

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from checkpoints import observation, pack_random, tiny_config
from serving import NANO

ROUNDS = 5


def policy_file(folder: Path) -> Path:
    config = tiny_config()
    cameras = tuple(Camera(name=name, height=224, width=224) for name in ("corner", "wrist"))
    processing = msgspec.structs.replace(config.processing, cameras=cameras)
    return pack_random(folder, msgspec.structs.replace(config, processing=processing))


def measure(policy: Any, seen: dict[str, Any], calls: int) -> list[float]:
    """Milliseconds of each call, after some to warm up."""
    for _ in range(50):
        policy.act(seen)
    return [timed(policy, seen) for _ in range(calls)]


def timed(policy: Any, seen: dict[str, Any]) -> float:
    start = time.perf_counter()
    policy.act(seen)
    return 1e3 * (time.perf_counter() - start)


def soak(policy: Any, seen: dict[str, Any], minutes: int, pid: int) -> Iterator[dict[str, Any]]:
    """Ask at 20 Hz; for each minute the latency of the calls and the server's resident memory in MB."""
    due = time.perf_counter()
    for minute in range(minutes):
        times = []
        for _ in range(60 * 20):
            start = time.perf_counter()
            times.append(timed(policy, seen))
            due = max(due + 0.05, start)
            time.sleep(max(0.0, due - time.perf_counter()))
        status = Path(f"/proc/{pid}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        yield {"minute": minute + 1, "resident_mb": round(resident / 1024, 1), **percentiles(times)}


def percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{share}": round(float(np.percentile(times, share)), 3) for share in (50, 95, 99)}


@contextlib.contextmanager
def server(path: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str], dict[str, Any]]]:
    """A server process that is ready: its address, itself, and what it said when it was ready."""
    command = [sys.executable, "-m", "bitvla", "serve", str(path), "--protocol", "openpi", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        listening, ready = (json.loads(process.stderr.readline()) for _ in range(2))
        try:
            yield f"ws://127.0.0.1:{listening['port']}", process, ready
        finally:
            process.terminate()


def crowd(url: str, observations: list[dict[str, Any]], calls: int) -> tuple[float, list[float]]:
    """A robot for each observation, all at once: seconds until the last has had its calls, milliseconds of each."""

    def drive(seen: dict[str, Any]) -> list[float]:
        with bitvla.connect(url, timeout=60) as robot:
            started.wait()
            return [timed(robot, seen) for _ in range(calls)]

    started = threading.Barrier(len(observations) + 1)
    with ThreadPoolExecutor(len(observations)) as robots:
        results = [robots.submit(drive, seen) for seen in observations]
        started.wait()
        start = time.perf_counter()
        times = [ms for result in results for ms in result.result()]
    return time.perf_counter() - start, times


def compare_batches(path: Path, clients: int, calls: int, threads: list[str]) -> list[dict[str, Any]]:
    """Throughput and latency of `clients` robots, without and with batches."""
    seen = [trace for trace, *_ in golden_traces(bitvla.load(path).bundle)]
    observations = [seen[index % len(seen)] for index in range(clients)]
    with server(path, *threads, "--max-batch", "1") as one, server(path, *threads, "--max-batch", str(clients)) as many:
        rounds: list[list[tuple[float, list[float]]]] = [[], []]
        for _ in range(ROUNDS):
            for (url, *_), results in zip((one, many), rounds, strict=True):
                results.append(crowd(url, observations, max(1, calls // ROUNDS)))
    return [
        {
            "batch": ready["batch"],
            "observations_per_s": round(float(np.median([len(times) / seconds for seconds, times in results])), 1),
            **percentiles([ms for _, times in results for ms in times]),
        }
        for (_, _, ready), results in zip((one, many), rounds, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--soak", type=int, metavar="MINUTES")
    parser.add_argument("--clients", type=int, metavar="N")
    parser.add_argument("--policy", type=Path, default=NANO)
    parser.add_argument("--threads", type=int, default=1, help="of a server")
    arguments = parser.parse_args()
    threads = ["--threads", str(arguments.threads)]
    if arguments.clients:
        rows = compare_batches(arguments.policy, arguments.clients, arguments.calls, threads)
        print(json.dumps(rows, indent=2))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = policy_file(Path(folder))
        policy = bitvla.load(path, threads=1)
        seen = observation(policy.config)
        with server(path, *threads) as (url, process, _), bitvla.connect(url) as remote:
            if arguments.soak:
                for row in soak(remote, seen, arguments.soak, process.pid):
                    print(json.dumps(row), flush=True)
                return
            bare, served = (measure(asked, seen, arguments.calls) for asked in (policy, remote))
    overhead = [time - float(np.median(bare)) for time in served]
    result = {"bare call": bare, "call over the socket": served, "overhead": overhead}
    print(json.dumps({"milliseconds": {name: percentiles(times) for name, times in result.items()}}, indent=2))


if __name__ == "__main__":
    main()
