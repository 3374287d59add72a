"""The command `bitvla serve` as a process of its own: signals, restarts, logs, what it refuses.

pytest tests/test_serve_process.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bitvla
from bitvla.errors import BitvlaError
from serving import NANO, expected, get, observation


class Process:
    """A running `bitvla serve`. Its log is JSON, since nobody reads along."""

    def __init__(self, *arguments: str, policy: Path = NANO) -> None:
        command = [sys.executable, "-m", "bitvla", "serve", str(policy), "--threads", "1", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.port = self.event("listening")["port"]
        self.url = f"ws://127.0.0.1:{self.port}"

    def event(self, name: str) -> dict[str, Any]:
        """The next event of that name in the log."""
        assert self.process.stderr
        for line in self.process.stderr:
            event = json.loads(line)
            if event["event"].startswith(name):
                return event
        raise AssertionError(f"no '{name}' in the log")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output


@contextlib.contextmanager
def serve(*arguments: str, **options: Any) -> Iterator[Process]:
    process = Process(*arguments, **options)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(number: int) -> None:
    with serve("--protocol", "openpi", "--json") as server, bitvla.connect(server.url) as policy:
        assert policy.act(observation()).tobytes() == expected().tobytes()
        status, output = server.end(number)
        assert status == 0
        assert json.loads(output) == {"requests": {"answered": 1}}


@pytest.mark.parametrize("protocol", ["lerobot", "gr00t"])
def test_every_dialect_starts_and_ends_so(protocol: str) -> None:
    with serve("--protocol", protocol, "--http-port", "0") as server:
        server.event("ready")
        assert server.end()[0] == 0


def test_a_killed_server_is_found_again_by_its_robots() -> None:
    with serve("--protocol", "openpi") as server:
        policy = bitvla.connect(server.url, timeout=30)
        policy.act(observation())
        server.end(signal.SIGKILL)
        with serve("--protocol", "openpi", "--port", str(server.port)):
            assert policy.act(observation(1)).tobytes() == expected(1).tobytes()
            policy.close()


def test_a_server_that_stands_still_is_told_in_time() -> None:
    """Stopped, not ended: its kernel still takes what is sent."""
    with serve("--protocol", "openpi") as server:
        policy = bitvla.connect(server.url, timeout=0.5)
        os.kill(server.process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(BitvlaError, match="did not answer"):
            policy.act(observation())
        assert time.monotonic() - start < 5
        os.kill(server.process.pid, signal.SIGCONT)
        assert policy.act(observation()).tobytes() == expected().tobytes()
        policy.close()


def test_hangup_and_a_new_file_load_the_policy_again(tmp_path: Path) -> None:
    path = Path(shutil.copy(NANO, tmp_path))
    with serve("--protocol", "openpi", "--watch", policy=path) as server, bitvla.connect(server.url) as policy:
        server.process.send_signal(signal.SIGHUP)
        assert server.event("reloaded")["sha256"] == policy.info()["sha256"]
        (tmp_path / "new").write_bytes(NANO.read_bytes()[:-1])
        os.replace(tmp_path / "new", path)
        assert "refused" in server.event("reload")["event"]
        assert policy.act(observation()).tobytes() == expected().tobytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--protocol", "openpi", "--host", "0.0.0.0"], "--token"),
        (["--protocol", "openpi", "--map", "observation/image=left"], "'left'"),
        (["--protocol", "openpi", "--map", "left"], "KEY=PART"),
        (["--protocol", "openpi", "--preset", "libero"], "not clear"),
        (["--protocol", "openpi", "--preset", "droid"], "libero"),
        (["--protocol", "openpi", "--http-port", "0"], "--http-port"),
        (["--protocol", "openpi", "--port", "70000"], "no port 70000"),
        (["--protocol", "lerobot", "--host", "203.0.113.7", "--insecure"], "cannot listen on 203.0.113.7"),
        (["--protocol", "openpi", "--host", "203.0.113.7", "--insecure"], "cannot listen on 203.0.113.7"),
    ],
)
def test_what_cannot_be_served_so_is_one_line(arguments: list[str], named: str) -> None:
    command = [sys.executable, "-m", "bitvla", "serve", str(NANO), "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


def test_the_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITVLA_TOKEN", "secret")
    with serve("--protocol", "openpi") as server:
        with pytest.raises(BitvlaError, match="token"):
            bitvla.connect(server.url)
        assert get(server.port, "/metrics", "secret")[0] == 200


def test_serving_brings_in_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "scipy", "pandas", "pyarrow", "metaworld"}
    assert not imported("bitvla.serve.app", "bitvla.serve.lerobot", "bitvla.serve.gr00t") & heavy
    assert not imported("bitvla.serve.app", "bitvla.serve.openpi") & (heavy | {"grpc", "google.protobuf", "zmq"})
    assert not imported("bitvla.serve.client") & {"prometheus_client", "bitvla._native", "tokenizers", "PIL", "rich"}


def imported(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())
