"""Meta-World's scripted experts as plain functions of the full observation."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bitvla.errors import BitvlaError


def expert(task: str) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float32]]:
    """The scripted expert of a Meta-World task.

    Args:
        task: Meta-World's name, with or without ``-v3``.

    Returns:
        A stateless function from the privileged observation ``float64 (39,)`` to the action
        ``float32 (4,)`` in [-1, 1]: hand displacement x, y, z and gripper effort.

    Raises:
        BitvlaError: no such task.
    """
    from metaworld.policies import ENV_POLICY_MAP

    # The experts clip their own commands later and warn about it at every step.
    warnings.filterwarnings("ignore", message="Constant.s. may be too high")
    name = task if task.endswith("-v3") else f"{task}-v3"
    if name not in ENV_POLICY_MAP:
        raise BitvlaError(f"no scripted expert for task '{task}': use a Meta-World v3 task name")
    policy = ENV_POLICY_MAP[name]()

    def act(observation: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        # Some experts write into their input: hand over a copy.
        action = policy.get_action(np.array(observation, dtype=np.float64))
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    return act
