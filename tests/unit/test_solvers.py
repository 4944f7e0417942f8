"""Weight solvers on problems whose answer is known, the certificate itself, statuses and refusals."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from ftw.errors import ConfigurationError, MissingDependencyError, SolverError
from ftw.problem import Status
from ftw.solvers import (
    Box,
    CappedCone,
    CappedSimplex,
    ClosedForm,
    ConstraintSet,
    CvxpyQP,
    Free,
    NonNegative,
    Polyhedron,
    ProjectedGradient,
    Simplex,
    Uniform,
    kkt_residual,
)
from ftw.solvers.linear import solve_on_rows, solve_psd
from ftw.testing import SHAPES, constraint_sets, ugly_problem

SETS = list(constraint_sets(1))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def objective(K, b, w):
    return float(w @ K @ w / 2 - b @ w)


# --- The certificate ---


def test_the_residual_is_zero_at_the_optimum_and_large_elsewhere():
    K, b = torch.eye(2, dtype=torch.float64), vector(1.0, -1.0)
    assert kkt_residual(K, b, NonNegative(), vector(1.0, 0.0)) == 0
    assert kkt_residual(K, b, Free(), vector(1.0, -1.0)) == 0
    assert kkt_residual(K, b, Simplex(1.0), vector(1.0, 0.0)) == 0
    for wrong in (vector(0.0, 0.0), vector(1.0, 1.0), vector(2.0, 0.0), vector(0.5, 0.0)):
        assert kkt_residual(K, b, NonNegative(), wrong) > 0.05
    assert kkt_residual(K, b, Simplex(1.0), vector(0.0, 1.0)) > 0.05


def test_the_residual_by_its_formula():
    K, b, w = torch.diag(vector(3.0, 4.0)), vector(6.0, -8.0), vector(3.0, 1.0)
    # ||K||_F = 5, ||b|| = 10, ||w|| = sqrt(10), g = Kw - b = (3, 12); on a cone the step is 1/||K||
    omega = math.sqrt(10) + 2
    moved = vector(3.0, 1.0) - vector(3 - 3 / 5, 0.0)  # the second: 1 - 12/5 < 0
    assert kkt_residual(K, b, NonNegative(), w) == pytest.approx(float(moved.norm()) / omega, rel=1e-14)
    backward = math.sqrt(153) / (5 * math.sqrt(10) + 10)
    assert kkt_residual(K, b, Free(), w) == pytest.approx(backward, rel=1e-14)
    omega, gamma = math.sqrt(10) + 1.5, 5 * math.sqrt(10) + 10  # the simplex has radius 1.5 < ||b||/||K||
    projected = Simplex(1.5).project(w - omega / gamma * vector(3.0, 12.0))
    expected = float((w - projected).norm()) / omega
    assert kkt_residual(K, b, Simplex(1.5), w) == pytest.approx(expected, rel=1e-14)


def test_infeasible_weights_are_measured_by_their_distance():
    K, b = torch.eye(2, dtype=torch.float64), vector(1.0, 1.0)
    near = kkt_residual(K, b, Simplex(2.0), vector(1.0, 1.0 + 1e-6))
    assert 1e-8 < near < 1e-5
    assert kkt_residual(K, b, Simplex(2.0), vector(1.0, math.nan)) == math.inf
    assert kkt_residual(K, b, CappedSimplex(2.0, 0.5), vector(1.0, 1.0)) == math.inf
    with pytest.raises(ConfigurationError, match="one weight per candidate"):
        kkt_residual(K, b, NonNegative(), vector(1.0))


def test_a_wrong_vertex_is_seen_however_small_the_gram_is():
    """At K << b an absolute step leaves the simplex problem's residual blind; the step is relative instead."""
    K, b = 1e-16 * torch.eye(2, dtype=torch.float64), vector(1.0, 0.5)
    assert kkt_residual(K, b, Simplex(2.0), vector(2.0, 0.0)) == 0
    assert kkt_residual(K, b, Simplex(2.0), vector(0.0, 2.0)) > 0.1


