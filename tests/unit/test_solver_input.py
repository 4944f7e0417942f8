"""What is no problem is refused in words, by every solver; what is one, however it is written, is solved."""

import math
import warnings

import numpy as np
import pytest
import torch

from ftw import registry
from ftw.errors import ConfigurationError
from ftw.solvers import (
    Box,
    CappedCone,
    Entropic,
    Free,
    Linear,
    LowRank,
    NoHarm,
    NonNegative,
    ProjectedGradient,
    Quota,
    Simplex,
    certify,
    kkt_residual,
    solve_worst_case,
)
from ftw.testing import ugly_problem

NAMES = [name for name, owners in registry.available("solvers").items() if "filter-then-weight" in owners]
K = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
b = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)


def solver_of(name):
    pytest.importorskip({"daqp": "daqp", "qp": "cvxpy"}.get(name, "torch"))
    return registry.resolve("solvers", name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("gram", "alignment", "message"),
    [
        ("K", b, "gram is 'K'"),
        (None, b, "gram is None"),
        ([[1.0, 2.0], [3.0]], b, "gram is .*cannot be read"),
        (K, ["a", "b", "c"], "alignment is"),
        (K.to(torch.complex128), b, "gram is .*complex"),
        (K.to_sparse(), b, "gram is .*sparse"),
        (K.to("meta"), b, "gram is .*meta"),
        (K[None], b, "gram has shape"),
        (K, K, "alignment has shape"),
        (K, torch.tensor(1.0), "alignment has shape"),
        (K * math.nan, b, "gram is not finite"),
        (K, b * math.inf, "alignment is not finite"),
        (1.7e308 * torch.eye(3, dtype=torch.float64), b, "gram holds 1.7e"),
        (K, 1e300 * b, r"size 2\^998"),
        (1e-200 * K, b, r"gram 2\^-66"),
        (LowRank(1e-120 * torch.ones(3, 1, dtype=torch.float64)), b, r"gram 2\^-79"),
        (LowRank(torch.ones(2, 2)), b, "factor has 2 rows"),
    ],
)
def test_what_is_no_problem_is_named(name, gram, alignment, message):
    constraints = Simplex(3.0) if name in ("entropic", "softmax") else Free()
    with pytest.raises(ConfigurationError, match=message):
        solver_of(name).solve(gram, alignment, constraints)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("constraints", ["simplex", Simplex, 3.0])
def test_what_is_no_set_is_named(name, constraints):
    with pytest.raises(ConfigurationError, match="no set of weights"):
        solver_of(name).solve(K, b, constraints)
    with pytest.raises(ConfigurationError, match="no set of weights"):
        certify(K, b, constraints, b)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear("free", torch.ones(1, 3)),
        lambda: Linear(Box, torch.ones(1, 3)),
        lambda: Quota("free", ["a", "b"], {"a": 0.5}),
        lambda: Quota(NonNegative(), None, {"a": 0.5}),
        lambda: Quota(NonNegative(), ["a", "b"], ["a"]),
        lambda: Box("low", 1.0),
        lambda: Simplex(1.0, "ab"),
        lambda: NoHarm(NonNegative(), [["a"]]),
        lambda: LowRank("F"),
        lambda: LowRank(1e200 * torch.ones(3, 1, dtype=torch.float64)),
        lambda: LowRank(torch.ones(3, 1), ridge=math.inf),
        lambda: LowRank(torch.ones(3, 1), ridge="much"),
    ],
)
def test_sets_and_factors_without_meaning_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()


@pytest.mark.parametrize("start", [[1.0, 2.0], [math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0], "start", torch.ones(3, 1)])
def test_a_start_that_is_none_is_refused(start):
    for name in ("pgd", "active_set", "entropic"):
        with pytest.raises(ConfigurationError, match="start"):
            solver_of(name).solve(K, b, start=start)


@pytest.mark.parametrize("count", [0, -1, 1.5, math.nan, math.inf, "many", None, True])
def test_options_that_count_are_integers(count):
    for name, option in (("pgd", "max_iterations"), ("active_set", "max_rounds"), ("entropic", "max_iterations")):
        with pytest.raises(ConfigurationError, match=option):
            registry.resolve("solvers", name, **{option: count})


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, "small", None])
def test_tolerances_are_positive_numbers(tolerance):
    for name in ("pgd", "active_set", "entropic", "closed_form"):
        with pytest.raises(ConfigurationError, match="tolerance"):
            registry.resolve("solvers", name, tolerance=tolerance)


