"""Matching pursuits and GREATS against references in feature space that know C and g, not K and b."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from ftw.errors import ConfigurationError
from ftw.filters import OMP, Greats, Greedy, TopK
from ftw.filters.greedy import GAINS
from ftw.filters.refit import non_negative
from ftw.problem import SelectionProblem
from ftw.testing import SHAPES, ugly_problem


def features(n, d, seed, shape="plain"):
    """C (d, n) and g (d,)."""
    rng = np.random.default_rng(seed)
    C, g = rng.standard_normal((d, n)), rng.standard_normal(d)
    if shape == "uneven":
        C *= 10.0 ** rng.uniform(-1, 1, n)
    if shape == "common":  # gradients of one model share a direction
        C += 2 * g[:, None]
    if shape == "duplicates":
        C[:, n - n // 2 :] = C[:, : n // 2]
    return C, g


def posed(C, g, k, scale=1.0):
    return SelectionProblem(torch.from_numpy(scale * C.T @ C), torch.from_numpy(scale * C.T @ g), k)


# --- The refit ---


@pytest.mark.parametrize("shape", SHAPES)
def test_non_negative_refit_is_nnls(shape):
    """Against scipy's NNLS in feature space: the same residual, which is unique where the weights are not."""
    for seed, n in itertools.product(range(6), (1, 2, 5, 12)):
        generator = torch.Generator().manual_seed(seed)
        ugly = ugly_problem(shape, n, generator)
        if shape == "out_of_range":
            continue  # no feature space has this b, and without a bound there may be no minimum
        K, b = ugly.gram.numpy(), ugly.alignment.numpy()
        weights = non_negative(K, b, np.zeros(n))
        assert (weights >= 0).all()
        values, vectors = np.linalg.eigh(K)
        kept = values > 1e-12 * max(values[-1], 1e-300)
        root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
        expected = nnls(root, vectors[:, kept].T @ b / np.sqrt(values[kept]))[0] if kept.any() else np.zeros(n)
        reached, best = (0.5 * w @ K @ w - b @ w for w in (weights, expected))
        assert reached <= best + 1e-9 * abs(best)


# --- Greedy on a factor ---


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("shape", ["plain", "uneven", "common", "duplicates"])
def test_greedy_is_the_same_from_a_factor_and_forms_no_gram(shape, gain):
    for seed in range(5):
        C, g = features(40, 12, seed, shape)
        problem = SelectionProblem(factor=torch.from_numpy(C.T.copy()), alignment=torch.from_numpy(C.T @ g), budget=10)
        assert Greedy(gain)(problem).tolist() == Greedy(gain)(posed(C, g, 10)).tolist()
        assert "full_gram" not in problem.__dict__


def test_a_factor_of_rank_r_needs_no_more_than_r_candidates():
    C, g = features(200, 6, 0)
    problem = SelectionProblem(factor=torch.from_numpy(C.T.copy()), alignment=torch.from_numpy(C.T @ g), budget=100)
    index = Greedy()(problem).numpy()
    assert len(index) <= 6
    weights = nnls(C[:, index], g)[0]
    assert np.linalg.norm(C[:, index] @ weights - g) <= 1e-9 * np.linalg.norm(g)


