"""Laws of filters, sets and solvers over drawn problems: sizes, defects, scales and sets all at random."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from ftw.filters import Greedy, TopK
from ftw.problem import SelectionProblem
from ftw.solvers import (
    Box,
    CappedCone,
    CappedSimplex,
    ClosedForm,
    Free,
    NonNegative,
    ProjectedGradient,
    Simplex,
    kkt_residual,
)
from ftw.testing import SHAPES, check_constraint_set, problems

QUICK = settings(max_examples=300, deadline=None, derandomize=True)
SCALES = st.sampled_from([1e-16, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e16])
SEEDS = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def sets(draw, n, scale=1.0, bounded=False):
    """A feasible set for n candidates whose own scale is `scale`."""
    total = scale * draw(st.sampled_from([0.0, 1e-3, 1.0, float(n)]))
    mass = 0.1 + torch.rand(n, generator=generator(draw(SEEDS)), dtype=torch.float64)
    slack = draw(st.sampled_from([1.0, 1.0 + 1e-9, 1.3, 4.0]))
    choices = [
        Box(0.0, scale),
        Box(-scale * mass, scale * mass),
        Simplex(total),
        Simplex(total, mass),
        CappedSimplex(total, slack * total / n),
        CappedSimplex(total, slack * total * mass / float(mass @ mass), mass),
    ]
    if not bounded:
        choices += [Free(), NonNegative(), Box(0.1 * scale, math.inf)]
        choices += [CappedCone(c) for c in (1.0, 1.0 + 1e-9, max(1.0, n / 3), 2.5, 1e6)]
    return draw(st.sampled_from(choices))


@QUICK
@given(st.data(), problems(), SCALES)
def test_pgd_is_optimal_or_rightly_unbounded(data, ugly, scale):
    natural = float(ugly.alignment.abs().max() / ugly.gram.abs().max()) if bool(ugly.gram.any()) else 1.0
    constraints = data.draw(sets(ugly.size, data.draw(st.sampled_from([1.0, scale, natural or 1.0]))))
    solution = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints, throw=False)
    if solution.status == "unbounded":
        assert not ugly.consistent
        assert math.isinf(constraints.polyhedron(ugly.size).radius)
        return
    assert solution.status == "optimal"
    assert solution.kkt_residual <= 1e-10
    assert constraints.contains(solution.weights, 1e-11)
    assert kkt_residual(ugly.gram, ugly.alignment, constraints, solution.weights) == solution.kkt_residual


@QUICK
@given(st.data(), problems(shapes=["out_of_range", "zero", "rank_one", "conflicting"], scales=[1.0]))
def test_unbounded_means_a_ray_that_a_linear_program_finds(data, ugly):
    n = ugly.size
    cone = data.draw(st.sampled_from([NonNegative(), CappedCone(1.0), CappedCone(2.5), CappedCone(1e6)]))
    share = cone.polyhedron(n).share
    caps = np.eye(n) - share if math.isfinite(share) else np.zeros((0, n))
    # max b'd over K d = 0, d in the cone, d <= 1
    values, vectors = np.linalg.eigh(ugly.gram.numpy())
    curved = vectors[:, values > 1e-10 * max(values[-1], 0)].T
    found = linprog(-ugly.alignment.numpy(), caps, np.zeros(len(caps)), curved, np.zeros(len(curved)), (0, 1))
    gain = -found.fun / max(float(ugly.alignment.norm()), 1e-300)
    assume(found.status == 0 and (gain > 1e-4 or gain < 1e-11))  # between these the linear program is in doubt
    solution = ProjectedGradient().solve(ugly.gram, ugly.alignment, cone, throw=False)
    assert (solution.status == "unbounded") == (gain > 1e-4)


@QUICK
@given(st.data(), problems(shapes=["well_posed", "uneven_lengths", "ill_conditioned"], scales=[1.0]), SEEDS)
def test_renaming_candidates_renames_their_weights(data, ugly, seed):
    order = torch.randperm(ugly.size, generator=generator(seed))
    constraints = data.draw(st.sampled_from([NonNegative(), CappedCone(2.5), Simplex(1.0), CappedSimplex(1.0, 1.0)]))
    plain = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints)
    K, b = ugly.gram[order][:, order], ugly.alignment[order]
    renamed = ProjectedGradient().solve(K, b, constraints)
    # Judged where it matters: each is optimal for the other's problem, and equally good.
    assert kkt_residual(K, b, constraints, plain.weights[order]) <= 1e-10
    difference = plain.weights[order] - renamed.weights
    size = plain.weights.norm() + renamed.weights.norm()
    assert float(difference @ K @ difference) <= 1e-9 * float(K.norm() * size**2)
    if ugly.name.startswith("well_posed"):
        assert torch.allclose(plain.weights[order], renamed.weights, rtol=1e-7, atol=1e-9 * float(size))


@QUICK
@given(st.data(), problems(), st.integers(-60, 60))
def test_powers_of_two_in_the_loss_change_no_bit(data, ugly, power):
    constraints = data.draw(sets(ugly.size))
    plain = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints, throw=False)
    scaled = ProjectedGradient().solve(2.0**power * ugly.gram, 2.0**power * ugly.alignment, constraints, throw=False)
    assert (plain.status, plain.kkt_residual) == (scaled.status, scaled.kkt_residual)
    assert torch.equal(plain.weights, scaled.weights)


@QUICK
@given(problems(shapes=["well_posed"], scales=[1.0]), st.sampled_from([1e-16, 1e-5, 0.3, 7.0, 1e16]))
def test_on_a_cone_weights_follow_the_scale_of_b(ugly, factor):
    for cone in (NonNegative(), CappedCone(2.0)):
        plain = ProjectedGradient().solve(ugly.gram, ugly.alignment, cone).weights
        scaled = ProjectedGradient().solve(ugly.gram, factor * ugly.alignment, cone).weights
        assert torch.allclose(scaled / factor, plain, rtol=1e-9, atol=1e-11 * float(plain.norm()))


@QUICK
@given(st.data(), problems(shapes=["well_posed", "low_rank", "harmful"], scales=[1.0]))
def test_a_candidate_that_harms_and_does_nothing_else_changes_nothing(data, ugly):
    cone = data.draw(st.sampled_from([NonNegative(), Box(0, 0.5), Simplex(1.0)]))
    n = ugly.size
    K = torch.block_diag(ugly.gram, ugly.gram.diagonal().max() * torch.eye(1, dtype=torch.float64))
    b = torch.cat([ugly.alignment, -100 * ugly.gram.abs().max()[None] - ugly.alignment.abs().max()])
    w = ProjectedGradient().solve(K, b, cone).weights
    assert w[n] == 0
    assert kkt_residual(ugly.gram, ugly.alignment, cone, w[:n]) <= 1e-10


@QUICK
@given(problems(shapes=["well_posed"], sizes=(1, 12), scales=[1.0]), st.integers(0, 11))
def test_a_duplicated_candidate_shares_its_weight(ugly, which):
    twin = torch.cat([torch.arange(ugly.size), torch.tensor([which % ugly.size])])
    K, b = ugly.gram[twin][:, twin], ugly.alignment[twin]
    for constraints in (NonNegative(), Simplex(1.0)):
        w = ProjectedGradient().solve(ugly.gram, ugly.alignment, constraints).weights
        doubled = ProjectedGradient().solve(K, b, constraints).weights
        assert doubled[-1] == pytest.approx(float(doubled[which % ugly.size]), rel=1e-6, abs=1e-9)
        merged = doubled[:-1].clone()
        merged[which % ugly.size] += doubled[-1]
        assert torch.allclose(merged, w, rtol=1e-6, atol=1e-9)


@QUICK
@given(st.data(), st.integers(0, 20), SCALES, st.integers(0, 5))
def test_sets_obey_their_law_at_every_scale(data, n, scale, seed):
    check_constraint_set(
        data.draw(sets(n, scale)) if n else data.draw(st.sampled_from([Free(), CappedCone()])), n, seed
    )


@QUICK
@given(problems(shapes=[s for s in SHAPES if s not in ("near_duplicates", "ill_conditioned", "uneven_lengths")]))
def test_closed_form_solves_or_says_that_it_cannot(ugly):
    solution = ClosedForm().solve(ugly.gram, ugly.alignment, Free(), throw=False)
    if ugly.consistent:
        assert solution.status == "optimal"
        assert solution.kkt_residual <= 1e-12
        null = torch.eye(ugly.size) - torch.linalg.pinv(ugly.gram, rtol=1e-11, hermitian=True) @ ugly.gram
        assert float((null.double() @ solution.weights).norm()) <= 1e-8 * float(solution.weights.norm())
    else:
        assert solution.status in ("unbounded", "optimal")
        singular = int(torch.linalg.matrix_rank(ugly.gram, rtol=1e-12, hermitian=True)) < ugly.size
        assert (solution.status == "unbounded") == singular


@QUICK
@given(problems(), st.integers(0, 24), SEEDS)
def test_greedy_never_loses_to_its_own_first_choice_and_keeps_useful_candidates(ugly, budget, seed):
    budget = min(budget, ugly.size)
    index = Greedy()(SelectionProblem(ugly.gram, ugly.alignment, budget))
    if not len(index):
        positive = (ugly.gram.diagonal() > 0) & (ugly.alignment > 1e-11 * ugly.alignment.abs().max())
        assert budget == 0 or not bool(positive.any())
        return
    K, b = ugly.gram[index][:, index], ugly.alignment[index]
    w = ProjectedGradient(tolerance=1e-6).solve(K, b, NonNegative(), throw=False).weights
    reached = float(w @ K @ w / 2 - b @ w)
    single = (ugly.alignment.clamp_min(0) ** 2 / ugly.gram.diagonal().clamp_min(1e-300) / 2).where(
        ugly.gram.diagonal() > 0, torch.zeros(())
    )
    assert reached <= -float(single.max()) * (1 - 1e-6)


@QUICK
@given(problems(shapes=["well_posed"], scales=[1.0]), st.integers(1, 24), SEEDS)
def test_filters_follow_a_renaming(ugly, budget, seed):
    order = torch.randperm(ugly.size, generator=generator(seed))
    budget = min(budget, ugly.size)
    for choose in (TopK(), Greedy()):
        plain = choose(SelectionProblem(ugly.gram, ugly.alignment, budget))
        renamed = choose(SelectionProblem(ugly.gram[order][:, order], ugly.alignment[order], budget))
        assert order[renamed].tolist() == plain.tolist()
