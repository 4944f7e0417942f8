"""Matching pursuit with a non-negative refit: candidates are chosen for what the others leave to be done."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ftw.filters.base import Filter
from ftw.problem import SelectionProblem
from ftw.solvers.linear import EPSILON, solve_psd
from ftw.solvers.polyhedron import Matrix, Vector


class Greedy(Filter):
    """Adds, one at a time, the candidate that lowers `1/2 w'Kw - b'w` most, and refits all weights in between.

    With `r = b - K_S w_S` (what the chosen leave unmatched), candidate j alone lowers the objective by
    `(r_j)_+^2 / (2 K_jj)`. After each choice `w_S >= 0` is refitted exactly; a candidate whose weight falls to 0
    is dropped and no longer counts towards the budget. Ends at the budget, or as soon as no r_j is positive
    beyond rounding: then the pool has nothing to add, and fewer than k are returned.

    Source: orthogonal matching pursuit as in GRAD-MATCH (Killamsetty et al. 2021). Deviations: r_j is divided by
    `K_jj`, so a candidate is not chosen for being long; the refit is non-negative and without ridge.
    Except for the rule of choice this is Lawson and Hanson's NNLS: the objective falls with every choice, no set
    comes twice, and so a dropped candidate may return but nothing cycles.

    A candidate with K_jj = 0 does not move the model and is never chosen. Cost: k columns of K and k small solves.
    """

    needs_gram: ClassVar[bool] = True

    def __call__(self, problem: SelectionProblem) -> Tensor:
        K, b = problem.full_gram.numpy(), problem.alignment.numpy()
        diagonal = np.diagonal(K)
        movable = diagonal > 0
        chosen: list[int] = []
        weights: Vector = np.zeros(0)
        spent = np.zeros(b.size, dtype=bool)
        while len(chosen) < problem.budget:
            terms = K[:, chosen] * weights
            residual = b - terms.sum(1)
            rounding = _ROUNDING * (np.abs(b) + np.abs(terms).sum(1))
            useful = movable & ~spent & (residual > rounding)
            useful[chosen] = False
            if not useful.any():
                break
            gain = np.full(b.size, -np.inf)
            gain[useful] = residual[useful] * (residual[useful] / diagonal[useful])
            best = int(np.argmax(gain))
            kept, refitted = _refit(K, b, [*chosen, best], np.append(weights, 0.0))
            if best not in kept:
                # Only rounding does this: its slope was positive. Passing it over keeps the loop finite.
                spent[best] = True
                continue
            chosen, weights = kept, refitted
        return torch.tensor(chosen, dtype=torch.long)


_ROUNDING = 1e-12
"""Part of the terms of r_j that is taken for rounding of their difference."""


def _refit(K: Matrix, b: Vector, index: list[int], weights: Vector) -> tuple[list[int], Vector]:
    """`min 1/2 w'Kw - b'w`, w >= 0 on `index`, from feasible weights; returns the positive part (Lawson-Hanson)."""
    while index:
        block, right = K[np.ix_(index, index)], b[index]
        scale = float(np.abs(block).sum(1) @ np.abs(weights) + np.abs(right).sum())
        move, _ = solve_psd(block, right - block @ weights, scale)
        target = weights + move
        if (target > 0).all():
            return index, target
        falling = target <= 0
        reaches = np.where(falling, 0.0, np.inf)
        np.divide(weights, -move, out=reaches, where=falling & (move < 0))
        first = int(np.argmin(reaches))
        weights = weights + reaches[first] * move
        stays = ~falling | (weights > EPSILON * np.abs(weights).max())
        stays[first] = False
        index, weights = [i for i, kept in zip(index, stays, strict=True) if kept], weights[stays]
    return index, weights
