"""What a plug-in's author runs: the contracts that ftw ships, and what is particular to these two."""

from __future__ import annotations

import pytest
import torch
from ftw_example_plugin import ADMM, Cosine

import ftw
from ftw.solvers import CappedCone, CappedSimplex, NonNegative
from ftw.testing import check_filter, check_solver


def test_the_solver_keeps_the_law() -> None:
    check_solver(ADMM(max_iterations=1000))  # the law holds for any limit: stopping short must be said


def test_the_filter_keeps_the_law() -> None:
    check_filter(Cosine())


def test_both_are_to_be_had_by_name() -> None:
    assert type(ftw.registry.resolve("solvers", "admm", tolerance=1e-6)) is ADMM
    assert type(ftw.registry.resolve("filters", "cosine")) is Cosine


@pytest.mark.parametrize("constraints", [NonNegative(), CappedSimplex(total=12.0, cap=3.0), CappedCone(4.0)], ids=repr)
def test_the_weights_are_those_of_another_method(constraints: ftw.solvers.ConstraintSet) -> None:
    generator = torch.Generator().manual_seed(0)
    C = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    g = torch.randn(30, generator=generator, dtype=torch.float64)
    ours = ADMM(tolerance=1e-11).solve(C.T @ C, C.T @ g, constraints)
    theirs = ftw.solvers.ProjectedGradient().solve(C.T @ C, C.T @ g, constraints)
    assert ours.status == "optimal"
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-8 * float(theirs.weights.max()))


def test_a_ray_of_unlimited_gain_is_found() -> None:
    K = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # the difference of the two weights costs nothing
    solution = ADMM().solve(K, torch.tensor([2.0, 1.0]), ftw.solvers.Free(), throw=False)
    assert solution.status == "unbounded"


def test_the_cosine_does_not_care_for_length() -> None:
    direction = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]).T
    length = torch.tensor([0.01, 10.0, 1.0, 5.0, 1.0])
    C, g = direction * length, torch.tensor([1.0, 0.1])
    problem = ftw.SelectionProblem(gram=C.T @ C, alignment=C.T @ g, budget=4)
    assert ftw.filters.TopK()(problem).tolist()[0] == 1  # by alignment, the long one is first
    assert Cosine()(problem).tolist() == [0, 1, 2]  # not the opposite one, nor the one of length 0
