"""The solvers beside `pgd`: rules by their formulas, exact ones by agreement; factors, starts, ridges, certificates."""

import builtins

import pytest
import torch

from ftw.errors import ConfigurationError, MissingDependencyError, SolverError
from ftw.problem import Status
from ftw.solvers import (
    DAQP,
    ActiveSet,
    Box,
    CappedCone,
    CappedSimplex,
    ClosedForm,
    Entropic,
    Free,
    LowRank,
    NonNegative,
    ProjectedGradient,
    Quota,
    Simplex,
    Softmax,
    Uniform,
    certify,
    kkt_residual,
    ridge_towards,
    solve_worst_case,
)
from ftw.solvers.gram import Thin
from ftw.testing import constraint_sets, ugly_problem


def problem(shape="well_posed", n=9, seed=0):
    return ugly_problem(shape, n, torch.Generator().manual_seed(seed))


def objective(gram, alignment, weights):
    return float(0.5 * weights @ gram @ weights - alignment @ weights)


@pytest.mark.parametrize("solver", [ActiveSet(), Entropic(), DAQP()], ids=["active_set", "entropic", "daqp"])
@pytest.mark.parametrize("name", constraint_sets(9))
def test_exact_solvers_agree_where_the_optimum_is_unique(solver, name):
    if isinstance(solver, DAQP):
        pytest.importorskip("daqp")
    constraints = constraint_sets(9)[name]
    for seed in range(3):
        ugly = problem(seed=seed)
        try:
            solution = solver.solve(ugly.gram, ugly.alignment, constraints)
        except ConfigurationError:
            return
        expected = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints)
        assert solution.status == "optimal"
        assert torch.allclose(solution.weights, expected.weights, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("constraints", [Simplex(3.0), CappedSimplex(3.0, 0.9), NonNegative(), CappedCone(2.0)])
def test_softmax_by_its_formula(constraints):
    """Without a cap that binds: weights in the ratio of exp(b / (temperature * std)), of the set's total or mean 1."""
    b = torch.tensor([0.3, -0.2, 0.1, 0.0, 0.25], dtype=torch.float64)
    weights = Softmax(temperature=4.0).solve(torch.eye(5), b, constraints).weights
    shape = torch.exp(b / (4.0 * b.std(unbiased=False)))
    total = 3.0 if isinstance(constraints, Simplex | CappedSimplex) else 5.0
    assert torch.allclose(weights, total * shape / shape.sum(), rtol=1e-12)


def test_softmax_shares_the_rest_when_a_cap_binds():
    b = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    weights = Softmax(temperature=0.5).solve(torch.eye(3), b, CappedSimplex(3.0, 1.5)).weights
    assert float(weights[0]) == 1.5
    ratio = torch.exp((b[1] - b[2]) / (0.5 * b.std(unbiased=False)))
    expected = torch.stack((1.5 * ratio / (1 + ratio), 1.5 / (1 + ratio)))
    assert torch.allclose(weights[1:], expected.clamp_max(1.5), rtol=1e-12)


def test_softmax_between_its_limits():
    ugly = problem()
    best = int(ugly.alignment.argmax())
    cold = Softmax(temperature=1e-6).solve(ugly.gram, ugly.alignment, Simplex(9.0)).weights
    hot = Softmax(temperature=1e9).solve(ugly.gram, ugly.alignment, Simplex(9.0)).weights
    assert float(cold[best]) == pytest.approx(9.0)
    assert torch.allclose(hot, torch.ones(9, dtype=torch.float64), atol=1e-6)


AT_LEAST_HALF = Quota(CappedCone(4.0), ["a", "b"] * 4 + ["a"], {"a": 0.5})


@pytest.mark.parametrize(
    ("solver", "constraints"),
    [(Entropic(), Free()), (Entropic(), AT_LEAST_HALF), (Softmax(), AT_LEAST_HALF)],
    ids=["entropic-free", "entropic-quota", "softmax-quota"],
)
def test_rules_refuse_sets_that_they_cannot_keep(solver, constraints):
    ugly = problem()
    with pytest.raises(ConfigurationError, match="use the solver 'pgd'"):
        solver.solve(ugly.gram, ugly.alignment, constraints)


def test_entropic_without_the_polish_is_regularised_by_its_early_end():
    ugly = problem("low_rank", 12)
    spread = []
    for steps in (1, 10, 100):
        solution = Entropic(polish=False, max_iterations=steps).solve(ugly.gram, ugly.alignment, Simplex(12.0))
        assert bool((solution.weights > 0).all())
        spread.append(objective(ugly.gram, ugly.alignment, solution.weights))
    assert spread == sorted(spread, reverse=True)
    exact = ProjectedGradient().solve(ugly.gram, ugly.alignment, Simplex(12.0)).weights
    assert spread[-1] >= objective(ugly.gram, ugly.alignment, exact) - 1e-12 * abs(spread[-1])


def test_uniform_and_softmax_say_when_their_weights_are_not_in_the_set():
    ugly = problem()
    with pytest.raises(SolverError, match="infeasible"):
        Uniform().solve(ugly.gram, ugly.alignment, Box(2.0, 3.0))


SIZES = [(12, 3), (40, 8), (9, 1), (6, 0)]


@pytest.mark.parametrize(("n", "rank"), SIZES)
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("solver", [ProjectedGradient(), ActiveSet()], ids=["pgd", "active_set"])
def test_a_factor_is_as_good_as_its_product(solver, n, rank, ridge):
    generator = torch.Generator().manual_seed(n)
    F = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    b = F @ torch.randn(rank, generator=generator, dtype=torch.float64)
    thin = LowRank(F, ridge)
    for name, constraints in constraint_sets(n).items():
        by_factor = solver.solve(thin, b, constraints, throw=False)
        by_matrix = solver.solve(thin.dense(), b, constraints, throw=False)
        assert by_factor.status == by_matrix.status == "optimal", name
        assert kkt_residual(thin.dense(), b, constraints, by_factor.weights) <= 1e-9, name
        low, high = (objective(thin.dense(), b, each.weights) for each in (by_factor, by_matrix))
        assert low == pytest.approx(high, rel=1e-8, abs=1e-8), name


@pytest.mark.parametrize(
    "solver", [ProjectedGradient, ActiveSet, Entropic, ClosedForm, Softmax, Uniform], ids=lambda cls: cls.__name__
)
def test_a_factor_is_not_multiplied_out(solver, monkeypatch):
    F = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("K is formed"))
    monkeypatch.setattr(Thin, "matrix", property(lambda self: pytest.fail("K is formed")))
    solved = 0
    for name, constraints in constraint_sets(300).items():
        try:
            solution = solver().solve(LowRank(F, 0.1), F @ torch.ones(4).double(), constraints, throw=False)
        except ConfigurationError:
            continue
        assert solution.status == "optimal" or solver is Uniform, name
        solved += 1
    assert solved > 1


