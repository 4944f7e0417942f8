"""An active-set method alone: Lawson and Hanson's where the set is the orthant, the house's own everywhere else."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver, infeasible, require_count, require_positive
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.gram import LowRank
from ftw.solvers.linear import EPSILON
from ftw.solvers.polish import GOAL, polish
from ftw.solvers.polyhedron import Polyhedron, Vector
from ftw.solvers.scaling import UnitProblem


class ActiveSet(WeightSolver):
    """Exact solves on one face after the other, without gradient steps in between.

    On `NonNegative` scipy's NNLS (Lawson and Hanson 1974) solves `min ||R w - d||`, `R'R = K` and `R'd = b`, and one
    face more takes away what the root of K cost in digits, or finds that b is out of K's range and the problem
    unbounded. On all other sets, and for a `LowRank` K, the faces are searched as in `polish`, from the set's point
    nearest to 0 or from `start`. It is the reference that `pgd` is compared with: the same answers, and the faster way
    where few weights are positive.

    Args:
        max_rounds: faces from which the search may begin anew.
        tolerance: largest `kkt_residual` called optimal. It does not end the solve early.

    Raises:
        ConfigurationError: `max_rounds` or `tolerance` is not positive.
    """

    takes_factor: ClassVar[bool] = True
    takes_start: ClassVar[bool] = True

    def __init__(self, max_rounds: int = 200, tolerance: float = 1e-10) -> None:
        require_count(max_rounds=max_rounds)
        require_positive(tolerance=tolerance)
        self.max_rounds, self.tolerance = max_rounds, tolerance

    def _solve(
        self, gram: Tensor | LowRank, alignment: Tensor, constraints: ConstraintSet, start: Tensor | None = None
    ) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return infeasible(alignment)
        problem = UnitProblem.of(gram, alignment, constraints)
        weights = problem.begin(start)
        if problem.residual(weights) <= GOAL:
            return problem.solution(weights, Status.OPTIMAL)
        if start is None and isinstance(gram, Tensor) and _is_orthant(problem.polyhedron):
            weights = _lawson_hanson(problem)
        found = polish(problem, weights, tolerance=self.tolerance, rounds=self.max_rounds, passes=2 * n + 1)
        status = Status.OPTIMAL if found.residual <= self.tolerance else Status.INACCURATE
        return problem.solution(found.weights, Status.UNBOUNDED if found.unbounded else status, found.solves)


def _is_orthant(polyhedron: Polyhedron) -> bool:
    alone = not len(polyhedron.rows) and not len(polyhedron.sides) and np.isinf(polyhedron.share)
    return bool(alone and np.all(polyhedron.lower == 0) and np.all(np.isinf(polyhedron.upper)))


def _lawson_hanson(problem: UnitProblem) -> Vector:
    from scipy.optimize import nnls

    values, vectors = np.linalg.eigh(problem.quadratic.matrix)
    kept = values > 4 * values.size * EPSILON * values[-1]
    roots = np.sqrt(values[kept])
    try:
        return np.asarray(nnls(roots[:, None] * vectors[:, kept].T, (problem.alignment @ vectors[:, kept]) / roots)[0])
    except RuntimeError:  # its limit of iterations
        return problem.nearest
