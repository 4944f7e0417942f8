"""Filters that score candidates one by one, each against its formula written out."""

import itertools
import math

import numpy as np
import pytest
import torch

from ftw.errors import ConfigurationError
from ftw.filters import IFD, GradNorm, Greedy, MaxLoss, RhoLoss, TopK
from ftw.problem import SelectionProblem
from ftw.testing import SHAPES, ugly_problem


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def with_columns(budget, **columns):
    n = len(next(iter(columns.values())))
    return SelectionProblem(None, torch.zeros(n), budget, extras=columns)


def ranked(scores, k):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


@pytest.mark.parametrize("shape", SHAPES)
def test_topk_by_each_score_is_its_formula(shape):
    ugly = ugly_problem(shape, 9, torch.Generator().manual_seed(1), 1e8, 1e-8)
    b, d = ugly.alignment.tolist(), ugly.gram.diagonal().tolist()
    scores = {
        "alignment": b,
        "cosine": [x / math.sqrt(q) if q > 0 else 0.0 for x, q in zip(b, d, strict=True)],
        "gain": [max(x, 0.0) ** 2 / q / 2 if q > 0 else 0.0 for x, q in zip(b, d, strict=True)],
    }
    for by, expected in scores.items():
        for k in (1, 4, 9):
            got = TopK(by)(SelectionProblem(ugly.gram, ugly.alignment, k)).tolist()
            assert [expected[i] for i in got] == pytest.approx(sorted(expected, reverse=True)[:k], rel=1e-12)
    assert TopK("alignment")(SelectionProblem(None, ugly.alignment, 4)).tolist() == ranked(b, 4)


def test_scores_disagree_where_lengths_differ():
    C = torch.tensor([[1.0, 3.0, 10.0], [0.0, 0.3, 30.0]], dtype=torch.float64)
    problem = SelectionProblem(C.T @ C, C.T @ vector(1.0, 0.2), 1)
    assert [TopK(by)(problem).tolist() for by in ("alignment", "cosine", "gain")] == [[2], [1], [1]]
    C = torch.tensor([[1.0, 3.0], [0.0, 2.0]], dtype=torch.float64)
    problem = SelectionProblem(C.T @ C, C.T @ vector(1.0, 0.0), 1)
    assert [TopK(by)(problem).tolist() for by in ("alignment", "cosine", "gain")] == [[1], [0], [0]]


def test_topk_says_per_instance_whether_it_reads_the_gram():
    assert [TopK(by).needs_gram for by in ("alignment", "cosine", "gain", "shapley")] == [False, True, True, True]
    assert not TopK().needs_gram
    with pytest.raises(ConfigurationError, match="no Gram matrix"):
        TopK("cosine")(SelectionProblem(None, vector(1.0), 1))
    with pytest.raises(ConfigurationError, match="allowed are 'alignment', 'cosine', 'gain', 'shapley'"):
        TopK("length")


@pytest.mark.parametrize("seed", range(5))
def test_topk_by_shapley_is_the_mean_marginal_utility(seed):
    """Over all orders in which candidates can join, of U(S) = sum_S b_i - 1/2 sum_SS K_ij."""
    n, ugly = 5, ugly_problem("well_posed", 5, torch.Generator().manual_seed(seed))
    K, b = 0.05 * ugly.gram.numpy(), ugly.alignment.numpy()

    def utility(S):
        return b[S].sum() - K[np.ix_(S, S)].sum() / 2

    values = np.zeros(n)
    for order in itertools.permutations(range(n)):
        for place, i in enumerate(order):
            values[i] += utility(list(order[: place + 1])) - utility(list(order[:place]))
    expected = ranked((values / math.factorial(n)).tolist(), 3)
    assert TopK("shapley")(SelectionProblem(torch.from_numpy(K), ugly.alignment, 3)).tolist() == expected


def test_topk_reads_the_diagonal_of_a_factor_without_forming_k():
    F = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = F @ vector(1.0, -1.0, 0.5)
    for by in ("cosine", "gain", "shapley"):
        problem = SelectionProblem(factor=F, alignment=b, budget=10)
        assert TopK(by)(problem).tolist() == TopK(by)(SelectionProblem(F @ F.T, b, 10)).tolist()
        assert "full_gram" not in problem.__dict__


