"""A face of a polyhedron: the constraints that hold with equality, and coordinates for what is left to move.

Called by the descent over faces and by the projection onto half-spaces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ftw.solvers.linear import EPSILON
from ftw.solvers.polyhedron import Flags, Matrix, Polyhedron, Vector


@dataclass(frozen=True, eq=False)
class Face:
    """`low` weights stand at their lower bound, `high` ones at the upper or the moving one; `tight` sides are met.

    The coordinates y of a move on the face are those of the free weights and, where weights stand at the moving bound,
    one more for these together, scaled so that lengths are kept. With `rows @ y = 0` a move leaves equalities and
    tight sides as they are, and the bound moves with the total.

    Attributes:
        polyhedron: n weights, q sides.
        low, high: (n,), never both.
        tight: (q,).
    """

    polyhedron: Polyhedron
    low: Flags
    high: Flags
    tight: Flags

    @classmethod
    def at(cls, polyhedron: Polyhedron, weights: Vector) -> Face:
        """The smallest face that holds the weights, which lie in the set up to rounding."""
        near = 4 * EPSILON * float(np.abs(weights).max(initial=0.0))
        low = weights - polyhedron.lower <= near
        high = room_above(polyhedron, weights) <= near
        high &= ~low
        return cls(polyhedron, low, high, _met(polyhedron, weights))

    @property
    def constraints(self) -> int:
        """How many bounds and sides hold with equality."""
        return int(np.count_nonzero(self.low) + np.count_nonzero(self.high) + np.count_nonzero(self.tight))

    @cached_property
    def free(self) -> NDArray[np.intp]:  # (f,)
        return np.flatnonzero(~(self.low | self.high))

    @cached_property
    def rows(self) -> Matrix:  # (m, f), or (m + 1, f + 1) with a moving bound
        polyhedron = self.polyhedron
        rows = np.concatenate((polyhedron.rows, polyhedron.sides[self.tight])) if self.tight.any() else polyhedron.rows
        reduced = rows[:, self.free]
        if not self._length:
            return reduced
        share = polyhedron.share
        gap = share * self._length**2 - 1
        # With exactly 1 / share weights at the bound the total is free; rounding must not pin it.
        gap = 0.0 if abs(gap) < 1e-12 else gap / (share * self._length)
        column = rows[:, self.high].sum(1) / self._length
        return np.vstack((np.column_stack((reduced, column)), np.append(polyhedron.members[self.free], gap)))

    def reduce(self, values: Matrix) -> Matrix:  # (n, ...) -> (f, ...), or (f + 1, ...)
        """Coordinates of vectors: of their component on the face's span, the rows left aside."""
        inner: Matrix = values[self.free]
        if not self._length:
            return inner
        return np.concatenate((inner, values[self.high].sum(0)[None] / self._length))

    def reduce_gram(self, gram: Matrix) -> Matrix:  # (n, n) -> (f, f), or (f + 1, f + 1)
        """K between coordinates."""
        inner: Matrix = gram[self.free[:, None], self.free]
        if not self._length:
            return inner
        column = gram[:, self.high].sum(1) / self._length
        whole = np.empty((self.free.size + 1, self.free.size + 1))
        whole[:-1, :-1] = inner
        whole[:-1, -1] = whole[-1, :-1] = column[self.free]
        whole[-1, -1] = column[self.high].sum() / self._length
        return whole

    def spread(self, reduced: Vector) -> Vector:  # (f,) or (f + 1,) -> (n,)
        """The move with these coordinates."""
        full = np.zeros(self.low.size)
        full[self.free] = reduced[: self.free.size]
        if self._length:
            full[self.high] = reduced[-1] / self._length
        return full

    def snap(self, weights: Vector) -> Vector:
        """The weights, those that stand at a fixed bound exactly there."""
        weights = np.where(self.low, self.polyhedron.lower, weights)
        return weights if math.isfinite(self.polyhedron.share) else np.where(self.high, self.polyhedron.upper, weights)

    @cached_property
    def _length(self) -> float:
        """The root of how many weights stand at the moving bound; 0 where it is none or moves with nobody."""
        return math.sqrt(np.count_nonzero(self.high)) if math.isfinite(self.polyhedron.share) else 0.0


def room_above(polyhedron: Polyhedron, weights: Vector) -> Vector:  # (n,)
    """How far each weight is below its upper bound, be it fixed or moving."""
    if math.isinf(polyhedron.share):
        return polyhedron.upper - weights
    cap = polyhedron.share * float(polyhedron.members @ weights)
    return np.where(polyhedron.members > 0, cap, polyhedron.upper) - weights


def _met(polyhedron: Polyhedron, weights: Vector) -> Flags:  # (q,)
    if not len(polyhedron.sides):
        return np.zeros(0, dtype=bool)
    offsets = np.maximum(finite_size(polyhedron.least), finite_size(polyhedron.most))
    near = SIDE_ROUNDING * (np.abs(polyhedron.sides) @ np.abs(weights) + offsets)
    values = polyhedron.sides @ weights
    return (values - polyhedron.least <= near) | (polyhedron.most - values <= near)


def finite_size(bound: Vector) -> Vector:
    """|bound|, 0 where it is open."""
    return np.where(np.isfinite(bound), np.abs(bound), 0.0)


SIDE_ROUNDING = 64 * EPSILON
"""Part of its terms within which a side counts as met; the projection leaves at most a quarter of it."""
