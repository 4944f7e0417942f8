"""Sets cut by linear constraints: quotas and no harm by their meaning, merged cuts, empty ones, bad arguments."""

import math

import pytest
import torch

import ftw
from ftw.errors import ConfigurationError
from ftw.solvers import (
    Box,
    CappedCone,
    CappedSimplex,
    Free,
    Linear,
    NoHarm,
    NonNegative,
    ProjectedGradient,
    Quota,
    Simplex,
    kkt_residual,
)
from ftw.testing import ugly_problem
from tests.models import MLP

SOURCES = ["web", "code", "web", "web", "code", "news"]


def problem(n, seed=0):
    return ugly_problem("well_posed", n, torch.Generator().manual_seed(seed))


def share(weights, label, mass=None):
    mass = torch.ones(len(weights), dtype=torch.float64) if mass is None else mass
    own = torch.tensor([source == label for source in SOURCES])
    return float((mass * weights)[own].sum() / (mass * weights).sum())


@pytest.mark.parametrize("base", [CappedCone(6.0), NonNegative(), Simplex(6.0), CappedSimplex(6.0, 4.0)])
@pytest.mark.parametrize("seed", range(5))
def test_a_quota_bounds_shares_of_the_total(base, seed):
    ugly = problem(6, seed)
    alignment = ugly.alignment.abs()
    quota = Quota(base, SOURCES, at_most={"web": 0.3}, at_least={"news": 0.25})
    solution = ProjectedGradient().solve(ugly.gram, alignment, quota)
    assert solution.status == "optimal"
    assert share(solution.weights, "web") <= 0.3 + 1e-9
    assert share(solution.weights, "news") >= 0.25 - 1e-9
    free = ProjectedGradient().solve(ugly.gram, alignment, base)
    loses = 0.5 * solution.weights @ ugly.gram @ solution.weights - alignment @ solution.weights
    gains = 0.5 * free.weights @ ugly.gram @ free.weights - alignment @ free.weights
    assert float(loses) >= float(gains) - 1e-9 * abs(float(gains))


def test_shares_count_the_mass():
    ugly, mass = problem(6), torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    for quota in (
        Quota(CappedCone(6.0), SOURCES, {"web": 0.2}, mass=mass),
        Quota(Simplex(6.0, mass), SOURCES, {"web": 0.2}),
    ):
        weights = ProjectedGradient().solve(ugly.gram, ugly.alignment.abs(), quota).weights
        assert share(weights, "web", mass) <= 0.2 + 1e-9


def test_a_share_that_is_pinned_is_an_equality():
    ugly = problem(6)
    quota = Quota(CappedCone(6.0), SOURCES, {"web": 0.5}, {"web": 0.5})
    weights = ProjectedGradient().solve(ugly.gram, ugly.alignment.abs(), quota).weights
    assert share(weights, "web") == pytest.approx(0.5, rel=1e-9)


def test_a_least_share_for_a_label_that_nobody_has_leaves_nothing_on_a_cone_and_no_set_on_a_simplex():
    cone = Quota(CappedCone(6.0), SOURCES, at_least={"books": 0.1})
    assert not bool(cone.project(torch.ones(6)).any())
    assert not Quota(Simplex(6.0), SOURCES, at_least={"books": 0.1}).feasible(6)


def test_no_harm_leaves_no_target_worse():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        B = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        C = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        K = C.T @ C
        solution = ProjectedGradient().solve(K, B.mean(1), NoHarm(CappedCone(8.0), B))
        assert solution.status == "optimal"
        assert float((B.T @ solution.weights).min()) >= -1e-9 * float(B.abs().max() * solution.weights.norm())


def test_cuts_of_cuts_are_one_set():
    inner = Linear(Box(-1.0, 1.0), [[1.0, 1.0, 0.0]], most=0.5)
    outer = Linear(inner, [[0.0, 1.0, 1.0]], least=0.2, most=0.2)
    assert isinstance(outer.base, Box)
    point = outer.project(torch.tensor([2.0, 2.0, -2.0]))
    assert outer.contains(point)
    assert inner.contains(point)
    assert float(point[1] + point[2]) == pytest.approx(0.2)


def test_restricted_keeps_the_rules_of_the_kept():
    kept = torch.tensor([0, 1, 5])
    quota = Quota(CappedCone(6.0), SOURCES, {"web": 0.25}).restricted(kept)
    weights = ProjectedGradient().solve(torch.eye(3).double(), torch.tensor([9.0, 1.0, 1.0]).double(), quota).weights
    assert float(weights[0] / weights.sum()) <= 0.25 + 1e-9
    mass = torch.tensor([0.5, 1.5, 1.0])
    simplex = Simplex(3.0, mass).restricted(torch.tensor([0, 2]))
    assert simplex.contains(torch.tensor([2.0, 2.0]))