@pytest.mark.parametrize("seed", range(20))
def test_the_best_gain_is_the_first_choice_of_greedy(seed):
    ugly = ugly_problem("uneven_lengths", 12, torch.Generator().manual_seed(seed))
    problem = SelectionProblem(ugly.gram, ugly.alignment, 1)
    assert Greedy()(problem).tolist() == TopK("gain")(problem).tolist()


def test_grad_norm_takes_the_longest():
    C = torch.tensor([[1.0, 0.0, -5.0, 3.0], [0.0, 2.0, 0.0, -4.0]], dtype=torch.float64)
    # lengths 1, 2, 5, 5: the tie goes by position
    assert GradNorm()(SelectionProblem(C.T @ C, torch.zeros(4), 3)).tolist() == [2, 3, 1]


def test_max_loss_takes_the_largest():
    assert MaxLoss()(with_columns(3, loss=[1.0, 4.0, 0.5, 4.0])).tolist() == [1, 3, 0]


def test_rho_loss_is_the_reducible_holdout_loss():
    """Mindermann et al. 2022, equation 3: L[y | x; D_t] - L[y | x; D_ho]."""
    rng = np.random.default_rng(0)
    loss, reference = rng.gamma(2.0, size=30), rng.gamma(2.0, size=30)
    for k in (0, 1, 7, 30):
        got = RhoLoss()(with_columns(k, loss=loss, reference_loss=reference)).tolist()
        assert got == np.argsort(reference - loss, kind="stable")[:k].tolist()
    # noise is lost on both models, what is learnt on neither: what is left to learn wins
    noisy, learnt, useful = (5.0, 5.0), (0.1, 0.1), (3.0, 1.0)
    columns = dict(zip(("loss", "reference_loss"), zip(noisy, learnt, useful, strict=True), strict=True))
    assert RhoLoss()(with_columns(1, **columns)).tolist() == [2]


def test_ifd_is_the_ratio_of_losses_up_to_one():
    """Li et al. 2024: s(A|Q) / s(A), the largest first, those above 1 left out."""
    conditioned = [0.5, 1.9, 2.1, 0.0, 1.0, 0.3]
    alone = [1.0, 2.0, 2.0, 1.0, 1.0, 0.0]
    reference = sorted(
        ((a / d, -i) for i, (a, d) in enumerate(zip(conditioned, alone, strict=True)) if d > 0 and a / d <= 1),
        reverse=True,
    )
    columns = {"loss_with_prompt": conditioned, "loss_without_prompt": alone}
    assert IFD()(with_columns(6, **columns)).tolist() == [-i for _, i in reference] == [4, 1, 0, 3]
    assert IFD()(with_columns(2, **columns)).tolist() == [4, 1]
    assert IFD(most=0.9)(with_columns(6, **columns)).tolist() == [0, 3]
    assert IFD(most=math.inf)(with_columns(6, **columns)).tolist() == [2, 4, 1, 0, 3]


def test_ifd_refuses_what_is_no_loss():
    with pytest.raises(ConfigurationError, match=r"loss_with_prompt'\] holds -1\.0.*not log-likelihoods"):
        IFD()(with_columns(1, loss_with_prompt=[-1.0], loss_without_prompt=[1.0]))
    for most in (0, -1.0, math.nan, "1", True):
        with pytest.raises(ConfigurationError, match="most is"):
            IFD(most)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor, lambda x: [torch.tensor(v) for v in x]])
def test_columns_may_be_held_by_anything(kind):
    assert MaxLoss()(with_columns(1, loss=kind([1.0, 2.0]))).tolist() == [1]


def test_a_column_that_is_missing_or_no_number_is_named():
    with pytest.raises(ConfigurationError, match=r"'max_loss' needs the column 'loss'.*\['length'\]; pass it with"):
        MaxLoss()(with_columns(1, length=[1.0]))
    with pytest.raises(ConfigurationError, match=r"extras\['loss'\] for the filter 'max_loss' is.*real numbers"):
        MaxLoss()(with_columns(1, loss=["a", "b"]))
    with pytest.raises(ConfigurationError, match=r"extras\['loss'\] for the filter 'max_loss' is not finite at \[1\]"):
        MaxLoss()(with_columns(1, loss=[1.0, math.nan]))


def test_columns_are_known_before_a_step_is_run():
    RhoLoss().require_columns(["reference_loss", "loss", "source"])
    with pytest.raises(ConfigurationError, match=r"RhoLoss needs the columns .*\['reference_loss'\] are missing"):
        RhoLoss().require_columns({"loss": [1.0]})
    TopK().require_columns([])
