"""Projected gradient with spectral steps and an exact polish: the default weight solver, for every set and every K."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from torch import Tensor

from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver, infeasible, require_count, require_positive
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.gram import LowRank
from ftw.solvers.polish import GOAL, polish
from ftw.solvers.polyhedron import Vector
from ftw.solvers.scaling import UnitProblem


class ProjectedGradient(WeightSolver):
    """Spectral projected gradient, then exact solves on the faces that it has found (`polish`).

    Bursts of projected gradient steps with the lengths of Barzilai and Borwein 1988, both of them in turn, and an exact
    line search towards each projected point (Birgin, Martinez and Raydan 2000, SPG2, whose non-monotone search the
    exact one replaces) alternate with polishing; a burst ends as soon as its steps agree on the face, and the
    first burst that leads the polish to rounding level ends the solve. Spectral steps take the place of momentum with
    restart (FISTA: Beck and Teboulle 2009; O'Donoghue and Candes 2015): they need no bound on K and descend at every
    step, and accuracy is the polish's affair, not theirs.

    Where several weights are optimal (duplicates, singular K), equal candidates get equal weights: the start is the
    set's point nearest to 0 unless one is given, and no step is made along a direction that has neither curvature
    nor slope.

    Unbounded problems are recognised by a ray of the set along which K has no curvature and b a positive slope
    above `tolerance`, relative. Deterministic: no random numbers, no clocks.

    A `LowRank` K is never multiplied out: a step costs O(n r), a solve on a face of f weights O(f r^2).

    Args:
        max_iterations: no further burst begins once gradient steps and linear solves together reach it.
        tolerance: largest `kkt_residual` called optimal. It does not end the solve early, which always aims at
            rounding level.

    Raises:
        ConfigurationError: `max_iterations` or `tolerance` is not positive.
    """

    takes_factor: ClassVar[bool] = True
    takes_start: ClassVar[bool] = True

    def __init__(self, max_iterations: int = 2000, tolerance: float = 1e-10) -> None:
        require_count(max_iterations=max_iterations)
        require_positive(tolerance=tolerance)
        self.max_iterations = max_iterations
        self.tolerance = tolerance

    def _solve(
        self, gram: Tensor | LowRank, alignment: Tensor, constraints: ConstraintSet, start: Tensor | None = None
    ) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return infeasible(alignment)
        problem = UnitProblem.of(gram, alignment, constraints)
        weights = problem.begin(start)
        current, residual = weights, problem.residual(weights)
        iterations, stalls, unbounded = 0, 0, False
        burst = 8 + math.isqrt(n)
        step = 1 / max(problem.norm, _FLATTEST)
        while residual > GOAL and not unbounded and iterations < self.max_iterations:
            moved, steps = descend(problem, current, step, min(burst, self.max_iterations - iterations))
            found = polish(
                problem,
                moved,
                step=step,
                tolerance=self.tolerance,
                # Where gradient steps identify the face soon, they are cheaper than solves; where they do not
                # (K graded over many decades), only the exact solves get on, and so are not limited later.
                rounds=_FEW_ROUNDS if iterations == 0 else _MANY_ROUNDS,
                passes=_FEW_PASSES if iterations == 0 else 2 * n + 1,
            )
            iterations += steps + found.solves
            current, unbounded = found.last, found.unbounded
            stalls = stalls + 1 if found.residual > 0.5 * residual else 0
            if unbounded or found.residual < residual:
                weights, residual = found.weights, found.residual
            if residual <= self.tolerance and stalls >= (1 if residual <= 50 * GOAL else 3):
                break  # rounding keeps the goal out of reach
            burst *= 2
        status = Status.OPTIMAL if residual <= self.tolerance else Status.INACCURATE
        return problem.solution(weights, Status.UNBOUNDED if unbounded else status, iterations)


_FEW_ROUNDS, _MANY_ROUNDS = 4, 16
_FEW_PASSES = 10
_FLATTEST = 1e-2
"""Least curvature assumed at unit scale, so that a nearly linear objective gets long but finite steps."""


def descend(problem: UnitProblem, start: Vector, shortest: float, most: int) -> tuple[Vector, int]:
    """At most `most` spectral steps of at least the length `shortest` from a point of the set, and their number.

    Ends when the bounds met have stayed the same over `_SETTLED` steps. The objective falls with every step.
    """
    x, gradient, length = start, problem.gradient(start), shortest
    lower, upper = problem.polyhedron.lower, problem.polyhedron.upper
    low = high = np.zeros(0, dtype=bool)
    settled = 0
    for taken in range(most):
        moved = problem.project(x - length * gradient)
        move = moved - x
        slope = float(gradient @ move)
        if not slope < 0:
            return x, taken
        image = problem.quadratic.times(move)
        curvature = float(move @ image)
        share = 1.0 if curvature <= -slope else -slope / curvature
        x = moved if share == 1 else x + share * move
        gradient = gradient + share * image
        square = float(image @ image)
        if curvature > 0 and square > 0:  # 0 by underflow
            length = float(move @ move) / curvature if taken % 2 else curvature / square
            length = min(max(length, shortest), 1 / _FLATTEST)
        else:
            length = 1 / _FLATTEST
        before = low, high
        low, high = moved <= lower, moved >= upper
        same = share == 1 and np.array_equal(low, before[0]) and np.array_equal(high, before[1])
        settled = settled + 1 if same else 0
        if settled == _SETTLED:
            return x, taken + 1
    return x, most


_SETTLED = 2
