"""State and actions: between the robot's units and the network's [-1, 1]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitvla.config import ProcessingConfig, Statistics
from bitvla.errors import BitvlaError

_EPSILON = np.float32(1e-8)


def check_state(state: object, statistics: Statistics) -> NDArray[np.float32]:
    """Return `state` as float32 (state_dim,) if it is finite and has the right length; otherwise BitvlaError."""
    try:
        vector = np.asarray(state, dtype=np.float32)
    except (TypeError, ValueError):
        raise BitvlaError(f"the state is not a vector of numbers: {state!r}") from None
    if vector.shape != (len(statistics.names),):
        raise BitvlaError(
            f"the state has shape {vector.shape}; the policy needs ({len(statistics.names)},): "
            + ", ".join(statistics.names)
        )
    for name, value in zip(statistics.names, vector, strict=True):
        if not np.isfinite(value):
            raise BitvlaError(f"the state '{name}' is {value}; refusing to act on it. Check the sensor")
    return vector


def normalize(values: NDArray[np.float32], statistics: Statistics) -> NDArray[np.float32]:
    """Map (..., n) in the robot's units to [-1, 1], clipped; masked dimensions pass unchanged."""
    low, span, mask = _bounds(statistics)
    scaled = np.clip(2 * (values - low) / (span + _EPSILON) - 1, -1, 1)
    return np.where(mask, scaled, values).astype(np.float32)


def unnormalize(values: NDArray[np.float32], statistics: Statistics) -> NDArray[np.float32]:
    """Map network outputs (..., n) to the robot's units: the inverse of `normalize` within the bounds."""
    low, span, mask = _bounds(statistics)
    scaled = np.float32(0.5) * (values + 1) * (span + _EPSILON) + low
    return np.where(mask, scaled, values).astype(np.float32)


def token_values(tokens: NDArray[np.int64], bins: int) -> NDArray[np.float32]:
    """Action tokens, counted from the first one of the vocabulary's last `bins`, -> values in [-1, 1].

    As in OpenVLA: `bins` edges from -1 to 1 make one bin less, the value is its centre, and the first token is the
    highest bin; so are the first two.
    """
    edges = np.linspace(-1, 1, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    values: NDArray[np.float32] = centres[np.clip(bins - 1 - tokens, 0, bins - 2)].astype(np.float32)
    return values


def robot_actions(outputs: NDArray[np.float32], processing: ProcessingConfig) -> NDArray[np.float32]:
    """Network outputs (..., n) -> actions in the robot's units and gripper convention.

    Convention 'libero': the last dimension was trained in [0, 1], 1 open; the robot takes -1 open, +1 closed.
    """
    actions = unnormalize(outputs, processing.action)
    if processing.gripper == "libero":
        actions[..., -1] = -np.sign(2 * actions[..., -1] - 1)
    return actions


def _bounds(statistics: Statistics) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    low = np.asarray(statistics.low, dtype=np.float32)
    high = np.asarray(statistics.high, dtype=np.float32)
    return low, high - low, np.asarray(statistics.mask, dtype=bool)
