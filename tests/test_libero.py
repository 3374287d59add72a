"""LIBERO behind the simulator interface: protocols as data, the process, and the benchmark itself where installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bitvla.config import ActionConfig, Statistics
from bitvla.convert import conventions
from bitvla.errors import BitvlaError
from bitvla.evaluate.failures import Watch
from bitvla.evaluate.report import report
from bitvla.evaluate.rollout import evaluate
from bitvla.sim import libero, make_simulator
from bitvla.sim.base import TRAINING_SEEDS
from bitvla.sim.libero import PROTOCOLS, Libero, LiberoProcessError
from bitvla.sim.record import Job, record_episode
from fakes import line_config

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
    def problem(self, suite, number):
        goals = {{
            0: [["turnon", "stove"]], 2: [["in", "bowl", "wooden_cabinet_1_top_region"]],
            5: [["on", "plate_1", "table_region"]],
            4: [["in", "bowl", "wooden_cabinet_1_middle_region"], ["turnon", "lamp"]],
        }}
        initial = [["turnon", "lamp"], ["open", "wooden_cabinet_1_middle_region"]]
        return {{"instruction": "go", "initial": initial, "goal": goals.get(number, [["on", "bowl", "plate"]])}}
    def reset(self, suite, number, episode, listed, wait_steps, seed):
        if suite == "libero_broken":
            1 / 0
        self.swapped = suite.endswith("_swap")
        self.asked = [number + 100 * self.swapped, episode, int(listed), wait_steps, seed]
        self.state = [0.0] * 8
        return {{"state": self.state}}
    def step(self, action):
        self.state[0] += action[0]
        return {{"state": self.state, "success": self.state[0] > 2.5 and not self.swapped}}
    def moment(self):
        bowl = {{"at": {{"bowl": [0, 0, 0]}}, "wanted": {{"bowl": True}}, "named": ["bowl"]}}
        return {{"hand": self.state[:3], "touched": [], "held": [], **bowl}}
    def scene(self):
        goal = {{"predicate": "on", "thing": "bowl", "place": "plate"}}
        done = {{**goal, "holds": True, "at": [9.0, 9.0, 9.0]}}
        waits = {{**goal, "holds": False, "at": self.asked[:3], "there": self.asked[2:]}}
        hand = {{"shoulder": [0, 0, 0], "hand": self.state[:3], "closing": [0, 1, 0], "forward": [0, 0, -1]}}
        return {{**hand, "goals": [done, waits]}}
    def heights(self, places, thing, absent):
        return [(x + y, thing == "bowl" and not absent) for x, y in places]
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


def test_an_unknown_suite_is_answered_with_the_nearest():
    module = server()
    simulation = object.__new__(module.Simulation)
    simulation._suites = dict.fromkeys(["libero_10", "libero_goal", "libero_spatial", *map(str, range(99))])
    with pytest.raises(module.RefusedError, match=r"'libero_spatal': there are libero_spatial, .*`libero-pro list`"):
        simulation.tasks("libero_spatal")


def test_a_suite_without_its_files_is_refused():
    class Suite:
        n_tasks = 0

        def get_task_init_states(self, number):
            raise FileNotFoundError("initial states unavailable: a.npz")

        def get_task_bddl_file_path(self, number):
            return "no/a.bddl"

    module = server()
    simulation = object.__new__(module.Simulation)
    simulation._env, simulation._suites, simulation._made = None, {"libero_goal_env": Suite, "libero_100": Suite}, {}
    with pytest.raises(module.RefusedError, match="suite 'libero_100' has no tasks"):
        simulation.tasks("libero_100")
    with pytest.raises(module.RefusedError, match=r"libero_goal_env/3 is incomplete: there is no no/a\.bddl$"):
        simulation.problem("libero_goal_env", 3)
    with pytest.raises(module.RefusedError, match=r"libero_goal_env/3 is incomplete: .* a\.npz$"):
        simulation._open("libero_goal_env", 3)


def test_an_episode_runs_in_the_other_process(world):
    world.reset("libero_goal/3", 7)
    assert world.environment_state().tolist() == [3, 7, 1, 1, 10, 7]  # of the first thing that is not there yet
    seen = world.observe()
    assert seen["images"]["full"].shape == (64, 64, 3)
    assert seen["images"]["full"][0, 0].tolist() == [0, 1, 2]
    assert seen["instruction"] == "go"
    assert [world.step(np.eye(7)[0] * 9) for _ in range(3)] == [False, False, True]  # clipped to 1 a step
    assert world.state()[0] == 3
    assert world.outcome() == {"success": True, "steps": 3, "done": []}
    world.reset("libero_goal/3", 8)
    assert world.outcome() == {"success": False, "steps": 0, "done": []}


def test_demonstrations_never_start_from_a_listed_state(world):
    world.reset("libero_goal/3", TRAINING_SEEDS + 7)
    assert world.environment_state().tolist() == [3, TRAINING_SEEDS + 7, 0, 0, 10, 7]


def test_the_expert_knows_what_it_cannot_do(world):
    reasons = [world.cannot_demonstrate(f"libero_goal/{number}") for number in (0, 1, 2, 4, 5)]
    assert "turnon stove" in reasons[0]
    assert "wooden_cabinet_1_top_region is closed" in reasons[2]
    assert "plate_1 lies too flat" in reasons[4]
    assert reasons[1] == reasons[3] == ""  # a lamp that is on and a drawer that is open need no hand


def test_heights_come_in_the_order_of_the_places(world):
    world.reset("libero_goal/3", 0)
    heights, own = world.heights(np.array([[1.0, 2.0], [3.0, 4.0]]), "bowl")
    assert heights.tolist() == [3, 7]
    assert own.all()
    assert not world.heights(np.zeros((1, 2)), "bowl", absent=True)[1].any()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda world: world.tasks("mt10"), "unknown LIBERO suite 'mt10'"),
        (lambda world: world.tasks("libero_goal/10"), "libero_goal has 0 to 9"),
        (lambda world: world.reset("libero_goal/1", 50), "lists 50 initial states"),
        (lambda world: world.reset("libero_goal/1", TRAINING_SEEDS - 1), "lists 50 initial states"),
        (lambda world: world.reset("libero_goal/0", 0) or world.expert(), "cannot do 'libero_goal/0'.* turnon stove"),
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
    with pytest.raises(BitvlaError, match=r"ended with status 1.*no_such_package.*make libero"):
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


def bounds(names):
    n = len(names)
    return Statistics(names=names, units=("1",) * n, low=(-1.0,) * n, high=(1.0,) * n, mask=(True,) * n)


class Ahead:
    """A policy for LIBERO that goes ahead, eight actions at a time."""

    def __init__(self):
        processing = conventions.libero_processing(bounds(Libero.state_names), bounds(Libero.action_names), views=2)
        self.config = msgspec.structs.replace(line_config(), action=ActionConfig(), processing=processing)

    def reset(self):
        pass

    def info(self):
        return {"instruction_set": "python"}

    def act(self, observation):
        return np.tile(np.eye(7, dtype=np.float32)[0], (8, 1))


def test_a_simulator_that_dies_costs_no_episode_and_counts_none_twice(tmp_path):
    script, mark = tmp_path / "world.py", tmp_path / "died"
    dies = (
        f"        mark = pathlib.Path({str(mark)!r})\n"
        "        if self.asked[1] == 1 and not mark.exists():\n"
        "            mark.touch()\n"
        "            import os\n"
        "            os.kill(os.getpid(), 9)\n"
    )
    step = "    def step(self, action):\n"
    script.write_text(WORLD.replace(step, step + dies))
    env = partial(Libero, python=Path(sys.executable), server=script)
    out = tmp_path / "result.json"
    result = evaluate(
        Ahead, env=env, suite="libero_goal/2", episodes=3, processes=1, out=out, console=Console(quiet=True)
    )
    assert mark.exists()
    assert [episode.seed for episode in result.episodes] == [0, 1, 2]
    assert (result.errors, result.total.successes) == (0, 3)
    written = json.loads(out.read_text())
    assert written["protocol"]["benchmark_protocol"] == "official"
    assert written["protocol"]["max_steps"] == 300
    assert written["versions"]["libero/world"] == "1"
    page = report(out, tmp_path / "report.html").read_text()
    assert "<dt>rules</dt><dd>official</dd>" in page
    assert "rotating" not in page
    assert "From 2 images, state" in page
    assert "never used in training" not in page  # the benchmark's states are the benchmark's


def test_more_episodes_than_initial_states_are_refused_before_the_first(tmp_path):
    script = tmp_path / "world.py"
    script.write_text(WORLD)
    env = partial(Libero, python=Path(sys.executable), server=script)
    call = {"env": env, "suite": "libero_goal/2", "processes": 1, "max_steps": 8, "console": Console(quiet=True)}
    with pytest.raises(BitvlaError, match=r"3 episodes from seed 48 .* 50 initial states .* has a task: 0 to 49$"):
        evaluate(Ahead, first_seed=48, episodes=3, **call)
    assert evaluate(Ahead, first_seed=48, episodes=2, **call).errors == 0


def test_a_suite_is_measured_with_its_perturbed_versions(tmp_path):
    script = tmp_path / "world.py"
    script.write_text(WORLD)
    env = partial(Libero, python=Path(sys.executable), server=script)
    result = evaluate(
        Ahead, env=env, suite="libero_object_pro/1", episodes=2, processes=1, max_steps=8, console=Console(quiet=True)
    )
    names = [f"libero_object{change}/1" for change in ("", "_lan", "_object", "_swap", "_task")]
    assert list(result.tasks) == names
    assert {drop.suite: drop.difference for drop in result.drops} == {
        "libero_object_lan": 0.0,
        "libero_object_object": 0.0,
        "libero_object_swap": -1.0,
        "libero_object_task": 0.0,
    }
    # The hand of this world begins at the bowl, closed.
    assert result.failures == {"spatial localisation": 2}
    assert [e.failure for e in result.episodes if not e.success] == ["spatial localisation"] * 2


def installed():
    try:
        return libero.find_python()
    except BitvlaError:
        return None


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="LIBERO is not installed: make libero")
def test_the_real_benchmark_follows_the_conventions():
    with Libero() as simulator:
        assert len(simulator.tasks("libero_spatial")) == 10
        simulator.reset("libero_spatial/0", 0)
        first, objects = simulator.observe(), simulator.environment_state()
        assert first["instruction"].startswith("pick up the black bowl between the plate and the ramekin")
        # Upside down: the base of the robot, which the camera faces, is at the bottom and gray; the table is not.
        assert np.ptp(first["images"]["full"][-4:].mean(axis=(0, 1))) < 10
        assert np.ptp(first["images"]["full"][:4].mean(axis=(0, 1))) > 10
        before = simulator.state()
        for _ in range(5):
            assert not simulator.step(np.array([0, 0, -1, 0, 0, 0, 1], np.float32))
        after = simulator.state()
        assert before[2] - after[2] > 0.03  # down
        assert after[6] - after[7] < before[6] - before[7]  # 1 closes the fingers
        simulator.reset("libero_spatial/0", 1)
        assert not np.allclose(simulator.environment_state(), objects, atol=1e-3)
        simulator.reset("libero_spatial/0", 0)
        assert np.array_equal(simulator.environment_state(), objects)
        again = simulator.observe()
        assert all(np.array_equal(again["images"][name], first["images"][name]) for name in simulator.cameras)


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="LIBERO is not installed: make libero")
def test_drawn_states_are_like_the_listed_ones():
    with Libero() as simulator:

        def places(task, seeds):
            for seed in seeds:
                simulator.reset(task, seed)
                yield simulator.environment_state()

        for task in ("libero_spatial/4", "libero_spatial/7", "libero_spatial/9"):  # in a drawer, on a burner, on a roof
            listed = np.mean(list(places(task, range(3))), axis=0)
            drawn = np.stack(list(places(task, range(TRAINING_SEEDS, TRAINING_SEEDS + 3))))
            assert np.abs(drawn - listed).max() < 0.08, task
            assert not np.allclose(drawn[0], drawn[1], atol=1e-3)


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="LIBERO is not installed: make libero")
def test_a_perturbed_sentence_is_the_one_that_is_said():
    with Libero() as simulator:
        said = {
            change: simulator.sentence(f"libero_object{change}/2", None) for change in ("", "_lan", "_swap", "_task")
        }
    assert said[""] == said["_swap"] != said["_lan"]
    assert said["_lan"] == "grab salad dressing and put into basket"
    assert said["_task"] == "pick the tomato sauce and place it in the basket"


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="LIBERO is not installed: make libero")
def test_the_real_things_are_seen_to_be_held_and_wanted():
    with Libero() as simulator:
        simulator.reset("libero_object/0", 0)
        first, act = simulator.moment(), simulator.expert()
        watch = Watch(first)
        while not first.at["alphabet_soup_1"][2] + 0.05 < simulator.moment().at["alphabet_soup_1"][2]:
            simulator.step(act())
            watch.see(simulator.moment())
        now = simulator.moment()
        simulator.reset("libero_goal/5", 0)
        assert simulator.moment().named == {"plate_1", "main_table_stove_front_region"}  # which is no part of a thing
    assert first.wanted == now.wanted == {"alphabet_soup_1": True}
    assert first.named == {"alphabet_soup_1", "basket_1", "basket_1_contain_region"}
    assert first.held == first.touched == set()
    assert now.held == now.touched == {"alphabet_soup_1"}
    assert first.opening > 0.9 > now.opening
    assert watch.failure() == "trajectory planning"


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="LIBERO is not installed: make libero")
def test_an_episode_may_be_longer_than_the_benchmarks_longest():
    code = (
        f"import sys; sys.path.insert(0, {str(SERVER.parent)!r}); from server import Simulation; s = Simulation(); "
        "s.reset('libero_object', 0, 0, True, 0, 7); s._env.env.timestep = 999; [s.step([0.0] * 7) for _ in range(3)]"
    )
    done = subprocess.run([installed(), "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="LIBERO is not installed: make libero")
def test_pictures_on_demand_are_those_of_the_benchmark():
    script = Path(__file__).parent / "manual" / "check_libero_pictures.py"
    done = subprocess.run([installed(), script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same in all 12 steps" in done.stdout


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="LIBERO is not installed: make libero")
# Flat and of transparent solids; in a drawer; two things for one basket.
@pytest.mark.parametrize("task", ["libero_object/1", "libero_spatial/4", "libero_10/0"])
def test_the_expert_reaches_the_goal_of_the_benchmark(task):
    with Libero() as simulator:
        simulator.reset(task, 0)
        act = simulator.expert()
        assert any(simulator.step(act()) for _ in range(simulator.steps_of(task)))


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="LIBERO is not installed: make libero")
def test_a_demonstration_is_recorded():
    with Libero(image_size=32) as simulator:
        episode = record_episode(simulator, Job(0, "libero_object/0", 0), seed=0)
    assert episode.task == "pick up the alphabet soup and place it in the basket"
    assert episode.extra["seed"] >= TRAINING_SEEDS
    assert episode.images["wrist"].shape == (episode.length, 32, 32, 3)
    assert episode.vectors["observation.keypoints"].shape == (episode.length, 12)
    hidden = episode.vectors["observation.environment_state"]
    assert np.linalg.norm(hidden[-1, :2] - hidden[-1, 3:5]) < 0.06 < np.linalg.norm(hidden[0, :2] - hidden[0, 3:5])
