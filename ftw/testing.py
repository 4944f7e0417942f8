"""Contract checks that a plug-in's author runs: one call each, an `AssertionError` that says what broke.

    from ftw.testing import check_solver

    def test_mine():
        check_solver(MySolver())

The checks assert the laws in the interfaces' docstrings on deliberately ugly problems: singular, duplicate,
conflicting, empty, scaled by 1e-16 and 1e16. Imports torch, numpy and the standard library only, so that it
needs no test framework; `problems` alone needs hypothesis. One section per interface.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, MissingDependencyError, SolverError
from ftw.optim_state.base import AffineUpdate, Preconditioner, ScaleOperator, state_of, state_rows
from ftw.problem import GramSource, SelectionProblem, Solution, Status

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from ftw.filters.base import Filter
    from ftw.solvers.base import WeightSolver
    from ftw.solvers.constraints import ConstraintSet


# --- Problems ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UglyProblem:
    """K, (n, n), and b, (n,), float64; `consistent` where b lies in the range of K, and float64 can tell."""

    name: str
    gram: Tensor
    alignment: Tensor
    consistent: bool

    @property
    def size(self) -> int:
        return self.alignment.numel()


SHAPES = (
    "well_posed",
    "low_rank",
    "rank_one",
    "duplicates",
    "near_duplicates",
    "conflicting",
    "zero_rows",
    "zero",
    "ill_conditioned",
    "uneven_lengths",
    "identity_ties",
    "harmful",
    "orthogonal_target",
    "out_of_range",
)
"""What can be wrong with contributions: see `ugly_problem`."""


def ugly_problem(
    shape: str,
    n: int,
    generator: torch.Generator,
    gram_scale: float = 1.0,
    alignment_scale: float = 1.0,
) -> UglyProblem:
    """One problem `K = C'C, b = C'g` (out_of_range: b arbitrary) with the defect that `shape` names."""
    wide, narrow = 2 * n + 2, max(1, n // 3)
    rank = {"low_rank": narrow, "rank_one": 1, "out_of_range": narrow}.get(shape, wide)
    C = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    g = torch.randn(rank, generator=generator, dtype=torch.float64)
    half = n // 2
    if shape in ("duplicates", "near_duplicates"):
        C[:, n - half :] = C[:, :half]
        if shape == "near_duplicates":
            C += 1e-7 * torch.randn(C.shape, generator=generator, dtype=torch.float64)
    elif shape == "conflicting":
        C[:, n - half :] = -C[:, :half]
    elif shape == "zero_rows":
        C[:, ::2] = 0.0
    elif shape == "zero":
        C.zero_()
    elif shape == "ill_conditioned":
        C *= torch.logspace(0, -7, rank, dtype=torch.float64)[:, None]
    elif shape == "uneven_lengths":
        C *= torch.logspace(-4, 4, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    elif shape == "identity_ties":
        C = torch.eye(rank, n, dtype=torch.float64)
        g = torch.ones(rank, dtype=torch.float64)
    elif shape == "harmful":
        C = C.abs()
        g = -g.abs()
    elif shape == "orthogonal_target":
        g = g - C @ torch.linalg.lstsq(C, g[:, None], driver="gelsd").solution.flatten() if n else g
    gram, alignment = C.T @ C, C.T @ g
    if shape in ("duplicates", "conflicting"):
        # A matrix product need not give equal columns equal bits; the samples' own arithmetic would.
        sign = 1.0 if shape == "duplicates" else -1.0
        alignment[n - half :] = sign * alignment[:half]
    if shape == "out_of_range":
        alignment = torch.randn(n, generator=generator, dtype=torch.float64)
    return UglyProblem(
        f"{shape}-n{n}-K{gram_scale:.0e}-b{alignment_scale:.0e}",
        gram * gram_scale,
        alignment * alignment_scale,
        consistent=shape not in ("out_of_range", "near_duplicates", "ill_conditioned", "uneven_lengths"),
    )


def ugly_problems(seed: int = 0, sizes: Sequence[int] = (0, 1, 2, 3, 8, 17)) -> Iterator[UglyProblem]:
    """Every shape at every size; the scales go round, so that each shape meets several of them."""
    scales = [(1.0, 1.0), (1e-16, 1e-16), (1e16, 1e-16), (1e-16, 1e16), (1e16, 1e16), (1e-8, 1e3)]
    generator = torch.Generator().manual_seed(seed)
    for i, shape in enumerate(SHAPES):
        for j, n in enumerate(sizes):
            yield ugly_problem(shape, n, generator, *scales[(i + j) % len(scales)])


def problems(
    shapes: Sequence[str] = SHAPES,
    sizes: tuple[int, int] = (1, 24),
    scales: Sequence[float] = (1e-16, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e16),
) -> SearchStrategy[UglyProblem]:
    """A hypothesis strategy of problems, for properties of your own filter or solver.

        @given(ftw.testing.problems())
        def test_mine(ugly):
            solution = MySolver().solve(ugly.gram, ugly.alignment, CappedCone(4.0))

    Args:
        shapes: the defects to draw from, of `SHAPES`.
        sizes: fewest and most candidates.
        scales: of K and of b, drawn apart.

    Raises:
        MissingDependencyError: hypothesis is not installed.
        ConfigurationError: a shape that there is not.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise MissingDependencyError(
            "ftw.testing.problems draws by hypothesis, which is not installed; pip install hypothesis, or go through "
            "ftw.testing.ugly_problems()."
        ) from error
    if not shapes or not set(shapes) <= set(SHAPES):
        raise ConfigurationError(f"shapes is {list(shapes)}; allowed are some of {', '.join(SHAPES)}; choose of these.")

    def drawn(shape: str, n: int, seed: int, gram_scale: float, alignment_scale: float) -> UglyProblem:
        return ugly_problem(shape, n, _generator(seed), gram_scale, alignment_scale)

    scale = st.sampled_from(list(scales))
    return st.builds(drawn, st.sampled_from(list(shapes)), st.integers(*sizes), st.integers(0, 2**31), scale, scale)


