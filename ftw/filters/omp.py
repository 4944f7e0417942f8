"""Orthogonal matching pursuit as GRAD-MATCH has it: by the largest residual, with ridge."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ftw.arguments import at_least
from ftw.filters.base import Filter
from ftw.filters.gram_columns import gram_columns
from ftw.filters.refit import ROUNDING, non_negative
from ftw.problem import SelectionProblem
from ftw.solvers.linear import solve_psd


class OMP(Filter):
    """Adds, one at a time, the candidate with the largest residual, and refits all weights in between.

    With the chosen X and weights `w = argmin 1/2 w'(K_X + rho I)w - b_X'w`, the residual of candidate j outside X is
    `r_j = b_j - K_jX w`, the inner product of c_j with what X leaves of g. The next choice is `argmax r_j` with
    weights `w >= 0`, or `argmax |r_j|` with signed ones. Ends at the budget, or as soon as the largest is no more than
    `tolerance * max_i |b_i|`. X never shrinks: a candidate whose weight the refit brings to 0 keeps its place.

    Source: Killamsetty et al. 2021, "GRAD-MATCH: gradient matching based data subset selection for efficient deep
    model training", algorithm 2 with the regularised error of section 3; the non-negative weights are those of the
    published code. Deviations: inner products are taken under M; rho is `ridge` times the mean of K_ii, since an
    absolute one would change its meaning with every scale; the end is told by residuals, since the norm of g, of which
    the paper's tolerance is a part, does not stand in the problem.

    It differs from `Greedy` in three ways: a longer contribution has the larger residual and is preferred, where
    `Greedy` divides by K_jj; the refit has a ridge; and a candidate made superfluous by later ones stays.

    A candidate with K_jj = 0 does not move the model and is never chosen. Cost: k columns of K, O(n r) each where the
    problem has a factor; O(n k) per choice for the residual; k solves of at most k unknowns.

    Args:
        ridge: rho in units of mean_i K_ii, at least 0.
        signed: whether weights may be negative, as in the paper's text; its code, like ours by default, says no.
        tolerance: part of the largest |b_i| at which to end, at least 0.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    needs_gram = True

    def __init__(self, ridge: float = 0.5, signed: bool = False, tolerance: float = 1e-4) -> None:
        at_least("ridge", ridge, 0.0)
        at_least("tolerance", tolerance, 0.0)
        self.ridge, self.signed, self.tolerance = float(ridge), bool(signed), float(tolerance)

    def __call__(self, problem: SelectionProblem) -> Tensor:
        b, diagonal = problem.alignment.numpy(), problem.diagonal.numpy()
        unit, height = float(diagonal.mean()) if b.size else 0.0, float(np.abs(b).max(initial=0.0))
        if not unit > 0 or not height > 0:
            return torch.zeros(0, dtype=torch.long)
        column, on_offer, b = gram_columns(problem), diagonal > 0, b / height
        rows = np.empty((problem.budget, b.size))  # rows[i] is K[:, chosen[i]] / unit
        chosen: list[int] = []
        weights, residual = np.zeros(0), b
        while len(chosen) < problem.budget:
            score = np.where(on_offer, np.abs(residual) if self.signed else residual, -np.inf)
            best = int(np.argmax(score))
            if score[best] <= max(self.tolerance, ROUNDING):
                break
            rows[len(chosen)] = column(best) / unit
            chosen.append(best)
            on_offer[best] = False
            known = rows[: len(chosen)]
            block, right = known[:, chosen] + self.ridge * np.eye(len(chosen)), b[chosen]
            if self.signed:
                weights = solve_psd(block, right, float(np.abs(right).sum()))[0]
            else:
                weights = non_negative(block, right, np.append(weights, 0.0))
            residual = b - weights @ known
        return torch.tensor(chosen, dtype=torch.long)
