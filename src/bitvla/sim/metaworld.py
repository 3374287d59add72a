"""Meta-World (MuJoCo, Sawyer arm) behind the simulator interface."""

from __future__ import annotations

import atexit
import os
import weakref
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitvla.errors import BitvlaError
from bitvla.sim.base import Expert, Observation, rendering
from bitvla.sim.experts import expert
from bitvla.sim.instructions import instruction

# MuJoCo picks its OpenGL backend when it is first imported, and loads it.
if not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")
with rendering():
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)

SWAP_GROUPS: tuple[tuple[str, ...], ...] = (
    ("drawer-open-v3", "drawer-close-v3"),
    ("window-open-v3", "window-close-v3"),
    ("reach-v3", "push-v3"),
    ("reach-v3", "pick-place-v3"),
)
"""Tasks that share one ambiguous scene: only the instruction tells which of them is meant."""

_MODEL_FIELDS = ("body_pos", "body_quat", "site_pos", "site_rgba", "geom_pos", "geom_rgba")
_CORNER_FOVY, _WRIST_FOVY = 45.0, 80.0  # vertical, in degrees
_CORNER_VIEW = {"azimuth": 145.0, "elevation": -32.0, "distance": 1.05, "lookat": (0.0, 0.66, 0.12)}
"""The third-person view, in degrees and metres: from corner2's side, close enough that the workspace fills it."""
_WRIST_VIEW = {"azimuth": 55.0, "elevation": -25.0, "distance": 0.3}
_WRIST_OFFSET = (-0.12, -0.16, 0.06)
"""A camera carried by the hand, on a bracket at this offset in metres (the hand never turns). It sees both fingers and
what is below and ahead of them, from the other side than the third-person view, so that the two fix a place in depth;
gripperPOV looks past the fingers and loses everything that is not right below."""
TOYS: dict[str, tuple[mujoco.mjtGeom, tuple[float, float, float], float]] = {
    "cube": (mujoco.mjtGeom.mjGEOM_BOX, (0.025, 0.025, 0.025), 0.025),
    "ball": (mujoco.mjtGeom.mjGEOM_SPHERE, (0.03, 0.0, 0.0), 0.03),
    "disc": (mujoco.mjtGeom.mjGEOM_CYLINDER, (0.035, 0.012, 0.0), 0.012),
}
"""Shapes of toys: MuJoCo's geometry, its size and how high its centre is, in metres."""
_MARKER_COLOURS = ((0.8, 0.0, 0.0, 1.0), (0.0, 0.8, 0.0, 1.0), (0.0, 0.0, 0.8, 1.0))
_CACHED_SCENES = 10


class Toy(NamedTuple):
    """A thing on the table that is in the pictures alone: nothing touches it."""

    shape: str  # one of TOYS
    colour: tuple[float, float, float]
    place: tuple[float, float]  # x, y in metres


@dataclass
class _Scene:
    """One task's environment, its pristine model and its renderer."""

    env: Any
    pristine: dict[str, npt.NDArray[np.float64]]
    renderer: mujoco.Renderer | None = None


@dataclass
class _Episode:
    """What has happened since the last reset."""

    task: str
    group: tuple[str, ...]
    instruction: str
    observation: npt.NDArray[np.float64]
    start: npt.NDArray[np.float64]
    opening_start: float | None
    steps: int = 0
    succeeded: bool = False
    lift: float = 0.0
    done: set[str] = field(default_factory=set)


