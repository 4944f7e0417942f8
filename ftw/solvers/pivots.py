"""Projection onto bounds and rows by pivoting: exact for points of every size, one constraint at a time.

Called by `half_spaces`, where its own faster method does not settle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftw.solvers.faces import Face
from ftw.solvers.linear import EPSILON
from ftw.solvers.polyhedron import Matrix, Vector

if TYPE_CHECKING:
    from ftw.solvers.half_spaces import Cuts

Signs = NDArray[np.int64]


def project_by_pivots(point: Vector, cuts: Cuts) -> tuple[Vector, Vector]:  # (n,) -> (n,), (q,)
    """As `project_between`, for a base without a moving bound.

    The dual active-set method of Goldfarb and Idnani 1983 for `K = I`: the weights are always the projection onto some
    of the constraints; a violated one is taken up by raising its multiplier, and those whose multipliers fall to 0
    meanwhile are let go. Deviations: bounds are kept as coordinates, not as rows, and the start is the projection onto
    the base where that has one positive equality, not the point itself.
    """
    pivoting = _Pivoting.start(point, cuts)
    for _ in range(50 * (point.size + len(pivoting.rows)) + 100):
        taken = pivoting.most_violated()
        if taken is None or not pivoting.take(taken):
            break
    return pivoting.settled(), pivoting.multipliers[len(cuts.base.rows) :]


@dataclass
class _Pivoting:
    """Weights w = x - rows' multipliers on the coordinates at no bound; the rest of x - w is the bounds' multipliers.

    Attributes:
        rows, least, most: (m, n), (m,), (m,): equalities of the base first, then the cuts.
        at: (n,) -1 at the lower, 1 at the upper bound, 0 at none.
        met: (m,) the same of rows. A positive multiplier belongs to `most`.
    """

    point: Vector
    cuts: Cuts
    rows: Matrix
    least: Vector
    most: Vector
    weights: Vector
    at: Signs
    met: Signs
    multipliers: Vector

    @classmethod
    def start(cls, point: Vector, cuts: Cuts) -> _Pivoting:
        base = cuts.base
        rows = np.concatenate((base.rows, cuts.rows))
        least, most = np.concatenate((base.values, cuts.least)), np.concatenate((base.values, cuts.most))
        self = cls(
            point,
            cuts,
            rows,
            least,
            most,
            np.minimum(np.maximum(point, base.lower), base.upper),
            (point > base.upper).astype(np.int64) - (point < base.lower),
            np.zeros(len(rows), dtype=np.int64),
            np.zeros(len(rows)),
        )
        if len(base.rows) == 1 and np.all(base.rows > 0) and point.size:
            self._start_on_row(cuts.project(point))
        return self

    def _start_on_row(self, weights: Vector) -> None:
        face, row = Face.at(self.cuts.base, weights), self.rows[0]
        self.weights, self.met[0] = weights, 1
        self.at = face.high.astype(np.int64) - face.low
        ratios = (self.point - weights) / row
        if not face.free.size:  # one bound too many holds: that with the multiplier 0 is let go
            if face.low.any():
                last = int(np.argmax(np.where(face.low, ratios, -math.inf)))
            else:
                last = int(np.argmin(ratios))
            self.at[last], self.multipliers[0] = 0, ratios[last]
            return
        free = row[face.free]
        self.multipliers[0] = float((self.point - weights)[face.free] @ free) / float(free @ free)

    def most_violated(self) -> tuple[Vector, float, int] | None:
        """Gradient, (n,), of the constraint missed most beside rounding, by how much, and its place.

        What is missed upwards is positive. Places are those of rows, then of weights.
        """
        weights, base = self.weights, self.cuts.base
        values, idle = self.rows @ weights, self.met == 0
        missed = np.where(idle, np.maximum(values - self.most, 0.0) - np.maximum(self.least - values, 0.0), 0.0)
        outside = np.maximum(weights - base.upper, 0.0) - np.maximum(base.lower - weights, 0.0)
        missed = np.concatenate((missed, np.where(self.at == 0, outside, 0.0)))
        of_rows = _NEAR * (np.abs(base.rows) @ np.abs(weights) + np.abs(base.values))
        of_bounds = np.full(weights.size, _NEAR * float(np.abs(weights).max(initial=0.0)))
        near = np.concatenate((of_rows, self.cuts.rounding(weights), of_bounds))
        excess = np.abs(missed) - near
        if not np.any(excess > 0):
            return None
        place = int(np.argmax(np.where(excess > 0, np.abs(missed) / np.maximum(near, _TINY), 0.0)))
        m = len(self.rows)
        return self.rows[place] if place < m else np.eye(1, weights.size, place - m)[0], float(missed[place]), place

    def take(self, taken: tuple[Vector, float, int]) -> bool:
        """Makes the missed constraint hold, and lets go those in its way; False if there is no such point."""
        gradient, missed, place = taken
        sign, raised, size = math.copysign(1.0, missed), 0.0, float(gradient @ gradient)
        missed = abs(missed)
        for _ in range(self.point.size + len(self.rows) + 1):
            held, free = np.flatnonzero(self.met), self.at == 0
            drift = np.linalg.lstsq(self.rows[held][:, free].T, gradient[free], rcond=1e-13)[0]
            rest = gradient - drift @ self.rows[held]
            move = np.where(free, rest, 0.0)
            curvature = float(move @ move)
            if curvature <= _PARALLEL**2 * size:
                curvature = 0.0
            length, leaving = self._first_to_go(held, -sign * drift, sign * raised * gradient, -sign * rest, size)
            full = missed / curvature if curvature else math.inf
            reach = min(length, full)
            if math.isinf(reach):
                return False
            raised += reach
            self.multipliers[held] -= sign * reach * drift
            if curvature:
                self.weights = self.weights - (sign * reach) * move
                missed -= reach * curvature
            if full <= length:
                self._hold(place, int(sign), raised)
                return True
            if leaving < len(self.rows):
                self.met[leaving], self.multipliers[leaving] = 0, 0.0
            else:
                self.at[leaving - len(self.rows)] = 0
        return False

    def _first_to_go(
        self, held: NDArray[np.intp], drift: Vector, pushed: Vector, rates: Vector, size: float
    ) -> tuple[float, int]:
        """How far until a multiplier is 0, and whose it is; bounds count after the rows."""
        loose = self.least[held] < self.most[held]
        falling = loose & (drift * self.met[held] < 0)
        reaches = np.full(len(self.rows) + self.at.size, math.inf)
        of_rows = np.full(held.size, math.inf)
        np.divide(-self.multipliers[held], drift, out=of_rows, where=falling)
        reaches[held] = of_rows
        forces = (self.point - self.weights - self.multipliers @ self.rows - pushed) * self.at
        fading = (rates * self.at < 0) & (np.abs(rates) > _PARALLEL * math.sqrt(size))
        np.divide(forces, np.abs(rates), out=reaches[len(self.rows) :], where=fading)
        reaches = np.maximum(reaches, 0.0)
        leaving = int(np.argmin(reaches))
        return float(reaches[leaving]), leaving

    def settled(self) -> Vector:
        """The weights, with the digits that constraints give them where they came down from a far larger point."""
        base, held, free = self.cuts.base, np.flatnonzero(self.met), self.at == 0
        rows, targets = self.rows[held], np.where(self.met > 0, self.most, self.least)[held]
        weights = self.weights.copy()
        for _ in range(2):
            weights[free] -= np.linalg.lstsq(rows[:, free], rows @ weights - targets, rcond=1e-13)[0]
        return np.minimum(np.maximum(weights, base.lower), base.upper)

    def _hold(self, place: int, sign: int, raised: float) -> None:
        m, base = len(self.rows), self.cuts.base
        if place < m:
            self.met[place], self.multipliers[place] = sign, sign * raised
            return
        self.at[place - m] = sign
        self.weights[place - m] = (base.upper if sign > 0 else base.lower)[place - m]


_NEAR = 16 * EPSILON
_PARALLEL = 1e-12
_TINY = float(np.finfo(np.float64).tiny)