# --- Constraint sets ---------------------------------------------------------------------------------------


def constraint_sets(n: int) -> dict[str, ConstraintSet]:
    """Sets for n candidates, each kind loose, tight and with a mass; all feasible if n >= 1."""
    from ftw.solvers import Box, CappedCone, CappedSimplex, Free, Linear, NoHarm, NonNegative, Quota, Simplex

    mass = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    mass = mass / mass.mean()
    places = torch.arange(n, dtype=torch.float64)
    sources = ["web" if i % 2 else "code" for i in range(n)]
    return {
        "free": Free(),
        "non_negative": NonNegative(),
        "box": Box(0.0, 1.0),
        "box_signed": Box(torch.linspace(-1, 0.1, n, dtype=torch.float64), 2.0),
        "box_half_open": Box(0.25, math.inf),
        "simplex": Simplex(total=float(n)),
        "simplex_mass": Simplex(total=float(n), mass=mass),
        "capped_simplex": CappedSimplex(total=float(n), cap=2.0),
        "capped_simplex_tight": CappedSimplex(total=1.0, cap=1 / max(n, 1)),
        "capped_simplex_mass": CappedSimplex(total=float(n), cap=1.7, mass=mass),
        "capped_cone": CappedCone(4.0),
        "capped_cone_third": CappedCone(max(1.0, n / 3)),
        "capped_cone_equal": CappedCone(1.0),
        "plane": Linear(Free(), torch.ones(1, n), float(n), float(n)),
        "band": Linear(Box(-1.0, 2.0), torch.stack((mass, places.cos())), -0.2 * n, 0.1 * n),
        "quota": Quota(CappedSimplex(total=float(n), cap=2.0), sources, {"web": 0.4}),
        "quota_mass": Quota(Simplex(float(n), mass), sources, {"web": 0.6}, {"code": 0.25}),
        "quota_cone": Quota(CappedCone(4.0), sources, {"web": 0.5}, {"code": 0.1}),
        "no_harm": NoHarm(CappedCone(4.0), torch.stack((places.cos(), (2 * places).sin()), 1)),
    }


