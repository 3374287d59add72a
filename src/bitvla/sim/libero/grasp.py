"""Where a hand that points down can hold a thing: grasps on a map of heights. Pure geometry, metres and radians."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEP = 0.005  # between the cells of a map
REACH = 0.17  # from a map's centre to its edge: a grasp at a rim, and the palm beside it

# Franka's hand, around robosuite's grip site between its fingertips.
TIP = 0.010  # the fingers end this far below it
PALM = 0.031  # and the palm begins this far above it
OPENING = 0.08
# The arm, with the hand pointing down. At 0.72 m its elbow is straight, and the controller can no longer pull it back;
# near that it swings on.
_WRIST_ABOVE, _WRIST_BEHIND = 0.204, 0.088  # the wrist from the grip site
_COMFORT, _ARM = 0.66, 0.70  # from shoulder to wrist: the worse the farther beyond, and at most
_FINGERS = np.arange(
    -0.065, 0.0651, STEP
)  # along the closing direction: the fingers, 25 mm thick, and all between them
_SIDES = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])  # across it: lines on which the sides of a thing are compared
_PADS = slice(1, 4)  # of them those that the fingers cover
_PALM = np.arange(-0.105, 0.1051, 0.01), np.arange(-0.035, 0.0351, 0.01)  # denser than a bottle's neck is wide
_RISE = 0.05  # the hand must be able to come from above
_CLEARANCE = 0.002
_DEPTH = 0.004  # the least that must be between the fingers above the site: butter is 17 mm thick
_SLANT = 0.0151  # how far the sides that they touch may be from parallel, on 1 cm; cells alone make 1 cm of it
_YAWS = np.arange(-12, 1) * np.pi / 12  # a quarter turn either way from the arm's rest: farther its wrist may not go


@dataclass(frozen=True)
class Grasp:
    """`position` float (3,) of the point between the fingertips, and the direction `yaw` in which they close."""

    position: Floats
    yaw: float


@dataclass(frozen=True)
class Heights:
    """What lies around `centre` (x, y), seen from above: heights float (N, N), and which of it is the thing's `own`."""

    centre: Floats
    height: Floats
    own: NDArray[np.bool_]

    @staticmethod
    def places(centre: Floats) -> Floats:
        """Where to look: float (N * N, 2), x by x."""
        line = np.arange(-REACH, REACH + STEP / 2, STEP)
        return centre + np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)

    def around(self, points: Floats, yaw: float, along: Floats, across: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Heights and own of the rectangle `along` x `across`, turned by `yaw`, around `points` (P, 2): (P, A, B)."""
        places = points[:, None, None] + rectangle(yaw, along, across)
        cells = np.rint((places - self.centre + REACH) / STEP).astype(int).clip(0, len(self.height) - 1)
        return self.height[cells[..., 0], cells[..., 1]], self.own[cells[..., 0], cells[..., 1]]


def rectangle(yaw: float, along: Floats, across: Floats) -> Floats:
    """Points float (A, B, 2) of a rectangle around (0, 0) whose first side points to `yaw`."""
    direction, normal = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
    return along[:, None, None] * direction + across[None, :, None] * normal


def angle(radians: float) -> float:
    """The same angle in [-pi, pi)."""
    return float((radians + np.pi) % (2 * np.pi) - np.pi)


def palm(yaw: float) -> Floats:
    """Points float (P, 2) under the palm of a hand that closes in the direction `yaw`."""
    return rectangle(yaw, *_PALM).reshape(-1, 2)


def fingers(yaw: float) -> Floats:
    """Points float (P, 2) under the fingers, wherever they are between closed and open."""
    return rectangle(yaw, _FINGERS, _SIDES[_PADS]).reshape(-1, 2)


def ceiling(places: Floats, shoulder: Floats) -> Floats:
    """How high the grip site can be at `places` (..., 2) for an arm with its `shoulder` (3,) there; -inf: nowhere."""
    away = np.linalg.norm(places - shoulder[:2], axis=-1) - _WRIST_BEHIND
    room = _ARM**2 - away**2
    return np.where(room > 0, shoulder[2] - _WRIST_ABOVE + np.sqrt(np.maximum(room, 0)), -np.inf)


def stretch(places: Floats, shoulder: Floats) -> Floats:
    """How far the wrist is from the `shoulder` (3,) when the grip site is at `places` (..., 3) and points down."""
    away = np.linalg.norm(places[..., :2] - shoulder[:2], axis=-1) - _WRIST_BEHIND
    return np.hypot(away, places[..., 2] + _WRIST_ABOVE - shoulder[2])


def plan(seen: Heights, yaw: float, shoulder: Floats, carry: Floats) -> Grasp | None:
    """The best grasp of the thing for a hand that is turned to `yaw` now, on an arm with its `shoulder` (3,) there.

    The arm must reach it, and the place to which the thing is carried, `carry` (3,) from here. None: not possible.

    Both fingers must find room beside it (or inside it, at the rim of a bowl) and nothing else between them; best is
    what is held deep, symmetrically, across parallel sides, near its middle, and without turning or stretching far.
    """
    if not seen.own.any():
        return None
    line = np.arange(-REACH, REACH + STEP / 2, STEP)
    cells = np.nonzero(seen.own)
    points = seen.centre + np.stack([line[cells[0]], line[cells[1]]], axis=-1)
    from_middle = np.linalg.norm(points - points.mean(axis=0), axis=1)
    above = np.array([0.0, 0.0, _RISE])
    inside = np.abs(_FINGERS) < OPENING / 2 - STEP / 2
    best, lowest = None, np.inf
    for turned in _YAWS:
        height, own = seen.around(points, turned, _FINGERS, _SIDES)
        below_palm = seen.around(points, turned, *_PALM)[0].max(axis=(1, 2))
        z = np.maximum(height[:, ~inside, _PADS].max(axis=(1, 2)) + TIP, below_palm - PALM) + _CLEARANCE
        between = (height > z[:, None, None] + 0.002) & inside[None, :, None]
        start, end, found = _edges(between)
        width, middle = end[:, 2] - start[:, 2] + STEP, (end[:, 2] + start[:, 2]) / 2
        slants = (np.abs(start - start[:, 2:3]) + np.abs(end - end[:, 2:3])) * found
        depth = np.where(between[:, :, 2], height[:, :, 2], -np.inf).max(axis=1) - z
        possible = found[:, 2] & ~(between & ~own)[:, :, _PADS].any(axis=(1, 2)) & (width <= OPENING - 2 * STEP + 1e-9)
        direction = np.array([np.cos(turned), np.sin(turned)])
        low = np.column_stack([points + middle[:, None] * direction, z])
        farthest = np.max([stretch(low + way, shoulder) for way in (0 * above, above, carry, carry + above)], axis=0)
        possible &= (farthest <= _ARM) & (depth >= _DEPTH) & (slants[:, _PADS].max(axis=1) <= _SLANT)
        cost = (
            slants.max(axis=1)
            + 2 * np.abs(middle)
            + 0.5 * from_middle
            + 0.01 * abs(angle(turned - yaw))
            + 0.01 * (~found[:, _PADS]).sum(axis=1)
            + 2 * np.maximum(farthest - _COMFORT, 0)
            - np.minimum(depth, 0.02)
        )
        cost = np.where(possible, cost, np.inf)
        k = int(cost.argmin())
        if cost[k] < lowest:
            lowest = cost[k]
            best = Grasp(low[k], float(turned))
    return best


def _edges(between: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Where what is between the fingers (P, A, B) starts and ends on each line (P, B), and whether there is any."""
    found: NDArray[np.bool_] = np.asarray(between.any(axis=1))
    start = np.where(found, _FINGERS[between.argmax(axis=1)], 0.0)
    end = np.where(found, _FINGERS[::-1][between[:, ::-1].argmax(axis=1)], 0.0)
    return start, end, found