@pytest.mark.parametrize("factor", [1e-30, 1e-16, 1e-3, 7.0, 1e16, 1e30])
@pytest.mark.parametrize("name", [name for name in SETS if name != "capped_simplex_tight"])  # that is one point
def test_the_residual_is_scale_free(name, factor):
    generator = torch.Generator().manual_seed(0)
    ugly = ugly_problem("well_posed", 6, generator)
    constraints = constraint_sets(6)[name]
    w = constraints.project(torch.rand(6, generator=generator, dtype=torch.float64))
    plain = kkt_residual(ugly.gram, ugly.alignment, constraints, w)
    assert plain > 1e-3
    assert kkt_residual(factor * ugly.gram, factor * ugly.alignment, constraints, w) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-7, 2.0**80, 1e-16, 0.3, 1e16])
def test_the_residual_does_not_change_with_the_unit_of_weights(factor):
    generator = torch.Generator().manual_seed(1)
    K, b = (ugly := ugly_problem("well_posed", 6, generator)).gram, ugly.alignment
    pairs = [
        (NonNegative(), NonNegative()),
        (CappedCone(2.0), CappedCone(2.0)),
        (Free(), Free()),
        (Simplex(3.0), Simplex(3.0 * factor)),
        (CappedSimplex(3.0, 0.7), CappedSimplex(3.0 * factor, 0.7 * factor)),
        (Box(0.1, 0.7), Box(0.1 * factor, 0.7 * factor)),
    ]
    for plain, scaled in pairs:
        w = plain.project(torch.rand(6, generator=generator, dtype=torch.float64))
        before = kkt_residual(K, b, plain, w)
        after = kkt_residual(K, factor * b, scaled, factor * w)
        assert before > 1e-4
        assert after == pytest.approx(before, rel=1e-9)
        if math.frexp(factor)[0] == 0.5:
            assert after == before


# --- Projected gradient ---


def optimum_by_enumeration(K, b, polyhedron):
    """The lowest objective over the minimisers of all faces of a set with finite bounds or none."""
    n, best, lowest = len(b), None, math.inf
    rows, values = torch.from_numpy(polyhedron.rows), torch.from_numpy(polyhedron.values)
    eye = torch.eye(n, dtype=torch.float64)
    sides = [[0, -1, 1] if math.isfinite(polyhedron.upper[i]) or math.isfinite(polyhedron.share) else [0, -1]
             for i in range(n)]  # fmt: skip
    for face in itertools.product(*sides):
        A, d = [*rows], [*values]
        for i, side in enumerate(face):
            if side and (side < 0 or math.isfinite(polyhedron.upper[i])):
                A.append(eye[i]), d.append(torch.tensor((polyhedron.lower if side < 0 else polyhedron.upper)[i]))
            elif side:
                A.append(eye[i] - polyhedron.share), d.append(torch.tensor(0.0, dtype=torch.float64))
        A = torch.stack(A) if A else torch.zeros(0, n, dtype=torch.float64)
        d = torch.stack(d) if d else torch.zeros(0, dtype=torch.float64)
        size = n + len(A)
        system = torch.zeros(size, size, dtype=torch.float64)
        system[:n, :n], system[:n, n:], system[n:, :n] = K, A.T, A
        w = (torch.linalg.pinv(system, rtol=1e-12) @ torch.cat([b, d]))[:n]
        w = torch.where(w.abs() < 1e-12, 0.0, w)
        if polyhedron.violation(w.numpy()) < 1e-9 and objective(K, b, w) < lowest:
            best, lowest = w, objective(K, b, w)
    return best, lowest


@pytest.mark.parametrize("shape", ["well_posed", "duplicates", "conflicting", "rank_one", "zero_rows", "harmful"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_pgd_reaches_the_lowest_of_all_faces(shape, n):
    generator = torch.Generator().manual_seed(n)
    sets = [NonNegative(), Box(0, 0.5), Simplex(n), CappedSimplex(n, 1.5), CappedCone(1.5), CappedCone(max(1, n / 3))]
    for _ in range(4):
        ugly = ugly_problem(shape, n, generator)
        for constraints in sets:
            solution = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints)
            _, lowest = optimum_by_enumeration(ugly.gram, ugly.alignment, constraints.polyhedron(n))
            reached = objective(ugly.gram, ugly.alignment, solution.weights)
            assert solution.status == "optimal"
            assert reached == pytest.approx(lowest, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SETS)
def test_pgd_is_certified_to_rounding(name, shape):
    """Every shape, several sizes and scales; unbounded problems have to be recognised, nothing else may happen."""
    generator = torch.Generator().manual_seed(0)
    for n, gram_scale, alignment_scale in ((1, 1, 1), (3, 1e16, 1e16), (8, 1e-16, 1e-16), (16, 1e-16, 1e16)):
        ugly = ugly_problem(shape, n, generator, gram_scale, alignment_scale)
        constraints = constraint_sets(n)[name]
        solution = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints, throw=False)
        if solution.status == "unbounded":
            assert not ugly.consistent
            assert math.isinf(constraints.polyhedron(n).radius)
        else:
            assert solution.status == "optimal"
            assert solution.kkt_residual <= 1e-12
            assert solution.kkt_residual == kkt_residual(ugly.gram, ugly.alignment, constraints, solution.weights)
            assert constraints.contains(solution.weights, 1e-12)


