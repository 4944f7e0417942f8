"""Contributions whose lengths differ by many orders: a short candidate's curvature is no rounding of a long one's."""

import numpy as np
import pytest
import torch

from ftw.problem import Status
from ftw.solvers import ActiveSet, LowRank, NoHarm, NonNegative, ProjectedGradient, kkt_residual
from ftw.solvers.linear import solve_on_rows, solve_thin_on_rows
from ftw.testing import constraint_sets


def uneven_factor(seed, n, rank):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(-4, 4, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    factor = lengths[:, None] * torch.randn(n, rank, generator=generator, dtype=torch.float64)
    return factor, factor @ torch.randn(rank, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("solver", [ProjectedGradient(), ActiveSet()], ids=["pgd", "active_set"])
def test_a_short_candidate_under_no_harm_is_bounded(solver):
    """Its curvature is 5e-17 of K's norm; reflecting the tight side, in which it has no part, must not lose it."""
    K = torch.tensor(
        [[4.39506593e-16, 4.75266648e-12, -1.06401166e-08], [0, 8.21132796e-08, 1.74674284e-04], [0, 0, 8.91583575]],
        dtype=torch.float64,
    )
    K = K.triu() + K.triu(1).T
    b = torch.tensor([3.25936100e12, 2.25265939e16, 3.66192940e19], dtype=torch.float64)
    harmless = NoHarm(
        NonNegative(), torch.tensor([[1.0, 0.0], [0.540302306, 0.909297427], [-0.416146837, -0.756802495]])
    )
    solution = solver.solve(K, b, harmless)
    assert solution.status is Status.OPTIMAL
    # On the tight side w2 = t, w3 = 0.909.. t / 0.756..: two unknowns, well posed once both have a unit diagonal.
    move = torch.tensor([[1.0, 0, 0], [0, 1.0, 0.909297427 / 0.756802495]], dtype=torch.float64)
    unit = (move @ K @ move.T).diagonal().sqrt()
    expected = torch.linalg.solve(move @ K @ move.T / unit.outer(unit), move @ b / unit) / unit @ move
    assert torch.allclose(solution.weights, expected, rtol=1e-6)


@pytest.mark.parametrize("name", constraint_sets(9))
def test_factors_of_uneven_lengths_are_solved_on_every_set(name):
    for seed in range(15):
        n, rank = 6 + seed % 12, 2 + seed % 3
        factor, b = uneven_factor(seed, n, rank)
        constraints = constraint_sets(n)[name]
        for gram in LowRank(factor), factor @ factor.T:
            solution = ProjectedGradient().solve(gram, b, constraints)
            assert solution.status is Status.OPTIMAL, (seed, type(gram))
            assert kkt_residual(factor @ factor.T, b, constraints, solution.weights) <= 1e-10, (seed, type(gram))


@pytest.mark.parametrize("thin", [False, True])
def test_rows_that_short_candidates_make_nearly_parallel_are_all_kept(thin):
    """At a unit diagonal the rows are 1e10 (1, 1, 0, 0) up to 1e-10; both must hold, and nothing else."""
    lengths = np.array([1e-10, 1e-10, 1.0, 1.0])
    factor = np.diag(lengths)
    rows = np.array([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    right = np.array([2e-10, -2e-10, 1.0, 1.0])
    if thin:
        move, ray = solve_thin_on_rows(factor, 0.0, right, rows, 1.0)
    else:
        move, ray = solve_on_rows(factor @ factor, right, rows, 1.0)
    assert ray is None
    assert move[:2] == pytest.approx([2e10, -2e10], rel=1e-9)
    assert np.abs(rows @ move).max() <= 1e-15 * 2e10
    assert move[2:] == pytest.approx([-(move[0] + move[1])] * 2, abs=1e-5)


@pytest.mark.parametrize("thin", [False, True])
def test_what_is_flat_at_every_length_stays_flat(thin):
    """c c' on a plane, the entries of c from 1e-8 to 1: only rounding is left, however short a candidate."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        c = torch.randn(5, 1, generator=generator, dtype=torch.float64).numpy() * np.logspace(-8, 0, 5)[:, None]
        right, rows = torch.randn(5, generator=generator, dtype=torch.float64).numpy(), np.ones((1, 5))
        ray = solve_thin_on_rows(c, 0.0, right, rows, 1.0)[1] if thin else solve_on_rows(c @ c.T, right, rows, 1.0)[1]
        assert ray is not None, seed
        size = np.linalg.norm(ray)
        assert abs(ray.sum()) <= 1e-13 * size
        assert abs(float(c[:, 0] @ ray)) <= 1e-7 * size
        assert right @ ray > 0