@pytest.mark.parametrize(("factor", "ridge"), [(torch.ones(3), 0.0), (torch.full((3, 2), float("nan")), 0.0),
                                               (torch.ones(3, 2), -1.0), (torch.ones(3, 2), float("inf"))])  # fmt: skip
def test_factors_without_meaning_are_refused(factor, ridge):
    with pytest.raises(ConfigurationError):
        LowRank(factor, ridge)


@pytest.mark.parametrize("solver", [ProjectedGradient(), ActiveSet(), Entropic()], ids=["pgd", "active", "entropic"])
@pytest.mark.parametrize("constraints", [CappedCone(4.0), CappedSimplex(9.0, 3.0), NonNegative()])
def test_a_start_changes_the_way_and_not_the_weights(solver, constraints):
    ugly = problem()
    plain = solver.solve(ugly.gram, ugly.alignment, constraints)
    for start in (plain.weights, torch.full((9,), 5.0), -torch.ones(9), torch.zeros(9)):
        warm = solver.solve(ugly.gram, ugly.alignment, constraints, start=start)
        assert warm.status == "optimal"
        assert torch.allclose(warm.weights, plain.weights, atol=1e-7, rtol=1e-7)
    assert solver.solve(ugly.gram, ugly.alignment, constraints, start=plain.weights).iterations <= plain.iterations


def test_a_start_is_checked():
    ugly = problem()
    with pytest.raises(ConfigurationError, match="start has 3 entries"):
        ProjectedGradient().solve(ugly.gram, ugly.alignment, start=torch.ones(3))
    with pytest.raises(ConfigurationError, match="does not iterate"):
        Uniform().solve(ugly.gram, ugly.alignment, start=torch.ones(9))


@pytest.mark.parametrize("reference", [0.0, 1.0, torch.linspace(0, 2, 9, dtype=torch.float64)])
def test_the_ridge_pulls_towards_its_reference(reference):
    ugly = problem()
    w0 = torch.as_tensor(reference, dtype=torch.float64).expand(9)
    far = []
    for strength in (0.0, 1.0, 1e3, 1e9):
        K, b = ridge_towards(ugly.gram, ugly.alignment, reference, strength)
        weights = ProjectedGradient().solve(K, b, NonNegative()).weights
        far.append(float((weights - w0).norm()))
        pull, constant = 0.5 * strength * (weights - w0) @ (weights - w0), 0.5 * strength * float(w0 @ w0)
        expected = objective(ugly.gram, ugly.alignment, weights) + float(pull)
        # What cancels are numbers of the constant's size.
        assert objective(K, b, weights) + constant == pytest.approx(expected, rel=1e-9, abs=1e-12 + 1e-14 * constant)
    assert far == sorted(far, reverse=True)
    assert far[-1] < 1e-6


