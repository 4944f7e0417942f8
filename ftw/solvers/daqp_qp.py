"""Weights by DAQP, a dual active-set method in C: fast at the sizes of a training step. Optional, through qpsolvers."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from torch import Tensor

from ftw.errors import MissingDependencyError
from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver, infeasible, require_count, require_positive
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.cvxpy_qp import judge
from ftw.solvers.polyhedron import Polyhedron
from ftw.solvers.scaling import UnitProblem


class DAQP(WeightSolver):
    """The QP over any set by DAQP (Arnström, Bemporad and Axehill 2022), called through qpsolvers.

    DAQP needs a positive definite K, and solves others by proximal iterations, which `proximal` switches on. It does
    not say why it found nothing, so that unbounded problems are status `failed` here. The moving bound of
    `CappedCone` becomes n rows.

    Args:
        tolerance: largest `kkt_residual` called optimal.
        proximal: the weight of the proximal term at unit scale, where the largest entry of K is at most 1.
        max_iterations: of DAQP, its proximal ones included.

    Raises:
        MissingDependencyError: qpsolvers or daqp is not installed.
        ConfigurationError: an option is not positive.
    """

    def __init__(self, tolerance: float = 1e-8, proximal: float = 1e-6, max_iterations: int = 100_000) -> None:
        require_count(max_iterations=max_iterations)
        require_positive(tolerance=tolerance, proximal=proximal)
        self.tolerance, self.proximal, self.max_iterations = tolerance, proximal, max_iterations

    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return infeasible(alignment)
        problem = UnitProblem.of(gram, alignment, constraints)
        if problem.residual(problem.nearest) == 0:  # covers n = 0
            return problem.solution(problem.nearest, Status.OPTIMAL)
        qpsolvers = _qpsolvers()
        program = qpsolvers.Problem(problem.quadratic.matrix, -problem.alignment, **_arguments(problem.polyhedron))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a verdict is in the solution
            found = qpsolvers.solve_problem(
                program,
                solver="daqp",
                eps_prox=self.proximal,
                iter_limit=self.max_iterations,
                primal_tol=_FINE,
                dual_tol=_FINE,
                eta_prox=_FINE,
            )
        return judge(problem, found.x, Status.OPTIMAL if found.found else Status.FAILED, self.tolerance)


_FINE = 1e-10
"""Tolerance asked of DAQP, at unit scale; finer ones it may miss by rounding."""


def _arguments(polyhedron: Polyhedron) -> dict[str, Any]:
    near = polyhedron.without_far_bounds()
    rows, limits = near.inequalities()
    return {
        "G": rows if len(rows) else None,
        "h": limits if len(rows) else None,
        "A": near.rows if len(near.rows) else None,
        "b": near.values if len(near.rows) else None,
        "lb": near.lower if np.isfinite(near.lower).any() else None,
        "ub": near.upper if np.isfinite(near.upper).any() else None,
    }


def _qpsolvers() -> Any:
    try:
        importlib.import_module("daqp")
        return importlib.import_module("qpsolvers")
    except ImportError as error:
        raise MissingDependencyError(
            "the solver 'daqp' needs qpsolvers and daqp, which are not installed; "
            "pip install 'filter-then-weight[daqp]', or use the solver 'pgd'."
        ) from error
