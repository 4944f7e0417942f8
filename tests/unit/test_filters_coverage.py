"""Facility location and clusters against plain versions with all distances written out."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from ftw.errors import ConfigurationError, UnknownComponentError
from ftw.filters import OMP, All, Cluster, FacilityLocation, Random, TopK
from ftw.filters.cluster import _shares
from ftw.problem import SelectionProblem
from ftw.testing import SHAPES, ugly_problem


def pool(n, d, seed, **options):
    C = np.random.default_rng(seed).standard_normal((n, d))
    return C, SelectionProblem(torch.from_numpy(C @ C.T), torch.from_numpy(C[:, 0].copy()), **options)


def apart(C):
    return np.sqrt(((C[:, None] - C[None]) ** 2).sum(-1))


# --- Facility location ---


def covered(D, S, top):
    return sum(top - D[i, list(S)].min() for i in range(len(D))) if len(S) else 0.0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [1, 2, 6, 30])
def test_facility_location_is_plain_greedy(n, seed):
    """CRAIG, equation 9: max sum_i max_{j in S} (d_0 - d_ij), the gain of every candidate computed at every choice."""
    C, problem = pool(n, 4, seed, budget=n)
    D = apart(C)
    top, expected = 2 * np.linalg.norm(C, axis=1).max(), []
    for _ in range(n):
        gains = [-math.inf if j in expected else covered(D, [*expected, j], top) for j in range(n)]
        # Of two that are nearest to each other either gains the same: the first, whatever rounding says.
        expected.append(int(np.flatnonzero(np.array(gains) >= max(gains) - 1e-12 * top * n)[0]))
    assert FacilityLocation()(problem).tolist() == expected
    for k in range(n):
        assert FacilityLocation()(pool(n, 4, seed, budget=k)[1]).tolist() == expected[:k]
    by_factor = SelectionProblem(factor=torch.from_numpy(C), alignment=torch.zeros(n), budget=n)
    assert FacilityLocation()(by_factor).tolist() == expected
    assert "full_gram" not in by_factor.__dict__


def test_facility_location_keeps_greedys_promise():
    for seed in range(30):
        C, problem = pool(9, 3, seed, budget=3)
        D = apart(C)
        top = 2 * np.linalg.norm(C, axis=1).max()
        reached = covered(D, FacilityLocation()(problem).tolist(), top)
        best = max(covered(D, S, top) for S in itertools.combinations(range(9), 3))
        assert (1 - 1 / math.e) * best <= reached <= best * (1 + 1e-12)


def test_facility_location_needs_one_of_each_kind():
    C = np.random.default_rng(0).standard_normal((3, 5))[[0, 1, 0, 2, 1, 2, 2, 2]]
    problem = SelectionProblem(torch.from_numpy(C @ C.T), torch.zeros(8), 8)
    index = FacilityLocation()(problem).tolist()
    assert sorted(index) == [0, 1, 3]  # the first of each kind, and nobody twice
    assert index[0] == 3 or len(index) == 3
    same = SelectionProblem(torch.ones(4, 4), torch.zeros(4), 3)
    assert FacilityLocation()(same).tolist() == [0]
    assert FacilityLocation()(SelectionProblem(torch.zeros(4, 4), torch.zeros(4), 3)).tolist() == []


@pytest.mark.parametrize("shape", SHAPES)
def test_facility_location_does_not_depend_on_scale_or_target(shape):
    ugly = ugly_problem(shape, 9, torch.Generator().manual_seed(2))
    plain = FacilityLocation()(SelectionProblem(ugly.gram, ugly.alignment, 4)).tolist()
    assert FacilityLocation()(SelectionProblem(2.0**-50 * ugly.gram, -ugly.alignment, 4)).tolist() == plain


# --- Clusters ---


def blobs(sizes, seed=0, d=6):
    rng = np.random.default_rng(seed)
    centres = 20 * rng.standard_normal((len(sizes), d))
    kind = np.repeat(np.arange(len(sizes)), sizes)
    kind = kind[rng.permutation(len(kind))]
    return centres[kind] + rng.standard_normal((len(kind), d)), kind


@pytest.mark.parametrize("source", ["gram", "factor"])
def test_clusters_are_those_of_k_means_and_send_in_proportion(source):
    for seed in range(10):
        C, kind = blobs((20, 12, 8), seed)
        b = torch.from_numpy(np.random.default_rng(seed).standard_normal(40))
        given = {"gram": torch.from_numpy(C @ C.T)} if source == "gram" else {"factor": torch.from_numpy(C)}
        index = Cluster(3)(SelectionProblem(alignment=b, budget=10, **given)).tolist()
        assert np.bincount(kind[index]).tolist() == [5, 3, 2]
        _, labels = kmeans2(C, C[[np.flatnonzero(kind == k)[0] for k in range(3)]], minit="matrix")
        for label in range(3):
            members = np.flatnonzero(labels == label)
            sent = [i for i in index if labels[i] == label]
            assert sent == sorted(members, key=lambda i: (-float(b[i]), i))[: len(sent)]
        assert kind[index].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 0]  # in turn, the larger cluster first


def test_clusters_of_a_gram_and_of_its_factor_are_the_same():
    for seed in range(10):
        C, problem = pool(40, 4, seed, budget=12)
        by_factor = SelectionProblem(factor=torch.from_numpy(C), alignment=problem.alignment, budget=12)
        for clusters in (3, 8):
            assert Cluster(clusters)(problem).tolist() == Cluster(clusters)(by_factor).tolist()
        # Everyone twice: a distance of 0 whose square rounds to either side of it.
        twice = torch.from_numpy(np.concatenate([C, C]) * 0.1)
        b = torch.cat([problem.alignment, problem.alignment - 10])
        K = twice @ twice.T * (1 + 1e-15 * (1 - torch.eye(80, dtype=torch.float64)))
        index = Cluster(8)(SelectionProblem(K, b, 24)).tolist()
        assert index == Cluster(8)(SelectionProblem(factor=twice, alignment=b, budget=24)).tolist()


def test_cluster_with_omp_towards_centroids_is_tagcos():
    """Within each cluster an orthogonal matching pursuit to the cluster's mean (Zhang et al. 2024)."""
    for seed in range(10):
        C, kind = blobs((16, 8), seed)
        b = torch.zeros(24, dtype=torch.float64)  # no target anywhere in it
        problem = SelectionProblem(torch.from_numpy(C @ C.T), b, 6)
        index = Cluster(2, within=OMP(ridge=0.1, tolerance=0.0), towards="centroid")(problem).tolist()
        for cluster, share in ((0, 4), (1, 2)):
            members = np.flatnonzero(kind == cluster)
            own, centre = C[members], C[members].mean(0)
            alone = SelectionProblem(torch.from_numpy(own @ own.T), torch.from_numpy(own @ centre), share)
            expected = members[OMP(ridge=0.1, tolerance=0.0)(alone).numpy()].tolist()
            assert [i for i in index if kind[i] == cluster] == expected