def test_greedy_with_room_for_all_ends_at_the_non_negative_optimum():
    """Whom it dropped on the way it takes up again where the optimum has them: else it would end above."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n, d = int(rng.integers(2, 13)), int(rng.integers(2, 8))
        C, g = rng.integers(-3, 4, (d, n)).astype(float), rng.integers(-3, 4, d).astype(float)
        index = Greedy()(posed(C, g, n)).numpy()
        left = nnls(C[:, index], g)[1] if len(index) else np.linalg.norm(g)
        assert left == pytest.approx(nnls(C, g)[1], abs=1e-9)


def test_greedy_passes_over_what_is_rounding_and_takes_what_is_not():
    """Candidate 1 helps as 0 does, 1e-8 as long: what 0 leaves of it is rounding, and of 2 a small but true part."""
    rng = np.random.default_rng(0)
    rounding = 0
    for _ in range(50):
        length, short = rng.uniform(0.5, 2, 2) * (1.0, 1e-8)
        C = np.array([[length, short, 0.0], [0.0, 0.0, 1.0], [0.0, 0.3 * short, 0.0]])
        K, b = C.T @ C, C.T @ np.array([1.0, 1e-17, 0.0])
        rounding += b[1] - K[0, 1] * (b[0] / K[0, 0]) > 0
        assert Greedy()(SelectionProblem(torch.from_numpy(K), torch.from_numpy(b), 3)).tolist() == [0, 2]
    assert rounding


def best_drop(C, g, index):
    """max b'w - 1/2 w'Kw over w >= 0 on the index, as a fall of 1/2 ||C w - g||^2."""
    return (g @ g - nnls(C[:, index], g)[1] ** 2) / 2 if len(index) else 0.0


def test_greedy_comes_near_the_best_set_there_is():
    """Against exhaustive search, as `benchmarks/filters.py` prints it: share of the best possible drop."""
    shares = []
    for seed in range(120):
        C, g = features(9, 12, seed, ("plain", "common", "uneven")[seed % 3])
        index = Greedy()(posed(C, g, 3)).numpy()
        best = max(best_drop(C, g, list(S)) for S in itertools.combinations(range(9), 3))
        if best > 1e-9 * (g @ g):  # otherwise nobody helps
            shares.append(best_drop(C, g, index) / best)
    assert len(shares) > 100
    assert max(shares) <= 1 + 1e-9
    assert np.median(shares) >= 0.999
    assert np.quantile(shares, 0.1) >= 0.9
    assert min(shares) >= 1 - 1 / np.e  # greedy's guarantee on submodular objectives, which this one is not


def forward(C, g, k):
    """Whoever makes the refitted drop largest, and away with those whose weight falls to 0: every one is tried."""
    chosen, reached = [], 0.0
    while len(chosen) < k:
        drops = [best_drop(C, g, [*chosen, j]) if j not in chosen else -np.inf for j in range(len(C.T))]
        if max(drops) <= reached + 1e-9 * (g @ g):
            break
        best = next(j for j, drop in enumerate(drops) if drop >= max(drops) * (1 - 1e-10))
        weights, reached = nnls(C[:, [*chosen, best]], g)[0], max(drops)
        chosen = [j for j, w in zip([*chosen, best], weights, strict=True) if w > 0]
    return chosen


@pytest.mark.parametrize("shape", ["plain", "uneven", "common", "duplicates"])
def test_greedy_by_refits_is_forward_selection_on_the_objective(shape):
    returned = 0
    for seed, d, k in itertools.product(range(12), (5, 14), (1, 3, 6, 12)):
        C, g = features(12, d, seed, shape)
        index = Greedy("refit")(posed(C, g, k)).tolist()
        expected = forward(C, g, k)
        assert best_drop(C, g, index) == pytest.approx(best_drop(C, g, expected), rel=1e-9)
        if len(expected) < d:  # beyond the rank several sets do
            assert index == expected
            returned += len(expected)
    assert returned > 50


def test_a_refit_sees_what_a_candidate_alone_does_not():
    shares = []
    for seed in range(60):
        C, g = features(9, 12, seed, "common")
        one, other = (best_drop(C, g, Greedy(gain)(posed(C, g, 3)).numpy()) for gain in GAINS)
        shares.append(other / one if one else 1.0)
    assert max(shares) > 1.001
    assert np.mean(shares) >= 1.0


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize(("scale", "size"), [(1e-300, 1.0), (1.0, 1e300), (1e-150, 1e150), (1e290, 1e-290)])
def test_greedy_at_the_ends_of_float64(gain, scale, size):
    for seed in range(5):
        C, g = features(9, 12, seed, "uneven")
        K, b = torch.from_numpy(C.T @ C), torch.from_numpy(C.T @ g)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            far = Greedy(gain)(SelectionProblem(scale * K, size * b, 4))
        assert far.tolist() == Greedy(gain)(SelectionProblem(K, b, 4)).tolist()


def test_greedy_refuses_another_gain():
    with pytest.raises(ConfigurationError, match="'alone', 'refit'"):
        Greedy("most")


# --- OMP ---


def omp_in_feature_space(C, g, k, ridge, signed=False, tolerance=0.0):
    """GRAD-MATCH, algorithm 2: argmax of the residual's inner products, then min ||C w - g||^2 + lambda ||w||^2."""
    lam = ridge * np.mean((C * C).sum(0))
    X, w, first = [], np.zeros(0), np.abs(C.T @ g).max()
    while len(X) < k:
        r = C.T @ (g - C[:, X] @ w)
        r = np.abs(r) if signed else r
        r[X] = -np.inf
        j = int(np.argmax(r))
        if r[j] <= max(tolerance, 1e-12) * first:
            break
        X.append(j)
        A = np.vstack([C[:, X], np.sqrt(lam) * np.eye(len(X))])
        y = np.concatenate([g, np.zeros(len(X))])
        w = np.linalg.lstsq(A, y, rcond=None)[0] if signed else nnls(A, y)[0]
    return X