class MetaWorld:
    """Meta-World v3 tasks with two cameras.

    ``corner`` (third person) and ``wrist`` images are uint8 ``(image_size, image_size, 3)``,
    upright. The state is float32 (4,): hand position x, y, z in metres and the gripper opening
    (0 closed, 1 open). Actions are float32 (4,) in [-1, 1]: hand displacement (1 = 1 cm a step)
    and gripper effort (1 closes). An episode may last ``max_steps`` steps; counting is up to
    the caller.

    Seeds from ``TRAINING_SEEDS`` (1,000,000) on belong to recorded demonstrations, smaller ones
    to evaluation, so that no evaluated initial state was ever trained on.
    """

    name = "metaworld"
    robot = "metaworld-sawyer"
    cameras: tuple[str, ...] = ("corner", "wrist")
    state_names: tuple[str, ...] = ("hand_x", "hand_y", "hand_z", "gripper_opening")
    action_names: tuple[str, ...] = ("hand_dx", "hand_dy", "hand_dz", "gripper_effort")
    environment_state_names: tuple[str, ...] = tuple(
        f"{thing}_{axis}" for thing in ("object1", "object2", "goal") for axis in "xyz"
    )
    keypoint_names: tuple[str, ...] = ("hand", "object1", "object2", "goal")
    action_noise: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    control_hz = 80.0
    max_steps = 500

    def __init__(self, image_size: int = 128) -> None:
        if not 16 <= image_size <= 640:
            raise BitvlaError(f"image_size {image_size} is out of range: choose 16 to 640 pixels")
        self.image_size = int(image_size)
        self._scenes: OrderedDict[str, _Scene] = OrderedDict()
        self._episode: _Episode | None = None
        self._closes_at_exit = False
        self.toys: tuple[Toy, ...] = ()  # on the table, until the next reset

    # -- tasks ---------------------------------------------------------------------------

    def tasks(self, suite: str) -> list[str]:
        """Task names of ``mt10``, ``mt50``, ``swap`` or of one single task.

        Raises:
            BitvlaError: no such suite or task.
        """
        if suite == "mt10":
            return list(MT10)
        if suite == "mt50":
            return sorted(ALL_V3_ENVIRONMENTS)
        if suite == "swap":
            return list(dict.fromkeys(task for group in SWAP_GROUPS for task in group))
        return [_task_name(suite)]

    def groups(self, suite: str = "swap") -> list[tuple[str, ...]]:
        """The groups of tasks of ``suite`` that share an ambiguous scene."""
        members = set(self.tasks(suite))
        return [group for group in SWAP_GROUPS if members.issuperset(group)]

    # -- episode -------------------------------------------------------------------------

    def reset(self, task: str, seed: int, ambiguous: bool | tuple[str, ...] = False) -> None:
        """Start an episode; the initial state is a pure function of the arguments.

        Args:
            task: a task's name, with or without ``-v3``.
            seed: any non-negative integer.
            ambiguous: True for a scene in which several tasks make sense (drawer and window
                half open; the same marker for reaching and for moving the puck), the same
                scene for every task of a group. A group of ``SWAP_GROUPS`` chooses the group
                when a task is in more than one; with True the seed chooses.

        Raises:
            BitvlaError: unknown task, negative seed, or no ambiguous scene for this task.
        """
        task = _task_name(task)
        if seed < 0:
            raise BitvlaError(f"seed {seed} is negative: use 0 or more")
        self.toys = ()
        group = _choose_group(task, seed, ambiguous)
        scene = self._scene(task)
        env = scene.env
        for name, values in scene.pristine.items():
            getattr(env.model, name)[:] = values
        mujoco.mj_resetData(env.model, env.data)
        env._did_see_sim_exception = False
        env._freeze_rand_vec = bool(group)
        if group:
            _reset_ambiguous(env, task, group, seed)
        else:
            env.seed(seed)
            env.reset()
        self._begin(env, task, seed, group)

    def _begin(self, env: Any, task: str, seed: int, group: tuple[str, ...]) -> None:
        """Take the first observation after the scene has been arranged."""
        mujoco.mj_forward(env.model, env.data)
        for site in env._target_site_config:
            env._set_pos_site(*site)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        space = env.sawyer_observation_space
        observation = np.clip(env._get_obs(), space.low, space.high)
        self._episode = _Episode(
            task=task,
            group=group,
            instruction=instruction(task, seed, split="heldout"),
            observation=observation,
            start=observation.copy(),
            opening_start=_opening(env, task),
        )

    def picture(self, camera: str) -> npt.NDArray[np.uint8]:
        """What one camera sees now, uint8 (image_size, image_size, 3)."""
        return self._render(self._current().task, camera)

    def observe(self) -> Observation:
        """Images of both cameras, state and a held-out instruction, now.

        Replace ``observation["instruction"]`` to give the robot another one.
        """
        episode = self._current()
        return {
            "images": {camera: self.picture(camera) for camera in self.cameras},
            "state": self.state(),
            "instruction": episode.instruction,
        }

    def step(self, action: npt.NDArray[np.float32]) -> bool:
        """Play one action for 12.5 ms.

        Args:
            action: float (4,), clipped to [-1, 1].

        Returns:
            Whether the task's own success condition holds after this step (it may stop
            holding later; ``outcome()["success"]`` tells whether it ever did).

        Raises:
            BitvlaError: wrong shape or a value that is not finite.
        """
        episode = self._current()
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise BitvlaError(f"action {action!r} is refused: four finite numbers are needed")
        env = self._scene(episode.task).env
        # The horizon belongs to the caller: a recovery has a prefix that is not counted.
        env.curr_path_length = 0
        observation, _, _, _, info = env.step(np.clip(action, -1.0, 1.0))
        success = bool(info["success"])
        episode.observation = observation
        episode.steps += 1
        episode.succeeded |= success
        episode.lift = max(episode.lift, float(observation[6] - episode.start[6]))
        episode.done |= self._achieved(env, episode, success)
        return success

    def state(self) -> npt.NDArray[np.float32]:
        """Proprioceptive state float32 (4,), without rendering."""
        return self._current().observation[:4].astype(np.float32)

    def full_observation(self) -> npt.NDArray[np.float64]:
        """Meta-World's own observation float64 (39,), which its experts read."""
        return self._current().observation.copy()

    def sentence(self, task: str, rng: np.random.Generator) -> str:
        """One of the task's training sentences."""
        return instruction(task, rng, split="train")

    def cannot_demonstrate(self, task: str) -> str:
        """Empty: there is an expert for every task."""
        return ""

    def longest_demonstration(self, task: str) -> int:
        """Half of what an evaluation allows: whatever takes longer has gone astray."""
        return self.max_steps // 2

    def expert(self) -> Expert:
        """Meta-World's expert of the running episode's task."""
        act = expert(self._current().task)
        return lambda: act(self.full_observation())

    def gripper_opening(self) -> float:
        """0 closed, 1 open."""
        return float(self._current().observation[3])

    def environment_state(self) -> npt.NDArray[np.float32]:
        """Positions float32 (9,) in metres: object 1, object 2 (zeros when none), goal."""
        seen = self._current().observation
        return np.concatenate([seen[4:7], seen[11:14], seen[36:39]]).astype(np.float32)

    def keypoints(self) -> npt.NDArray[np.float32]:
        """Where the gripper's centre, both objects and the goal are in each image: float32 (2, 4, 2)."""
        episode = self._current()
        env = self._scene(episode.task).env
        places = np.stack([env.tcp_center, *self.environment_state().reshape(3, 3)])
        hand = env.data.body("hand").xpos
        views = [(_corner_view(), _CORNER_FOVY), (_wrist_view(hand), _WRIST_FOVY)]
        points = np.stack([_project(places, view, fovy) for view, fovy in views])
        points[:, ~places.any(axis=1)] = -1
        return points.astype(np.float32)

    def points(self, places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Where places (K, 3) in metres are in the corner image: shares (K, 2) of its width and height."""
        return _project(places, _corner_view(), _CORNER_FOVY)

    def marker_colour(self) -> str | None:
        """ "red", "green" or "blue"; None where no marker shows the goal."""
        red, green, blue, opacity = self._scene(self._current().task).env.model.site("goal").rgba
        return ("red", "green", "blue")[int(np.argmax((red, green, blue)))] if opacity else None

    def outcome(self) -> dict[str, Any]:
        """What was done since the reset, measured.

        Returns:
            ``success`` (ever), ``steps``, ``hand_goal_distance`` (gripper centre to goal),
            ``object_goal_distance``, ``object_displacement``, ``object_lift`` (highest so far),
            ``opening`` and ``opening_change`` of the drawer or window (None elsewhere), all in
            metres; ``done``: the tasks of the scene's group (of the task alone in an ordinary
            scene) whose success condition has held at some step.
        """
        episode = self._current()
        env = self._scene(episode.task).env
        opening = _opening(env, episode.task)
        change = None
        if opening is not None and episode.opening_start is not None:
            change = opening - episode.opening_start
        seen, goal = episode.observation, np.asarray(env._target_pos)
        return {
            "success": episode.succeeded,
            "steps": episode.steps,
            "hand_goal_distance": float(np.linalg.norm(env.tcp_center - goal)),
            "object_goal_distance": float(np.linalg.norm(seen[4:7] - goal)),
            "object_displacement": float(np.linalg.norm(seen[4:7] - episode.start[4:7])),
            "object_lift": episode.lift,
            "opening": opening,
            "opening_change": change,
            "done": sorted(episode.done),
        }

    @staticmethod
    def _achieved(env: Any, episode: _Episode, success: bool) -> set[str]:
        """Which tasks of the scene's group are solved at this step."""
        done = {episode.task} if success else set()
        others = [task for task in episode.group if task != episode.task]
        opening = _opening(env, episode.task)
        goal, seen = np.asarray(env._target_pos), episode.observation
        for task in others:
            if opening is not None:
                solved = _OPENING_SOLVED[task](opening)
            elif task == "reach-v3":
                solved = np.linalg.norm(env.tcp_center - goal) <= 0.05
            else:
                radius = 0.05 if task == "push-v3" else 0.07
                solved = np.linalg.norm(seen[4:7] - goal) <= radius
            if solved:
                done.add(task)
        return done

    # -- scenes and rendering ------------------------------------------------------------

    def _current(self) -> _Episode:
        if self._episode is None:
            raise BitvlaError("no episode is running: call reset(task, seed) first")
        return self._episode

    def _scene(self, task: str) -> _Scene:
        """The cached environment of ``task``; the least recently used one makes room."""
        if task not in self._scenes:
            if len(self._scenes) >= _CACHED_SCENES:
                _, oldest = self._scenes.popitem(last=False)
                _close_scene(oldest)
            self._scenes[task] = _make_scene(task)
        self._scenes.move_to_end(task)
        return self._scenes[task]

    def _render(self, task: str, camera: str) -> npt.NDArray[np.uint8]:
        scene = self._scene(task)
        if scene.renderer is None:
            scene.renderer = _make_renderer(scene.env.model, self.image_size)
            if not self._closes_at_exit:
                # EGL complains when a context outlives it. MuJoCo ends EGL at exit, from a handler that the first
                # context registers; a later handler runs earlier.
                atexit.register(_close_if_alive, weakref.ref(self))
                self._closes_at_exit = True
        wrist = camera == "wrist"
        # MuJoCo keeps the field of view of free cameras in the model.
        scene.env.model.vis.global_.fovy = _WRIST_FOVY if wrist else _CORNER_FOVY
        view = _wrist_view(scene.env.data.body("hand").xpos) if wrist else _corner_view()
        scene.renderer.update_scene(scene.env.data, camera=view)
        for toy in self.toys:
            _draw(scene.renderer.scene, toy)
        return scene.renderer.render().copy()

    def close(self) -> None:
        """Free all environments and rendering contexts; may be called more than once."""
        while self._scenes:
            _close_scene(self._scenes.popitem()[1])
        self._episode = None

    def __enter__(self) -> MetaWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_OPENING_SOLVED = {
    "drawer-open-v3": lambda opening: opening >= 0.16,
    "drawer-close-v3": lambda opening: opening <= 0.0315,
    "window-open-v3": lambda opening: opening >= 0.19,
    "window-close-v3": lambda opening: opening <= 0.04,
}
"""Success conditions of Meta-World as conditions on the opening in metres."""


