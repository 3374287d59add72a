"""Why an episode failed, in the kinds of BitVLA's failure analysis, by what the simulator knows of hand and things."""

from __future__ import annotations

import math
from typing import Literal

from bitvla.sim.base import Moment

Failure = Literal["goal misunderstanding", "spatial localisation", "trajectory planning", "other"]

CARRIED = 0.05  # metres from where it stood at first: more than a thing is pushed by a hand that grasps beside it
NEAR = 0.10  # metres between the fingertips and the middle of a thing: a grasp of it, but missed
CLOSED = 0.5  # share of the gripper's opening below which it is closed


class Watch:
    """Sees every moment of an episode, from the first on, and sorts its failure by the first of these that is true.

    - Goal misunderstanding: a thing that the goal does not name was held `CARRIED` or more from where it stood.
    - Trajectory planning: a thing whose part of the goal is not done at the end was held, or touched where it is not to
      be carried. It was found, and not brought where it belongs in time.
    - Spatial localisation: such a thing was never held, and a finger touched it, or the hand was closed within `NEAR`
      of it: a grasp, but beside it.
    - Other: none of it happened.
    """

    def __init__(self, first: Moment) -> None:
        self._first = self._last = first
        self._strayed = False
        self._reached: set[str] = set()
        self._missed: set[str] = set()
        self.see(first)

    def see(self, moment: Moment) -> None:
        self._last = moment
        self._strayed |= any(
            name not in moment.named and math.dist(moment.at[name], self._first.at[name]) >= CARRIED
            for name in moment.held
        )
        self._reached |= {
            name for name, carry in moment.wanted.items() if name in (moment.held if carry else moment.touched)
        }
        closed = moment.opening < CLOSED
        self._missed |= {
            name
            for name in moment.wanted
            if name in moment.touched or (closed and math.dist(moment.hand, moment.at[name]) <= NEAR)
        }

    def failure(self) -> Failure:
        """The kind of failure, when the episode has ended without success."""
        wanted = self._last.wanted.keys()
        if self._strayed:
            return "goal misunderstanding"
        if wanted & self._reached:
            return "trajectory planning"
        return "spatial localisation" if wanted & self._missed else "other"
