"""The shipped contract checks over every registered filter and solver, driven by one table each.

Whatever is registered must stand in a table, with the options under which its law is to hold. That the checks can
fail is tested with components that break one law each.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import ftw.solvers
from ftw import registry
from ftw.errors import ConfigurationError
from ftw.filters import (
    DPP,
    IFD,
    OMP,
    All,
    Chain,
    Cluster,
    FacilityLocation,
    Filter,
    GradNorm,
    Greats,
    Greedy,
    MaxLoss,
    Opus,
    Quota,
    Random,
    RhoLoss,
    Threshold,
    TopK,
)
from ftw.problem import Solution, Status
from ftw.solvers import (
    DAQP,
    ActiveSet,
    Box,
    CappedCone,
    CappedSimplex,
    ClosedForm,
    ConstraintSet,
    CvxpyQP,
    Entropic,
    Free,
    Linear,
    NoHarm,
    NonNegative,
    ProjectedGradient,
    Simplex,
    Softmax,
    Uniform,
    WeightSolver,
    kkt_residual,
)
from ftw.testing import check_constraint_set, check_filter, check_solver, constraint_sets

FILTERS = {
    "all": (All, [{}]),
    "chain": (Chain, [{}, {"filters": ["grad_norm", "dpp", "topk"], "keep": [3, 1.5]}, {"filters": ["topk", "all"]}]),
    "cluster": (Cluster, [{}, {"clusters": 2, "within": "omp", "towards": "centroid"}]),
    "dpp": (DPP, [{}, {"quality": "exp", "relevance": 3.0}, {"mode": "sample"}, {"mode": "sample", "quality": "exp"}]),
    "facility_location": (FacilityLocation, [{}]),
    "grad_norm": (GradNorm, [{}]),
    "greats": (Greats, [{}, {"learning_rate": 1e-3, "reduction": "mean"}]),
    "greedy": (Greedy, [{}, {"gain": "refit"}]),
    "ifd": (IFD, [{}, {"most": math.inf}]),
    "max_loss": (MaxLoss, [{}]),
    "omp": (OMP, [{}, {"ridge": 0.0, "tolerance": 0.0}, {"signed": True}, {"signed": True, "ridge": 0.0}]),
    "opus": (Opus, [{}, {"temperature": 0.0}, {"redundancy": 0.0}]),
    "quota": (Quota, [{}, {"filter": "topk", "at_most": {1.0: 0.5}}, {"filter": "rho_loss"}]),
    "random": (Random, [{}]),
    "rho_loss": (RhoLoss, [{}]),
    "threshold": (Threshold, [{}, {"value": 0.5}]),
    "topk": (TopK, [{}, {"by": "cosine"}, {"by": "gain"}, {"by": "shapley"}]),
}
SOLVERS = {
    "active_set": (ActiveSet, [{}, {"max_rounds": 400}]),
    "closed_form": (ClosedForm, [{}]),
    "daqp": (DAQP, [{}]),
    "entropic": (Entropic, [{}]),
    "pgd": (ProjectedGradient, [{}]),
    "qp": (CvxpyQP, [{}, {"backend": "OSQP"}, {"compiled": False}]),
    "softmax": (Softmax, [{}, {"temperature": 0.01}, {"temperature": 100.0}]),
    "uniform": (Uniform, [{}]),
}
SETS = {Free, NonNegative, Box, Simplex, CappedSimplex, CappedCone, Linear, ftw.solvers.Quota, NoHarm}


def cases(table):
    return [pytest.param(cls, options, id=f"{name}{options or ''}") for name, (cls, all_options) in table.items()
            for options in all_options]  # fmt: skip


def ours(group):
    return {name for name, owners in registry.available(group).items() if "filter-then-weight" in owners}


@pytest.mark.parametrize(("group", "table"), [("filters", FILTERS), ("solvers", SOLVERS)])
def test_everything_registered_stands_in_the_table(group, table):
    assert ours(group) == set(table)
    for name, (cls, _) in table.items():
        assert registry.load(group, name) is cls
        assert isinstance(registry.resolve(group, name), cls)


def test_every_public_set_is_among_the_sets_that_solvers_meet():
    named = (getattr(ftw.solvers, name) for name in ftw.solvers.__all__)
    public = {each for each in named if isinstance(each, type) and issubclass(each, ConstraintSet)} - {ConstraintSet}
    assert public == SETS == {type(constraints) for constraints in constraint_sets(3).values()}


@pytest.mark.parametrize(("cls", "options"), cases(FILTERS))
def test_filter(cls, options):
    check_filter(cls(**options))


@pytest.mark.parametrize(("cls", "options"), cases(SOLVERS))
def test_solver(cls, options):
    check_solver(cls(**options))


# --- The checks themselves ---


class Broken(Filter):
    """A filter that returns what it was told to, computed from the problem."""

    def __init__(self, rule, needs_gram=False, columns=()):
        self.rule, self.needs_gram, self.columns = rule, needs_gram, columns

    def __call__(self, problem):
        return self.rule(problem)


def spoil(problem):
    problem.alignment.zero_()
    return torch.arange(problem.budget)


CALLS = itertools.count()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda problem: list(range(problem.budget)), "not a tensor"),
        (lambda problem: torch.arange(problem.budget, dtype=torch.int32), "not int64"),
        (lambda problem: torch.arange(problem.budget)[:, None], "not (m,)"),
        (lambda problem: torch.arange(problem.size), "allowed"),
        (lambda problem: torch.zeros(problem.budget, dtype=torch.long), "repeats a candidate"),
        (lambda problem: torch.arange(problem.budget) - 1, "leaves the pool"),
        (lambda problem: torch.arange(problem.size).roll(next(CALLS))[: problem.budget], "from the same state"),
        (spoil, "changes the problem's alignment"),
        (lambda problem: torch.argsort(-problem.full_gram.diagonal())[: problem.budget], "gram=None"),
    ],
)
def test_check_filter_finds(rule, message):
    with pytest.raises((AssertionError, ConfigurationError)) as caught:
        check_filter(Broken(rule))
    assert message in str(caught.value)


def first(problem):
    return torch.arange(problem.budget)


def spoil_column(problem):
    problem.extra("loss", "broken").zero_()
    return first(problem)


def spoil_factor(problem):
    if problem.factor is not None:
        problem.factor.zero_()
    return first(problem)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (first, {"columns": ("loss",)}, "but runs without it"),
        (spoil_column, {"columns": ("loss",)}, "changes the column 'loss'"),
        (spoil_factor, {"needs_gram": True}, "changes the problem's factor"),
        (lambda p: first(p) if p.factor is None else first(p).flip(0), {"needs_gram": True}, "given as a factor"),
        (lambda p: first(p) if p.factor is None else torch.arange(p.size), {"needs_gram": True}, "from a factor: "),
    ],
)
def test_check_filter_finds_what_columns_and_factors_show(rule, options, message):
    with pytest.raises(AssertionError) as caught:
        check_filter(Broken(rule, **options))
    assert message in str(caught.value)


def test_a_plug_in_is_checked_in_three_lines():
    class Shortest(Filter):
        needs_gram = True

        def __call__(self, problem):
            return torch.argsort(problem.diagonal, stable=True)[: problem.budget]

    check_filter(Shortest())


class Wrapped(WeightSolver):
    """A solver that is right but for one change to its solution."""

    def __init__(self, change):
        self.change, self.calls = change, 0

    def _solve(self, gram, alignment, constraints):
        self.calls += 1
        solution = ProjectedGradient().solve(gram, alignment, constraints, throw=False)
        return self.change(self, solution, gram, alignment, constraints)


def certified(weights, gram, alignment, constraints, status=Status.OPTIMAL):
    return Solution(weights, status, kkt_residual(gram, alignment, constraints, weights))


def give_up(solver, solution, gram, alignment, constraints):
    if solution.status in ("infeasible", "unbounded"):
        return solution
    return certified(constraints.project(alignment * 0), gram, alignment, constraints, Status.INACCURATE)


def absolute(solver, solution, gram, alignment, constraints):
    """Right for one scale of K and b only."""
    ridge = 1e-9 * torch.eye(len(gram), dtype=gram.dtype)
    return ProjectedGradient(tolerance=1.0).solve(gram + ridge, alignment, constraints, throw=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda solver, s, *_: Solution(s.weights.float(), s.status, s.kkt_residual), "dtype"),
        (lambda solver, s, *_: Solution(s.weights[:-1], s.status, s.kkt_residual), "shape"),
        (lambda solver, s, *_: Solution(s.weights * math.nan, s.status, s.kkt_residual), "nan"),
        (lambda solver, s, *_: Solution(s.weights, "optimal", s.kkt_residual), "status"),
        (lambda solver, s, *p: s if p[2].contains(s.weights - 1) else replace(s, weights=s.weights - 1), "outside the"),
        (lambda solver, s, *p: certified(p[2].project(0 * p[1]), *p), "called optimal at"),
        (lambda solver, s, *p: Solution(p[2].project(0 * p[1]), s.status, s.kkt_residual), "reports a residual"),
        (give_up, "on a well-posed problem"),
        (lambda solver, s, *_: Solution(s.weights, Status.UNBOUNDED, s.kkt_residual), "not unbounded"),
        (absolute, "reports a residual"),
    ],
)
def test_check_solver_finds(change, message):
    def changed(solver, solution, *problem):
        feasible = solution.status is not Status.INFEASIBLE and solution.weights.numel()
        return change(solver, solution, *problem) if feasible else solution

    with pytest.raises(AssertionError) as caught:
        check_solver(Wrapped(changed))
    assert message in str(caught.value)


def test_check_solver_finds_what_is_not_deterministic():
    def tired(solver, solution, gram, alignment, constraints):
        if solver.calls % 2 or solution.status is not Status.OPTIMAL:
            return solution
        moved = solution.weights * (1 + 1e-12)
        return certified(moved, gram, alignment, constraints)

    with pytest.raises(AssertionError, match="not deterministic"):
        check_solver(Wrapped(tired))


def test_check_solver_finds_infeasible_sets_passed_over():
    def hopeful(solver, solution, gram, alignment, constraints):
        if solution.status is Status.INFEASIBLE:
            return Solution(torch.zeros_like(alignment), Status.OPTIMAL, 0.0)
        return solution

    with pytest.raises(AssertionError, match="on an empty set"):
        check_solver(Wrapped(hopeful))


class Refuses(WeightSolver):
    def _solve(self, gram, alignment, constraints):
        raise ConfigurationError("not this one; none; go away.")


def test_check_solver_finds_a_solver_that_refuses_everything():
    with pytest.raises(AssertionError, match="refuses every set"):
        check_solver(Refuses())


class Loose(NonNegative):
    def project_array(self, point):
        return point.clip(0) + 1e-6 * abs(point)


class Clipped(Simplex):
    """Clips and rescales, which lands in the simplex but not at its nearest point."""

    def project_array(self, point):
        positive = point.clip(1e-300)
        return positive * (self.total / positive.sum())


class Different(NonNegative):
    """Projects onto the box but describes the orthant."""

    def project_array(self, point):
        return point.clip(0, 1)


@pytest.mark.parametrize("constraints", [Loose(), Clipped(3.0), Different()])
def test_check_constraint_set_finds(constraints):
    with pytest.raises(AssertionError):
        check_constraint_set(constraints, 3)
