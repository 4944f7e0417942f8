"""Accelerated projected gradient with an active-set polish: the default weight solver, for every set and every K."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import Solution, Status
from ftw.solvers.active_set import polish
from ftw.solvers.base import WeightSolver
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.polyhedron import Vector
from ftw.solvers.scaling import UnitProblem


class ProjectedGradient(WeightSolver):
    """FISTA with adaptive restart, then exact solves on the faces that it has found (`active_set`).

    Short bursts of accelerated gradient (Beck and Teboulle 2009), restarted whenever the step opposes the
    gradient mapping (O'Donoghue and Candes 2015, the gradient scheme), alternate with polishing; the first burst
    that leads the polish to rounding level ends the solve. Deviations from the papers: a fixed step
    `1 / ||K||_F` instead of a line search, and the polish.

    Where several weights are optimal (duplicates, singular K), equal candidates get equal weights: the start is the
    set's point nearest to 0, and no step is made along a direction that has neither curvature nor slope.

    Unbounded problems are recognised by a ray of the set along which K has no curvature and b a positive slope
    above `tolerance`, relative. Deterministic: no random numbers, no clocks.

    Args:
        max_iterations: no further burst begins once gradient steps and linear solves together reach it.
        tolerance: largest `kkt_residual` called optimal. It does not end the solve early, which always aims at
            rounding level.

    Raises:
        ConfigurationError: `max_iterations` or `tolerance` is not positive.
    """

    def __init__(self, max_iterations: int = 2000, tolerance: float = 1e-10) -> None:
        if not max_iterations > 0 or not tolerance > 0:
            raise ConfigurationError(
                f"max_iterations is {max_iterations!r} and tolerance {tolerance!r}; both must be positive; "
                "leave them out for the defaults 2000 and 1e-10."
            )
        self.max_iterations = max_iterations
        self.tolerance = tolerance

    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        if not constraints.feasible(alignment.numel()):
            return Solution(torch.zeros_like(alignment), Status.INFEASIBLE, math.inf)
        problem = UnitProblem.of(gram, alignment, constraints)
        weights = current = problem.project(np.zeros(alignment.numel()))
        residual, iterations, stalls, unbounded = problem.residual(weights), 0, 0, False
        burst = 8 + alignment.numel() // 6
        step = 1 / max(problem.norm, _FLATTEST)
        while residual > _GOAL and not unbounded and iterations < self.max_iterations:
            burst = min(burst, self.max_iterations - iterations)
            found = polish(
                problem,
                _accelerate(problem, current, step, burst),
                step,
                goal=_GOAL,
                tolerance=self.tolerance,
                # Where gradient steps identify the face soon, they are cheaper than solves; where they do not
                # (K graded over many decades), only the exact solves get on, and so are not limited later.
                rounds=_FEW_ROUNDS if iterations == 0 else _MANY_ROUNDS,
                passes=_FEW_PASSES if iterations == 0 else 2 * alignment.numel() + 1,
            )
            iterations += burst + found.solves
            current, unbounded = found.last, found.unbounded
            stalls = stalls + 1 if found.residual > 0.5 * residual else 0
            if unbounded or found.residual < residual:
                weights, residual = found.weights, found.residual
            if residual <= self.tolerance and stalls >= (1 if residual <= 50 * _GOAL else 3):
                break  # rounding keeps the goal out of reach
            burst *= 2
        status = Status.OPTIMAL if residual <= self.tolerance else Status.INACCURATE
        return Solution(
            torch.from_numpy(weights * problem.unit),
            Status.UNBOUNDED if unbounded else status,
            residual,
            iterations,
        )


_FEW_ROUNDS, _MANY_ROUNDS = 4, 16
_FEW_PASSES = 10
_GOAL = 2e-14
_FLATTEST = 1e-2
"""Least curvature assumed at unit scale, so that a nearly linear objective gets long but finite steps."""


def _accelerate(problem: UnitProblem, start: Vector, step: float, iterations: int) -> Vector:
    """`iterations` steps of FISTA from a point of the set; never to a larger objective."""
    x, y, momentum = start, start, 1.0
    for _ in range(iterations):
        moved = problem.project(y - step * problem.gradient(y))
        change = moved - x
        if float((y - moved) @ change) > 0:  # the gradient scheme, eq. 13
            y, momentum = moved, 1.0
        else:
            grown = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            y = moved + ((momentum - 1) / grown) * change
            momentum = grown
        x = moved
    whole = x - start
    change_of_objective = float(problem.gradient(start) @ whole) + 0.5 * float(whole @ problem.gram @ whole)
    return x if change_of_objective < 0 else start
