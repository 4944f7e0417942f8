"""Constraint sets: projections against a general QP and against enumeration, membership, empty sets, bad arguments."""

import itertools
import math

import pytest
import torch

from ftw.errors import ConfigurationError
from ftw.solvers import Box, CappedCone, CappedSimplex, Free, NonNegative, Simplex
from ftw.testing import check_constraint_set, constraint_sets


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 100])
@pytest.mark.parametrize("name", constraint_sets(1))
def test_the_law_of_constraint_sets(name, n):
    check_constraint_set(constraint_sets(n)[name], n)


@pytest.mark.parametrize("constraints", [Free(), NonNegative(), Box(), CappedCone(), Simplex(0.0), CappedSimplex(0, 1)])
def test_no_candidates(constraints):
    assert constraints.feasible(0)
    assert constraints.project(torch.zeros(0)).shape == (0,)
    assert constraints.contains(torch.zeros(0))
    check_constraint_set(constraints, 0)


@pytest.mark.parametrize(
    ("constraints", "n"),
    [
        (Simplex(1.0), 0),
        (CappedSimplex(1.0, 1.0), 0),
        (CappedSimplex(total=3.0, cap=0.5), 5),
        (CappedSimplex(total=3.0, cap=1.0, mass=[0.1, 0.2]), 2),
        (CappedSimplex(total=1e-16, cap=1e-17), 5),
    ],
)
def test_empty_sets_say_so(constraints, n):
    assert not constraints.feasible(n)
    assert not constraints.contains(torch.zeros(n))
    with pytest.raises(ConfigurationError, match="raise the cap or lower the total"):
        constraints.project(torch.zeros(n))


def test_a_cap_that_just_reaches_the_total_is_feasible():
    for n in range(1, 200):  # total / n is rounded, so that n times it may fall short of the total
        constraints = CappedSimplex(total=1.0, cap=1.0 / n)
        assert constraints.feasible(n)
        assert constraints.project(torch.arange(n)).tolist() == pytest.approx([1.0 / n] * n, rel=1e-14)


def test_projection_onto_the_simplex_by_hand():
    assert Simplex(1.0).project(vector(0.5, 0.2, -9.0)).tolist() == pytest.approx([0.65, 0.35, 0.0])
    assert CappedSimplex(1.0, 0.6).project(vector(0.5, 0.2, -9.0)).tolist() == pytest.approx([0.6, 0.4, 0.0])
    # mass'w = 2 with mass (1, 2): (1, 1) - v (1, 2) with v = 1/5
    assert Simplex(2.0, mass=[1.0, 2.0]).project(vector(1.0, 1.0)).tolist() == pytest.approx([0.8, 0.6])


def test_projection_onto_the_cone_by_hand():
    cone = CappedCone(1.5)  # of two: w_i <= 0.75 (w_1 + w_2), that is w_1 <= 3 w_2 and w_2 <= 3 w_1
    assert cone.project(vector(2.0, 1.0)).tolist() == [2.0, 1.0]
    assert cone.project(vector(1.0, 0.0)).tolist() == pytest.approx([0.9, 0.3])
    assert cone.project(vector(-1.0, -2.0)).tolist() == [0.0, 0.0]
    assert cone.project(vector(1.0, -3.0)).tolist() == [0.0, 0.0]  # in the polar cone: 3 * 1 - 3 = 0
    assert CappedCone(1.0).project(vector(4.0, 2.0, -3.0)).tolist() == pytest.approx([1.0, 1.0, 1.0])


