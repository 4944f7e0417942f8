"""Each filter against a reference of a few lines, on hand-made and on ugly pools."""

import itertools

import pytest
import torch

from ftw.errors import ConfigurationError
from ftw.filters import All, Greedy, Random, Threshold, TopK
from ftw.problem import SelectionProblem
from ftw.testing import SHAPES, ugly_problem


def problem(alignment, budget, gram=None, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return SelectionProblem(gram, torch.as_tensor(alignment, dtype=torch.float64), budget, None, generator)


def test_topk_takes_the_largest_and_breaks_ties_by_position():
    assert TopK()(problem([1.0, 3.0, 2.0, 3.0, -1.0], 3)).tolist() == [1, 3, 2]
    assert TopK()(problem([0.0, -0.0, 0.0], 2)).tolist() == [0, 1]
    assert TopK()(problem([-3.0, -1.0], 2)).tolist() == [1, 0]


def test_topk_ties_are_stable_in_large_pools():
    assert TopK()(problem(torch.zeros(5000), 4000)).tolist() == list(range(4000))


def test_threshold_leaves_out_what_does_not_help():
    alignment = [0.0, 3.0, -2.0, 1.0, 2.0]
    assert Threshold()(problem(alignment, 5)).tolist() == [1, 4, 3]
    assert Threshold()(problem(alignment, 2)).tolist() == [1, 4]
    assert Threshold(1.5)(problem(alignment, 5)).tolist() == [1, 4]
    assert Threshold(-5)(problem(alignment, 5)).tolist() == [1, 4, 3, 0, 2]
    assert Threshold()(problem([-1.0, 0.0], 2)).tolist() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0", None, True])
def test_threshold_refuses_what_is_no_number(value):
    with pytest.raises(ConfigurationError, match="finite number is needed"):
        Threshold(value)


def test_random_draws_from_the_problem_generator_only():
    before = torch.random.get_rng_state()
    drawn = [Random()(problem(torch.zeros(10), 4, seed=seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_random_is_uniform_over_subsets():
    generator = torch.Generator().manual_seed(0)
    draws, counts = 6000, dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for _ in range(draws):
        it = SelectionProblem(None, torch.zeros(4), 2, None, generator)
        counts[tuple(sorted(Random()(it).tolist()))] += 1
    expected = draws / len(counts)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 20.5  # the 99.9 % quantile at 5 degrees of freedom; the seed is fixed


def test_random_without_a_generator_says_what_to_pass():
    with pytest.raises(ConfigurationError, match=r"pass generator=torch\.Generator"):
        Random()(problem([1.0], 1))


def test_all_ignores_the_budget_and_says_so():
    assert All()(problem([1.0, 2.0, 3.0], 1)).tolist() == [0, 1, 2]
    assert not All.honours_budget


def non_negative_by_enumeration(K, b):
    """argmin of 1/2 w'Kw - b'w over w >= 0: the best of the minimisers on all faces."""
    best, value = torch.zeros_like(b), 0.0
    for size in range(1, len(b) + 1):
        for face in itertools.combinations(range(len(b)), size):
            index = list(face)
            part = torch.linalg.lstsq(K[index][:, index], b[index, None], driver="gelsd").solution.flatten()
            if (part > 0).all():
                w = torch.zeros_like(b)
                w[index] = part
                reached = float(w @ K @ w / 2 - b @ w)
                if reached < value - 1e-12 * abs(value):
                    best, value = w, reached
    return best


def greedy_by_definition(K, b, k):
    chosen, weights = [], torch.zeros(0, dtype=b.dtype)
    while len(chosen) < k:
        r = b - K[:, chosen] @ weights
        gains = [
            (float(r[j]) ** 2 / float(K[j, j]), -j)
            for j in range(len(b))
            if j not in chosen and K[j, j] > 0 and r[j] > 1e-10 * (b.abs().max() + 1e-300)
        ]
        if not gains:
            break
        chosen = [*chosen, -max(gains)[1]]
        weights = non_negative_by_enumeration(K[chosen][:, chosen], b[chosen])
        chosen, weights = [j for j, w in zip(chosen, weights, strict=True) if w > 0], weights[weights > 0]
    return chosen


@pytest.mark.parametrize("n", [1, 2, 5, 7])
@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_its_definition(n, seed):
    generator = torch.Generator().manual_seed(seed)
    for shape in ("well_posed", "conflicting", "zero_rows", "identity_ties", "harmful"):
        ugly = ugly_problem(shape, n, generator)
        for k in range(n + 1):
            got = Greedy()(SelectionProblem(ugly.gram, ugly.alignment, k)).tolist()
            assert got == greedy_by_definition(ugly.gram, ugly.alignment, k), (shape, k)


def test_greedy_prefers_a_complement_to_a_duplicate():
    C = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    g = torch.tensor([1.0, 0.4], dtype=torch.float64)
    it = SelectionProblem(C.T @ C, C.T @ g, 3)
    assert Greedy()(it).tolist() == [0, 2]  # the duplicate adds nothing, so the budget of 3 is not used up
    assert TopK()(SelectionProblem(C.T @ C, C.T @ g, 2)).tolist() == [0, 1]


def test_greedy_drops_a_candidate_that_the_others_replace():
    C = torch.tensor([[2.0, 3.0, -1.0], [-2.0, -3.0, 3.0], [-3.0, 1.0, -2.0]], dtype=torch.float64)
    g = torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64)
    K, b = C.T @ C, C.T @ g
    assert Greedy()(SelectionProblem(K, b, 1)).tolist() == [0]
    assert Greedy()(SelectionProblem(K, b, 2)).tolist() == [0, 1]
    # 2 brings the weight of 0 down to zero, so 0 goes, and its place in the budget is free again.
    assert Greedy()(SelectionProblem(K, b, 3)).tolist() == greedy_by_definition(K, b, 3) == [1, 2]


def test_greedy_does_not_choose_a_candidate_for_its_length():
    C = torch.tensor([[1.0, 100.0], [0.0, 300.0]], dtype=torch.float64)
    g = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert TopK()(SelectionProblem(C.T @ C, C.T @ g, 1)).tolist() == [1]
    assert Greedy()(SelectionProblem(C.T @ C, C.T @ g, 1)).tolist() == [0]


def test_greedy_ignores_candidates_that_do_not_move_the_model():
    K, b = torch.diag(torch.tensor([0.0, 1.0])), torch.tensor([5.0, 1.0])
    assert Greedy()(SelectionProblem(K, b, 2)).tolist() == [1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [(1e-16, 1e-16), (1e16, 1e16), (1e16, 1e-16), (1e-16, 1e16)])
def test_greedy_does_not_depend_on_scales(shape, scales):
    generator = torch.Generator().manual_seed(3)
    ugly = ugly_problem(shape, 9, generator)
    plain = Greedy()(SelectionProblem(ugly.gram, ugly.alignment, 4)).tolist()
    # Powers of two near the scales, so that rounding cannot decide a tie.
    powers = [2.0 ** round(torch.log2(torch.tensor(scale)).item()) for scale in scales]
    scaled = SelectionProblem(powers[0] * ugly.gram, powers[1] * ugly.alignment, 4)
    assert Greedy()(scaled).tolist() == plain


def test_greedy_beats_top_k_on_redundant_pools():
    """What matching pursuit is for: the objective after refit, in pools where every sample comes three times."""
    generator = torch.Generator().manual_seed(0)

    def objective(K, b, index):
        K, b = K[index][:, index], b[index]
        w = non_negative_by_enumeration(K, b)
        return float(w @ K @ w / 2 - b @ w)

    better = 0
    for _ in range(30):
        C = torch.randn(10, 4, generator=generator, dtype=torch.float64).repeat(1, 3)
        K, b = C.T @ C, C.T @ torch.randn(10, generator=generator, dtype=torch.float64)
        greedy, top = (objective(K, b, f(SelectionProblem(K, b, 3))) for f in (Greedy(), TopK()))
        # Top-k spends the whole budget on copies of one sample; greedy starts with the best single one.
        assert greedy <= top + 1e-12
        better += greedy < 1.05 * top
    assert better >= 15
