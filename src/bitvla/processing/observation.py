"""What a robot hands to a policy, checked: the same gate for the packed runtime and for PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitvla.config import PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.processing.images import check_image
from bitvla.processing.vectors import check_state


class Observation(NamedTuple):
    """Images in the order of the policy's cameras, the state in the robot's units, the instruction as given.

    The state of a policy that takes none is empty.
    """

    images: list[NDArray[np.uint8]]
    state: NDArray[np.float32]
    instruction: str


def check_observation(observation: object, config: PolicyConfig) -> Observation:
    """The parts of `observation`, or BitvlaError naming what is missing, unknown or unusable.

    It must be {"images": {camera name: uint8 (height, width, 3)}, "state": float (state_dim,), "instruction": str},
    without "state" where the policy takes none. The instruction itself is checked where it becomes tokens
    (`Prompt.ids`).
    """
    keys = ("images", "state", "instruction") if config.action.state_dim else ("images", "instruction")
    parts = _exactly(observation, keys, "the observation", "entry")
    cameras = config.processing.cameras
    images = _exactly(parts["images"], tuple(camera.name for camera in cameras), "observation['images']", "camera")
    return Observation(
        images=[check_image(images[camera.name], camera) for camera in cameras],
        state=check_state(parts.get("state", ()), config.processing.state),
        instruction=parts["instruction"],
    )


def _exactly(value: object, names: tuple[str, ...], what: str, part: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BitvlaError(f"{what} is a {type(value).__name__}, not a dictionary with {', '.join(names)}")
    missing = [name for name in names if name not in value]
    extra = [str(name) for name in value if name not in names]
    if missing:
        raise BitvlaError(
            f"{what} lacks the {part} '{missing[0]}'; the policy needs {', '.join(names)}"
            + (f" and got {', '.join(map(str, value))}" if value else "")
        )
    if extra:
        raise BitvlaError(f"{what} has the unknown {part} '{extra[0]}'; the policy takes {', '.join(names)}")
    return value
