"""State and actions: between the robot's units and the network's [-1, 1]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitvla.config import PolicyConfig, ProcessingConfig, Statistics
from bitvla.errors import BitvlaError

_EPSILON = np.float32(1e-8)


def check_state(state: object, statistics: Statistics) -> NDArray[np.float32]:
    """Return `state` as float32 (state_dim,) if it is finite and has the right length; otherwise BitvlaError."""
    vector = _numbers(state, "the state is not a vector of numbers")
    if vector.shape != (len(statistics.names),):
        raise BitvlaError(
            f"the state has shape {vector.shape}; the policy needs ({len(statistics.names)},): "
            + ", ".join(statistics.names)
        )
    for name, value in zip(statistics.names, vector, strict=True):
        if not np.isfinite(value):
            raise BitvlaError(f"the state '{name}' is {value}; refusing to act on it. Check the sensor")
    return vector


def _numbers(given: object, otherwise: str) -> NDArray[np.float32]:
    """What a robot gave, as float32 in C order; BitvlaError, `otherwise`, where it is text, complex, ragged ..."""
    try:
        values = np.asarray(given)
    except Exception:  # ragged lists have NumPy's errors, tensors on a GPU those of their library
        values = np.empty(0, object)
    if values.dtype.kind not in "biuf":
        raise BitvlaError(f"{otherwise}: {' '.join(repr(given).split()):.80}")
    return np.asarray(values, np.float32, order="C")


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


def value_tokens(values: NDArray[np.float32], bins: int) -> NDArray[np.int64]:
    """Values in [-1, 1] -> action tokens: the inverse of `token_values`, as exact as the bins are fine."""
    return bins - np.digitize(np.clip(values, -1, 1), np.linspace(-1, 1, bins)).astype(np.int64)


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


def check_prefix(prefix: object, config: PolicyConfig) -> NDArray[np.float32]:
    """Return decided actions as float32 (n, dim), n <= max_prefix, in the robot's units; otherwise BitvlaError.

    None is no action, and is all that a policy takes which was not trained for a prefix.
    """
    most, dim = config.action.max_prefix, config.action.dim
    actions = _numbers(np.empty((0, dim)) if prefix is None else prefix, "the prefix is not an array of actions")
    if actions.ndim != 2 or actions.shape[1] != dim:
        raise BitvlaError(f"the prefix has shape {actions.shape}; the policy needs (n, {dim}), a row an action")
    if len(actions) > most:
        raise BitvlaError(
            f"a prefix of {len(actions)} actions is given, the policy takes up to {most}"
            + ("" if most else ": it was not trained to continue decided actions (max_prefix)")
        )
    if not np.isfinite(actions).all():
        raise BitvlaError("the prefix holds a value that is not finite; refusing to continue it")
    return actions


def network_actions(actions: NDArray[np.float32], processing: ProcessingConfig) -> NDArray[np.float32]:
    """Actions (..., n) in the robot's units -> as the network gives them: the inverse of `robot_actions`."""
    if processing.gripper == "libero":
        actions = actions.copy()
        actions[..., -1] = (1 - actions[..., -1]) / 2
    return normalize(actions, processing.action)


def action_range(processing: ProcessingConfig) -> dict[str, list[float]]:
    """Bounds of the training actions in the robot's units: {"low", "high"}; infinite where they are not known."""
    statistics = processing.action
    low = np.where(statistics.mask, statistics.low, -np.inf)
    high = np.where(statistics.mask, statistics.high, np.inf)
    if processing.gripper == "libero":
        low[-1], high[-1] = -1, 1
    return {"low": low.tolist(), "high": high.tolist()}


def _bounds(statistics: Statistics) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    low = np.asarray(statistics.low, dtype=np.float32)
    high = np.asarray(statistics.high, dtype=np.float32)
    return low, high - low, np.asarray(statistics.mask, dtype=bool)
