"""LIBERO behind the simulator interface: protocols as data, the process, and the benchmark itself where installed."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitvla.convert import conventions
from bitvla.errors import BitvlaError
from bitvla.sim import libero
from bitvla.sim.base import make_simulator
from bitvla.sim.libero import PROTOCOLS, Libero, LiberoProcessError

SERVER = Path(libero.__file__).with_name("server.py")

# Speaks the protocol through the real serve(), with a world that needs no graphics: the hand moves by its commands.
WORLD = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("server", {str(SERVER)!r})
server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(server)

class World:
    def versions(self):
        return {{"libero/world": "1"}}
    def tasks(self, suite):
        if not suite.startswith("libero_"):
            raise server.RefusedError(f"unknown LIBERO suite '{{suite}}'")
        return 10
    def reset(self, suite, number, episode, wait_steps, seed):
        if suite == "libero_broken":
            1 / 0
        self.asked = [number, episode, wait_steps, seed]
        self.state = [0.0] * 8
        return {{"state": self.state, "objects": self.asked[:3], "instruction": "go"}}
    def step(self, action):
        self.state[0] += action[0]
        return {{"state": self.state, "objects": self.asked[:3], "success": self.state[0] > 2.5}}
    def render(self, size):
        full = bytes(range(256)) * (3 * size * size // 256)
        return {{"full": full, "wrist": bytes(len(full))}}
    def close(self):
        pass

server.serve(int(sys.argv[1]), World)
"""


@pytest.fixture
def world(tmp_path):
    script = tmp_path / "world.py"
    script.write_text(WORLD)
    with Libero(image_size=64, python=Path(sys.executable), server=script) as simulator:
        yield simulator


@pytest.mark.parametrize(
    ("protocol", "suite", "steps"),
    [
        ("official", "libero_spatial", 220),
        ("official", "libero_object", 280),
        ("official", "libero_goal", 300),
        ("official", "libero_10", 520),
        ("official", "libero_90", 400),
        ("official", "libero_goal/3", 300),
        ("official", "libero_10_swap", 520),
        ("official", "libero_spatial_lan", 220),
        ("lerobot", "libero_spatial", 280),
        ("lerobot", "libero_goal", 300),
        ("vla.cpp", "libero_spatial", 500),
        ("vla.cpp", "libero_10", 500),
    ],
)
def test_an_episode_is_as_long_as_the_protocol_says(tmp_path, protocol, suite, steps):
    script = tmp_path / "world.py"
    script.write_text(WORLD)
    with Libero(protocol=protocol, python=Path(sys.executable), server=script) as simulator:
        assert simulator.steps_of(suite) == steps
        assert simulator.benchmark_protocol == protocol


def test_every_protocol_waits_ten_steps_and_has_its_own_seed():
    assert {name: (rules.wait_steps, rules.seed) for name, rules in PROTOCOLS.items()} == {
        "official": (10, 7),
        "lerobot": (10, 1000),
        "vla.cpp": (10, 42),
    }


def test_the_conventions_are_those_of_the_published_fine_tunes():
    assert Libero.state_names == tuple(conventions.LIBERO_STATE)
    assert Libero.action_names == tuple(conventions.LIBERO_ACTION)
    assert Libero.cameras == conventions.CAMERAS[2]
    assert server().DUMMY_ACTION == (0, 0, 0, 0, 0, 0, -1)


def server():
    spec = importlib.util.spec_from_file_location("server", SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("quaternion", "expected"),
    [
        ((0, 0, 0, 1), (0, 0, 0)),
        ((0, 0, 0, -1.0000001), (0, 0, 0)),
        ((1, 0, 0, 0), (math.pi, 0, 0)),
        ((0, 0, math.sin(0.25), math.cos(0.25)), (0, 0, 0.5)),
        # The opposite sign is the same rotation, but another vector: policies were trained without a choice of sign.
        ((0, 0, -math.sin(0.25), -math.cos(0.25)), (0, 0, -(2 * math.pi - 0.5))),
    ],
)
def test_a_rotation_is_an_axis_times_an_angle_without_a_choice_of_sign(quaternion, expected):
    assert np.allclose(server().axis_angle(quaternion), expected)


def test_an_episode_runs_in_the_other_process(world):
    world.reset("libero_goal/3", 7)
    assert world.environment_state().tolist() == [3, 7, 10]
    seen = world.observe()
    assert seen["images"]["full"].shape == (64, 64, 3)
    assert seen["images"]["full"][0, 0].tolist() == [0, 1, 2]
    assert seen["instruction"] == "go"
    assert [world.step(np.eye(7)[0] * 9) for _ in range(3)] == [False, False, True]  # clipped to 1 a step
    assert world.state()[0] == 3
    assert world.outcome() == {"success": True, "steps": 3, "done": []}
    world.reset("libero_goal/3", 8)
    assert world.outcome() == {"success": False, "steps": 0, "done": []}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda world: world.tasks("mt10"), "unknown LIBERO suite 'mt10'"),
        (lambda world: world.tasks("libero_goal/10"), "libero_goal has 0 to 9"),
        (lambda world: world.reset("libero_goal/1", 50), "lists 50 initial states"),
        (lambda world: world.reset("libero_goal/1", 0, ambiguous=True), "no ambiguous scenes"),
        (lambda world: world.observe(), "call reset"),
        (lambda world: world.reset("libero_goal/1", 0) or world.step(np.zeros(4)), "seven finite numbers"),
        (lambda world: world.reset("libero_goal/1", 0) or world.step(np.full(7, np.nan)), "seven finite numbers"),
        (lambda world: Libero(protocol="mine"), "available are official, lerobot, vla.cpp"),
        (lambda world: Libero(image_size=4), "choose 16 to 640"),
    ],
)
def test_a_bad_request_is_refused_with_a_reason(world, call, reason):
    with pytest.raises(BitvlaError, match=reason):
        call(world)


def test_a_failure_inside_the_benchmark_is_not_the_users(world):
    with pytest.raises(LiberoProcessError, match="failed in reset: ZeroDivisionError"):
        world.reset("libero_broken/1", 0)


def test_a_killed_simulator_is_an_error_that_says_so(world):
    world.reset("libero_goal/1", 0)
    os.kill(world.pid, signal.SIGKILL)
    with pytest.raises(LiberoProcessError, match="was ended by SIGKILL"):
        world.step(np.zeros(7))
    world.close()
    world.close()


def test_a_process_that_cannot_start_gives_its_last_words(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import no_such_package")
    with pytest.raises(LiberoProcessError, match=r"ended with status 1.*no_such_package"):
        Libero(python=Path(sys.executable), server=script)


def test_without_the_environment_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("BITVLA_LIBERO", str(tmp_path))
    with pytest.raises(BitvlaError, match="run `make libero`"):
        make_simulator("libero")


def test_a_protocol_is_for_libero_only(tmp_path):
    command = [sys.executable, "-m", "bitvla", "eval", "no.safetensors", "--suite", "mt10", "--episodes", "1"]
    done = subprocess.run([*command, "--protocol", "lerobot"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--protocol is for --env libero" in done.stderr