def _task_name(task: str) -> str:
    name = task if task.endswith("-v3") else f"{task}-v3"
    if name not in ALL_V3_ENVIRONMENTS:
        raise BitvlaError(
            f"unknown suite or task '{task}': use mt10, mt50, swap or a Meta-World task such as 'drawer-open'"
        )
    return name


def _choose_group(task: str, seed: int, ambiguous: bool | tuple[str, ...]) -> tuple[str, ...]:
    if ambiguous is False:
        return ()
    candidates = [group for group in SWAP_GROUPS if task in group]
    if not isinstance(ambiguous, bool):
        candidates = [group for group in candidates if group == tuple(ambiguous)]
    if not candidates:
        raise BitvlaError(f"task '{task}' has no ambiguous scene in {ambiguous}: see metaworld.SWAP_GROUPS")
    return candidates[seed % len(candidates)]


def _make_scene(task: str) -> _Scene:
    env = ALL_V3_ENVIRONMENTS[task]()
    # The experts need to see the goal; the cached space still hides it.
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    env._set_task_called = True
    env.seeded_rand_vec = True
    pristine = {name: getattr(env.model, name).copy() for name in _MODEL_FIELDS}
    return _Scene(env, pristine)


class _Renderer(mujoco.Renderer):
    _gl_context = _mjr_context = None  # where it cannot be made, it closes what it has not


