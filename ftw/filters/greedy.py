"""Matching pursuit with a non-negative refit: candidates are chosen for what the others leave to be done."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftw.filters.base import Filter
from ftw.filters.gram_columns import gram_columns
from ftw.filters.refit import ROUNDING, descend
from ftw.problem import SelectionProblem
from ftw.solvers.polyhedron import Matrix, Vector

Flags = NDArray[np.bool_]


class Greedy(Filter):
    """Adds, one at a time, the candidate that lowers `1/2 w'Kw - b'w` most, and refits all weights in between.

    With `r = b - K_S w_S` (what the chosen leave unmatched), candidate j alone lowers the objective by
    `(r_j)_+^2 / (2 K_jj)`. After each choice `w_S >= 0` is refitted exactly; a candidate whose weight falls to 0
    is dropped and no longer counts towards the budget. Ends at the budget, or as soon as no r_j is positive
    beyond rounding: then the pool has nothing to add, and fewer than k are returned.

    Source: orthogonal matching pursuit as in GRAD-MATCH (Killamsetty et al. 2021, algorithm 2), which `OMP` has as it
    stands there. Deviations: r_j is divided by `K_jj`, so a candidate is not chosen for being long; the refit is
    non-negative and without ridge; a candidate of no more use is given back.
    Except for the rule of choice this is Lawson and Hanson's NNLS: the objective falls with every choice, no set
    comes twice, and so a dropped candidate may return but nothing cycles.

    A candidate with K_jj = 0 does not move the model and is never chosen. Cost: k columns of K, O(n r) each where the
    problem has a factor; O(n k) per choice for the residual; k solves of at most k unknowns.
    """

    needs_gram = True

    def __call__(self, problem: SelectionProblem) -> Tensor:
        b, diagonal = problem.alignment.numpy(), problem.diagonal.numpy()
        column, on_offer = gram_columns(problem), diagonal > 0
        room = np.empty((problem.budget, b.size))
        chosen: list[int] = []
        weights: Vector = np.zeros(0)
        while len(chosen) < problem.budget:
            rows = room[: len(chosen)]  # K[chosen]
            residual = b - weights @ rows
            best = _best(residual, diagonal, on_offer, b, weights, rows)
            if best is None:
                break
            room[len(chosen)] = column(best)
            grown = [*chosen, best]
            block = room[: len(grown)][:, grown]
            kept, weights_kept = descend(block, b[grown], np.append(weights, 0.0))
            if len(chosen) not in kept:
                # Only rounding does this: its slope was positive. Passing it over keeps the loop finite.
                on_offer[best] = False
                continue
            if len(kept) < len(grown):
                on_offer[chosen] = True
                room[: len(kept)] = room[kept]
            chosen, weights = [grown[i] for i in kept], weights_kept
            on_offer[chosen] = False
        return torch.tensor(chosen, dtype=torch.long)


def _best(residual: Vector, diagonal: Vector, on_offer: Flags, b: Vector, weights: Vector, rows: Matrix) -> int | None:
    """The candidate of the largest gain among those whose residual is positive beyond rounding."""
    useful = on_offer & (residual > 0)
    if not useful.any():
        return None
    gain = np.full(b.size, -np.inf)
    # The quotient first: the square of a small residual would underflow.
    gain[useful] = residual[useful] * (residual[useful] / diagonal[useful])
    best = int(np.argmax(gain))
    if residual[best] > ROUNDING * (abs(b[best]) + float(weights @ np.abs(rows[:, best]))):
        return best
    useful &= residual > ROUNDING * (np.abs(b) + weights @ np.abs(rows))  # O(n k), and mostly not needed
    gain[~useful] = -np.inf
    return int(np.argmax(gain)) if useful.any() else None
