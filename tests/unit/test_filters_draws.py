"""DPP and OPUS: determinants by brute force, and draws against enumerated probabilities."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, nchypergeom_fisher

from ftw.errors import ConfigurationError
from ftw.filters import DPP, Opus
from ftw.filters.dpp import _eigenvectors_drawn
from ftw.filters.draws import gumbel
from ftw.filters.opus import _common_weight
from ftw.problem import SelectionProblem
from ftw.testing import SHAPES, ugly_problem

DRAWS = 2500


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def features(n, r, seed):
    """F (n, r) and b (n,), most of b positive."""
    generator = seeded(seed)
    F = torch.randn(n, r, generator=generator, dtype=torch.float64)
    F *= torch.rand(n, 1, generator=generator, dtype=torch.float64) + 0.3
    return F, torch.rand(n, generator=generator, dtype=torch.float64) + 0.2 * torch.randn(
        n, generator=generator, dtype=torch.float64
    )


def kernel(F, b, quality, relevance=1.0):
    """L = diag(q) S diag(q), written out."""
    n = len(b)
    L = np.zeros((n, n))
    for i, j in itertools.product(range(n), range(n)):
        cosine = float(F[i] @ F[j]) / math.sqrt(float(F[i] @ F[i]) * float(F[j] @ F[j]))
        q = [
            max(float(b[m]), 0.0) if quality == "positive" else math.exp(relevance * float(b[m] / b.abs().max()))
            for m in (i, j)
        ]
        L[i, j] = q[0] * cosine * q[1]
    return L


def fits(counts, probabilities):
    """Chi-square: whether counts by outcome could have these probabilities (99.9 %; the seeds are fixed)."""
    total = sum(counts.values())
    assert set(counts) <= set(probabilities), "an outcome that has no probability was drawn"
    expected = {outcome: total * p for outcome, p in probabilities.items()}
    # Outcomes too rare for the chi-square law count as one.
    rare = [outcome for outcome, number in expected.items() if number < 5]
    cells = [(counts.get(outcome, 0), number) for outcome, number in expected.items() if number >= 5]
    pooled = sum(expected[outcome] for outcome in rare)
    if pooled > 1:
        cells.append((sum(counts.get(outcome, 0) for outcome in rare), pooled))
    statistic = sum((count - number) ** 2 / number for count, number in cells)
    return statistic < chi2.ppf(0.999, len(cells) - 1)


# --- DPP: the most likely set ---


@pytest.mark.parametrize("quality", ["positive", "exp"])
@pytest.mark.parametrize("seed", range(15))
def test_map_is_the_greedy_determinant(quality, seed):
    n, r = [(1, 3), (4, 6), (8, 12), (8, 4)][seed % 4]
    F, b = features(n, r, seed)
    L = kernel(F, b, quality)
    expected = []
    while len(expected) < n:
        best = max(
            (np.linalg.det(L[np.ix_([*expected, j], [*expected, j])]), -j) for j in range(n) if j not in expected
        )
        if best[0] <= 1e-13 * np.prod(np.diag(L)[[*expected, -best[1]]]):
            break
        expected.append(-best[1])
    for k in range(n + 1):
        got = DPP(quality=quality)(SelectionProblem(F @ F.T, b, k)).tolist()
        assert got == expected[:k]
        by_factor = SelectionProblem(factor=F, alignment=b, budget=k)
        assert DPP(quality=quality)(by_factor).tolist() == expected[:k]
        assert "full_gram" not in by_factor.__dict__


def test_map_comes_near_the_best_determinant():
    shares = []
    for seed in range(60):
        F, b = features(9, 12, seed)
        L = kernel(F, b.abs(), "positive")
        index = DPP()(SelectionProblem(F @ F.T, b.abs(), 4)).numpy()
        best = max(np.linalg.det(L[np.ix_(S, S)]) for S in itertools.combinations(range(9), 4))
        shares.append(np.linalg.det(L[np.ix_(index, index)]) / best)
    assert max(shares) <= 1 + 1e-9
    assert np.median(shares) >= 0.95
    assert min(shares) >= math.factorial(4) ** -2  # Civril and Magdon-Ismail 2009: greedy volume within 1 / k!


def test_map_takes_no_duplicate_and_nobody_who_does_not_help():
    F = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0, 0.1, -1.0], dtype=torch.float64)
    assert DPP()(SelectionProblem(F @ F.T, b, 4)).tolist() == [0, 2]
    assert DPP(quality="exp", relevance=0.0)(SelectionProblem(F @ F.T, b, 4)).tolist() == [0, 2]
    assert DPP(quality="exp", relevance=9.0)(SelectionProblem(F @ F.T, b, 1)).tolist() == [0]
    assert DPP()(SelectionProblem(torch.eye(3), -torch.ones(3), 2)).tolist() == []
    assert DPP()(SelectionProblem(torch.zeros(3, 3), torch.ones(3), 2)).tolist() == []


def test_map_in_large_pools_of_low_rank_stops_at_the_rank():
    F, b = features(3000, 40, 0)
    problem = SelectionProblem(factor=F, alignment=b, budget=100)
    index = DPP()(problem)
    assert len(index) == 40
    assert "full_gram" not in problem.__dict__
    assert len(DPP("sample")(SelectionProblem(factor=F, alignment=b, budget=100, generator=seeded()))) == 40


# --- DPP: draws ---


def k_dpp(L, k):
    sets = {S: max(np.linalg.det(L[np.ix_(S, S)]), 0.0) for S in itertools.combinations(range(len(L)), k)}
    total = sum(sets.values())
    return {S: volume / total for S, volume in sets.items() if volume > 1e-12 * total}


@pytest.mark.parametrize(("n", "r", "k"), [(5, 7, 1), (6, 8, 3), (6, 4, 3), (6, 4, 4), (6, 2, 2)])
@pytest.mark.parametrize("source", ["gram", "factor"])
def test_draws_are_a_k_dpp(n, r, k, source):
    F, b = features(n, r, n + r + k)
    given = {"gram": F @ F.T} if source == "gram" else {"factor": F}
    generator, counts = seeded(1), {}
    sampler = DPP("sample", quality="exp")
    for _ in range(DRAWS):
        drawn = sampler(SelectionProblem(alignment=b, budget=k, generator=generator, **given)).tolist()
        counts[tuple(sorted(drawn))] = counts.get(tuple(sorted(drawn)), 0) + 1
    assert fits(counts, k_dpp(kernel(F, b, "exp"), k))


def test_the_chi_square_test_can_fail():
    F, b = features(6, 8, 17)
    generator, counts = seeded(1), {}
    for _ in range(DRAWS):
        drawn = tuple(sorted(torch.randperm(6, generator=generator)[:3].tolist()))
        counts[drawn] = counts.get(drawn, 0) + 1
    assert not fits(counts, k_dpp(kernel(F, b, "exp"), 3))


def test_eigenvectors_are_drawn_rightly_where_elementary_polynomials_overflow():
    """Of 2000 values, half 3 and half 1, e_400 is above 1e430; the threes drawn follow Fisher's noncentral law."""
    values, rng = np.repeat([1.0, 3.0], 1000), np.random.default_rng(0)
    law = nchypergeom_fisher(2000, 1000, 400, 3.0)
    for scale in (1e-200, 1e200):
        drawn = [_eigenvectors_drawn(scale * values, 400, rng.random(2000)) for _ in range(12)]
        assert all(len(set(each)) == 400 for each in drawn)
        threes = np.mean([sum(i >= 1000 for i in each) for each in drawn])
        assert abs(threes - law.mean()) < 4 * law.std() / np.sqrt(12)