def test_the_certificate_sees_a_quota_that_is_broken():
    ugly = problem(6)
    quota = Quota(CappedCone(6.0), SOURCES, {"web": 0.1})
    free = ProjectedGradient().solve(ugly.gram, ugly.alignment.abs(), CappedCone(6.0)).weights
    assert kkt_residual(ugly.gram, ugly.alignment.abs(), quota, free) > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(Free(), [[1.0, math.nan]]),
        lambda: Linear(Free(), [1.0, 2.0]),
        lambda: Linear(Free(), [[1.0, 2.0]], least=2.0, most=1.0),
        lambda: Linear(Free(), [[1.0, 2.0]], least=[0.0, 0.0]),
        lambda: Linear(Linear(Free(), [[1.0]]), [[1.0, 2.0]]),
        lambda: Quota(Free(), SOURCES, {"web": 0.5}),
        lambda: Quota(CappedCone(4.0), SOURCES, {"web": 1.5}),
        lambda: Quota(CappedCone(4.0), SOURCES, {"web": True}),
        lambda: Quota(CappedCone(4.0), SOURCES, {"web": 0.1}, {"web": 0.2}),
        lambda: Quota(CappedCone(4.0), SOURCES, at_least={"web": 0.6, "code": 0.6}),
        lambda: Quota(CappedCone(4.0), SOURCES, {"web": 0.5}, mass=[1.0]),
        lambda: Quota(CappedCone(4.0), SOURCES, {"web": 0.5}).feasible(3),
    ],
)
def test_arguments_without_meaning_are_refused(make):
    with pytest.raises(ConfigurationError, match=r".+; .+; .+\."):
        make()


def test_alignments_that_are_not_finite_are_refused():
    with pytest.raises(ConfigurationError, match="alignments is not finite"):
        NoHarm(CappedCone(4.0), torch.full((3, 2), math.inf))


def test_the_selector_keeps_a_quota_by_the_column_of_the_batch():
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss_of(model, x):
        return (model(x) - 1.0).square().mean()

    selector = ftw.Selector(
        model,
        optimizer,
        target=[torch.randn(4, 6, dtype=torch.float64)],
        loss_fn=loss_of,
        budget=8,
        filter="all",
        warmup=0,
        constraints=ftw.WeightQuota({"web": 0.25}, base=CappedCone(8.0)),
    )
    labels = ["web", "code"] * 4
    for _ in range(3):
        with selector.record(extras={"source": labels}):
            loss_of(model, torch.randn(8, 6, dtype=torch.float64)).backward()
        weights = selector.apply().weights
        assert float(weights[::2].sum()) <= 0.25 * float(weights.sum()) + 1e-9
        assert float(weights.sum()) > 0
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ConfigurationError, match="source"), selector.record():
        pytest.fail("the column is missed before the block begins")


@pytest.mark.parametrize("options", [{}, {"memory_cap": 2_000, "reference": "target"}])
def test_the_selector_reads_what_is_said_of_single_candidates_by_their_places(options):
    torch.manual_seed(0)
    model = MLP()

    def loss_of(model, x):
        return (model(x) - 1.0).square().mean()

    upper = torch.arange(8, dtype=torch.float64) / 4
    rows = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, -1.0], [0.0, 1, 0, 1, 0, 1, 0, 1]], dtype=torch.float64)
    for constraints in (Box(0.0, upper), CappedSimplex(1.0, upper), Linear(Box(0.0, upper), rows, -0.5, 0.5)):
        seen = {}

        class Seeing(ProjectedGradient):
            def _solve(self, gram, alignment, constraints, start=None, seen=seen):
                seen["set"] = constraints.polyhedron(len(alignment))
                return super()._solve(gram, alignment, constraints, start)

        selector = ftw.Selector(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            target=[torch.randn(4, 6, dtype=torch.float64)],
            loss_fn=loss_of,
            budget=4,
            filter="topk",
            solver=Seeing(),
            constraints=constraints,
            gradients="factorized",
            **options,
        )
        with selector.record():
            loss_of(model, torch.randn(8, 6, dtype=torch.float64)).backward()
        selection = selector.select()
        chosen = torch.argsort(selection.diagnostics["alignment"], descending=True, stable=True)[:4]
        assert sorted(seen["set"].upper.tolist()) == sorted(upper[chosen].tolist())
        if isinstance(constraints, Linear):
            assert sorted(map(tuple, seen["set"].sides.T)) == sorted(map(tuple, rows.T[chosen].tolist()))
        selector.discard()
        with selector.record():
            loss_of(model, torch.randn(7, 6, dtype=torch.float64)).backward()
        with pytest.raises(ConfigurationError, match="for 7 candidates"):
            selector.select()
        selector.close()
