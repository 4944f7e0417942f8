"""A set of weights as bounds and rows: what solvers read of a `ConstraintSet` besides its projection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Polyhedron:
    """`lower <= w <= upper`, `rows @ w = values`, `w_i <= share * members'w`, `least <= sides @ w <= most`.

    Attributes:
        lower, upper: (n,), infinite where there is no bound; 0 and infinite for members under a finite `share`.
        rows, values: (m, n) and (m,).
        share: largest part of the total that one weight may have; infinite without such a cap.
        members: (n,), 1 for weights that make up this total and obey the cap, 0 for others; by default all do.
        sides, least, most: (q, n), (q,) and (q,), `least < most`, infinite where a side is open; none by default.
    """

    lower: Vector
    upper: Vector
    rows: Matrix
    values: Vector
    share: float = math.inf
    sides: Matrix = field(default_factory=lambda: np.zeros((0, 0)))
    least: Vector = field(default_factory=lambda: np.zeros(0))
    most: Vector = field(default_factory=lambda: np.zeros(0))
    members: Vector = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not len(self.sides):
            object.__setattr__(self, "sides", np.zeros((0, self.lower.size)))
        if not len(self.members):
            object.__setattr__(self, "members", np.ones(self.lower.size))

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

    @property
    def bounded(self) -> bool:
        """Whether there are other constraints than equalities."""
        single = np.isfinite(self.lower).any() or np.isfinite(self.upper).any()
        return bool(single) or math.isfinite(self.share) or len(self.sides) > 0

    def scaled(self, factor: float) -> Polyhedron:
        """The set `{factor * w}`."""
        return Polyhedron(
            self.lower * factor,
            self.upper * factor,
            self.rows,
            self.values * factor,
            self.share,
            self.sides,
            self.least * factor,
            self.most * factor,
            self.members,
        )

    def caps(self) -> Matrix:  # (n, n)
        """The moving cap as rows: `caps @ w <= 0`."""
        return np.diag(self.members) - self.share * np.outer(self.members, self.members)

    def inequalities(self) -> tuple[Matrix, Vector]:  # (p, n), (p,)
        """Sides and the moving cap as `G w <= h`; bounds of single weights are not in it."""
        above, below = np.isfinite(self.most), np.isfinite(self.least)
        rows, limits = [self.sides[above], -self.sides[below]], [self.most[above], -self.least[below]]
        if math.isfinite(self.share):
            rows.append(self.caps())
            limits.append(np.zeros(self.lower.size))
        return np.concatenate(rows), np.concatenate(limits)

    def without_far_bounds(self) -> Polyhedron:
        """Without bounds that are astronomical beside 1, which at unit scale only ruin a backend's own scaling.

        Should the weights reach that far all the same, the projection puts the bounds back and the certificate tells.
        """
        lower = np.where(self.lower < -_FAR, -math.inf, self.lower)
        return replace(self, lower=lower, upper=np.where(self.upper > _FAR, math.inf, self.upper))

    def violation(self, weights: Vector) -> float:
        """Largest violation, each relative to the numbers that it compares; 0 inside."""
        if not weights.size:
            empty = np.any(self.values != 0) or np.any(self.least > 0) or np.any(self.most < 0)
            return math.inf if empty else 0.0
        largest = float(np.abs(weights).max())
        worst = 0.0
        for excess, bound in ((self.lower - weights, self.lower), (weights - self.upper, self.upper)):
            finite = np.isfinite(bound)
            worst = max(worst, _relative(excess[finite], np.maximum(np.abs(bound[finite]), largest)))
        if math.isfinite(self.share):
            over = self.members * (weights - self.share * float(self.members @ weights))
            worst = max(worst, _relative(over, np.full(weights.size, largest)))
        terms = np.abs(self.rows) @ np.abs(weights) + np.abs(self.values)
        worst = max(worst, _relative(np.abs(self.rows @ weights - self.values), terms))
        values, terms = self.sides @ weights, np.abs(self.sides) @ np.abs(weights)
        for excess, bound in ((self.least - values, self.least), (values - self.most, self.most)):
            finite = np.isfinite(bound)
            worst = max(worst, _relative(excess[finite], terms[finite] + np.abs(bound[finite])))
        return worst


def _relative(excess: Vector, size: Vector) -> float:
    over = excess > 0
    return float((excess[over] / size[over]).max()) if over.any() else 0.0


_FAR = 1e8
