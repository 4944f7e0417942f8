"""Exact minimisation over the faces of a polyhedron. Called by `pgd`, `active_set` and `entropic` for the last digits.

A projected-gradient step proposes which constraints hold (it releases every one with a wrong multiplier at once); on
that face the minimiser is a linear solve; constraints met on the way are added and the solve repeated. So the
objective falls with every face and no face comes twice: the scheme of More and Toraldo 1991 (GPCG), with a direct
solve for their conjugate gradients, and with the capped cone's moving bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ftw.solvers.faces import Face, room_above
from ftw.solvers.linear import EPSILON
from ftw.solvers.polyhedron import Flags, Vector
from ftw.solvers.scaling import UnitProblem

GOAL = 2e-14
"""Residual at rounding level, at which a solve ends."""


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
    *,
    step: float | None = None,
    tolerance: float,
    rounds: int,
    passes: int,
) -> Polished:
    """The best weights found from `start` in at most `rounds` faces of at most `passes` linear solves each.

    Args:
        step: length of the projected steps that propose a face, at most 1 / largest eigenvalue of K; the default is
            1 / ||K||_F.
        tolerance: slope, relative to the gradient's size, from which a ray of the set without curvature counts
            as unbounded descent.
    """
    if step is None:
        step = 1 / problem.norm if problem.norm else _LONG
    gradient = problem.gradient(start)
    best, best_residual = start, problem.residual(start, gradient)
    weights, solves, stalls = start, 0, 0
    for _ in range(rounds):
        descent = _Descent(problem, problem.project(weights - step * gradient))
        unbounded = descent.run(tolerance, passes)
        weights, solves = descent.weights, solves + descent.solves
        gradient = problem.gradient(weights)
        residual = problem.residual(weights, gradient)
        if unbounded:
            return Polished(weights, residual, weights, solves, unbounded=True)
        stalls = stalls + 1 if residual > 0.5 * best_residual else 0
        if residual < best_residual:
            best, best_residual = weights, residual
        if best_residual <= GOAL or (stalls >= 2 and best_residual <= 50 * GOAL):
            break  # the second: rounding keeps the goal out of reach
    return Polished(best, best_residual, weights, solves)


class _Descent:
    """Weights on a face, and the way down from there over smaller and smaller ones."""

    def __init__(self, problem: UnitProblem, weights: Vector) -> None:
        self.problem = problem
        self.face = Face.at(problem.polyhedron, weights)
        self.weights = self.face.snap(weights)
        self.solves = 0

    def run(self, tolerance: float, passes: int) -> bool:
        """Moves towards the minimiser of the face or of a smaller one, by at most `passes` linear solves.

        Returns:
            Whether the objective falls without end along a ray of the set.
        """
        problem = self.problem
        for _ in range(passes):  # each but the last adds a constraint
            gradient, face = problem.gradient(self.weights), self.face
            gamma = problem.sizes(self.weights)[1]
            reduced, flat = problem.quadratic.minimise(face, -face.reduce(gradient), gamma)
            self.solves += 1
            if flat is not None:
                ray = face.spread(flat)
                reach = self._reach(ray)
                length = float(np.linalg.norm(ray))
                if math.isfinite(reach):
                    self._follow(ray, reach, gradient, _NOTICEABLE * problem.sizes(self.weights)[0] / length, math.inf)
                    continue
                if -float(gradient @ ray) > tolerance * gamma * length:
                    return True
            newton = face.spread(reduced)
            reach = self._reach(newton)
            if reach >= 1:
                self.weights = self.weights + newton
                return False
            self._follow(newton, reach, gradient, _NOTICEABLE, 1.0)
        return False

    def _follow(self, direction: Vector, reach: float, gradient: Vector, least: float, longest: float) -> None:
        """Goes to the first constraint in the way, or further, bent along the set, where the objective is lower.

        One constraint at a time would need as many solves as there are wrong ones. Lengths grow from `least`, or from
        a few times `reach`, to `longest` while the objective falls; the last one has to add constraints, so
        that faces shrink.
        """
        problem, slope = self.problem, float(gradient @ direction)
        # direction'K direction is -slope on the way to the face's minimiser, and 0 on a ray.
        lowest = reach * slope * (1 - 0.5 * reach if longest == 1 else 1.0)
        best, length = None, max(_LONGER * reach, least)
        while length < _LONGER * longest:
            length = min(length, longest)
            landing = problem.project(self.weights + length * direction)
            change = problem.change(gradient, landing - self.weights)
            if not change < lowest:
                break
            best, lowest = landing, change
            length *= _LONGER
        if best is not None:
            face = Face.at(problem.polyhedron, best)
            if face.constraints > self.face.constraints:
                self.face, self.weights = face, face.snap(best)
                return
        self._advance(direction, reach)

    def _advance(self, direction: Vector, reach: float) -> None:
        """Goes as far as the first constraint and keeps every one that is met there."""
        below, above, sides = self._reaches(direction)
        met = reach * (1 + 1e-12)
        low = self.face.low | (below <= met)
        high = (self.face.high | (above <= met)) & ~low
        self.face = Face(self.face.polyhedron, low, high, self.face.tight | (sides <= met))
        self.weights = self.face.snap(self.weights + reach * direction)

    def _reach(self, direction: Vector) -> float:
        """How many times `direction` fits before a constraint is met; infinity if none is."""
        return float(min(reaches.min(initial=math.inf) for reaches in self._reaches(direction)))

    def _reaches(self, direction: Vector) -> tuple[Vector, Vector, Vector]:  # (n,), (n,), (q,)
        face, polyhedron, weights = self.face, self.face.polyhedron, self.weights
        falling = (direction < 0) & ~face.low
        below = _ratios(weights - polyhedron.lower, -direction, falling)
        closing = direction
        if math.isfinite(polyhedron.share):
            closing = direction - polyhedron.members * (polyhedron.share * float(polyhedron.members @ direction))
        rising = (closing > EPSILON * np.abs(direction).max(initial=0.0)) & ~face.high
        above = _ratios(room_above(polyhedron, weights), closing, rising)
        if not face.tight.size:
            return below, above, np.zeros(0)
        rates, values = polyhedron.sides @ direction, polyhedron.sides @ weights
        moving = (np.abs(rates) > _PARALLEL * (np.abs(polyhedron.sides) @ np.abs(direction))) & ~face.tight
        room = np.where(rates > 0, polyhedron.most - values, values - polyhedron.least)
        return below, above, _ratios(room, np.abs(rates), moving)


def _ratios(room: Vector, rate: Vector, where: Flags) -> Vector:
    """room / rate, at least 0; infinite where nothing is met."""
    ratios = np.full(room.size, math.inf)
    np.divide(room, rate, out=ratios, where=where)
    np.maximum(ratios, 0.0, out=ratios)
    return ratios


_LONG = 1e2
"""Length of a projected step where K is zero; weights are expected to be of size 1."""

_LONGER = 4.0
"""Ratio of the lengths tried; the figure matters little."""

_NOTICEABLE = 1e-3
"""Least length tried, as part of the way to the minimiser or, along a ray, of the weights' size."""

_PARALLEL = 8 * EPSILON
"""Part of its terms up to which a side's rate of change is rounding."""
