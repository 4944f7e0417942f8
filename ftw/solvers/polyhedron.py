"""A set of weights as bounds and rows: what solvers read of a `ConstraintSet` besides its projection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Polyhedron:
    """`lower <= w <= upper`, `rows @ w = values`, `w_i <= share * sum(w)`.

    Attributes:
        lower, upper: (n,), infinite where there is no bound; lower is 0 wherever `share` is finite.
        rows, values: (m, n) and (m,).
        share: largest part of the total that one weight may have; infinite without such a cap.
    """

    lower: Vector
    upper: Vector
    rows: Matrix
    values: Vector
    share: float = math.inf

    @property
    def radius(self) -> float:
        """An upper bound on ||w||; infinite if none follows from bounds and single rows."""
        if not self.lower.size:
            return 0.0
        reach = np.maximum(np.abs(self.lower), np.abs(self.upper))
        longest = float(reach.max())
        # Divided first: the square of a large bound would overflow.
        radius = longest * float(np.linalg.norm(reach / longest)) if 0 < longest < math.inf else longest
        if np.all(self.lower >= 0):
            for row, value in zip(self.rows, self.values, strict=True):
                if np.all(row > 0):
                    # The norm is convex, so it is largest at a vertex of the simplex {w >= 0, row'w = value}.
                    radius = min(radius, float(value / row.min()))
        return radius

    def scaled(self, factor: float) -> Polyhedron:
        """The set `{factor * w}`."""
        return Polyhedron(self.lower * factor, self.upper * factor, self.rows, self.values * factor, self.share)

    def violation(self, weights: Vector) -> float:
        """Largest violation, each relative to the numbers that it compares; 0 inside."""
        if not weights.size:
            return 0.0 if np.all(self.values == 0) else math.inf
        largest = float(np.abs(weights).max())
        worst = 0.0
        for excess, bound in ((self.lower - weights, self.lower), (weights - self.upper, self.upper)):
            finite = np.isfinite(bound)
            worst = max(worst, _relative(excess[finite], np.maximum(np.abs(bound[finite]), largest)))
        if math.isfinite(self.share):
            worst = max(worst, _relative(weights - self.share * weights.sum(), np.full(weights.size, largest)))
        terms = np.abs(self.rows) @ np.abs(weights) + np.abs(self.values)
        return max(worst, _relative(np.abs(self.rows @ weights - self.values), terms))


def _relative(excess: Vector, size: Vector) -> float:
    over = excess > 0
    return float((excess[over] / size[over]).max()) if over.any() else 0.0