def check_constraint_set(constraints: ConstraintSet, n: int, seed: int = 0) -> None:
    """Asserts the law of `ConstraintSet` for n candidates; an empty set must only say that it is empty."""
    generator = torch.Generator().manual_seed(seed)
    what = f"{constraints!r} for n = {n}"
    points = [torch.zeros(n, dtype=torch.float64)]
    for scale in (1e-16, 1e-3, 1.0, 1e3, 1e16):
        points.append(scale * torch.randn(n, generator=generator, dtype=torch.float64))
        points.append(scale * torch.ones(n, dtype=torch.float64))
        points.append(-scale * torch.rand(n, generator=generator, dtype=torch.float64))
    if not constraints.feasible(n):
        assert not constraints.contains(points[0]), f"{what}: infeasible, but contains(0)"
        return
    projections = []
    for point in points:
        before = point.clone()
        projected = constraints.project(point)
        assert torch.equal(point, before), f"{what}: project changes its argument"
        assert projected.shape == (n,), f"{what}: projection of shape {tuple(projected.shape)}"
        assert projected.dtype == torch.float64, f"{what}: projection of dtype {projected.dtype}"
        assert bool(torch.isfinite(projected).all()), f"{what}: project({point}) = {projected}"
        assert constraints.contains(projected, 1e-11), f"{what}: project({point}) = {projected} is outside"
        again = constraints.project(projected)
        assert _close(again, projected, 1e-11), f"{what}: projecting twice moves {projected} to {again}"
        projections.append(projected)
    for i, member in enumerate(projections):
        for other in (100 * member, (member + projections[i - 1]) / 2):
            # What the polyhedron holds, the projection has to leave where it is.
            if constraints.contains(other, 1e-13):
                moved = constraints.project(other)
                assert _close(moved, other, 1e-11), f"{what}: contains {other}, but projects it to {moved}"
    for point, projected in zip(points, projections, strict=True):
        for member in projections:
            slope = float((point - projected) @ (member - projected))
            size = float((point.norm() + projected.norm()) * (member.norm() + projected.norm()))
            assert slope <= 1e-11 * size, (
                f"{what}: {projected} is not the nearest point to {point}; {member} lies towards it ({slope:.1e})"
            )


# --- Filters -----------------------------------------------------------------------------------------------