def nearest_by_enumeration(polyhedron, point):
    """The nearest member of all faces' nearest points; faces by brute force, in exact small systems."""
    n, best, distance = len(point), None, math.inf
    eye = torch.eye(n, dtype=torch.float64)
    members = torch.from_numpy(polyhedron.members)
    faces = []  # for each inequality, the equations (a, d) that it may be active with; None where it is not
    for i in range(n):
        faces.append([None])
        for bound in (polyhedron.lower[i], polyhedron.upper[i]):
            if math.isfinite(bound):
                faces[-1].append((eye[i], bound))
        if math.isfinite(polyhedron.share) and members[i]:
            faces[-1].append((eye[i] - polyhedron.share * members, 0.0))
    for side, *bounds in zip(torch.from_numpy(polyhedron.sides), polyhedron.least, polyhedron.most, strict=True):
        faces.append([None, *((side, bound) for bound in bounds if math.isfinite(bound))])
    equalities = list(zip(torch.from_numpy(polyhedron.rows), polyhedron.values, strict=True))
    for face in itertools.product(*faces):
        w, equations = point, equalities + [equation for equation in face if equation is not None]
        if equations:
            A = torch.stack([a for a, _ in equations])
            d = torch.tensor([value for _, value in equations], dtype=torch.float64)
            w = point + torch.linalg.pinv(A, rtol=1e-12) @ (d - A @ point)
        if polyhedron.violation(w.numpy()) < 1e-9 and float((w - point).norm()) < distance:
            best, distance = w, float((w - point).norm())
    return best


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", constraint_sets(1))
def test_projection_is_the_nearest_of_all_faces(name, n):
    generator = torch.Generator().manual_seed(n)
    for constraints in (constraint_sets(n)[name], CappedCone(1 + n * 0.37), CappedSimplex(1.0, 1.2 / n)):
        for _ in range(6):
            point = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
            expected = nearest_by_enumeration(constraints.polyhedron(n), point)
            assert torch.allclose(constraints.project(point), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [5, 12])
def test_projection_agrees_with_a_general_solver(n):
    cp = pytest.importorskip("cvxpy")
    generator = torch.Generator().manual_seed(n)
    mass = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    w = cp.Variable(n)
    for constraints, rules in (
        (CappedSimplex(3.0, 0.9, mass), [w >= 0, w <= 0.9, mass.numpy() @ w == 3.0]),
        (Simplex(2.5, mass), [w >= 0, mass.numpy() @ w == 2.5]),
        (CappedCone(2.3), [w >= 0, w <= 2.3 * cp.sum(w) / n]),
    ):
        for _ in range(4):
            point = torch.randn(n, generator=generator, dtype=torch.float64)
            cp.Problem(cp.Minimize(cp.sum_squares(w - point.numpy())), rules).solve(
                "CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
            )
            assert torch.allclose(constraints.project(point), torch.from_numpy(w.value), atol=1e-6, rtol=0)


@pytest.mark.parametrize("power", [-1000, -53, -3, 3, 53, 900])
def test_projection_scales_with_its_set_and_its_point(power):
    scale, n = 2.0**power, 9
    point = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for constraints, scaled in (
        (CappedCone(2.0), CappedCone(2.0)),
        (NonNegative(), NonNegative()),
        (Simplex(3.0), Simplex(3.0 * scale)),
        (CappedSimplex(3.0, 0.7), CappedSimplex(3.0 * scale, 0.7 * scale)),
        (Box(-0.3, 0.5), Box(-0.3 * scale, 0.5 * scale)),
    ):
        assert torch.equal(scaled.project(point * scale), constraints.project(point) * scale)


@pytest.mark.parametrize("far", [1e8, 1e16, 1e30])
def test_far_points_lose_no_digits_of_the_total(far):
    """x - v mass cancels all digits of w here, unless the multiplier is found in steps."""
    point = far * torch.tensor([1.0, -1.0, 1.0, 0.3, 1.0], dtype=torch.float64)
    assert Simplex(1.0).project(point).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3], rel=1e-14)
    assert CappedSimplex(1.0, 0.3).project(point).tolist() == pytest.approx([0.3, 0, 0.3, 0.1, 0.3], rel=1e-14)


def test_far_and_near_entries_together():
    point = vector(1e16, 3.0, 2.9, -1e16)
    assert CappedSimplex(2.0, 1.2).project(point).tolist() == pytest.approx([1.2, 0.45, 0.35, 0.0], rel=1e-14)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_the_cone_near_its_apex_stays_near_its_apex(n):
    """What decides between 0 and more is rounding here; on a wrong piece the weights would be of size 1."""
    generator = torch.Generator().manual_seed(n)
    for _ in range(300):
        fewest = 1 + (n - 1) * float(torch.rand((), generator=generator, dtype=torch.float64))
        for q in (fewest, float(round(fewest))):
            point = torch.randn(n, generator=generator, dtype=torch.float64)
            largest = point.sort(descending=True).values
            whole = min(int(q), n - 1)
            # The largest point'v over the cone's v with sum q is brought to 0: the boundary of the polar cone.
            point -= (largest[:whole].sum() + (q - whole) * largest[whole]) / q
            for push in (0.0, 1e-16, 1e-15, 1e-14):
                projected = CappedCone(n / q).project(point + push * point.norm())
                assert float(projected.norm()) <= 1e-12 * float(point.norm())