def test_draws_come_from_the_problems_generator_only():
    F, b = features(30, 10, 0)
    before = torch.random.get_rng_state()
    for make in (lambda: DPP("sample"), Opus):
        draws = [make()(SelectionProblem(F @ F.T, b, 5, None, seeded(seed))).tolist() for seed in (0, 0, 1)]
        assert draws[0] == draws[1] != draws[2]
        with pytest.raises(ConfigurationError, match="generator=None"):
            make()(SelectionProblem(F @ F.T, b, 5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dpp_refuses():
    for options, message in (
        ({"mode": "exact"}, "allowed are 'map', 'sample'"),
        ({"quality": "loss"}, "allowed are 'positive', 'exp'"),
        ({"relevance": 2.0}, "acts on quality='exp' only"),
        ({"quality": "exp", "relevance": -1.0}, "relevance is -1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            DPP(**options)


# --- OPUS ---


def opus_odds(F, b, k, temperature, redundancy=1.0):
    """Probability of every ordered draw: the softmax of U = b - s sum_S K, one draw after the other."""
    K, b = (F @ F.T).numpy(), b.numpy()
    T = np.argsort(-b, kind="stable")[:k]
    s = redundancy * max(b[T].sum(), 0.0) / K[np.ix_(T, T)].sum()
    tau = temperature * b.std()
    odds = {}
    for order in itertools.permutations(range(len(b)), k):
        p = 1.0
        for step, i in enumerate(order):
            U = b - s * K[:, list(order[:step])].sum(1)
            left = [j for j in range(len(b)) if j not in order[:step]]
            p *= math.exp(U[i] / tau) / sum(math.exp(U[j] / tau) for j in left)
        odds[order] = p
    return odds


@pytest.mark.parametrize(("n", "k", "temperature", "redundancy"), [(4, 1, 0.9, 1.0), (4, 2, 0.9, 1.0), (4, 2, 0.3, 3.0),
                                                                 (4, 3, 2.0, 0.0), (3, 3, 0.9, 1.0)])  # fmt: skip
@pytest.mark.parametrize("source", ["gram", "factor"])
def test_opus_draws_by_the_softmax_of_utilities(n, k, temperature, redundancy, source):
    F, b = features(n, 3, n + k)
    given = {"gram": F @ F.T} if source == "gram" else {"factor": F}
    generator, counts = seeded(2), {}
    draw = Opus(temperature, redundancy)
    for _ in range(DRAWS):
        order = tuple(draw(SelectionProblem(alignment=b, budget=k, generator=generator, **given)).tolist())
        counts[order] = counts.get(order, 0) + 1
    odds = opus_odds(F, b, k, temperature, redundancy)
    assert sum(odds.values()) == pytest.approx(1)
    assert fits(counts, odds)


def test_opus_without_heat_is_greedy_on_its_utility():
    for seed in range(20):
        F, b = features(8, 5, seed)
        K = F @ F.T
        for k in (1, 3, 8):
            T = torch.argsort(-b, stable=True)[:k]
            s = max(float(b[T].sum()), 0.0) / float(K[T][:, T].sum())
            expected = []
            for _ in range(k):
                U = b - s * K[:, expected].sum(1)
                U[expected] = -math.inf
                expected.append(int(U.argmax()))
            assert Opus(temperature=0.0)(SelectionProblem(K, b, k, None, seeded())).tolist() == expected


def test_opus_is_calibrated():
    """The penalty of the full set of best candidates equals their alignment on average, at every scale."""
    for scale in (1e-6, 1.0, 1e6):
        F, b = features(10, 30, 0)
        K, b = scale**2 * F @ F.T, scale * b.abs()
        T = torch.argsort(-b, stable=True)[:4]
        s = _common_weight(SelectionProblem(K, b, 4))
        assert float((s * K[T][:, T].sum(1)).mean()) == pytest.approx(float(b[T].mean()), rel=1e-12)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "zero"])
@pytest.mark.parametrize(("loss", "target"), [(2.0**-20, 1.0), (2.0**20, 1.0), (1.0, 2.0**-30), (2.0**30, 2.0**30)])
def test_no_scale_changes_a_draw(shape, loss, target):
    """Contributions times `loss`, target gradient times `target`."""
    ugly = ugly_problem(shape, 9, seeded(3))
    for draw in (Opus(), DPP("sample"), DPP("sample", "exp")):
        plain = draw(SelectionProblem(ugly.gram, ugly.alignment, 4, None, seeded(5)))
        scaled = SelectionProblem(loss**2 * ugly.gram, loss * target * ugly.alignment, 4, None, seeded(5))
        assert draw(scaled).tolist() == plain.tolist()


def test_opus_where_nothing_tells_candidates_apart():
    generator, counts = seeded(0), dict.fromkeys(range(4), 0)
    for _ in range(DRAWS):
        counts[int(Opus()(SelectionProblem(torch.eye(4), torch.zeros(4), 1, None, generator)))] += 1
    assert fits(counts, dict.fromkeys(range(4), 0.25))
    for b in (torch.ones(4), -torch.ones(4), torch.zeros(4)):
        assert Opus(0.0)(SelectionProblem(torch.eye(4), b, 2, None, seeded())).tolist() == [0, 1]


def test_gumbel_has_the_law_of_its_name():
    draws = gumbel(seeded(), 20000).numpy()
    assert np.isfinite(draws).all()
    edges = np.linspace(-1.5, 4, 12)
    cumulative = np.exp(-np.exp(-edges))
    cells = np.diff(np.concatenate([[0.0], cumulative, [1.0]]))
    counts = np.histogram(draws, np.concatenate([[-np.inf], edges, [np.inf]]))[0]
    assert fits(dict(enumerate(counts.tolist())), dict(enumerate(cells.tolist())))


@pytest.mark.parametrize("options", [{"temperature": -0.1}, {"redundancy": -1.0}, {"temperature": float("nan")}])
def test_opus_refuses(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Opus(**options)