def check_filter(filter: Filter, seed: int = 0) -> None:
    """Asserts the law of `Filter` on ugly problems, with every budget from 0 to n and unequal masses.

    K is given as a matrix, on demand and as a factor. The columns that the filter names in `columns` are drawn from a
    few positive numbers, so that they hold ties and serve as labels too; without one of them the filter must raise.
    """
    for ugly in ugly_problems(seed, sizes=(0, 1, 2, 7)):
        n, root = ugly.size, _root(ugly.gram)
        mass = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
        extras = {name: _few_values(n, seed + i) for i, name in enumerate(filter.columns)}
        for budget in {0, 1, n // 2, n} & set(range(n + 1)):
            what = f"{type(filter).__name__} on {ugly.name}, budget {budget}"
            most = budget if filter.honours_budget else n

            def posed(
                gram: Tensor | GramSource | None,
                factor: Tensor | None = None,
                columns: Mapping[str, Any] = extras,
                alignment: Tensor = ugly.alignment,
                budget: int = budget,
                mass: Tensor = mass,
            ) -> SelectionProblem:
                given = {name: values.clone() for name, values in columns.items()}
                return SelectionProblem(
                    gram, alignment.clone(), budget, mass, _generator(seed), factor=factor, extras=given
                )

            gram = ugly.gram.clone()
            problem = posed(gram)
            index = filter(problem)
            _assert_index(what, index, n, most)
            assert torch.equal(problem.alignment, ugly.alignment), f"{what}: changes the problem's alignment"
            assert torch.equal(gram, ugly.gram), f"{what}: changes the problem's gram"
            for name, values in extras.items():
                assert torch.equal(problem.extras[name], values), f"{what}: changes the column {name!r}"
            again = filter(posed(ugly.gram))
            assert torch.equal(index, again), f"{what}: {index.tolist()}, then {again.tolist()} from the same state"
            lazy = filter(posed(_source(ugly.gram)))
            assert torch.equal(index, lazy), f"{what}: another answer if the gram is formed on demand"
            if not filter.needs_gram:
                assert torch.equal(index, filter(posed(None))), f"{what}: needs_gram is False, but the gram matters"
            factor = root.clone()
            by_factor = filter(posed(None, factor))
            _assert_index(f"{what}, from a factor", by_factor, n, most)
            assert torch.equal(factor, root), f"{what}: changes the problem's factor"
            if ugly.name.startswith("well_posed"):  # elsewhere rounding may decide between equals
                assert torch.equal(index, by_factor), f"{what}: another answer if K is given as a factor"
            for name in extras:
                few = {other: values for other, values in extras.items() if other != name}
                _assert_column_missed(what, filter, posed(ugly.gram, columns=few), name)


def _root(gram: Tensor) -> Tensor:  # (n, n)
    """F with `F F' = K` up to rounding."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _few_values(n: int, seed: int) -> Tensor:  # (n,) float64
    return 0.5 * torch.randint(1, 5, (n,), generator=_generator(seed)).double()


def _assert_column_missed(what: str, filter: Filter, problem: SelectionProblem, name: str) -> None:
    for run in (lambda: filter.require_columns(problem.extras), lambda: filter(problem)):
        said = None
        try:
            run()
        except ConfigurationError as error:
            said = str(error)
        assert said is not None, f"{what}: the column {name!r} is in `columns`, but runs without it"
        assert name in said, f"{what}: the error without the column {name!r} does not name it: {said}"


def _source(gram: Tensor):  # type: ignore[no-untyped-def]  # a GramSource
    return lambda index: gram if index is None else gram[index][:, index]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _assert_index(what: str, index: Tensor, n: int, most: int) -> None:
    assert isinstance(index, Tensor), f"{what}: returns {type(index).__name__}, not a tensor"
    assert index.dtype == torch.long, f"{what}: dtype {index.dtype}, not int64"
    assert index.dim() == 1, f"{what}: shape {tuple(index.shape)}, not (m,)"
    assert index.device.type == "cpu", f"{what}: on {index.device}, not on the CPU"
    values = index.tolist()
    assert len(values) <= most, f"{what}: {len(values)} candidates, {most} allowed"
    assert len(set(values)) == len(values), f"{what}: repeats a candidate: {values}"
    assert all(0 <= i < n for i in values), f"{what}: {values} leaves the pool of {n}"


# --- Weight solvers ----------------------------------------------------------------------------------------


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
        assert _close(scaled.weights, plain.weights, allowed), (
            f"{type(solver).__name__} over {name}: weights {plain.weights} become {scaled.weights} "
            "when K and b are multiplied by 65536^2"
        )


def _close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    return float((left - right).norm()) <= tolerance * float(left.norm() + right.norm())


def _same_figure(left: float, right: float) -> bool:
    """Equal but for rounding: two residuals near 1e-16 need not agree in any digit."""
    return left == right or abs(left - right) <= 1e-3 * max(left, right) + 1e-13


# --- Preconditioners ---------------------------------------------------------------------------------------

Draw = Callable[[Sequence[int]], Tensor]
"""shape -> standard normal numbers, float64, from the check's own generator."""


def check_preconditioner(
    preconditioner: Preconditioner,
    make_optimizer: Callable[[list[Parameter]], Optimizer],
    *,
    shapes: Sequence[tuple[int, ...]] = ((3, 4), (5,), ()),
    steps: int = 4,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> float:
    """Assert the laws of `Preconditioner` and `ScaleOperator` along real steps of a real optimizer, float64.

    At every step, the first included: the displacement predicted from the gradient is what `step()` does; it
    is affine in the gradient; M is symmetric positive semidefinite, acts on batches and has a square root;
    the rows of an elementwise update are the update of the rows; nothing is written; `age` counts the steps.

    Args:
        preconditioner: what is checked; it must model `step()` of the optimizer that is made.
        make_optimizer: the oracle: makes the optimizer, with the options and groups to be checked, from
            parameters of the given `shapes`.
        steps: how many steps deep.
        tolerance: largest allowed error of a displacement, relative to the largest entry of `|o| + |M G|`.

    Returns:
        The largest such error that was met.

    Raises:
        AssertionError: a law is broken; the message says which, and at which step.
    """
    draw: Draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parameters = [Parameter(draw(shape)) for shape in shapes]
    optimizer = make_optimizer(parameters)
    for group in optimizer.param_groups:
        for p in group["params"]:
            # As small as its steps, or else the subtraction after a step cancels the digits compared.
            p.data.mul_(float(group.get("lr") or 1.0))

    worst = 0.0
    for step in range(steps):
        size = 10.0 ** float(draw(()))  # gradients of a run vary in size, and second moments remember it
        reference = {p: draw(p.shape) * size for p in parameters}
        for p in parameters:
            p.grad = reference[p].clone()
        before = _snapshot(optimizer)
        update = preconditioner.linearise(optimizer, reference)
        _check_affine(update, reference, draw, step)
        for p in parameters:
            _check_scale_operator(update.scale[p], draw(p.shape), draw(p.shape), step)
        _check_tensors(preconditioner, optimizer, update, reference, step)
        changed = [name for name, value in _snapshot(optimizer).items() if not _same(value, before.get(name))]
        assert not changed, f"step {step}: linearise wrote to {changed}; it must leave the optimizer as it was"

        predicted = update.displacement(reference)
        old = {p: p.detach().clone() for p in parameters}
        optimizer.step()
        for p in parameters:
            # The new value was rounded when it was stored; that ulp is no error of the prediction.
            ulp = torch.finfo(p.dtype).eps * torch.maximum(p.detach().abs(), old[p].abs())
            error = _relative(
                ((predicted[p] - (p.detach() - old[p])).abs() - ulp).clamp_min(0),
                update.offset[p].abs() + update.scale[p].apply(reference[p]).abs(),
            )
            worst = max(worst, error)
            assert error <= tolerance, (
                f"step {step}: the predicted displacement of a parameter of shape {tuple(p.shape)} is off by "
                f"{error:.1e} of its largest term; {tolerance:.1e} is allowed"
            )
    return worst


def _check_affine(update: AffineUpdate, x: Mapping[Parameter, Tensor], draw: Draw, step: int) -> None:
    share, y = 0.3, {p: draw(p.shape) for p in x}
    mixed = update.displacement({p: share * x[p] + (1 - share) * y[p] for p in x})
    at_x, at_y = update.displacement(x), update.displacement(y)
    for p in x:
        error = _relative(mixed[p] - share * at_x[p] - (1 - share) * at_y[p], at_x[p].abs() + at_y[p].abs())
        assert error <= 1e-12, f"step {step}: the displacement is not affine in the gradient ({error:.1e})"


def _check_scale_operator(scale: ScaleOperator, x: Tensor, y: Tensor, step: int) -> None:
    at_x, at_y, batch = scale.apply(x), scale.apply(y), scale.apply(torch.stack([x, y]))
    error = _relative(batch - torch.stack([at_x, at_y]), batch)
    assert error <= 1e-12, f"step {step}: M acts on a batch otherwise than on its entries ({error:.1e})"
    skew = (y * at_x - x * at_y).sum() / ((y * at_x).abs() + (x * at_y).abs()).sum().clamp_min(1e-300)
    assert abs(skew) <= 1e-12, f"step {step}: M is not symmetric ({skew:.1e})"
    assert (x * at_x).sum() >= 0, f"step {step}: M is not positive semidefinite"
    root = scale.power(0.5)
    error = _relative(root.apply(root.apply(x)) - at_x, at_x)
    assert error <= 1e-12, f"step {step}: power(.5) applied twice is not M ({error:.1e})"


def _check_tensors(
    preconditioner: Preconditioner,
    optimizer: Optimizer,
    update: AffineUpdate,
    reference: Mapping[Parameter, Tensor],
    step: int,
) -> None:
    """Age, rows, and a reference that lacks parameters."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            age = preconditioner.age(group, state_of(optimizer, p))
            assert age in (None, step), f"step {step}: age is {age}; it must count the steps taken, or be None"
            alone = preconditioner.linearise(optimizer, {p: reference[p]})
            assert list(alone.scale) == [p], f"step {step}: parameters without a reference must be left out"
            if not (preconditioner.elementwise and p.dim()):
                continue
            state = preconditioner.prepare(p.detach(), group, state_of(optimizer, p))
            for rows in (slice(0, 1), slice(1, None)):
                part = preconditioner.linearise_tensor(
                    p.detach()[rows], group, state_rows(state, p, rows), reference[p][rows]
                )
                for name, ours, whole in (
                    ("M", part.scale.apply(reference[p][rows]), update.scale[p].apply(reference[p])[rows]),
                    ("the offset", part.offset, update.offset[p][rows]),
                    ("kappa", torch.tensor(part.gain), torch.tensor(update.gain[p])),
                    ("the sign", torch.tensor(part.sign), torch.tensor(update.sign[p])),
                ):
                    error = _relative(ours - whole, whole)
                    assert error <= 1e-12, f"step {step}: {name} of rows is not that of the whole ({error:.1e})"


def _snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Everything that a preconditioner can reach, by a name for the message."""
    seen: dict[str, Any] = {"the entries of optimizer.state": len(optimizer.state)}
    for g, group in enumerate(optimizer.param_groups):
        seen |= {f"group {g} {key}": copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for i, p in enumerate(group["params"]):
            seen[f"parameter {g}.{i}"] = p.detach().clone()
            seen[f"gradient {g}.{i}"] = None if p.grad is None else p.grad.clone()
            seen |= {f"state {g}.{i} {k}": copy.deepcopy(_plain(v)) for k, v in state_of(optimizer, p).items()}
    return seen


def _plain(value: Any) -> Any:
    """What a tensor that is quantised inside stands for; it may know neither copies nor comparisons."""
    quantised = isinstance(value, Tensor) and type(value).dequantize is not Tensor.dequantize
    return value.dequantize() if quantised else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _relative(error: Tensor, size: Tensor) -> float:
    """Largest entry of the error over the largest entry of what it is an error of."""
    if not error.numel():
        return 0.0
    return float(error.abs().max() / size.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