def _make_renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    # Shadows and multisampling cost twenty times the rest of the picture.
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    with rendering():
        renderer = _Renderer(model, height=size, width=size)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = 0
    return renderer


def _draw(scene: mujoco.MjvScene, toy: Toy) -> None:
    kind, size, height = TOYS[toy.shape]
    place, upright = np.array([*toy.place, height]), np.eye(3).ravel()
    colour = np.array([*toy.colour, 1.0], dtype=np.float32)
    mujoco.mjv_initGeom(scene.geoms[scene.ngeom], kind, np.array(size), place, upright, colour)
    scene.ngeom += 1


def _corner_view() -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    for name, value in _CORNER_VIEW.items():
        setattr(camera, name, value)
    return camera


def _wrist_view(hand: npt.NDArray[np.float64]) -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    for name, value in _WRIST_VIEW.items():
        setattr(camera, name, value)
    camera.lookat[:] = hand + _WRIST_OFFSET + camera.distance * _forward(camera)
    return camera


def _forward(camera: mujoco.MjvCamera) -> npt.NDArray[np.float64]:
    """Unit vector of where a free camera looks."""
    azimuth, elevation = np.radians(camera.azimuth), np.radians(camera.elevation)
    return np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])


def _project(places: npt.NDArray[np.float64], camera: mujoco.MjvCamera, fovy: float) -> npt.NDArray[np.float64]:
    """World positions (K, 3) in metres -> shares (K, 2) of a square image; (-1, -1) behind the camera."""
    forward = _forward(camera)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    away = places - (camera.lookat - camera.distance * forward)
    depth = away @ forward
    half = np.maximum(depth, 1e-6) * np.tan(np.radians(fovy) / 2)
    across, up = away @ right / half, away @ np.cross(right, forward) / half
    points = np.stack([0.5 + across / 2, 0.5 - up / 2], axis=1)
    return np.where(depth[:, None] > 0, points, -1.0)


