"""Exact minimisation over the faces of a polyhedron. Called by the projected gradient, whose last digits it brings.

A projected-gradient step proposes which bounds hold (it releases every bound with a wrong multiplier at once); on
that face the minimiser is a linear solve; bounds met on the way are added and the solve repeated. So the
objective falls with every face and no face comes twice: the scheme of More and Toraldo 1991 (GPCG), with a direct
solve for their conjugate gradients, and with the capped cone's moving bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftw.solvers.linear import EPSILON, solve_on_rows
from ftw.solvers.polyhedron import Vector
from ftw.solvers.scaling import UnitProblem

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Polished:
    """What a polish came to, at unit scale.

    Attributes:
        weights, residual: (n,), the iterate with the smallest residual.
        last: (n,), the iterate with the smallest objective; to go on from.
        solves: number of linear solves.
        unbounded: whether a ray of endless descent was found; `weights` is then a point on it.
    """

    weights: Vector
    residual: float
    last: Vector
    solves: int
    unbounded: bool = False


def polish(
    problem: UnitProblem,
    start: Vector,  # (n,), in the set
    step: float,  # at most 1 / largest eigenvalue of K
    *,
    goal: float,
    tolerance: float,
    rounds: int,
    passes: int,
) -> Polished:
    """The best weights found from `start` in at most `rounds` faces of at most `passes` linear solves each.

    Args:
        goal: residual at which to end early.
        tolerance: slope, relative to the gradient's size, from which a ray of the set without curvature counts
            as unbounded descent.
    """
    best, best_residual = start, problem.residual(start)
    weights, solves, stalls = start, 0, 0
    for _ in range(rounds):
        face = _Face.at(problem, problem.project(weights - step * problem.gradient(weights)))
        ray = face.descend(tolerance, passes)
        weights, solves = face.weights, solves + face.solves
        residual = problem.residual(weights)
        if ray:
            return Polished(weights, residual, weights, solves, unbounded=True)
        stalls = stalls + 1 if residual > 0.5 * best_residual else 0
        if residual < best_residual:
            best, best_residual = weights, residual
        if best_residual <= goal or (stalls >= 2 and best_residual <= 50 * goal):
            break  # the second: rounding keeps the goal out of reach
    return Polished(best, best_residual, weights, solves)


@dataclass
class _Face:
    """Weights and the bounds that are kept active: `low` at the lower, `high` at the upper bound."""

    problem: UnitProblem
    weights: Vector
    low: Flags
    high: Flags
    solves: int = 0

    @classmethod
    def at(cls, problem: UnitProblem, weights: Vector) -> _Face:
        polyhedron = problem.polyhedron
        near = 4 * EPSILON * float(np.abs(weights).max())
        low = weights - polyhedron.lower <= near
        high = ~low & (_room_above(problem, weights) <= near)
        face = cls(problem, weights.copy(), low, high)
        face._snap()
        return face

    def descend(self, tolerance: float, passes: int) -> bool:
        """Moves towards the minimiser of the face or of a smaller one, by at most `passes` linear solves.

        Returns:
            Whether the objective falls without end along a ray of the set.
        """
        problem = self.problem
        for _ in range(passes):  # each but the last adds a bound
            gradient = problem.gradient(self.weights)
            gamma = problem.sizes(self.weights)[1]
            newton, ray = self._directions(gradient, gamma)
            self.solves += 1
            if ray is not None:
                reach = self._reach(ray)
                if math.isfinite(reach):
                    self._advance(ray, reach)
                    continue
                if -float(gradient @ ray) > tolerance * gamma * float(np.linalg.norm(ray)):
                    return True
            reach = self._reach(newton)
            if reach >= 1:
                self.weights = self.weights + newton
                return False
            if not self._jump(gradient, newton, reach):
                self._advance(newton, reach)
        return False

    def _directions(self, gradient: Vector, gamma: float) -> tuple[Vector, Vector | None]:
        """The step to the face's minimiser, and the descent direction without curvature if there is one.

        Coordinates are the free weights and, where weights stand at the cone's moving bound, the total s: they
        follow as `share * s`, and `s = sum(w)` is one more row.
        """
        polyhedron, K = self.problem.polyhedron, self.problem.gram
        high, free = self.high, np.flatnonzero(~(self.low | self.high))
        gram, slope, rows = K[np.ix_(free, free)], gradient[free], polyhedron.rows[:, free]
        moving = math.isfinite(polyhedron.share) and bool(high.any())
        if moving:
            share, count = polyhedron.share, free.size
            column = share * K[:, high].sum(1)
            extended = np.empty((count + 1, count + 1))
            extended[:count, :count] = gram
            extended[:count, count] = extended[count, :count] = column[free]
            extended[count, count] = share * column[high].sum()
            gram, slope = extended, np.append(slope, share * gradient[high].sum())
            gap = share * int(high.sum()) - 1
            # With exactly 1 / share weights at the bound the total is free; rounding must not pin it.
            total = np.append(np.ones(count), 0.0 if abs(gap) < 1e-12 else gap)
            rows = np.vstack((np.column_stack((rows, share * polyhedron.rows[:, high].sum(1))), total))
        newton, ray = solve_on_rows(gram, -slope, rows, gamma)

        def spread(reduced: Vector) -> Vector:
            full = np.zeros_like(gradient)
            full[free] = reduced[: free.size]
            if moving:
                full[high] = polyhedron.share * reduced[-1]
            return full

        return spread(newton), None if ray is None else spread(ray)

    def _reach(self, direction: Vector) -> float:
        """How many times `direction` fits before a bound is met; infinity if none is."""
        below, above = self._reaches(direction)
        return float(min(below.min(initial=math.inf), above.min(initial=math.inf)))

    def _reaches(self, direction: Vector) -> tuple[Vector, Vector]:  # (n,), (n,)
        polyhedron, share = self.problem.polyhedron, self.problem.polyhedron.share
        below = np.full(direction.size, math.inf)
        falling = ~self.low & (direction < 0)
        below[falling] = (self.weights - polyhedron.lower)[falling] / -direction[falling]
        above = np.full(direction.size, math.inf)
        closing = direction - share * float(direction.sum()) if math.isfinite(share) else direction
        closing = np.where(self.high, 0.0, closing)
        rising = closing > EPSILON * np.abs(direction).max(initial=0.0)
        above[rising] = _room_above(self.problem, self.weights)[rising] / closing[rising]
        return np.maximum(below, 0.0), np.maximum(above, 0.0)

    def _advance(self, direction: Vector, reach: float) -> None:
        """Goes as far as the first bound and keeps every bound that is met there."""
        below, above = self._reaches(direction)
        self.weights = self.weights + reach * direction
        met = reach * (1 + 1e-12)
        self.low |= below <= met
        self.high = (self.high | (above <= met)) & ~self.low
        self._snap()

    def _jump(self, gradient: Vector, newton: Vector, reach: float) -> bool:
        """Goes further than the first bound, bent along the set, where that lowers the objective more.

        One bound at a time would need as many solves as there are wrong bounds. Of the points tried, the longest
        that beats the straight step is taken; it has to add bounds, so that faces shrink.
        """
        problem, bounds = self.problem, int(self.low.sum() + self.high.sum())
        walked = reach * float(gradient @ newton) * (1 - 0.5 * reach)  # newton'K newton = -gradient'newton
        share = 1.0
        while share > 2 * reach:
            landing = _Face.at(problem, problem.project(self.weights + share * newton))
            move = landing.weights - self.weights
            jumped = float(gradient @ move) + 0.5 * float(move @ problem.gram @ move)
            if jumped < walked and int(landing.low.sum() + landing.high.sum()) > bounds:
                self.weights, self.low, self.high = landing.weights, landing.low, landing.high
                return True
            share *= _SHORTER
        return False

    def _snap(self) -> None:
        polyhedron = self.problem.polyhedron
        self.weights[self.low] = polyhedron.lower[self.low]
        if math.isinf(polyhedron.share):
            self.weights[self.high] = polyhedron.upper[self.high]


_SHORTER = 0.5
"""Ratio of the step lengths tried; the figure matters little."""


def _room_above(problem: UnitProblem, weights: Vector) -> Vector:  # (n,)
    share = problem.polyhedron.share
    moving = share * float(weights.sum()) if math.isfinite(share) else math.inf
    return np.minimum(problem.polyhedron.upper, moving) - weights