def test_candidates_that_all_harm_get_no_weight_at_all():
    K, b = torch.eye(3, dtype=torch.float64), vector(-1.0, -2.0, 0.0)
    for constraints in (NonNegative(), CappedCone(2.0), Box(0, 1)):
        solution = ProjectedGradient().solve(K, b, constraints)
        assert solution.weights.tolist() == [0.0, 0.0, 0.0]
        assert solution.kkt_residual == 0


def test_dropped_candidates_have_exactly_zero_weight():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ugly = ugly_problem("well_posed", 16, generator)
        for constraints in (NonNegative(), CappedCone(4.0), Simplex(16), CappedSimplex(16, 4.0)):
            w = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints).weights
            assert bool((w == 0).any())
            assert float(w[w > 0].min()) > 1e-9 * float(w.max())


@pytest.mark.parametrize("name", ["non_negative", "simplex", "capped_simplex", "capped_cone", "box"])
def test_equal_candidates_share_equally(name):
    generator = torch.Generator().manual_seed(0)
    for n in (2, 6, 16):
        ugly = ugly_problem("duplicates", n, generator)
        w = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraint_sets(n)[name]).weights
        half = n // 2
        assert torch.allclose(w[:half], w[n - half :], rtol=1e-6, atol=1e-9)


def test_the_loss_scale_changes_no_bit_of_the_weights():
    generator = torch.Generator().manual_seed(0)
    for shape, constraints in itertools.product(SHAPES, (CappedCone(4.0), CappedSimplex(7.0, 2.0), Box(0, 1))):
        ugly = ugly_problem(shape, 7, generator)
        plain, scaled = (
            ProjectedGradient().solve(f * ugly.gram, f * ugly.alignment, constraints, throw=False)
            for f in (1.0, 65536.0**2)
        )
        assert torch.equal(plain.weights, scaled.weights)


def test_on_a_cone_the_weights_scale_with_b():
    ugly = ugly_problem("well_posed", 7, torch.Generator().manual_seed(0))
    for constraints in (CappedCone(2.0), NonNegative()):
        plain = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints).weights
        scaled = ProjectedGradient().solve(ugly.gram, 2.0**-40 * ugly.alignment, constraints).weights
        assert torch.equal(scaled, 2.0**-40 * plain)


@pytest.mark.parametrize("solver", [ProjectedGradient(), ClosedForm(), CvxpyQP()])
def test_unbounded_problems_are_recognised(solver):
    K = torch.diag(vector(1.0, 0.0))
    b = vector(1.0, 1.0)
    sets = [Free()] if isinstance(solver, ClosedForm) else [Free(), NonNegative(), CappedCone(4.0), Box(0, math.inf)]
    for constraints in sets:
        solution = solver.solve(K, b, constraints, throw=False)
        assert solution.status == "unbounded"
        assert bool(torch.isfinite(solution.weights).all())
        with pytest.raises(SolverError, match="add ridge"):
            solver.solve(K, b, constraints)


def test_no_curvature_is_no_harm_where_the_set_or_b_bounds_the_problem():
    K = torch.diag(vector(1.0, 0.0))
    assert ProjectedGradient().solve(K, vector(1.0, 1.0), Box(0, 3)).weights.tolist() == [1.0, 3.0]
    assert ProjectedGradient().solve(K, vector(1.0, 0.0), NonNegative()).weights.tolist() == [1.0, 0.0]
    assert ProjectedGradient().solve(K, vector(1.0, -1.0), NonNegative()).weights.tolist() == [1.0, 0.0]
    # e_2 is a flat ray of the orthant, but not of the cone that binds w_2 to w_1
    tight = ProjectedGradient().solve(K, vector(1.0, 1.0), CappedCone(1.5))
    assert tight.weights.tolist() == pytest.approx([4.0, 12.0])
    zero = torch.zeros(2, 2)
    assert ProjectedGradient().solve(zero, vector(1.0, 2.0), Simplex(1.0)).weights.tolist() == [0.0, 1.0]
    assert ProjectedGradient().solve(zero, vector(-1.0, -2.0), NonNegative()).weights.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("n", [3, 10, 49, 98])