@pytest.mark.parametrize("shape", ["plain", "uneven", "common"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.5])
def test_omp_is_grad_match(shape, signed, ridge):
    for seed, n in itertools.product(range(10), (1, 2, 7, 15)):
        C, g = features(n, 20, seed, shape)
        for k in {1, n // 2, n}:
            got = OMP(ridge, signed, tolerance=1e-6)(posed(C, g, k, scale=1e-5)).tolist()
            assert got == omp_in_feature_space(C, g, k, ridge, signed, 1e-6)


def test_omp_reads_a_factor():
    C, g = features(60, 20, 3)
    problem = SelectionProblem(factor=torch.from_numpy(C.T.copy()), alignment=torch.from_numpy(C.T @ g), budget=15)
    assert OMP()(problem).tolist() == omp_in_feature_space(C, g, 15, 0.5, tolerance=1e-4)
    assert "full_gram" not in problem.__dict__


def test_omp_and_greedy_differ_as_they_say():
    long_and_off = np.array([[1.0, 3.0], [0.0, 9.0]])
    g = np.array([1.0, 0.0])
    assert OMP()(posed(long_and_off, g, 1)).tolist() == [1]
    assert Greedy()(posed(long_and_off, g, 1)).tolist() == [0]
    # the first choice becomes superfluous: greedy gives it back, OMP keeps it
    C = np.array([[2.0, 3.0, -1.0], [-2.0, -3.0, 3.0], [-3.0, 1.0, -2.0]])
    g = np.array([3.0, 0.0, -1.0])
    assert Greedy()(posed(C, g, 3)).tolist() == [1, 2]
    assert OMP(ridge=0.0)(posed(C, g, 3)).tolist() == omp_in_feature_space(C, g, 3, 0.0)
    assert sorted(OMP(ridge=0.0)(posed(C, g, 3)).tolist()) == [0, 1, 2]


def test_omp_ends_at_its_tolerance():
    C, g = features(30, 10, 0)
    sizes = [len(OMP(0.0, tolerance=t)(posed(C, g, 30))) for t in (0.9, 0.3, 0.0)]
    assert sizes == [len(omp_in_feature_space(C, g, 30, 0.0, tolerance=t)) for t in (0.9, 0.3, 0.0)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_omp_with_signed_weights_takes_what_points_away():
    C, g = np.array([[1.0, -5.0]]), np.array([1.0])
    assert OMP()(posed(C, g, 1)).tolist() == [0]
    assert OMP(signed=True)(posed(C, g, 1)).tolist() == [1]


def test_omp_finds_nothing_where_there_is_nothing():
    for K, b in ((torch.zeros(3, 3), torch.ones(3)), (torch.eye(3), torch.zeros(3)), (torch.eye(3), -torch.ones(3))):
        assert OMP()(SelectionProblem(K, b, 2)).tolist() == []
    unmoved = SelectionProblem(torch.diag(torch.tensor([0.0, 1.0])), torch.tensor([5.0, 1.0]), 2)
    assert OMP()(unmoved).tolist() == OMP(signed=True)(unmoved).tolist() == [1]


@pytest.mark.parametrize("options", [{"ridge": -1.0}, {"tolerance": -1e-3}, {"ridge": float("nan")}])
def test_omp_refuses(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        OMP(**options)


# --- GREATS ---


def greats_by_the_paper(grads, g, rate, k, mean):
    """U(z | S) = lr grad_z . g - lr^2 sum_S grad_z . grad_j, for updates that sum (or average) gradients."""
    step = rate / max(k, 1) if mean else rate
    S = []
    for _ in range(k):
        gains = [
            -np.inf if z in S else step * grads[z] @ g - step**2 * sum(grads[z] @ grads[j] for j in S)
            for z in range(len(grads))
        ]
        S.append(int(np.argmax(gains)))
    return S


@pytest.mark.parametrize("rate", [1e-5, 1e-2, 0.3, 10.0])
@pytest.mark.parametrize("mean", [False, True])
def test_greats_is_the_papers_greedy(rate, mean):
    """Geometry "vanilla": c = grad / n, b = lr c.g, K = lr c.c."""
    answers = set()
    for seed, n in itertools.product(range(10), (1, 4, 9)):
        C, g = features(n, 6, seed, "common")
        grads = C.T
        c = grads / n
        for k in range(n + 1):
            b, K = torch.from_numpy(rate * c @ g), torch.from_numpy(rate * c @ c.T)
            problem = SelectionProblem(K, b, k)
            got = Greats(rate, "mean" if mean else "sum")(problem).tolist()
            assert got == greats_by_the_paper(grads, g, rate, k, mean)
            by_column = SelectionProblem(K, b, k, extras={"learning_rate": [rate] * n})
            assert Greats(reduction="mean" if mean else "sum")(by_column).tolist() == got
            answers.add(got == TopK()(problem).tolist())
    assert (False in answers) == (rate > 1e-5)  # with a rate of fine-tuning the interaction decides nothing


def test_greats_by_name_needs_the_rate():
    assert Greats().columns == ("learning_rate",)
    assert Greats(1e-3).columns == ()
    with pytest.raises(ConfigurationError, match="'greats' needs the column 'learning_rate'"):
        Greats()(SelectionProblem(torch.eye(2), torch.ones(2), 1))
    with pytest.raises(ConfigurationError, match="learning_rate is -1"):
        Greats(-1.0)
    with pytest.raises(ConfigurationError, match="'sum', 'mean'"):
        Greats(reduction="none")


def test_greats_with_the_optimizers_curvature_turns_to_the_other_direction():
    C = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.6]])
    g = np.array([1.0, 0.6])
    assert Greats(1e-5)(posed(C, g, 2)).tolist() == [0, 1]
    assert Greats(1.0, "mean")(posed(C, g, 2)).tolist() == [0, 2]
