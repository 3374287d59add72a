"""How overlapping chunks become one action a step.

Chunks lie on a line of steps: a chunk with anchor a holds the actions for steps a, a + 1, ... Where several cover a
step, the action is their weighted sum, oldest first, with the weights of a named method:

    replace              0 ... 0 0 1                           the newest alone
    weighted_average     ... w(1-w)^2  w(1-w)  w               at each arrival, w new + (1 - w) old
    temporal_ensemble    1  e^-m  e^-2m ... (sum 1)            the oldest counts most (ACT, arXiv 2304.13705)
    real_time_chunking   as replace; the policy was given what the robot is committed to while it thinks (the frozen
                         prefix) and continues it (arXiv 2506.07339); the new chunk takes over where the prefix ends
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitvla.config import Record
from bitvla.errors import BitvlaError


class _Method(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="method"):
    def weights(self, count: int) -> NDArray[np.float64]:
        """Weights, float64 (count,) with sum 1, of the chunks that cover a step, oldest first."""
        return np.eye(1, count, count - 1)[0]

    def check(self) -> None:
        """Raise BitvlaError for a value that cannot be right."""


class Replace(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="replace"):
    """The newest chunk alone."""


class RealTimeChunking(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="real_time_chunking"):
    """The newest chunk, computed to continue the actions that are played meanwhile."""


class WeightedAverage(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="weighted_average"):
    """`new` is the share of an arriving chunk."""

    new: float = 0.7

    def weights(self, count: int) -> NDArray[np.float64]:
        weights = self.new * (1 - self.new) ** np.arange(count - 1, -1, -1, dtype=np.float64)
        weights[0] /= self.new  # the oldest had nothing to be averaged with
        return weights

    def check(self) -> None:
        if not 0 < self.new <= 1:
            raise BitvlaError(f"executor settings: joining.new {self.new} is not within 0 and 1")


class TemporalEnsemble(_Method, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="temporal_ensemble"):
    """Weights fall with `decay` from each chunk to the next younger; negative: the youngest counts most."""

    decay: float = 0.01

    def weights(self, count: int) -> NDArray[np.float64]:
        # Counted from the largest exponent, so that no weight overflows.
        exponents = -self.decay * np.arange(count, dtype=np.float64)
        weights = np.exp(exponents - exponents.max())
        return weights / weights.sum()

    def check(self) -> None:
        if not -100 <= self.decay <= 100:
            raise BitvlaError(f"executor settings: joining.decay {self.decay} is not within -100 and 100")


Joining = Replace | WeightedAverage | TemporalEnsemble | RealTimeChunking


class Chunk(NamedTuple):
    """Actions float32 (horizon, dim) for the steps from `anchor` on; `observed` is when (ns) their observation was
    taken. The first `frozen` repeat what was already decided."""

    id: int
    anchor: int
    actions: NDArray[np.float32]
    observed: int
    frozen: int = 0


class Source(NamedTuple):
    """One part of an action: a row of a chunk, and its weight."""

    chunk: int
    row: int
    weight: float


class Timeline:
    """The chunks that are in use, of which `playable` actions each may be played."""

    def __init__(self, method: Joining, playable: int) -> None:
        self._method, self._playable = method, playable
        self._chunks: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        """Put a chunk behind the others; those that end before it starts are forgotten."""
        self._chunks = [old for old in self._chunks if old.anchor + self._playable > chunk.anchor] + [chunk]

    @property
    def newest(self) -> Chunk | None:
        return self._chunks[-1] if self._chunks else None

    def left(self, step: int) -> int:
        """How many steps from `step` on have an action."""
        ends = [chunk.anchor + self._playable for chunk in self._chunks]
        return max(0, max(ends, default=step) - step)

    def at(self, step: int) -> tuple[NDArray[np.float32], tuple[Source, ...]] | None:
        """The action float32 (dim,) for `step` and what it was made of, oldest first; None if there is none."""
        covering = [chunk for chunk in self._chunks if 0 <= step - chunk.anchor < self._playable]
        # A frozen action is that of the older chunk, which the policy may have repeated inexactly.
        covering = [chunk for chunk in covering if step - chunk.anchor >= chunk.frozen] or covering[:1]
        if not covering:
            return None
        weights = self._method.weights(len(covering))
        parts = [(chunk, weight) for chunk, weight in zip(covering, weights, strict=True) if weight > 0]
        sources = tuple(Source(chunk.id, step - chunk.anchor, float(weight)) for chunk, weight in parts)
        if len(parts) == 1:
            return parts[0][0].actions[step - parts[0][0].anchor].copy(), sources
        total = sum(weight * chunk.actions[step - chunk.anchor].astype(np.float64) for chunk, weight in parts)
        return np.asarray(total, dtype=np.float32), sources

    def prefix(self, step: int, length: int) -> NDArray[np.float32] | None:
        """The actions float32 (n, dim) that will be played from `step` on, n <= length; None if there are none."""
        planned = [self.at(later) for later in range(step, step + length)]
        rows = [action for action, _ in filter(None, planned)]
        return np.stack(rows) if rows else None