def test_the_ridge_of_a_factor_stays_a_factor():
    F = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    K, b = ridge_towards(LowRank(F), torch.ones(8), 1.0, 0.5)
    dense, _ = ridge_towards(F @ F.T, torch.ones(8), 1.0, 0.5)
    assert isinstance(K, LowRank)
    assert torch.allclose(K.dense(), dense)
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigurationError, match="strength"):
            ridge_towards(F @ F.T, b, 1.0, bad)
    with pytest.raises(ConfigurationError, match="reference"):
        ridge_towards(F @ F.T, b, torch.ones(3), 1.0)


@pytest.mark.parametrize("name", constraint_sets(9))
def test_every_solution_has_three_residuals_and_a_sentence(name):
    ugly, constraints = problem(), constraint_sets(9)[name]
    solution = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints)
    found = certify(ugly.gram, ugly.alignment, constraints, solution.weights)
    for figure in ("primal_residual", "dual_residual", "complementarity"):
        assert 0 <= getattr(solution, figure) <= 1e-9
        assert getattr(solution, figure) == pytest.approx(getattr(found, figure), abs=1e-15)
    assert solution.status.sentence.endswith(".")
    assert len({status.sentence for status in Status}) == len(list(Status))


def test_each_residual_sees_its_own_fault():
    ugly = problem()
    constraints = NonNegative()
    best = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints).weights
    outside = best.clone()
    outside[int(best.argmin())] = -0.5 * float(best.max())
    assert certify(ugly.gram, ugly.alignment, constraints, outside).primal_residual > 1e-2
    far = certify(ugly.gram, ugly.alignment, constraints, 2 * best)
    assert far.primal_residual == 0
    assert max(far.dual_residual, far.complementarity) > 1e-2


@pytest.mark.parametrize("constraints", [CappedCone(8.0), CappedSimplex(8.0, 4.0), NonNegative(), Box(0.0, 2.0)])
def test_the_worst_served_target_is_served_best(constraints):
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        C = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        B = C.T @ (1.0 + torch.randn(12, 3, generator=generator, dtype=torch.float64))
        K = C.T @ C

        def utility(w, K=K, B=B):
            return float((B.T @ w).min() - 0.5 * w @ K @ w)

        found = solve_worst_case(K, B, constraints)
        assert found.status == "optimal"
        assert torch.allclose(found.values, B.T @ found.weights)
        best = utility(found.weights)
        for scale in (0.01, 0.1, 1.0):
            for _ in range(100):
                near = found.weights + scale * torch.randn(8, generator=generator, dtype=torch.float64)
                assert utility(constraints.project(near)) <= best + 1e-9 * max(1.0, abs(best))
        if found.mixture.sum():
            assert float(found.mixture.sum()) == pytest.approx(1.0)
            alone = ProjectedGradient().solve(K, B @ found.mixture, constraints)
            assert kkt_residual(K, B @ found.mixture, constraints, found.weights) <= 1e-6
            assert objective(K, B @ found.mixture, alone.weights) == pytest.approx(
                objective(K, B @ found.mixture, found.weights), rel=1e-6, abs=1e-6
            )


@pytest.mark.parametrize("constraints", ["simplex", NonNegative])
def test_the_worst_case_needs_a_set(constraints):
    with pytest.raises(ConfigurationError, match="is no set of weights"):
        solve_worst_case(torch.eye(2), torch.ones(2, 2), constraints)


def test_the_worst_case_of_one_target_is_that_target():
    ugly = problem()
    found = solve_worst_case(ugly.gram, ugly.alignment[:, None], CappedCone(4.0))
    plain = ProjectedGradient().solve(ugly.gram, ugly.alignment, CappedCone(4.0))
    assert torch.allclose(found.weights, plain.weights, atol=1e-8)
    with pytest.raises(ConfigurationError, match="at least one target"):
        solve_worst_case(ugly.gram, torch.zeros(9, 0))


def test_daqp_names_its_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] in ("daqp", "qpsolvers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", lambda name: missing(name))
    ugly = problem()
    with pytest.raises(MissingDependencyError, match=r"filter-then-weight\[daqp\]"):
        DAQP().solve(ugly.gram, ugly.alignment, NonNegative())
