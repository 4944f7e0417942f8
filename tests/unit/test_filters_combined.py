"""Filters made of filters: chains and quotas."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from ftw.errors import ConfigurationError, UnknownComponentError
from ftw.filters import All, Chain, Greedy, MaxLoss, Quota, Random, Threshold, TopK
from ftw.problem import SelectionProblem


def pool(n, k, seed=0, gram=True, **options):
    rng = np.random.default_rng(seed)
    C = rng.standard_normal((n, 8))
    b = torch.from_numpy(C @ rng.standard_normal(8))
    return SelectionProblem(torch.from_numpy(C @ C.T) if gram else None, b, k, **options)


# --- Chain ---


@pytest.mark.parametrize("seed", range(10))
def test_a_chain_is_its_filters_one_after_the_other(seed):
    problem = pool(20, 4, seed)
    for keep, number in ((2.0, 8), (2.3, 10), (9, 9), (1, 4), (99, 20), (50.0, 20), (1.0, 4)):
        shortlist = TopK()(SelectionProblem(problem.gram, problem.alignment, number)).sort().values
        K, b = problem.gram[shortlist][:, shortlist], problem.alignment[shortlist]
        expected = shortlist[Greedy()(SelectionProblem(K, b, 4))].tolist()
        assert Chain(["topk", "greedy"], keep=[keep])(problem).tolist() == expected
    assert Chain()(problem).tolist() == Chain([TopK, Greedy()], [2.0])(problem).tolist()
    assert Chain(["greedy"], [])(problem).tolist() == Greedy()(problem).tolist()


def test_three_stages_and_their_ties():
    problem = SelectionProblem(None, torch.zeros(9), 2, extras={"loss": [1, 1, 5, 5, 5, 5, 1, 1, 5]})
    assert Chain([MaxLoss, TopK, "threshold"], [3, 2.0])(problem).tolist() == []
    assert Chain([MaxLoss, TopK, TopK], [4, 1.5])(problem).tolist() == [2, 3]
    # Equal for the last filter: by position in the pool, not by what an earlier filter thought.
    problem = SelectionProblem(None, torch.zeros(4), 1, extras={"loss": [1, 2, 3, 4]})
    assert Chain([MaxLoss, TopK], [3])(problem).tolist() == [1]


def test_a_chain_forms_no_more_of_k_than_its_dear_filter_reads():
    problem, asked = pool(30, 3), []

    def source(index):
        asked.append(index)
        return problem.gram if index is None else problem.gram[index][:, index]

    lazy = SelectionProblem(source, problem.alignment, 3)
    assert Chain()(lazy).tolist() == Chain()(problem).tolist()
    assert [None if index is None else len(index) for index in asked] == [6]


def test_a_chain_needs_what_its_filters_need():
    assert Chain().needs_gram
    assert Chain().honours_budget
    assert not Chain(["topk", "threshold"]).needs_gram
    assert Chain([TopK("cosine"), "threshold"]).needs_gram
    assert Chain(["rho_loss", "max_loss", "topk"], [2, 2]).columns == ("loss", "reference_loss")
    kept = Chain(["topk", "all"], [6])
    assert not kept.honours_budget
    assert sorted(kept(pool(20, 4)).tolist()) == sorted(TopK()(pool(20, 6)).tolist())


def test_a_chain_ends_where_nobody_is_left():
    nobody = SelectionProblem(torch.eye(3), -torch.ones(3), 2)
    assert Chain(["threshold", "greedy"])(nobody).tolist() == []


@pytest.mark.parametrize(
    ("filters", "keep", "message"),
    [
        ([], [], "at least one filter"),
        ("topk", [], "at least one filter"),
        (["topk", "greedy"], [], "one keep for each but the last"),
        (["topk"], [2.0], "one keep for each but the last"),
        (["topk", "greedy"], [0.5], "keep holds 0.5"),
        (["topk", "greedy"], [0], "keep holds 0"),
        (["topk", "greedy"], [True], "keep holds True"),
        (["topk", "greedy"], [float("inf")], "keep holds inf"),
    ],
)
def test_chain_refuses(filters, keep, message):
    with pytest.raises(ConfigurationError, match=message):
        Chain(filters, keep)
    with pytest.raises(UnknownComponentError, match="did you mean 'greedy'"):
        Chain(["topk", "gredy"])


# --- Quota ---

SOURCES = ["web", "web", "code", "web", "book", "code", "web", "web", "book", "web"]


def best_under(b, labels, k, at_most, at_least):
    """Exhaustively: most picks first, then the largest sum of b."""
    sets = [
        S
        for size in range(k + 1)
        for S in itertools.combinations(range(len(b)), size)
        if all(Counter(labels[i] for i in S)[label] <= share * k + 1e-9 for label, share in at_most.items())
        and all(Counter(labels[i] for i in S)[label] >= share * k - 1e-9 for label, share in at_least.items())
    ]
    return max(sets, key=lambda S: (len(S), sum(b[i] for i in S)))


@pytest.mark.parametrize(
    ("at_most", "at_least"),
    [
        ({"web": 0.5}, {}),
        ({"web": 0.2, "code": 0.2}, {}),
        ({"web": 0.0}, {}),
        ({}, {"book": 0.4}),
        ({}, {"book": 0.2, "code": 0.4}),
        ({"web": 0.4}, {"book": 0.2}),
        ({"web": 0.5, "code": 0.2}, {"book": 0.4, "web": 0.1}),
    ],
)
def test_topk_under_quotas_is_the_best_there_is(at_most, at_least):
    for seed, k in itertools.product(range(12), (1, 3, 5)):
        b = np.random.default_rng(seed).standard_normal(10)
        problem = SelectionProblem(None, torch.from_numpy(b), k, extras={"source": SOURCES})
        quota = Quota("topk", at_most=at_most or None, at_least=at_least or None)
        try:
            got = quota(problem).tolist()
        except ConfigurationError:
            least = {label: np.ceil(share * k - 1e-9) for label, share in at_least.items()}
            assert any(v > np.floor(at_most.get(label, 1) * k + 1e-9) for label, v in least.items()) or (
                sum(least.values()) > k
            )
            continue
        assert sorted(got) == sorted(best_under(b, SOURCES, k, at_most, at_least))


def test_a_quota_that_does_not_bind_changes_nothing():
    for seed in range(10):
        problem = pool(12, 4, seed, extras={"source": list(range(12))})
        assert Quota("greedy", at_most=0.25)(problem).tolist() == Greedy()(problem).tolist()
        assert Quota("greedy", at_most={"nowhere": 0.0})(problem).tolist() == Greedy()(problem).tolist()


@pytest.mark.parametrize("filter", ["greedy", "omp", "dpp", "facility_location", "cluster", "random", "opus", "chain"])
def test_every_filter_keeps_to_quotas(filter):
    for seed, k in itertools.product(range(8), (2, 5, 8)):
        generator = torch.Generator().manual_seed(seed)
        labels = np.random.default_rng(seed).choice(["a", "b", "c"], 16).tolist()
        problem = pool(16, k, seed, extras={"kind": labels}, generator=generator)
        counts = Counter(labels)
        lowest = min(counts["b"], -(-k // 4)) / k
        picks = Quota(filter, "kind", at_most={"a": 0.5}, at_least={"b": lowest})(problem).tolist()
        taken = Counter(labels[i] for i in picks)
        assert len(picks) == len(set(picks)) <= k
        assert taken["a"] <= k / 2
        assert taken["b"] >= lowest * k - 1e-9


def test_a_least_share_is_met_even_by_those_the_filter_would_not_take():
    problem = SelectionProblem(
        None, torch.tensor([3.0, 2.0, -1.0, -2.0, -3.0]), 3, extras={"source": ["a", "a", "b", "b", "b"]}
    )
    assert Threshold()(problem).tolist() == [0, 1]
    assert Quota("threshold", at_least={"b": 2 / 3})(problem).tolist() == [0, 2, 3]
    assert Quota("threshold", at_least={"b": 1 / 3})(problem).tolist() == [0, 1, 2]


def test_by_default_no_label_has_more_than_half():
    problem = SelectionProblem(
        torch.eye(6), torch.arange(6.0) + 1, 4, extras={"source": ["b", "b", "a", "a", "a", "a"]}
    )
    assert sorted(Quota()(problem).tolist()) == [0, 1, 4, 5]
    assert sorted(Quota("topk", at_least={"b": 0.25})(problem).tolist()) == [1, 3, 4, 5]


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor, lambda x: [torch.tensor(v) for v in x]])
def test_labels_may_be_held_by_anything(kind):
    problem = SelectionProblem(None, torch.tensor([3.0, 2.0, 1.0]), 2, extras={"source": kind([7, 7, 8])})
    assert Quota("topk", at_most={7: 0.5})(problem).tolist() == [0, 2]


def test_a_label_that_can_tell_no_group_is_named():
    problem = SelectionProblem(None, torch.ones(2), 2, extras={"source": [["web"], ["code"]]})
    with pytest.raises(ConfigurationError, match=r"'source' holds \['web'\]; labels are"):
        Quota("topk")(problem)


def test_infeasible_quotas_say_why():
    problem = SelectionProblem(None, torch.ones(4), 4, extras={"source": ["a", "a", "a", "b"]})
    with pytest.raises(
        ConfigurationError, match=r"asks for 2 of 4 picks with source 'b'; the pool has 1.*lower at_least"
    ):
        Quota("topk", at_least={"b": 0.5})(problem)
    with pytest.raises(ConfigurationError, match=r"asks for 1 of 4 picks with source 'c'; the pool has 0"):
        Quota("topk", at_least={"c": 0.1})(problem)
    with pytest.raises(ConfigurationError, match="at_most allows 1"):
        Quota("topk", at_most={"a": 0.25}, at_least={"a": 0.5})(problem)
    with pytest.raises(ConfigurationError, match="more in all than the budget of 1"):
        few = SelectionProblem(None, torch.ones(4), 1, extras={"source": ["a", "a", "a", "b"]})
        Quota("topk", at_least={"a": 0.5, "b": 0.5})(few)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_most": 1.5}, "at_most is 1.5"),
        ({"at_most": {"a": -0.1}}, r"at_most\['a'\] is -0.1"),
        ({"at_least": {"a": True}}, r"at_least\['a'\] is True"),
        ({"at_least": {"a": 0.6, "b": 0.6}}, "at most 1 together"),
        ({"filter": All}, "ignores budgets"),
    ],
)
def test_quota_refuses(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Quota(**options)


def test_a_quota_needs_its_label_and_what_its_filter_needs():
    quota = Quota("max_loss", "language")
    assert quota.columns == ("language", "loss")
    assert not quota.needs_gram
    assert Quota().needs_gram
    with pytest.raises(ConfigurationError, match="'quota' needs the column 'language'"):
        quota(SelectionProblem(None, torch.ones(1), 1, extras={"loss": [1.0]}))
    nested = Quota(Chain([Random, "topk"], [3.0]), "language", at_most=0.5)
    problem = pool(9, 3, extras={"language": list("aaaaabbbb")}, generator=torch.Generator().manual_seed(0))
    assert max(Counter("aaaaabbbb"[i] for i in nested(problem).tolist()).values()) <= 1
