"""What serving adds to a call of the policy: milliseconds over the bare call, on loopback, two 224 px images.

    python benchmarks/serve.py --calls 1000
    python benchmarks/serve.py --soak 30

The policy has random weights and is tiny, so that its own time, and how that varies, hides nothing; its observation is
that of a full-size one. Client and server are processes of their own. The overhead of a call over the socket is its
time less the median of the bare calls. `--soak` asks 20 times a second for so many minutes instead, and prints for each
the server's memory and the latency.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import bitvla
from bitvla.config import Camera

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from checkpoints import observation, pack_random, tiny_config


def policy_file(folder: Path) -> Path:
    config = tiny_config()
    cameras = tuple(Camera(name=name, height=224, width=224) for name in ("corner", "wrist"))
    processing = msgspec.structs.replace(config.processing, cameras=cameras)
    return pack_random(folder, msgspec.structs.replace(config, processing=processing))


def measure(policy: Any, seen: dict[str, Any], calls: int) -> list[float]:
    """Milliseconds of each call, after some to warm up."""
    times = []
    for _ in range(50):
        policy.act(seen)
    for _ in range(calls):
        start = time.perf_counter()
        policy.act(seen)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def soak(policy: Any, seen: dict[str, Any], minutes: int, pid: int) -> Iterator[dict[str, Any]]:
    """Ask at 20 Hz; for each minute the latency of the calls and the server's resident memory in MB."""
    due = time.perf_counter()
    for minute in range(minutes):
        times = []
        for _ in range(60 * 20):
            start = time.perf_counter()
            policy.act(seen)
            times.append(1e3 * (time.perf_counter() - start))
            due = max(due + 0.05, start)
            time.sleep(max(0.0, due - time.perf_counter()))
        status = Path(f"/proc/{pid}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        yield {"minute": minute + 1, "resident_mb": round(resident / 1024, 1), **percentiles(times)}


def percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{share}": round(float(np.percentile(times, share)), 3) for share in (50, 95, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--soak", type=int, metavar="MINUTES")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = policy_file(Path(folder))
        policy = bitvla.load(path, threads=1)
        seen = observation(policy.config)
        command = [sys.executable, "-m", "bitvla", "serve", str(path), "--protocol", "openpi", "--port", "0"]
        with subprocess.Popen(
            [*command, "--threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as server:
            assert server.stderr
            port = json.loads(server.stderr.readline())["port"]
            with bitvla.connect(f"ws://127.0.0.1:{port}") as remote:
                if arguments.soak:
                    for row in soak(remote, seen, arguments.soak, server.pid):
                        print(json.dumps(row), flush=True)
                    server.terminate()
                    return
                bare, served = (measure(asked, seen, arguments.calls) for asked in (policy, remote))
            server.terminate()
    overhead = [time - float(np.median(bare)) for time in served]
    result = {"bare call": bare, "call over the socket": served, "overhead": overhead}
    print(json.dumps({"milliseconds": {name: percentiles(times) for name, times in result.items()}}, indent=2))


if __name__ == "__main__":
    main()