def _close_scene(scene: _Scene) -> None:
    if scene.renderer is not None:
        scene.renderer.close()
        scene.renderer = None
    scene.env.close()


def _close_if_alive(reference: weakref.ref[MetaWorld]) -> None:
    simulator = reference()
    if simulator is not None:
        simulator.close()


def _opening(env: Any, task: str) -> float | None:
    """How far the drawer or the window is open, in metres; None for other tasks."""
    if task.startswith("drawer-"):
        return -float(env.data.joint("goal_slidey").qpos[0])
    if task.startswith("window-"):
        return float(env.data.joint("window_slide").qpos[0])
    return None


def _reset_ambiguous(env: Any, task: str, group: tuple[str, ...], seed: int) -> None:
    """Arrange the scene that all tasks of ``group`` share for this seed."""
    rng = np.random.default_rng([seed, zlib.crc32(" ".join(group).encode())])
    goal = env.model.site("goal")
    if group[0].startswith("drawer-"):
        env._last_rand_vec = np.array([rng.uniform(-0.1, 0.1), 0.9, 0.0])
        env.reset()
        env.data.joint("goal_slidey").qpos[0] = -rng.uniform(0.06, 0.12)
        goal.rgba[3] = 0.0  # the marker would tell which task is meant
    elif group[0].startswith("window-"):
        env._last_rand_vec = rng.uniform([-0.1, 0.75, 0.16], [0.1, 0.9, 0.2])
        env.reset()
        env.data.joint("window_slide").qpos[0] = rng.uniform(0.07, 0.15)
        goal.rgba[3] = 0.0
    else:
        env._last_rand_vec = _puck_and_goal(rng, on_table="push-v3" in group)
        env.reset()
        env._set_obj_xyz(env._last_rand_vec[:3])
        goal.rgba[:] = _MARKER_COLOURS[rng.integers(3)]
    env.data.qvel[:] = 0.0


def _puck_and_goal(rng: np.random.Generator, on_table: bool) -> npt.NDArray[np.float64]:
    """Puck and goal positions (6,), at least 15 cm apart as Meta-World has them."""
    while True:
        puck = rng.uniform([-0.1, 0.6, 0.02], [0.1, 0.7, 0.02])
        goal = rng.uniform([-0.1, 0.8, 0.05], [0.1, 0.9, 0.3])
        if on_table:
            goal[2] = 0.02
        if np.linalg.norm(puck[:2] - goal[:2]) >= 0.15:
            return np.concatenate([puck, goal])
