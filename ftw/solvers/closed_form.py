"""The unbounded weights of the paper's ablation: one symmetric solve, no bounds."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.linear import solve_on_rows
from ftw.solvers.polyhedron import Polyhedron
from ftw.solvers.scaling import UnitProblem


class ClosedForm(WeightSolver):
    """Solves `K w = b`, on the plane `A w = d` if the set has equalities.

    Singular K: the weights nearest to 0 (to the plane's point nearest to 0) if b lies in the range of K, status
    `unbounded` otherwise. A ridge is no matter of this solver; the selector adds it to K.

    Law: on `Free` with b in the range of K the weights are `pinv(K) b`.

    Args:
        tolerance: largest `kkt_residual` called optimal; also how far, relative, b may be out of K's range.

    Raises:
        ConfigurationError: the set has bounds or caps; use 'pgd' or 'qp' for those.
    """

    def __init__(self, tolerance: float = 1e-10) -> None:
        if not tolerance > 0:
            raise ConfigurationError(
                f"tolerance is {tolerance!r}; it must be positive; leave it out for the default 1e-10."
            )
        self.tolerance = tolerance

    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        if not constraints.feasible(alignment.numel()):
            return Solution(torch.zeros_like(alignment), Status.INFEASIBLE, math.inf)
        if _has_bounds(constraints.polyhedron(alignment.numel())):
            raise ConfigurationError(
                f"ClosedForm was given {constraints!r}; it can honour Free and sets of equalities only; "
                "use the solver 'pgd' or 'qp' for bounds, or pass Free()."
            )
        problem = UnitProblem.of(gram, alignment, constraints)
        weights = problem.project(np.zeros(alignment.numel()))
        for _ in range(2):  # the second solve is iterative refinement
            gradient, gamma = problem.gradient(weights), problem.sizes(weights)[1]
            rows = problem.polyhedron.rows
            move, ray = solve_on_rows(problem.gram, -gradient, rows, gamma, self.tolerance)
            if ray is not None:
                return Solution(torch.from_numpy(weights * problem.unit), Status.UNBOUNDED, problem.residual(weights))
            weights = weights + move
        residual = problem.residual(weights)
        status = Status.OPTIMAL if residual <= self.tolerance else Status.INACCURATE
        return Solution(torch.from_numpy(weights * problem.unit), status, residual)


def _has_bounds(polyhedron: Polyhedron) -> bool:
    bounded = np.isfinite(polyhedron.lower).any() or np.isfinite(polyhedron.upper).any()
    return bool(bounded) or math.isfinite(polyhedron.share)
