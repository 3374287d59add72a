"""Meta-World behind the simulator interface: reproducible states, upright pictures, sentences, shared scenes."""

import subprocess
import sys

import numpy as np
import pytest

from bitvla.errors import BitvlaError
from bitvla.sim import make_simulator
from bitvla.sim.instructions import instruction
from bitvla.sim.metaworld import MT10, SWAP_GROUPS, MetaWorld

TASKS = MetaWorld().tasks("mt50")


@pytest.fixture(scope="module")
def simulator():
    simulator = make_simulator("metaworld", image_size=64)
    yield simulator
    simulator.close()


def snapshot(simulator, task, seed, ambiguous=False):
    simulator.reset(task, seed, ambiguous=ambiguous)
    seen = simulator.observe()
    return simulator.full_observation(), seen["images"]["corner"], seen["images"]["wrist"]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("task", ["push-v3", "drawer-open-v3", "peg-insert-side-v3"])
def test_the_initial_state_depends_on_task_and_seed_alone(simulator, task):
    first = snapshot(simulator, task, 4)
    assert not same(first, snapshot(simulator, task, 5))
    for _ in range(20):
        simulator.step(np.array([1, 1, -1, 1], np.float32))
    snapshot(simulator, "reach-v3", 1)
    assert same(first, snapshot(simulator, task, 4))
    fresh = make_simulator("metaworld", image_size=64)
    assert same(first, snapshot(fresh, task, 4))
    fresh.close()


def test_the_observation_is_what_the_interface_says(simulator):
    simulator.reset("reach-v3", 0)
    seen = simulator.observe()
    assert set(seen) == {"images", "state", "instruction"}
    for camera in simulator.cameras:
        assert seen["images"][camera].shape == (64, 64, 3)
        assert seen["images"][camera].dtype == np.uint8
    assert seen["state"].dtype == np.float32
    assert np.array_equal(seen["state"], simulator.full_observation()[:4].astype(np.float32))


def test_the_corner_picture_is_upright(simulator):
    """Raising the hand moves the changed pixels towards the top of the picture."""
    simulator.reset("reach-v3", 0)
    for _ in range(40):
        simulator.step(np.array([0, 0, -1, 0], np.float32))
    low = simulator.observe()["images"]["corner"].astype(int)
    for _ in range(60):
        simulator.step(np.array([0, 0, 1, 0], np.float32))
    high = simulator.observe()["images"]["corner"].astype(int)
    # The cyan finger is the only strongly blue-green thing that moves.
    rows = [np.mean(np.nonzero((p[..., 1] - p[..., 0] > 60) & (p[..., 2] - p[..., 0] > 60))[0]) for p in (low, high)]
    assert rows[1] < rows[0] - 3


def solves(simulator, task, steps=500):
    act = simulator.expert()
    return any(simulator.step(act()) for _ in range(steps))


@pytest.mark.parametrize("task", MT10)
def test_the_expert_solves_every_task(simulator, task):
    solved = 0
    for seed in (20, 21, 22):
        simulator.reset(task, seed)
        solved += solves(simulator, task)
    assert solved >= 2


@pytest.mark.parametrize("group", SWAP_GROUPS)
def test_tasks_of_a_group_share_one_scene_and_the_expert_decides_what_is_done(simulator, group):
    for seed in (0, 1):
        pictures = [snapshot(simulator, task, seed, ambiguous=group)[1:] for task in group]
        difference = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(*pictures, strict=True)]
        assert max(difference) < 0.1
        for task in group:
            simulator.reset(task, seed, ambiguous=group)
            assert solves(simulator, task, steps=300)
            assert task in simulator.outcome()["done"]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_sentences_are_new_and_made_of_known_words(task):
    training = {instruction(task, i, split="train") for i in range(200)}
    held_out = {instruction(task, i, split="heldout") for i in range(200)}
    assert len(training) >= (12 if task in MT10 else 4)
    assert len(held_out) >= (4 if task in MT10 else 2)
    assert not training & held_out
    known = {word.strip(",.") for name in TASKS for i in range(20) for word in instruction(name, i).split()}
    assert {word.strip(",.") for sentence in held_out for word in sentence.split()} <= known


def test_no_two_tasks_share_a_sentence():
    sentences = [
        (instruction(task, i, split=split), task) for task in TASKS for split in ("train", "heldout") for i in range(30)
    ]
    owners: dict[str, str] = {}
    for sentence, task in sentences:
        assert owners.setdefault(sentence, task) == task


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.reset("juggle", 0), "juggle"),
        (lambda s: s.reset("push", -1), "seed -1"),
        (lambda s: s.reset("door-open", 0, ambiguous=True), "door-open"),
        (lambda s: s.tasks("mt11"), "mt11"),
        (lambda s: (s.reset("push", 0), s.step(np.full(4, np.nan))), "refused"),
        (lambda s: (s.reset("push", 0), s.step(np.zeros(3))), "refused"),
    ],
)
def test_misuse_is_named(simulator, act, message):
    with pytest.raises(BitvlaError, match=message):
        act(simulator)


def test_an_unknown_simulator_is_named():
    with pytest.raises(BitvlaError, match="unknown simulator 'gazebo'"):
        make_simulator("gazebo")


def test_a_process_ends_quietly_though_nobody_closed_the_simulator():
    code = (
        "from bitvla.sim import make_simulator\n"
        "simulator = make_simulator('metaworld', image_size=32)\n"
        "simulator.reset('reach', 0)\n"
        "simulator.observe()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_keypoints_are_where_the_picture_shows_the_thing(simulator):
    """The marker is the only strongly green thing in a pushing scene; both cameras must agree with its keypoint."""
    close = make_simulator("metaworld", image_size=256)
    goal = close.keypoint_names.index("goal")
    checked = 0
    for seed in range(4):
        close.reset("push-v3", seed)
        images, points = close.observe()["images"], close.keypoints()
        for view, camera in enumerate(close.cameras):
            red, green, blue = images[camera].astype(int).transpose(2, 0, 1)
            rows, columns = np.nonzero((green - red > 60) & (green - blue > 60))
            if len(rows) > 20:  # else it is hidden or out of view
                centre = np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / 256
                assert np.abs(points[view, goal] - centre).max() < 0.02
                checked += 1
    close.close()
    assert checked >= 6


def test_a_thing_that_is_not_there_has_no_keypoint(simulator):
    simulator.reset("reach-v3", 0)
    points = simulator.keypoints()
    assert points.shape == (2, 4, 2)
    assert points.dtype == np.float32
    assert np.array_equal(points[:, simulator.keypoint_names.index("object2")], np.full((2, 2), -1))
