"""Are the pictures rendered on demand those of the benchmark's own observation? Runs in LIBERO's environment:

    .venv-libero/bin/python tests/manual/check_libero_pictures.py [SUITE [TASK]]

Two simulations of one task take the same 12 actions, one as `bitvla eval` drives it, one with the cameras in the
observation; ends with an error at the first pixel or joint that differs.
"""

import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("MUJOCO_GL", "egl")
sys.path.insert(0, str(Path(__file__).parents[2] / "src/bitvla/sim/libero"))
import server
from libero.libero.envs import OffScreenRenderEnv

SIZE, EPISODE, SEED = 256, 3, 7
IMAGES = {"full": "agentview_image", "wrist": "robot0_eye_in_hand_image"}


def main(suite: str = "libero_spatial", task: str = "0") -> None:
    ours, number = server.Simulation(), int(task)
    ours.reset(suite, number, EPISODE, True, 0, SEED)
    listed = ours._suite(suite)
    env = OffScreenRenderEnv(
        bddl_file_name=listed.get_task_bddl_file_path(number),
        camera_heights=SIZE,
        camera_widths=SIZE,
        hard_reset=False,
    )
    env.seed(0)
    np.random.seed([SEED, EPISODE])  # noqa: NPY002 -- LIBERO places its fixtures with the global generator
    for robot in env.robots:
        robot.gripper.current_action = np.zeros(robot.gripper.dof)
    env.reset()
    theirs = env.set_init_state(listed.get_task_init_states(number)[EPISODE])
    rng = np.random.default_rng(0)
    for step in range(12):
        pictures = ours.render(SIZE)
        for camera, name in IMAGES.items():
            picture = np.frombuffer(pictures[camera], np.uint8).reshape(SIZE, SIZE, 3)
            different = int((picture != theirs[name]).any(axis=-1).sum())
            assert different == 0, f"step {step}: {different} pixels of '{camera}' differ"
        action = list(server.DUMMY_ACTION) if step < 4 else rng.uniform(-1, 1, 7).tolist()
        ours.step(action)
        theirs = env.step(action)[0]
        assert np.array_equal(ours._env.env.sim.data.qpos, env.env.sim.data.qpos), f"step {step}: joints differ"
    env.close()
    ours.close()
    print(f"{suite}/{task}: pictures and joints are the same in all 12 steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
