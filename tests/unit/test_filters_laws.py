"""Laws that all deterministic filters share: names, scales, copies and positions of candidates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw.filters import (
    DPP,
    IFD,
    OMP,
    Chain,
    Cluster,
    FacilityLocation,
    GradNorm,
    Greats,
    Greedy,
    MaxLoss,
    Quota,
    RhoLoss,
    Threshold,
    TopK,
)
from ftw.problem import SelectionProblem
from ftw.testing import SHAPES, ugly_problem

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SCALE_FREE = {
    "chain": Chain(),
    "cluster": Cluster(),
    "cluster_tagcos": Cluster(2, "omp", "centroid"),
    "dpp": DPP(),
    "dpp_exp": DPP(quality="exp", relevance=3.0),
    "facility_location": FacilityLocation(),
    "grad_norm": GradNorm(),
    "greedy": Greedy(),
    "greedy_refit": Greedy("refit"),
    "ifd": IFD(),
    "max_loss": MaxLoss(),
    "omp": OMP(),
    "omp_signed": OMP(0.1, signed=True),
    "quota": Quota(),
    "rho_loss": RhoLoss(),
    "threshold": Threshold(),
    "topk": TopK(),
    "topk_cosine": TopK("cosine"),
    "topk_gain": TopK("gain"),
}
DETERMINISTIC = SCALE_FREE | {"greats": Greats(), "greats_mean": Greats(0.01, "mean")}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def columns(n, seed):
    """Distinct numbers, so that no tie depends on positions, and labels."""
    draws = generator(seed)
    named = {
        name: torch.rand(n, generator=draws, dtype=torch.float64) + 0.1
        for name in ("loss", "reference_loss", "loss_with_prompt", "loss_without_prompt")
    }
    labels = [("web", "code", "book")[i] for i in torch.randint(0, 3, (n,), generator=draws).tolist()]
    return named | {"source": labels, "learning_rate": torch.full((n,), 1e-3, dtype=torch.float64)}


def posed(ugly, budget, extras, order=None, loss=1.0, target=1.0):
    order = torch.arange(ugly.size) if order is None else order
    taken = {name: [values[i] for i in order.tolist()] for name, values in extras.items()}
    K, b = ugly.gram[order][:, order], ugly.alignment[order]
    return SelectionProblem(loss**2 * K, loss * target * b, budget, extras=taken)


# Clusters of one size and pairs of nearest candidates are ties: see the next test for these.
@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if not name.startswith(("cluster", "facility"))])
@QUICK
@given(n=st.integers(1, 16), seed=st.integers(0, 10**6), data=st.data())
def test_renaming_candidates_renames_the_picks(name, n, seed, data):
    filter, ugly = DETERMINISTIC[name], ugly_problem("well_posed", n, generator(seed))
    extras, budget = columns(n, seed), data.draw(st.integers(0, n))
    order = torch.randperm(n, generator=generator(seed + 1))
    plain = filter(posed(ugly, budget, extras)).tolist()
    renamed = order[filter(posed(ugly, budget, extras, order))].tolist()
    if name == "topk_gain":  # nothing is gained with a harmful candidate: these are equal
        helps = ugly.alignment > 0
        assert len(renamed) == len(plain) == budget
        plain, renamed = ([i for i in index if helps[i]] for index in (plain, renamed))
    assert renamed == plain


def test_clusters_and_facilities_follow_a_renaming_where_nothing_is_equal():
    for seed in range(20):
        # far groups of sizes 5, 4 and 3, each with a member nearest to its middle
        draws = generator(seed)
        kind = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
        C = 30 * torch.randn(3, 8, generator=draws, dtype=torch.float64)[kind]
        C += torch.randn(12, 8, generator=draws, dtype=torch.float64)
        b = C @ torch.randn(8, generator=draws, dtype=torch.float64)
        order = torch.randperm(12, generator=draws)
        for filter, k in (
            (Cluster(3), 12),
            (Cluster(3), 7),
            (Cluster(3, "omp", "centroid"), 7),
            (FacilityLocation(), 3),
        ):
            plain = filter(SelectionProblem(C @ C.T, b, k)).tolist()
            renamed = filter(SelectionProblem((C @ C.T)[order][:, order], b[order], k))
            assert order[renamed].tolist() == plain


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_scale_of_loss_or_target_changes_the_picks(name, shape):
    filter, ugly, extras = SCALE_FREE[name], ugly_problem(shape, 9, generator(3)), columns(9, 0)
    for budget in (2, 5, 9):
        plain = filter(posed(ugly, budget, extras)).tolist()
        for loss, target in ((2.0**-25, 1.0), (2.0**25, 1.0), (1.0, 2.0**-40), (1.0, 2.0**40), (2.0**20, 2.0**-60)):
            assert filter(posed(ugly, budget, extras, loss=loss, target=target)).tolist() == plain


@pytest.mark.parametrize("name", ["greedy", "greedy_refit", "dpp", "dpp_exp", "facility_location", "chain"])
@pytest.mark.parametrize("seed", range(5))
def test_a_copy_of_a_chosen_candidate_is_not_chosen(name, seed):
    ugly = ugly_problem("duplicates", 12, generator(seed))
    index = SCALE_FREE[name](posed(ugly, 12, columns(12, seed))).tolist()
    assert index
    assert len({i % 6 for i in index}) == len(index)
    assert all(i < 6 for i in index)  # of two copies the first


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_equal_candidates_go_by_position(name):
    """The same orthogonal contributions, alignments and columns for all."""
    n, filter = 8, DETERMINISTIC[name]
    extras = {column: torch.ones(n, dtype=torch.float64) for column in columns(1, 0)} | {"source": list("abcdefgh")}
    K, b = torch.eye(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    assert filter(SelectionProblem(K, b, 4, extras=extras)).tolist() == list(range(4))
    if name != "quota":  # which leaves out at most a label, here as many as candidates
        assert filter(SelectionProblem(K, b, 0, extras=extras)).tolist() == []


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("shape", ["zero", "harmful"])
def test_nothing_useful_is_no_error(name, shape):
    ugly = ugly_problem(shape, 6, generator(0))
    index = DETERMINISTIC[name](posed(ugly, 3, columns(6, 0))).tolist()
    if name in ("greedy", "greedy_refit", "omp", "dpp", "threshold", "chain"):
        assert index == []


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_masses_play_no_part(name):
    """A contribution holds its mass already; counting it twice would favour long samples."""
    ugly, extras = ugly_problem("well_posed", 9, generator(0)), columns(9, 0)
    plain = posed(ugly, 4, extras)
    heavy = SelectionProblem(ugly.gram, ugly.alignment, 4, torch.linspace(0.1, 3.0, 9), extras=plain.extras)
    assert DETERMINISTIC[name](heavy).tolist() == DETERMINISTIC[name](plain).tolist()
