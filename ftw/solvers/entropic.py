"""Mirror descent with the entropy: weights move by factors, not by differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver, infeasible, require_count, require_positive
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.entropy import positive, scale_to_total
from ftw.solvers.gram import LowRank
from ftw.solvers.polish import GOAL, polish
from ftw.solvers.polyhedron import Vector
from ftw.solvers.scaling import UnitProblem
from ftw.solvers.softmax import budget_of


class Entropic(WeightSolver):
    """Exponentiated gradient: `w_i <- w_i exp(-eta g_i)`, brought back to the set with the least relative entropy.

    Source: Kivinen and Warmuth 1997; mirror descent of Beck and Teboulle 2003 with the entropy `sum mu_i w_i log w_i`.
    Deviations: the step eta is searched, such that the objective stays below its linear part plus the relative
    entropy to the last weights over eta (Bauschke, Bolte and Teboulle 2017); caps and a free total are projected
    exactly, too. Then `polish` brings the last digits.

    Without the polish weights stay positive, and early ones near equal: a regularised solution, status
    `inaccurate` where `max_iterations` ends the solve.

    Args:
        polish: finish with exact solves on the face found.
        max_iterations: of the exponentiated gradient.
        tolerance: largest `kkt_residual` called optimal; also where it ends without the polish.

    Raises:
        ConfigurationError: an option is not positive; or the set is not for it: weights below 0, or other rows than one
            positive total, such as a quota.
    """

    takes_factor: ClassVar[bool] = True
    takes_start: ClassVar[bool] = True

    def __init__(self, polish: bool = True, max_iterations: int = 2000, tolerance: float = 1e-8) -> None:
        require_count(max_iterations=max_iterations)
        require_positive(tolerance=tolerance)
        self.polish, self.max_iterations, self.tolerance = polish, max_iterations, tolerance

    def _solve(
        self, gram: Tensor | LowRank, alignment: Tensor, constraints: ConstraintSet, start: Tensor | None = None
    ) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return infeasible(alignment)
        polyhedron = constraints.polyhedron(n)
        row, total, _ = budget_of(type(self).__name__, constraints, polyhedron)
        if np.any(polyhedron.lower < 0) or (len(polyhedron.rows) and np.any(polyhedron.lower > 0)):
            raise ConfigurationError(
                f"Entropic was given {constraints!r}; it can honour weights of at least 0, and of exactly 0 beside a "
                "total; use the solver 'pgd' for other bounds."
            )
        problem = UnitProblem.of(gram, alignment, constraints)
        mirror = _Mirror(problem, row, total / problem.unit)
        weights = mirror.first(None if start is None else problem.begin(start))
        return self._iterate(problem, mirror, weights)

    def _iterate(self, problem: UnitProblem, mirror: _Mirror, weights: Vector) -> Solution:
        best, residual = problem.nearest, problem.residual(problem.nearest)
        taken, burst, unbounded, stalls = 0, 32 + math.isqrt(weights.size), False, 0
        while taken < self.max_iterations and residual > (GOAL if self.polish else self.tolerance) and not unbounded:
            weights, steps = mirror.descend(weights, min(burst, self.max_iterations - taken))
            taken += max(steps, 1)
            candidate = problem.project(weights)
            found = problem.residual(candidate)
            if self.polish:
                passes = 2 * weights.size + 1
                polished = polish(problem, candidate, tolerance=self.tolerance, rounds=_ROUNDS, passes=passes)
                candidate, found, unbounded = polished.weights, polished.residual, polished.unbounded
            stalls = stalls + 1 if found > 0.5 * residual else 0
            if found < residual or unbounded:
                best, residual = candidate, found
            if steps == 0 or (self.polish and residual <= self.tolerance and stalls >= 2):
                break
            burst *= 2
        status = Status.OPTIMAL if residual <= self.tolerance else Status.INACCURATE
        return problem.solution(best, Status.UNBOUNDED if unbounded else status, taken)


_ROUNDS = 8


@dataclass
class _Mirror:
    """Steps at unit scale. Attributes: `row`, `total`: of the set, or ones and n where the total is free."""

    problem: UnitProblem
    row: Vector
    total: float
    rate: float = 0.0

    def first(self, near: Vector | None) -> Vector:
        """Positive weights to start from: equal ones, or those given with equal ones mixed in."""
        if near is None:
            return self._project(np.ones_like(self.row))
        equal = max(float(near.mean()), _MIXED) if near.size else 0.0
        return self._project((1 - _MIXED) * near + _MIXED * equal)

    def descend(self, weights: Vector, most: int) -> tuple[Vector, int]:
        problem, gradient = self.problem, self.problem.gradient(weights)
        for taken in range(most):
            slopes = gradient / self.row
            steepest = float(np.abs(slopes).max(initial=0.0))
            if not steepest or not _VANISHED < float(weights.max()) < 1 / _VANISHED:
                return weights, taken
            rate = min(2 * self.rate or 1 / steepest, _STEEPEST / steepest)
            for _ in range(_HALVINGS):
                moved = self._project(weights * np.exp(-rate * slopes))
                move = moved - weights
                image = problem.quadratic.times(move)
                if 0.5 * rate * float(move @ image) <= self._distance(moved, weights):
                    break
                rate /= 2
            else:
                return weights, taken
            self.rate = rate
            if not np.any(move):
                return weights, taken
            weights, gradient = moved, gradient + image
        return weights, most

    def _distance(self, moved: Vector, weights: Vector) -> float:
        """`sum mu_i (m_i log(m_i / w_i) - m_i + w_i)`."""
        kept = moved > 0
        logs = np.zeros_like(moved)
        np.log(moved / weights, out=logs, where=kept)
        return float(self.row @ (moved * logs - moved + weights))

    def _project(self, shape: Vector) -> Vector:
        """The point of the set with the least relative entropy to `shape`."""
        polyhedron, shape = self.problem.polyhedron, positive(shape)
        if len(polyhedron.rows):
            return scale_to_total(shape, polyhedron.upper, self.row, self.total)
        if math.isinf(polyhedron.share):
            return np.minimum(np.maximum(shape, polyhedron.lower), polyhedron.upper)
        parts = scale_to_total(shape, np.full(shape.size, polyhedron.share), np.ones_like(shape), 1.0)
        # With the parts fixed, the sum of s part log(s part / shape) - s part is least at this total s.
        kept = parts > 0
        return parts * math.exp(-float(parts[kept] @ np.log(parts[kept] / shape[kept])))


_MIXED = 1e-3
"""Part of equal weights in a given start: a weight of 0 would stay 0."""

_VANISHED = 1e-100
"""Weights of a pool that only harms fall towards 0 for ever; without curvature, those of one that helps rise."""

_STEEPEST = 30.0
"""Largest exponent of a factor."""

_HALVINGS = 60
