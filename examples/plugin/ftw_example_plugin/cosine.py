"""A filter that looks at the direction of a contribution and not at its length."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.filters.base import Filter
from ftw.problem import SelectionProblem


class Cosine(Filter):
    """The k candidates whose contributions point most nearly along the target gradient.

    The score is `b_i / sqrt(K_ii)`, the cosine of c_i and g under M times the norm of g, which all share.
    The alignment b_i alone prefers long contributions, that is long or badly predicted samples; weights can
    make up for length, but not for direction. Candidates without a positive score are left out: no
    non-negative weight makes them useful.
    """

    needs_gram = True  # K_ii is read of the whole pool

    def __call__(self, problem: SelectionProblem) -> Tensor:
        length = problem.full_gram.diagonal().clamp_min(0).sqrt()
        # A contribution of length 0 has no direction, and b_i = 0 with it.
        score = torch.where(length > 0, problem.alignment / length, torch.zeros_like(length))
        order = torch.argsort(score, descending=True, stable=True)  # stable: ties go by position in the pool
        return order[score[order] > 0][: problem.budget]