def test_a_cap_of_n_or_more_binds_nobody():
    point = vector(5.0, -1.0, 0.0)
    assert CappedCone(3.0).project(point).tolist() == [5.0, 0.0, 0.0]
    assert CappedCone(1e9).project(point).tolist() == [5.0, 0.0, 0.0]
    assert math.isinf(CappedCone(3.0).polyhedron(3).share)


@pytest.mark.parametrize("n", [3, 6, 7, 30, 49, 90])
def test_equal_weights_on_the_fewest_candidates_are_members(n):
    """n / 3 is rounded; three equal weights must be in CappedCone(n / 3) all the same."""
    constraints = CappedCone(n / 3)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[:3] = 0.7
    assert constraints.contains(weights, 1e-15)
    assert constraints.project(weights).tolist() == pytest.approx(weights.tolist(), rel=1e-15)
    weights[2] = 0.0
    assert not constraints.contains(weights)


def test_no_stray_weights_beside_the_fewest():
    """With n / cap = 2.9999999999999996 the others would get weights of 1e-16, and count as chosen."""
    for n in range(3, 120):
        for fewest in range(1, n):
            point = torch.full((n,), -1e3, dtype=torch.float64)
            point[:fewest] = 1e4
            projected = CappedCone(n / fewest).project(point)
            assert int((projected != 0).sum()) == fewest


@pytest.mark.parametrize("scale", [1e-16, 1.0, 1e16])
def test_membership_is_relative(scale):
    for constraints, member in (
        (Simplex(2.0 * scale), vector(1.5, 0.5, 0.0)),
        (CappedSimplex(2.0 * scale, 1.5 * scale), vector(1.5, 0.5, 0.0)),
        (Box(0.0, 1.5 * scale), vector(1.5, 0.5, 0.0)),
        (CappedCone(2.25), vector(1.5, 0.5, 0.0)),
        (NonNegative(), vector(1.5, 0.5, 0.0)),
    ):
        assert constraints.contains(member * scale)
        for wrong in ((0, 1e-6), (2, -1e-6)):
            moved = member.clone()
            moved[wrong[0]] += wrong[1]
            expected = isinstance(constraints, NonNegative) and wrong[0] == 0
            assert constraints.contains(moved * scale) == expected
            assert constraints.contains(moved * scale, tolerance=1e-4)
    assert not Free().contains(vector(math.nan))


def test_per_candidate_bounds():
    box = Box([0.0, -1.0], torch.tensor([1.0, 2.0]))
    assert box.project(vector(5.0, -5.0)).tolist() == [1.0, -1.0]
    simplex = CappedSimplex(1.0, cap=[0.1, 1.0, 1.0])
    assert simplex.project(vector(9.0, 0.0, 0.0)).tolist() == pytest.approx([0.1, 0.45, 0.45])
    for constraints in (box, CappedSimplex(1.0, [0.5, 0.5, 1.0]), Simplex(1.0, [1.0, 2.0, 3.0])):
        with pytest.raises(ConfigurationError, match="entries for 7 candidates"):
            constraints.feasible(7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CappedCone(0.9),
        lambda: CappedCone(math.nan),
        lambda: CappedCone(True),
        lambda: CappedCone("2"),
        lambda: Box(1.0, 0.0),
        lambda: Box(math.nan, 1.0),
        lambda: Box([0.0, 1.0], [1.0, 2.0, 3.0]),
        lambda: Box(math.inf, math.inf),
        lambda: Box(torch.zeros(2, 2), 1.0),
        lambda: Simplex(-1.0),
        lambda: Simplex(math.inf),
        lambda: Simplex(1.0, mass=[1.0, 0.0]),
        lambda: Simplex(1.0, mass=2.0),
        lambda: CappedSimplex(1.0, -0.5),
        lambda: CappedSimplex(math.nan, 0.5),
    ],
)
def test_arguments_without_meaning_are_refused(make):
    with pytest.raises(ConfigurationError, match=r".+; .+; .+\."):  # what was given; what is allowed; what to do
        make()