def test_shares_add_up_and_stay_within_their_cluster():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(1, 20, rng.integers(1, 8))
        for total in range(int(sizes.sum()) + 1):
            shares = _shares(sizes, total)
            exact = total * sizes / sizes.sum()
            assert shares.sum() == total
            assert (np.abs(shares - exact) < 1).all()
            assert (shares <= sizes).all()
    assert _shares(np.array([2, 2, 2]), 4).tolist() == [2, 1, 1]


def test_one_cluster_and_as_many_as_candidates():
    _, problem = pool(7, 4, 0, budget=3)
    assert Cluster(1)(problem).tolist() == TopK()(problem).tolist()
    # a cluster for each candidate: all of one size, so that shares go by position
    assert Cluster(100)(problem).tolist() == [0, 1, 2]
    _, problem = pool(7, 4, 0, budget=0)
    assert Cluster()(problem).tolist() == []


def test_the_default_number_of_clusters_is_the_root_of_k():
    C, kind = blobs((10, 10, 10))
    problem = SelectionProblem(torch.from_numpy(C @ C.T), torch.zeros(30), 9)
    assert np.bincount(kind[Cluster()(problem).tolist()]).tolist() == [3, 3, 3]


def test_cluster_hands_on_generator_and_columns():
    C, _ = blobs((10, 10))
    K, loss = torch.from_numpy(C @ C.T), np.random.default_rng(0).random(20)
    draw = Cluster(2, within=Random)
    drawn = [draw(SelectionProblem(K, torch.zeros(20), 8, None, torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    by_loss = Cluster(1, within="max_loss")
    assert by_loss.columns == ("loss",)
    found = by_loss(SelectionProblem(K, torch.zeros(20), 4, extras={"loss": loss}))
    assert found.tolist() == np.argsort(-loss)[:4].tolist()


def test_cluster_refuses():
    for options, error, message in (
        ({"clusters": 0}, ConfigurationError, "integer of at least 1"),
        ({"clusters": 2.0}, ConfigurationError, "integer of at least 1"),
        ({"towards": "mean"}, ConfigurationError, "'target', 'centroid'"),
        ({"within": All}, ConfigurationError, "ignores budgets"),
        ({"within": "topkk"}, UnknownComponentError, "did you mean 'topk'"),
    ):
        with pytest.raises(error, match=message):
            Cluster(**options)
