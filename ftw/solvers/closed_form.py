"""The unbounded weights of the paper's ablation: one symmetric solve, no bounds."""

from __future__ import annotations

from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver, infeasible, require_positive
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.faces import Face
from ftw.solvers.gram import LowRank
from ftw.solvers.scaling import UnitProblem


class ClosedForm(WeightSolver):
    """Solves `K w = b`, on the plane `A w = d` if the set has equalities (`Linear(Free(), A, d, d)`).

    Singular K: the weights nearest to 0 (to the plane's point nearest to 0) if b lies in the range of K, status
    `unbounded` otherwise. For a ridge shift K and b with `ridge_towards`; the selector adds its own.

    Law: on `Free` with b in the range of K the weights are `pinv(K) b`.

    Args:
        tolerance: largest `kkt_residual` called optimal; also how far, relative, b may be out of K's range.

    Raises:
        ConfigurationError: the set has bounds, caps or half-spaces; use 'pgd' or 'qp' for those.
    """

    takes_factor = True

    def __init__(self, tolerance: float = 1e-10) -> None:
        require_positive(tolerance=tolerance)
        self.tolerance = tolerance

    def _solve(self, gram: Tensor | LowRank, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return infeasible(alignment)
        if constraints.polyhedron(n).bounded:
            raise ConfigurationError(
                f"ClosedForm was given {constraints!r}; it can honour Free and sets of equalities only; "
                "use the solver 'pgd' or 'qp' for bounds, or pass Free()."
            )
        problem = UnitProblem.of(gram, alignment, constraints)
        weights = problem.nearest
        whole = Face.at(problem.polyhedron, weights)
        for _ in range(2):  # the second solve is iterative refinement
            gradient, gamma = problem.gradient(weights), problem.sizes(weights)[1]
            move, ray = problem.quadratic.minimise(whole, -gradient, gamma, self.tolerance)
            if ray is not None:
                return problem.solution(weights, Status.UNBOUNDED)
            weights = weights + move
        status = Status.OPTIMAL if problem.residual(weights) <= self.tolerance else Status.INACCURATE
        return problem.solution(weights, status)
