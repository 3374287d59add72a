"""Recording real Meta-World demonstrations: reproducible, resumable, and safe against interruption."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bitvla import progress
from bitvla.data.lerobot import LeRobotDataset, claim
from bitvla.errors import BitvlaError
from bitvla.sim import make_simulator
from bitvla.sim import record as recorder
from bitvla.sim.base import TRAINING_SEEDS, GivenUpError
from bitvla.sim.instructions import instruction
from bitvla.sim.record import Job, Settings, record, record_episode

TASK = "drawer-close"


@pytest.fixture(scope="module")
def simulator():
    simulator = make_simulator("metaworld", image_size=32)
    yield simulator
    simulator.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("record") / "whole"
    record("metaworld", TASK, 3, out, image_size=32, processes=1)
    return out


def command(out, episodes=3):
    arguments = ["record", "--env", "metaworld", "--suite", TASK, "--episodes", str(episodes), str(out)]
    return [sys.executable, "-m", "bitvla", *arguments, "--image-size", "32", "--processes", "1"]


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def same(a, b):
    first, second = LeRobotDataset(a), LeRobotDataset(b)
    return np.array_equal(first.action, second.action) and first.task_strings == second.task_strings


def test_an_episode_is_a_function_of_its_job(simulator):
    first = record_episode(simulator, Job(0, "reach-v3", 1), seed=3)
    record_episode(simulator, Job(1, "drawer-close-v3", 0), seed=3)
    again = record_episode(simulator, Job(0, "reach-v3", 1), seed=3)
    other = record_episode(simulator, Job(0, "reach-v3", 2), seed=3)
    assert np.array_equal(first.vectors["action"], again.vectors["action"])
    assert np.array_equal(first.images["wrist"], again.images["wrist"])
    assert not np.array_equal(first.vectors["observation.state"][0], other.vectors["observation.environment_state"][0])
    assert first.extra["seed"] >= TRAINING_SEEDS


class Still:
    """A scene without cameras in which nothing happens."""

    max_steps = 0
    cameras = ()
    action_noise = (1.0,)

    def groups(self):
        return []

    def sentence(self, task, rng):
        return instruction(task, rng)

    def longest_demonstration(self, task):
        return 1

    def expert(self):
        return None

    def reset(self, task, seed, ambiguous):
        pass


def test_an_expert_that_gives_up_fails_an_attempt_not_the_recording():
    tries = []

    class Hopeless(Still):
        max_steps = 1

        def expert(self):
            def act():
                tries.append(1)
                raise GivenUpError("the puck cannot be held as it lies")

            return act

        def step(self, action):
            return False

        def outcome(self):
            return {"success": False}

    with pytest.raises(BitvlaError, match="the expert failed 20 times at 'push-v3'"):
        record_episode(Hopeless(), Job(0, "push-v3", 0), seed=0)
    assert len(tries) == 20


def test_recoveries_and_ambiguous_scenes_have_their_share(monkeypatch):
    """The draws alone, without simulating: about 20 % and 30 % of many episodes."""
    drawn = []

    class Scene(Still):
        def groups(self):
            return [("push-v3",)]

        def reset(self, task, seed, ambiguous):
            drawn.append([ambiguous, False])

    def disturb(*_):
        drawn[-1][1] = True
        return False

    monkeypatch.setattr(recorder, "_disturb", disturb)
    for index in range(1000):
        recorder._attempt(Scene(), Job(0, "push-v3", index), seed=0, attempt=0)
    ambiguous, recoveries = np.mean(drawn, axis=0)
    assert abs(ambiguous - 0.3) < 0.05
    assert abs(recoveries - 0.2) < 0.05


def test_sentences_are_training_sentences(whole):
    known = {instruction(TASK, index, split="train") for index in range(100)}
    assert set(LeRobotDataset(whole).task_strings) <= known


def test_a_killed_recording_goes_on_and_ends_the_same(whole, tmp_path):
    out = tmp_path / "cut"
    process = subprocess.Popen(command(out), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob(".staging/*.npz")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()  # the main process alone: its workers must notice
    process.wait()
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "a worker outlived the recording"
        time.sleep(0.05)
    assert list(out.glob(".staging/*.npz"))
    record("metaworld", TASK, 3, out, image_size=32, processes=1)
    assert same(out, whole)
    assert not (out / ".staging").exists()


def test_ctrl_c_is_one_line_and_keeps_what_is_recorded(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(out, 50), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".staging/*.npz")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(out.glob(".staging/*.npz"))


def test_a_larger_number_continues_and_a_second_run_is_complete(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0)
    assert record("metaworld", TASK, 1, out, image_size=32, processes=1)["recorded_now"] == 1
    assert re.fullmatch(rf"recording 1/1 \S+ {TASK}-v3 \d+ frames\n", capsys.readouterr().err)
    assert record("metaworld", TASK, 3, out, image_size=32, processes=1)["recorded_now"] == 2
    assert record("metaworld", TASK, 3, out, image_size=32, processes=1)["recorded_now"] == 0
    assert same(out, whole)


def test_a_full_disk_is_named_and_loses_nothing(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    append = recorder.LeRobotWriter.append

    def full(self, episodes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recorder.LeRobotWriter, "append", full)
    with pytest.raises(BitvlaError, match=r"No space left on device.*run the same command again"):
        record("metaworld", TASK, 3, out, image_size=32, processes=1)
    assert len(list(out.glob(".staging/*.npz"))) == 3
    monkeypatch.setattr(recorder.LeRobotWriter, "append", append)
    record("metaworld", TASK, 3, out, image_size=32, processes=1)
    assert same(out, whole)


def test_a_simulator_that_dies_is_replaced_once(monkeypatch):
    settings, job, made, closed = Settings("metaworld", TASK, 0, 32), Job(0, TASK, 0), [], []

    def make(env, image_size):
        made.append(env)
        return SimpleNamespace(dies=len(made) in deadly, close=lambda: closed.append(env))

    def demonstrate(simulator, job, seed):
        if simulator.dies:
            raise RuntimeError("the process was ended by SIGKILL")
        return "episode"

    monkeypatch.setattr(recorder, "make_simulator", make)
    monkeypatch.setattr(recorder, "record_episode", demonstrate)
    monkeypatch.setattr(recorder, "_simulators", {})
    deadly = {1}
    assert recorder._with_simulator(job, settings) == "episode"
    assert (len(made), len(closed)) == (2, 1)
    deadly = {3, 4}
    recorder._simulators.clear()
    with pytest.raises(BitvlaError, match=r"failed twice at 'drawer-close' .*SIGKILL.*bitvla doctor"):
        recorder._with_simulator(job, settings)
    assert not recorder._simulators


def test_a_worker_that_is_killed_is_named_and_loses_nothing(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(command(out, 50), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob(".staging/*.npz")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{worker}/cmdline").read_bytes():
            os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "fewer --processes" in errors
    assert list(out.glob(".staging/*.npz"))


def test_a_second_recording_into_the_same_folder_is_refused(whole):
    settings = json.loads((whole / "meta" / "recording.json").read_text())
    with claim(whole, "recording", settings), pytest.raises(BitvlaError, match="another recording is writing"):
        record("metaworld", TASK, 3, whole, image_size=32, processes=1)


def test_a_folder_of_something_else_is_refused(whole, tmp_path):
    with pytest.raises(BitvlaError, match="other settings"):
        record("metaworld", TASK, 3, whole, image_size=48, processes=1)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(BitvlaError, match="not empty"):
        record("metaworld", TASK, 3, tmp_path, image_size=32, processes=1)