def test_equal_weights_still_find_their_size(n):
    """CappedCone(1) leaves the total only, here nearly flat. 49 * (1 / 49) is not 1, which must not pin the total."""
    C = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    C -= C.mean(1, keepdim=True)
    K = C.T @ C + 1e-4 * torch.ones(n, n, dtype=torch.float64)
    solution = ProjectedGradient().solve(K, 3.0 * K.sum(1), CappedCone(1.0))
    assert solution.weights.tolist() == pytest.approx([3.0] * n, rel=1e-9)
    assert solution.iterations < 60


def test_curvature_of_rounding_size_is_none():
    """c c' on the plane sum = 0: the row is reflected away, and what is left of the curvature is rounding."""
    for seed in range(50):
        c = torch.randn((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
        K, r, rows = np.full((3, 3), c * c), np.array([1.0, 0.0, -1e-6]), np.ones((1, 3))
        step, ray = solve_on_rows(K, r, rows, scale=1.0)
        assert ray is not None
        assert np.abs(step).max() <= 1e-12
        assert abs(ray.sum()) <= 1e-15
        assert r @ ray > 0


def test_a_small_candidate_is_not_a_missing_one():
    """Its curvature is 1e-20 of the other's, but it is curvature, and not the rounding of anything."""
    K = np.diag([1.0, 1e-20])
    step, ray = solve_psd(K, np.array([2.0, 3e-10]), scale=1.0)
    assert ray is None
    assert step.tolist() == pytest.approx([2.0, 3e10], rel=1e-12)


def test_a_flat_ray_between_curved_axes_is_found():
    """No single candidate is flat: only (1, 1) is, and b gains along it."""
    K = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    solve = ProjectedGradient().solve
    assert solve(K, vector(1.0, -0.5), NonNegative(), throw=False).status == "unbounded"
    assert solve(K, vector(1.0, -1.0), NonNegative()).status == "optimal"
    assert solve(K, vector(1.0, -1.5), NonNegative()).weights.tolist() == pytest.approx([1.0, 0.0])
    assert solve(K, vector(1.0, -0.5), CappedCone(1.0), throw=False).status == "unbounded"


@pytest.mark.parametrize("solver", [ProjectedGradient(), ClosedForm(), CvxpyQP(), Uniform()])
def test_no_candidates(solver):
    nothing = torch.zeros(0, 0), torch.zeros(0)
    solution = solver.solve(*nothing, Free())
    assert (solution.status, solution.weights.shape, solution.kkt_residual) == ("optimal", (0,), 0.0)
    if not isinstance(solver, ClosedForm):
        assert solver.solve(*nothing, CappedCone(2.0)).status == "optimal"
        assert solver.solve(*nothing, Simplex(1.0), throw=False).status == "infeasible"


def test_one_candidate():
    K, b = torch.tensor([[4.0]]), vector(2.0)
    for constraints, weight in (
        (Free(), 0.5),
        (NonNegative(), 0.5),
        (CappedCone(1.0), 0.5),
        (Simplex(3.0), 3.0),
        (CappedSimplex(3.0, 3.0), 3.0),
        (Box(0.0, 0.25), 0.25),
    ):
        assert ProjectedGradient().solve(K, b, constraints).weights.tolist() == [weight]


def test_infeasible_is_a_status_or_an_error():
    K, b, empty = torch.eye(3), vector(1.0, 1.0, 1.0), CappedSimplex(total=3.0, cap=0.5)
    for solver in (ProjectedGradient(), CvxpyQP(), Uniform()):
        solution = solver.solve(K, b, empty, throw=False)
        assert (solution.status, solution.kkt_residual) == ("infeasible", math.inf)
        with pytest.raises(SolverError, match="raise the cap or lower the total"):
            solver.solve(K, b, empty)


def test_an_iteration_limit_gives_inaccurate_weights_in_the_set():
    ugly = ugly_problem("uneven_lengths", 64, torch.Generator().manual_seed(0))
    hasty = ProjectedGradient(max_iterations=1).solve(ugly.gram, ugly.alignment, CappedCone(2.0))
    assert hasty.status == "inaccurate"
    assert hasty.kkt_residual > 1e-10
    assert CappedCone(2.0).contains(hasty.weights)


def test_bad_input_is_refused_before_solving():
    solve, b = ProjectedGradient().solve, vector(1.0, 1.0)
    for K, message in (
        (torch.eye(3), "gram has shape"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "gram is not finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "positive semidefinite"),
        (-torch.eye(2), "positive semidefinite"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            solve(K, b)
    with pytest.raises(ConfigurationError, match="alignment is not finite"):
        solve(torch.eye(2), vector(1.0, math.inf))
    for make in (
        lambda: ProjectedGradient(max_iterations=0),
        lambda: ProjectedGradient(tolerance=0.0),
        lambda: ClosedForm(tolerance=-1.0),
        lambda: CvxpyQP(tolerance=math.nan),
    ):
        with pytest.raises(ConfigurationError, match=r"positive|at least 1"):
            make()


def test_the_rounding_of_float32_is_no_reason_to_refuse():
    C = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    K = C.T @ C  # rank 4 of 12, with the rounding of float32
    lowest = float(torch.linalg.eigvalsh(K.double())[0])
    assert lowest < 0
    assert ProjectedGradient().solve(K, K[:, 0], CappedSimplex(12, 4.0)).status == "optimal"
    ridge = 1e-6 * K.double().trace() * torch.eye(12, dtype=torch.float64)
    assert ProjectedGradient().solve(K + ridge, K[:, 0], CappedCone(4.0)).status == "optimal"


# --- Closed form ---


@pytest.mark.parametrize("shape", ["well_posed", "low_rank", "rank_one", "duplicates", "conflicting", "zero_rows"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_closed_form_is_the_pseudo_inverse(shape, n):
    ugly = ugly_problem(shape, n, torch.Generator().manual_seed(n))
    solution = ClosedForm().solve(ugly.gram, ugly.alignment, Free())
    expected = torch.linalg.pinv(ugly.gram, rtol=1e-12, hermitian=True) @ ugly.alignment
    assert solution.status == "optimal"
    assert solution.kkt_residual <= 1e-13
    assert torch.allclose(solution.weights, expected, rtol=1e-8, atol=1e-10)


class Sum(ConstraintSet):
    """A set from outside the package: the weights that sum to 1."""

    def feasible(self, n):
        return n > 0

    def project_array(self, point):
        return point + (1 - point.sum()) / point.size

    def polyhedron(self, n):
        free = Free().polyhedron(n)
        row, value = torch.ones(1, n, dtype=torch.float64).numpy(), torch.ones(1, dtype=torch.float64).numpy()
        return Polyhedron(free.lower, free.upper, row, value)


def test_a_set_of_equalities_is_honoured_even_from_outside():
    K, b = torch.diag(vector(1.0, 2.0)), vector(3.0, 0.0)
    # K w - b = v (1, 1), w_1 + w_2 = 1: w = (3 + v, v / 2), v = -4/3
    for solver in (ClosedForm(), ProjectedGradient(), CvxpyQP()):
        solution = solver.solve(K, b, Sum())
        assert solution.weights.tolist() == pytest.approx([5 / 3, -2 / 3], rel=1e-8)
        assert solution.status == "optimal"


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("free", "plane")])
def test_closed_form_refuses_bounds_and_names_who_can(name):
    with pytest.raises(ConfigurationError, match="'pgd' or 'qp'"):
        ClosedForm().solve(torch.eye(4), torch.ones(4), constraint_sets(4)[name])


# --- Uniform ---


def test_uniform_places_equal_weights_in_every_set():
    K, b = torch.eye(4), vector(1.0, 2.0, 3.0, 4.0)
    mass = vector(0.5, 1.0, 1.0, 1.5)
    for constraints, weight in (
        (Free(), 1.0),
        (NonNegative(), 1.0),
        (CappedCone(1.0), 1.0),
        (Box(0, 2), 1.0),
        (Simplex(10.0), 2.5),
        (Simplex(6.0, mass), 1.5),
        (CappedSimplex(2.0, 0.5), 0.5),
        (Simplex(0.0), 0.0),
    ):
        solution = Uniform().solve(K, b, constraints)
        assert solution.weights.tolist() == [weight] * 4
        assert solution.status == "optimal"
        assert solution.kkt_residual == kkt_residual(K, b, constraints, solution.weights)
    for narrow in (Box(0, 0.5), Box(2, 3), CappedSimplex(2.0, [0.1, 1.0, 1.0, 1.0])):
        assert Uniform().solve(K, b, narrow, throw=False).status == "infeasible"


def test_uniform_reports_what_a_weight_solver_could_still_gain():
    solution = Uniform().solve(torch.eye(2), vector(5.0, 0.0), NonNegative())
    assert solution.kkt_residual > 0.1
    assert Uniform().solve(torch.eye(2), vector(1.0, 1.0), NonNegative()).kkt_residual == 0


# --- cvxpy ---


def test_qp_and_pgd_agree_where_the_optimum_is_unique():
    ugly = ugly_problem("well_posed", 10, torch.Generator().manual_seed(0))
    solver = CvxpyQP()
    for constraints in constraint_sets(10).values():
        by_qp = solver.solve(ugly.gram, ugly.alignment, constraints)
        by_pgd = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints)
        assert torch.allclose(by_qp.weights, by_pgd.weights, atol=1e-5)


def test_qp_compiles_once_per_size_and_layout():
    solver, generator = CvxpyQP(), torch.Generator().manual_seed(0)
    for n, cap in ((3, 2.0), (3, 1.5), (4, 2.0), (3, 3.0)):
        ugly = ugly_problem("well_posed", n, generator)
        constraints = CappedSimplex(n, cap, torch.rand(n, generator=generator) + 0.8)
        solution = solver.solve(ugly.gram, ugly.alignment, constraints)
        assert solution.kkt_residual == kkt_residual(ugly.gram, ugly.alignment, constraints, solution.weights) <= 1e-6
    assert len(solver._programs) == 2
    for n in range(1, 30):
        solver.solve(torch.eye(n), torch.ones(n))
    assert len(solver._programs) <= 16


@pytest.mark.parametrize(
    ("native", "status"),
    [
        ("optimal_inaccurate", Status.INACCURATE),
        ("user_limit", Status.INACCURATE),
        ("infeasible_inaccurate", Status.FAILED),
        ("unbounded_inaccurate", Status.FAILED),
        ("solver_error", Status.FAILED),
        ("a status of the future", Status.FAILED),
    ],
)
def test_qp_calls_nothing_optimal_that_its_backend_does_not(monkeypatch, native, status):
    K, b = torch.eye(2), vector(1.0, 2.0)
    monkeypatch.setattr("ftw.solvers.cvxpy_qp._Program.run", lambda *_: (native, vector(1.0, 2.0).numpy()))
    assert CvxpyQP().solve(K, b, Box(-9, 9), throw=False).status is status


def test_qp_calls_nothing_optimal_that_is_not(monkeypatch):
    monkeypatch.setattr("ftw.solvers.cvxpy_qp._Program.run", lambda *_: ("optimal", vector(1.0, 1.9).numpy()))
    solution = CvxpyQP().solve(torch.eye(2), vector(1.0, 2.0), NonNegative())
    assert solution.status is Status.INACCURATE
    monkeypatch.setattr("ftw.solvers.cvxpy_qp._Program.run", lambda *_: ("optimal", vector(1.0, math.nan).numpy()))
    solution = CvxpyQP().solve(torch.eye(2), vector(1.0, 2.0), NonNegative(), throw=False)
    assert solution.status is Status.FAILED
    assert bool(torch.isfinite(solution.weights).all())


def test_qp_without_cvxpy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'filter-then-weight\[qp\]'"):
        CvxpyQP().solve(torch.eye(2), torch.ones(2))


def test_qp_tells_a_missing_backend_from_a_mistyped_one():
    with pytest.raises(ConfigurationError, match="knows no backend 'CLARABELL'"):
        CvxpyQP("CLARABELL")
    import cvxpy

    if "GUROBI" in cvxpy.installed_solvers():
        pytest.skip("GUROBI is installed here")
    with pytest.raises(MissingDependencyError, match="GUROBI is not installed"):
        CvxpyQP("gurobi")