def test_lists_of_numbers_keep_their_digits():
    """torch reads a list of floats as float32 unless told otherwise."""
    ugly = ugly_problem("well_posed", 6, torch.Generator().manual_seed(0))
    solve = ProjectedGradient().solve
    expected = solve(ugly.gram, ugly.alignment, CappedCone(2.0)).weights
    listed = ugly.gram.tolist(), ugly.alignment.tolist()
    assert torch.equal(solve(*listed, CappedCone(2.0)).weights, expected)
    assert kkt_residual(*listed, CappedCone(2.0), expected.tolist()) < 1e-13
    backwards = ugly.gram.numpy()[::-1, ::-1], ugly.alignment.numpy()[::-1]
    assert torch.allclose(solve(*backwards, CappedCone(2.0)).weights.flip(0), expected, rtol=1e-12)
    factor = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(LowRank(factor.tolist()).factor, factor)
    columns = [[0.1], [0.2], [0.3], [0.4], [0.5], [0.6]]
    assert torch.equal(
        solve_worst_case(ugly.gram, columns).weights,
        solve_worst_case(ugly.gram, torch.tensor(columns, dtype=torch.float64)).weights,
    )
    assert Simplex(0.1).contains([0.1])
    mass = torch.tensor([0.5, 1.0, 1.5]).bfloat16()
    assert Simplex(3.0, mass).contains([1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["pgd", "active_set", "entropic"])
@pytest.mark.parametrize("gram", [torch.zeros(3, 3), LowRank(torch.zeros(3, 0)), LowRank(torch.zeros(3, 2))])
@pytest.mark.parametrize("constraints", [NonNegative(), CappedCone(2.0)])
def test_without_curvature_what_helps_is_unbounded(name, gram, constraints):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solver_of(name).solve(gram, b, constraints, throw=False).status == "unbounded"
        assert solver_of(name).solve(gram, -b.abs(), constraints).weights.tolist() == [0.0, 0.0, 0.0]
        assert solver_of(name).solve(gram, 0 * b, constraints).status == "optimal"
        best = solver_of(name).solve(gram, b, Simplex(3.0))
    assert best.status == "optimal"
    assert best.weights.tolist() == [0.0, 0.0, 3.0]


def test_entropic_without_the_polish_ends_where_weights_rise_for_ever():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Entropic(polish=False).solve(torch.zeros(3, 3), b, NonNegative()).status == "inaccurate"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-130, 1e130])
def test_far_scales_leave_no_warning(name, size):
    for gram, alignment in ((size * K, b), (K, size * b), (size * K, size * b)):
        for constraints in (Box(0.0, 1.0), Simplex(3.0), Simplex(size), CappedCone(2.0)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    solution = solver_of(name).solve(gram, alignment, constraints, throw=False)
                except ConfigurationError:
                    continue
            assert bool(torch.isfinite(solution.weights).all())
            assert not math.isnan(solution.kkt_residual)
            if name == "pgd":
                assert solution.status == "optimal"


def test_astronomical_weights_are_as_wrong_as_infinite_ones():
    for weights in (1e200 * b, b * math.inf):
        assert set(vars(certify(K, b, NonNegative(), weights)).values()) == {math.inf}


@pytest.mark.parametrize("name", ["pgd", "active_set", "daqp", "qp"])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20, 1e300])
def test_the_size_of_a_target_s_alignments_does_not_matter_to_no_harm(name, size):
    """A small row is no row to a backend with absolute tolerances."""
    columns = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    expected = ProjectedGradient().solve(K, b, NoHarm(CappedCone(2.0), columns)).weights
    harmless = NoHarm(CappedCone(2.0), columns * torch.tensor([1.0, size], dtype=torch.float64))
    solution = solver_of(name).solve(K, b, harmless)
    assert solution.status == "optimal"
    assert torch.allclose(solution.weights, expected, atol=1e-6)


def test_multipliers_belong_to_the_rows_as_given():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((2, 5)) * np.array([[1e-6], [1e4]])
    cut = Linear(Box(-1.0, 1.0), rows, -math.inf, [-1e-6, -1e4])
    point = generator.standard_normal(5)
    nearest, multipliers = cut.project_with_multipliers(point)
    assert np.abs(multipliers).max() > 0
    assert nearest == pytest.approx(np.clip(point - rows.T @ multipliers, -1.0, 1.0), rel=1e-12, abs=1e-12)
