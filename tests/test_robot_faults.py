"""A robot whose policy is far away, over real sockets and processes, when the network or the server fails.

    pytest tests/test_robot_faults.py

Time is real here. Packets are held back by a relay, since a kernel need not have netem. Whatever happens, a row of a
chunk is never played twice, standing still is zero displacement, and the last command is to hold.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitvla
from bitvla.errors import BitvlaError
from bitvla.serve.executor import Executor, Summary
from bitvla.serve.schedule import Settings
from serving import Held, expected, locked, observation, serving, stalling_network, wait_until
from test_serve_process import serve

ACTIONS = ("displacement", "displacement", "displacement", "gripper")


class Arm:
    """A robot that sees noise and keeps what it is told; `on_step` hears of every command."""

    def __init__(self, on_step: Any = lambda count: None) -> None:
        self.told: list[np.ndarray] = []
        self._on_step = on_step

    def observe(self) -> dict[str, Any]:
        return observation(len(self.told) % 50)

    def step(self, action: np.ndarray) -> None:
        self.told.append(action)
        self._on_step(len(self.told))


def play(url: str, arm: Arm, log: Path, steps: int, timeout: float, **settings: Any) -> Summary:
    known = {"control_hz": 20.0, "actions": ACTIONS, "alignment": "lagged", "warmup_calls": 2, "slowest": 1.0}
    known["allow_gaps"] = True  # a machine that is busy with other tests proves nothing
    with bitvla.connect(url, timeout=timeout) as policy:
        return Executor(policy, arm, Settings(**known | settings), log=log).run(steps)


def check_nothing_is_repeated(arm: Arm, log: Path) -> list[str]:
    """The kinds of the steps, after what must hold in every run."""
    steps = [line for line in map(json.loads, log.read_text().splitlines()) if "kind" in line]
    played = [tuple(step["sources"][-1][:2]) for step in steps if step["kind"] == "play"]
    assert played == sorted(set(played))
    for step in steps:
        if step["kind"] == "hold":
            assert step["action"][:3] == [0, 0, 0]
    assert arm.told[-1][:3].tolist() == [0, 0, 0]
    return [step["kind"] for step in steps]


def test_jitter_of_200_ms_and_a_lost_packet_are_held_through(tmp_path: Path) -> None:
    """Packets come up to 200 ms late in both directions; one is lost, and sent again after TCP's patience."""
    random = np.random.default_rng(3)
    jitter = (random.uniform(0, 0.2) for _ in itertools.count())
    quiet, lost = itertools.repeat(0.0, 4), itertools.chain(itertools.islice(jitter, 14), [1.6])
    stalls = locked(itertools.chain(quiet, lost, jitter))
    arm = Arm()
    with serving() as server, stalling_network(server.port, stalls) as url:
        summary = play(url, arm, tmp_path / "log", steps=70, timeout=10, max_hold_s=20.0)
    kinds = check_nothing_is_repeated(arm, tmp_path / "log")
    assert (summary.ended, summary.played) == ("steps", 70)
    assert summary.gaps >= 1
    assert summary.held == kinds.count("hold") > 0  # 1.6 s without a packet, and a chunk lasts 0.8 s
    assert kinds[-1] == "play"


def test_a_network_that_falls_silent_stops_the_robot_by_its_own_deadline(tmp_path: Path) -> None:
    silent = threading.Event()
    silence = (30.0 if silent.is_set() else 0.0 for _ in itertools.count())
    arm = Arm(lambda count: silent.set() if count == 5 else None)
    with serving() as server, stalling_network(server.port, locked(silence)) as url:
        start = time.monotonic()
        with pytest.raises(BitvlaError, match="no action for"):
            play(url, arm, tmp_path / "log", steps=400, timeout=4, max_hold_s=0.5)
        assert time.monotonic() - start < 20
    assert check_nothing_is_repeated(arm, tmp_path / "log")[-1] == "hold"


def test_a_robot_holds_while_its_server_is_killed_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    back = threading.Event()

    def kill(count: int) -> None:
        if count == 20:
            threading.Thread(target=restart).start()

    def restart() -> None:
        server.end(signal.SIGKILL)
        time.sleep(1.5)  # longer than a chunk
        with serve("--protocol", "openpi", "--port", str(server.port)) as again:
            again.event("ready")
            back.wait(120)

    arm = Arm(kill)
    with serve("--protocol", "openpi") as server:
        try:
            summary = play(server.url, arm, tmp_path / "log", steps=60, timeout=120, max_hold_s=120.0)
        finally:
            back.set()
    kinds = check_nothing_is_repeated(arm, tmp_path / "log")
    assert (summary.ended, summary.played) == ("steps", 60)
    assert "hold" in kinds[20:]
    assert kinds[-1] == "play"


CLIENT = """
import sys
import bitvla
sys.path.insert(0, sys.argv[2])
from serving import observation
policy = bitvla.connect(sys.argv[1])
print("asking", flush=True)
policy.act(observation())
"""


def test_a_client_that_is_killed_while_it_waits_leaves_the_others_alone() -> None:
    held = Held(going=True)
    with serving(lambda: held) as server, bitvla.connect(server.url, timeout=30) as other:
        held.going.clear()
        held.began.clear()
        folder = str(Path(__file__).parent)
        client = subprocess.Popen([sys.executable, "-c", CLIENT, server.url, folder], stdout=subprocess.PIPE)
        assert held.began.wait(60)
        client.kill()
        client.communicate()
        held.going.set()
        assert other.act(observation(2)).tobytes() == expected(2).tobytes()
        wait_until(lambda: server.metric("bitvla_sessions") == 1)


def test_a_clock_that_the_system_sets_is_not_the_robots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps by an hour, forth and back, at every look: control and deadlines go on unmoved."""
    jumps: Iterator[float] = itertools.cycle([3600.0, -3600.0])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    arm = Arm()
    with serving() as server:
        summary = play(server.url, arm, tmp_path / "log", steps=25, timeout=10, max_hold_s=10.0)
    check_nothing_is_repeated(arm, tmp_path / "log")
    assert summary.ended == "steps"
    assert 1.1 < summary.seconds < 30
