"""The contract of weight solvers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ftw.errors import ConfigurationError, SolverError
from ftw.problem import Solution, Status
from ftw.testing.sets import close, constraint_sets
from ftw.testing.ugly import UglyProblem, ugly_problem, ugly_problems

if TYPE_CHECKING:
    from ftw.solvers.base import WeightSolver
    from ftw.solvers.constraints import ConstraintSet


def check_solver(solver: WeightSolver, seed: int = 0) -> None:
    """Asserts the law of `WeightSolver` on ugly problems over every kind of set that the solver honours.

    A set may be refused with a `ConfigurationError`, but not every set. On well-posed problems the solver
    must reach `optimal`, otherwise one that always gives up would pass. A rule with an infinite tolerance has one
    answer only; it may call a set that does not hold this answer `infeasible`, but not every set.
    """
    honoured = reached = 0
    for ugly in ugly_problems(seed, sizes=(0, 1, 2, 3, 8, 17)):
        for name, constraints in constraint_sets(ugly.size).items():
            if ugly.size == 0 and not constraints.feasible(0):
                continue
            what = f"{type(solver).__name__} on {ugly.name} over {name}"
            gram, alignment = ugly.gram.clone(), ugly.alignment.clone()
            try:
                solution = solver.solve(gram, alignment, constraints, throw=False)
            except ConfigurationError:
                continue
            honoured += 1
            assert torch.equal(gram, ugly.gram), f"{what}: changes K"
            assert torch.equal(alignment, ugly.alignment), f"{what}: changes b"
            _assert_solution(what, solver, solution, ugly, constraints)
            reached += solution.status is Status.OPTIMAL
            not_its_rule = math.isinf(solver.tolerance) and solution.status is Status.INFEASIBLE
            if ugly.name.startswith("well_posed") and not not_its_rule:
                assert solution.status == Status.OPTIMAL, f"{what}: {solution.status} on a well-posed problem"
            again = solver.solve(gram, alignment, constraints, throw=False)
            assert torch.equal(again.weights, solution.weights), f"{what}: not deterministic"
    assert honoured, f"{type(solver).__name__} refuses every set"
    assert reached, f"{type(solver).__name__} is optimal on no set"
    _assert_infeasible_is_said(solver)
    _assert_scale_free(solver, seed)


def _assert_solution(
    what: str, solver: WeightSolver, solution: Solution, ugly: UglyProblem, constraints: ConstraintSet
) -> None:
    from ftw.solvers import kkt_residual

    weights = solution.weights
    assert weights.shape == (ugly.size,), f"{what}: weights of shape {tuple(weights.shape)}"
    assert weights.dtype == torch.float64, f"{what}: weights of dtype {weights.dtype}"
    assert weights.device.type == "cpu", f"{what}: weights on {weights.device}"
    assert bool(torch.isfinite(weights).all()), f"{what}: weights {weights}"
    assert isinstance(solution.status, Status), f"{what}: status {solution.status!r}"
    assert solution.kkt_residual >= 0, f"{what}: kkt_residual {solution.kkt_residual}"
    if solution.status in (Status.OPTIMAL, Status.INACCURATE):
        assert constraints.contains(weights), f"{what}: weights {weights} are outside the set"
        certified = kkt_residual(ugly.gram, ugly.alignment, constraints, weights)
        assert _same_figure(certified, solution.kkt_residual), (
            f"{what}: reports a residual of {solution.kkt_residual:.1e}, kkt_residual says {certified:.1e}"
        )
    if solution.status is Status.OPTIMAL:
        assert solution.kkt_residual <= solver.tolerance, (
            f"{what}: called optimal at {solution.kkt_residual:.1e}, tolerance {solver.tolerance:.1e}"
        )
    bounded = ugly.size == 0 or math.isfinite(constraints.polyhedron(ugly.size).radius)
    assert solution.status is not Status.UNBOUNDED or not (bounded or ugly.consistent), f"{what}: not unbounded"


def _assert_infeasible_is_said(solver: WeightSolver) -> None:
    from ftw.solvers import CappedSimplex

    empty = CappedSimplex(total=3.0, cap=0.5)
    K, b = torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    what = f"{type(solver).__name__} on an empty set"
    try:
        status = solver.solve(K, b, empty, throw=False).status
    except ConfigurationError:
        return
    assert status == Status.INFEASIBLE, f"{what}: {status}"
    try:
        solver.solve(K, b, empty)
    except SolverError:
        return
    raise AssertionError(f"{what}: solve(throw=True) does not raise SolverError")


def _assert_scale_free(solver: WeightSolver, seed: int) -> None:
    """(K, b) -> (a K, a b) changes nothing; on a well-posed problem, where the weights are unique."""
    ugly = ugly_problem("well_posed", 9, torch.Generator().manual_seed(seed))
    for name, constraints in constraint_sets(ugly.size).items():
        try:
            plain = solver.solve(ugly.gram, ugly.alignment, constraints, throw=False)
            scaled = solver.solve(65536.0**2 * ugly.gram, 65536.0**2 * ugly.alignment, constraints, throw=False)
        except ConfigurationError:
            continue
        allowed = 1e-9 if math.isinf(solver.tolerance) else max(1e-9, 1e2 * solver.tolerance)
        assert close(scaled.weights, plain.weights, allowed), (
            f"{type(solver).__name__} over {name}: weights {plain.weights} become {scaled.weights} "
            "when K and b are multiplied by 65536^2"
        )


def _same_figure(left: float, right: float) -> bool:
    """Equal but for rounding: two residuals near 1e-16 need not agree in any digit."""
    return left == right or abs(left - right) <= 1e-3 * max(left, right) + 1e-13
