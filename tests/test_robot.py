"""Robots and `bitvla run`: what fits, what is refused, what is recorded, and what a replay says of it.

pytest tests/test_robot.py
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import bitvla
from bitvla.cli import main
from bitvla.data.lerobot import LeRobotDataset, alone
from bitvla.errors import BitvlaError
from bitvla.robot import make_robot
from bitvla.robot.base import FakeRobot, actions_of
from bitvla.robot.lerobot import LeRobotRobot, open_lerobot
from bitvla.robot.recorder import DECISION, Recorder
from bitvla.robot.replay import replay
from bitvla.robot.run import Options, _check_limits, run
from bitvla.serve.executor import Executor, Step
from bitvla.serve.guard import Axis, Guard, Limits, limits_from
from bitvla.serve.joining import RealTimeChunking
from bitvla.serve.schedule import settings_for
from checkpoints import pack_random, tiny_config, token_config
from serving import NANO, serving

FAST = Options(seconds=0.6, control_hz=20.0, threads=1)


HORIZON = 60  # so long that actions do not run out on a machine that is busy with other tests


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two policies for the same robot, which take a prefix."""
    root = tmp_path_factory.mktemp("policies")
    action = msgspec.structs.replace(tiny_config().action, horizon=HORIZON, max_prefix=HORIZON // 2)
    first, second = (pack_random(root / str(seed), tiny_config(action=action), seed=seed) for seed in range(2))
    return first, second


@pytest.fixture(scope="module")
def policy(policies: tuple[Path, Path]) -> str:
    return str(policies[0])


@pytest.fixture(scope="module")
def info(policy: str) -> dict[str, Any]:
    return bitvla.load(policy, threads=1).info()


def fake(info: Mapping[str, Any]) -> FakeRobot:
    return FakeRobot(info, "open the drawer")


# -- what fits ---------------------------------------------------------------------------


FEATURES: dict[str, Any] = {
    "corner": (36, 32, 3), "s2": float, "s0": float, "s1": float, "wrist": (30, 30, 3)
}  # fmt: skip


class Hardware:
    """Has the methods of `lerobot.robots.Robot`, its values in another order than the policy's."""

    def __init__(self, **changes: Any) -> None:
        self.observation_features = FEATURES
        self.action_features = dict.fromkeys(("a3", "a1", "a0", "a2"), float)
        vars(self).update(changes)
        self.is_connected = False
        self.connections, self.sent = 0, []

    def connect(self) -> None:
        self.connections, self.is_connected = self.connections + 1, True

    def disconnect(self) -> None:
        self.is_connected = False

    def get_observation(self) -> dict[str, Any]:
        noise = np.random.default_rng(len(self.sent))
        return {
            name: noise.integers(0, 256, kind, np.uint8) if isinstance(kind, tuple) else 0.1 * int(name[1])
            for name, kind in self.observation_features.items()
        }

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        assert self.is_connected
        self.sent.append(action)
        return action


LIMITS = """
[[axes]]
name = "a0"
kind = "displacement"
low = -0.01
high = 0.01
[[axes]]
name = "a1"
kind = "position"
low = -10
high = 10
[[axes]]
name = "a2"
kind = "position"
low = -10
high = 10
[[axes]]
name = "a3"
kind = "gripper"
low = -10
high = 10
"""


def test_a_lerobot_robot_is_spoken_to_by_name(policy: str, info: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text(LIMITS)
    hardware = Hardware()
    options = msgspec.structs.replace(FAST, limits=tmp_path / "limits.toml", log=tmp_path / "log.jsonl", episodes=2)
    result = run(policy, lambda info: LeRobotRobot(hardware, info, "open the drawer"), options)
    assert [summary.played for summary in result["episodes"]] == [12, 12]
    assert result["episodes"][0].clipped["a0: speed"] == 12
    assert hardware.connections == 1
    assert not hardware.is_connected
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (tmp_path / "log-1.jsonl").exists()
    told = [dict(zip(info["action"]["names"], step["action"], strict=True)) for step in steps if "kind" in step]
    assert hardware.sent[: len(told)] == told
    assert hardware.sent[-1]["a0"] == 0  # the last command is to hold
    assert hardware.sent[-1]["a1"] == hardware.sent[-2]["a1"]
    state = LeRobotRobot(Hardware(), info, "").observe()["state"]
    np.testing.assert_allclose(state, [0, 0.1, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"observation_features": {"corner": (36, 32, 3), "s0": float, "s1": float, "s2": float}},
            "'wrist' is missing",
        ),
        (
            {"observation_features": FEATURES | {"top": (30, 30, 3)}},
            "'top' is unknown to the policy: the policy needs corner, wrist",
        ),
        (
            {"observation_features": FEATURES | {"wrist": (480, 640, 3)}},
            "'wrist' of the robot delivers 480 x 640 pixels, the policy was trained on 30 x 30 pixels",
        ),
        (
            {"observation_features": FEATURES | {"s3": float}},
            "state of the robot is s2, s0, s1, s3",
        ),
        ({"action_features": {"a0": float}}, "action of the robot is a0; the policy was trained with a0, a1"),
        ({}, "--limits"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_connected(
    policy: str, changes: dict[str, Any], message: str
) -> None:
    hardware = Hardware(**changes)
    with pytest.raises(BitvlaError, match=message):
        run(policy, lambda info: LeRobotRobot(hardware, info, "go"), FAST)
    assert hardware.connections == 0


def test_a_robot_that_fails_is_told_to_hold_and_let_go(policy: str, tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text(LIMITS)
    hardware = Hardware()

    def unplugged() -> dict[str, Any]:
        if len(hardware.sent) > 5:
            raise TimeoutError("camera corner: no frame")
        return Hardware.get_observation(hardware)

    hardware.get_observation = unplugged  # type: ignore[method-assign]
    options = msgspec.structs.replace(FAST, limits=tmp_path / "limits.toml", seconds=5, record=tmp_path / "data")
    with pytest.raises(BitvlaError, match="the robot failed: TimeoutError: camera corner"):
        run(policy, lambda info: LeRobotRobot(hardware, info, "go"), options)
    assert hardware.sent[-1]["a0"] == 0
    assert not hardware.is_connected
    assert LeRobotDataset(tmp_path / "data").num_frames == 6


def test_a_robot_whose_observation_lacks_a_value_is_named(info: dict[str, Any]) -> None:
    for seen in ({}, FEATURES | {"s1": "x"}):
        with pytest.raises(BitvlaError, match="the robot failed: "):
            LeRobotRobot(Hardware(get_observation=lambda seen=seen: seen), info, "go").observe()


def test_limits_that_contradict_a_name_are_refused() -> None:
    """To hold, a position that is called a displacement would be told to go to 0, and a speed would go on."""
    for name, kind in (("elbow.pos", "displacement"), ("gripper.pos", "displacement"), ("x.vel", "position")):
        with pytest.raises(BitvlaError, match=f"call '{name}' a {kind}, which its name contradicts"):
            _check_limits(Limits(axes=(Axis(name=name, kind=kind, low=-1, high=1),)), {"action": {"names": [name]}})
    for name, kind in (("elbow.pos", "position"), ("gripper.pos", "position"), ("x", "displacement")):
        _check_limits(Limits(axes=(Axis(name=name, kind=kind, low=-1, high=1),)), {"action": {"names": [name]}})


def test_a_policy_without_a_state_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(BitvlaError, match="takes no state"):
        run(str(pack_random(tmp_path, token_config())), fake, FAST)


def test_names_tell_what_is_commanded_or_do_not() -> None:
    assert actions_of(["shoulder_pan.pos", "gripper.pos", "x.vel"]) == ("position", "gripper", "displacement")
    assert actions_of(["ee.x"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--robot", "fake"], "--instruction"),
        (["--robot", "metaworld"], "--task"),
        (["--robot", "lerobot", "--instruction", "go"], "--robot-config"),
        (
            ["--robot", "lerobot", "--instruction", "go", "--robot-config", "none.toml"],
            "cannot read the configuration none.toml",
        ),
        (["--robot", "fake", "--instruction", "go", "--hz", "21"], "faster than the 20 Hz"),
        (["--robot", "fake", "--instruction", "go", "--max-hold", "0"], "max_hold_s 0.0 is not a positive time"),
    ],
)
def test_what_a_run_needs_is_named(
    policy: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", policy, "--threads", "1", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_a_rate_that_is_none_is_bad_usage(policy: str, rate: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", policy, "--robot", "fake", "--instruction", "go", "--hz", rate])


def test_without_lerobot_it_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lerobot", None)
    (tmp_path / "arm.toml").write_text('type = "so101_follower"')
    with pytest.raises(BitvlaError, match="pip install lerobot"):
        open_lerobot(tmp_path / "arm.toml")


def test_zero_seconds_prove_and_move_nothing(policy: str) -> None:
    robots: list[FakeRobot] = []

    def keep(info: Mapping[str, Any]) -> FakeRobot:
        robots.append(fake(info))
        return robots[0]

    result = run(policy, keep, msgspec.structs.replace(FAST, seconds=0))
    assert result["episodes"][0].plan.proven
    assert robots[0].taken == 0


# -- near and far ------------------------------------------------------------------------


def test_a_served_policy_drives_the_same_robot(policy: str) -> None:
    """The server tells all that is needed, the range of the actions for the guard included."""
    with serving(partial(bitvla.load, policy, threads=1)) as server:
        result = run(server.url, fake, msgspec.structs.replace(FAST, joining="real_time_chunking"))
    assert result["episodes"][0].played == 12
    assert result["episodes"][0].gaps == 0


def test_a_simulated_robot_lives_in_its_own_process(info: dict[str, Any]) -> None:
    cameras = [{"name": name, "height": 32, "width": 32} for name in ("corner", "wrist")]
    robot = make_robot("metaworld", {"cameras": cameras}, task="drawer-open", seed=3)
    try:
        assert robot.actions == ("displacement",) * 3 + ("gripper",)
        robot.start(0)
        first = robot.observe()
        assert first["images"]["wrist"].shape == (32, 32, 3)
        for _ in range(5):
            robot.step(np.array([1, 0, 0, 0], np.float32))
        assert robot.observe()["state"][0] > first["state"][0] + 0.01
        robot.start(0)
        assert np.array_equal(robot.observe()["state"], first["state"])
        with pytest.raises(BitvlaError, match="mt10"):
            make_robot("metaworld", {"cameras": cameras}, task="mt10")
    finally:
        robot.close()


# -- record and replay -------------------------------------------------------------------


def record(policy: str, out: Path, **changes: Any) -> dict[str, Any]:
    return run(policy, fake, msgspec.structs.replace(FAST, record=out, **changes))


@pytest.mark.parametrize("joining", ["replace", "real_time_chunking", "temporal_ensemble"])
def test_a_replay_against_the_same_policy_is_identical(policy: str, tmp_path: Path, joining: str) -> None:
    record(policy, tmp_path / "data", joining=joining, episodes=2)
    result = replay(tmp_path / "data", policy, threads=1)
    assert result["identical"]
    assert result["chunks"] > 1
    assert {row["max"] for row in result["dimensions"]} == {0}


def test_a_replay_says_where_another_policy_differs(policies: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = map(str, policies)
    record(first, tmp_path / "data", episodes=2)
    result = replay(tmp_path / "data", second, threads=1)
    assert not result["identical"]
    asked, dataset = bitvla.load(second, threads=1), LeRobotDataset(tmp_path / "data")
    units = asked.info()["action"]["units"]
    for index, row in enumerate(result["dimensions"]):
        assert row["unit"] == units[index]
        frame = dataset.episode_ranges[row["episode"]][0] + row["frame"]
        images = {camera: dataset.images(camera)[frame] for camera in dataset.cameras}
        seen = {"images": images, "state": dataset.state[frame], "instruction": "open the drawer"}
        recorded = dataset.vectors("executor.chunk")[frame].reshape(HORIZON, 4)
        error = np.abs(asked.act(seen) - recorded)[row["row"], index]
        assert row["max"] == pytest.approx(error, rel=1e-5)
        assert 0 < row["mean"] < row["p95"] <= row["max"]
    shares = [row["mean share of the span"] for row in result["most different"]]
    assert shares == sorted(shares, reverse=True)
    one = replay(tmp_path / "data", second, episode=1, threads=1)
    assert 0 < one["chunks"] < result["chunks"]
    with pytest.raises(BitvlaError, match="episode 7"):
        replay(tmp_path / "data", second, episode=7, threads=1)


def test_a_chunk_that_was_decided_as_far_as_the_other_policy_looks_is_left_out(policy: str, tmp_path: Path) -> None:
    action = msgspec.structs.replace(tiny_config().action, horizon=1)
    processing = msgspec.structs.replace(tiny_config().processing, execute_horizon=1)
    short = str(pack_random(tmp_path / "short", tiny_config(action=action, processing=processing)))
    record(policy, tmp_path / "data", joining="real_time_chunking")
    recorded = LeRobotDataset(tmp_path / "data").vectors("executor.decision")
    asked, frozen = recorded[:, DECISION.index("latency_ms")] > 0, recorded[:, DECISION.index("frozen")]
    result = replay(tmp_path / "data", short, threads=1)
    assert result["chunks"] == (asked & (frozen < 1)).sum() < asked.sum()
    assert all(np.isfinite(chunk["mean share of the span"]) for chunk in result["most different"])


def test_the_commands_do_both(policies: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = map(str, policies)
    options = ["--robot", "fake", "--instruction", "go", "--seconds", "0.5", "--record", str(tmp_path / "data")]
    assert main(["run", first, *options, "--threads", "1"]) == 0
    assert "no gap while answers take up to" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "data"), second, "--threads", "1"]) == 0
    assert "dimension" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "data"), second, "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] > 0


def test_a_recording_tells_every_decision(policy: str, info: dict[str, Any], tmp_path: Path) -> None:
    """Seen against the executor's own log and what the robot saw and was told."""
    seen: list[np.ndarray] = []
    told: list[np.ndarray] = []

    class Watched(FakeRobot):
        def observe(self) -> dict[str, Any]:
            observation = super().observe()
            seen.append(observation["images"]["corner"])
            return observation

        def step(self, action: np.ndarray) -> None:
            told.append(action)

    actions = ("displacement",) * 3 + ("gripper",)
    limits = limits_from(info, actions, margin=-0.3)  # narrow, so that the guard has something to do
    recorder = Recorder(tmp_path / "data", info, 20.0, "watched")
    executor = Executor(
        bitvla.load(policy, threads=1),
        Watched(info, "go"),
        settings_for(info, actions, joining=RealTimeChunking()),
        guard=Guard(limits, 20.0),
        log=tmp_path / "log.jsonl",
        recorder=recorder,
    )
    summary = executor.run(12)
    recorder.save()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kind" in line]
    answers = {line["chunk"]: line for line in lines if "chunk" in line}
    dataset = LeRobotDataset(tmp_path / "data")
    decisions = {name: dataset.vectors("executor.decision")[:, i] for i, name in enumerate(DECISION)}
    planned, chunks = dataset.vectors("executor.planned"), dataset.vectors("executor.chunk").reshape(-1, HORIZON, 4)
    assert dataset.num_frames == len(steps) == 12
    assert np.array_equal(dataset.action, np.array([step["action"] for step in steps], np.float32))
    assert np.array_equal(dataset.action, told[:-1])
    assert summary.clipped
    assert (planned != dataset.action).any(axis=0).any()
    assert (decisions["queue"] == [step["queue"] for step in steps]).all()
    for frame, step in enumerate(steps):
        source = step["sources"][-1]
        asked_at = int(decisions["source_frame"][frame])
        assert decisions["source_row"][frame] == source[1]
        assert np.array_equal(chunks[asked_at], np.array(answers[source[0]]["actions"], np.float32))
        assert np.array_equal(planned[frame], chunks[asked_at][source[1]])
        assert decisions["latency_ms"][asked_at] == pytest.approx(answers[source[0]]["latency_ms"], rel=1e-5)
        assert decisions["frozen"][asked_at] == answers[source[0]]["frozen"]
    assert decisions["frozen"].max() > 0
    assert np.array_equal(dataset.images("corner"), seen[-12:])  # lossless, and the last before each command
    facts = dataset.episodes.iloc[0]
    assert facts["policy_sha256"] == info["sha256"]
    assert json.loads(facts["summary"])["played"] == 12


def test_a_run_that_is_refused_leaves_no_episode(policy: str, tmp_path: Path) -> None:
    class Blind(FakeRobot):
        def observe(self) -> dict[str, Any]:
            raise BitvlaError("no image")

    record(policy, tmp_path / "data")
    with pytest.raises(BitvlaError, match="no image"):
        run(policy, lambda info: Blind(info, "go"), msgspec.structs.replace(FAST, record=tmp_path / "data"))
    assert LeRobotDataset(tmp_path / "data").num_episodes == 1


STEP = Step(
    time_ms=0, kind="hold", step=0, action=(0.0,) * 4, sources=(), queue=0, age_ms=0, slack_ms=0, change=0, jerk=0,
    seam=False,
)  # fmt: skip


@pytest.fixture
def recorder(info: dict[str, Any], tmp_path: Path) -> Recorder:
    """Three frames are recorded."""
    recorder = Recorder(tmp_path / "data", info, 20.0, "fake")
    for _ in range(3):
        recorder.commanded(fake(info).observe(), np.zeros(4, np.float32), STEP)
    return recorder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"corner": np.zeros((8, 8, 3), np.uint8), "wrist": np.zeros((30, 30, 3), np.uint8)}}, "8, 8, 3"),
        ({"images": {"corner": np.zeros((36, 32, 3)), "wrist": np.zeros((30, 30, 3), np.uint8)}}, "dtype float64"),
        ({"images": {"corner": np.zeros((36, 32, 3), np.uint8)}}, "'wrist'"),
        ({"state": np.zeros(2)}, "3 finite numbers"),
        ({"state": [0, np.nan, 0]}, "3 finite numbers"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_and_the_others_kept(
    recorder: Recorder, info: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BitvlaError, match=message):
        recorder.commanded(fake(info).observe() | changes, np.zeros(4, np.float32), STEP)
    recorder.save()
    assert LeRobotDataset(tmp_path / "data").num_frames == 3


def test_a_full_disk_leaves_what_is_whole(recorder: Recorder, info: dict[str, Any], tmp_path: Path) -> None:
    recorder._files["corner"].flush()
    os.truncate(tmp_path / "data" / ".running" / "0.raw", 36 * 32 * 3 * 5 // 2)
    recorder.save()
    assert LeRobotDataset(tmp_path / "data").num_frames == 2
    recorder.commanded(fake(info).observe(), np.zeros(4, np.float32), STEP)
    recorder._files["wrist"] = open("/dev/full", "wb")  # noqa: SIM115 -- the recorder closes it
    image = np.zeros((30, 30, 3), np.uint8)
    with pytest.raises(BitvlaError, match="free some space"):
        all(recorder._write("wrist", image) is None for _ in range(10))  # some fit into the buffer
    recorder.save()
    assert LeRobotDataset(tmp_path / "data").num_episodes == 1
    assert not (tmp_path / "data" / ".running").exists()


def test_a_folder_that_cannot_be_or_is_in_use_is_told_before_anything_is_measured(policy: str, tmp_path: Path) -> None:
    """A second recorder would write its pictures into the episode of the first."""
    (tmp_path / "file").touch()
    with pytest.raises(BitvlaError, match=r"cannot write to .*: Not a directory"):
        record(policy, tmp_path / "file" / "data")
    with alone(tmp_path / "data", "recording"), pytest.raises(BitvlaError, match="another recording is writing"):
        record(policy, tmp_path / "data")


def test_another_dataset_is_not_added_to(policy: str, tmp_path: Path) -> None:
    record(policy, tmp_path / "data")
    with pytest.raises(BitvlaError, match="other features or another rate"):
        record(policy, tmp_path / "data", control_hz=10.0)


def test_a_dataset_that_is_no_recording_is_told(policy: str, tmp_path: Path) -> None:
    from datasets import write_dataset

    with pytest.raises(BitvlaError, match="no recording"):
        replay(write_dataset(tmp_path / "data", episodes=2), policy, threads=1)


RUN = ["--robot", "fake", "--instruction", "go", "--threads", "1"]


@pytest.fixture
def start(policy: str, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bitvla", "run", policy, *RUN, "--record", str(tmp_path / "data"), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_kill_loses_the_running_episode_alone(
    policy: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("--episodes", "100", "--seconds", "0.5")
    info = tmp_path / "data" / "meta" / "info.json"
    wait_for(lambda: info.exists() and json.loads(info.read_text())["total_episodes"] >= 2)
    wait_for((tmp_path / "data" / ".running" / "0.raw").exists)
    process.kill()
    process.communicate(timeout=30)
    kept = LeRobotDataset(tmp_path / "data").num_episodes
    assert kept >= 2
    assert replay(tmp_path / "data", policy, threads=1)["identical"]
    record(policy, tmp_path / "data")
    assert LeRobotDataset(tmp_path / "data").num_episodes == kept + 1
    assert not (tmp_path / "data" / ".running").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_holds_and_keeps_the_episode(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], number: int, status: int
) -> None:
    process = start("--seconds", "60", "--log", str(tmp_path / "log.jsonl"))
    log = tmp_path / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count('"kind"') > 1)  # the first frame is recorded then
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == status, error
    assert LeRobotDataset(tmp_path / "data").num_episodes == 1
    summary = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert summary["ended"] == ("stop" if status == 0 else "KeyboardInterrupt")


def test_a_camera_that_freezes_ends_the_run_on_hold(policy: str, info: dict[str, Any], tmp_path: Path) -> None:
    told: list[np.ndarray] = []

    class Frozen(FakeRobot):
        def observe(self) -> dict[str, Any]:
            observation = super().observe()
            observation["images"]["wrist"] = np.zeros((30, 30, 3), np.uint8)
            return observation

        def step(self, action: np.ndarray) -> None:
            told.append(action)

    options = msgspec.structs.replace(FAST, seconds=30, record=tmp_path / "data")
    with pytest.raises(BitvlaError, match="camera 'wrist' has shown the same image 11 times"):
        run(policy, lambda info: Frozen(info, "go"), options)
    assert len(told) < 60
    assert not told[-1].any()
    assert "frozen" in LeRobotDataset(tmp_path / "data").episodes.iloc[0]["ended"]


EXAMPLE = Path(__file__).parent.parent / "examples" / "lerobot_arm.py"


def test_the_example_plays_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hz", "4", "--seconds", "2", "--record", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["arm", str(NANO), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "8 actions in " in capsys.readouterr().out
    dataset = LeRobotDataset(tmp_path / "data")
    assert dataset.num_frames == 8
    moved = dataset.state[1:, :3] - dataset.state[:-1, :3]
    np.testing.assert_allclose(moved, 0.01 * dataset.action[:-1, :3], atol=1e-6)
