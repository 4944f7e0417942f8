"""The plainest filter: the largest scores, each candidate judged alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.arguments import one_of
from ftw.filters.base import Filter
from ftw.filters.ranking import largest
from ftw.problem import SelectionProblem

SCORES = ("alignment", "cosine", "gain", "shapley")


class TopK(Filter):
    """The k candidates with the largest score, equal ones by their position in the pool.

    Always k of them, even where the score is negative; `Threshold` leaves those out.

    Args:
        by: the score of candidate i.

            "alignment": b_i, the drop of the target loss per unit weight. Needs no K.
            "cosine": `b_i / sqrt(K_ii)`, the cosine of c_i and g under M times the norm of g, which all share: length
            does not count. LESS (Xia et al. 2024) ranks by this cosine of Adam's features. Deviations: the
            features are M^(1/2) c_i with this step's M, neither projected nor summed over checkpoints.
            "gain": `(b_i)_+^2 / (2 K_ii)`, the most that `b'w - 1/2 w'Kw` can gain with candidate i alone and
            w_i >= 0; the first choice of `Greedy`.
            "shapley": `b_i - 1/2 sum_j K_ij` over the whole pool, the Shapley value of
            `U(S) = sum_S b_i - 1/2 sum_SS K_ij`, everyone with the weight 1 of plain training. Wang et al. 2024, "Data
            Shapley in one training run", second order. Deviation: their Hessian is that of the target's loss, ours the
            optimizer's own P^-1 (for `geometry="vanilla"` 1/lr, under which K is in the units of b).

            A candidate with K_ii = 0 does not move the model: its cosine and gain are 0.

    Raises:
        ConfigurationError: `by` is not one of the four.
    """

    def __init__(self, by: str = "alignment") -> None:
        one_of("by", by, SCORES)
        self.by = by
        self.needs_gram = by != "alignment"

    def __call__(self, problem: SelectionProblem) -> Tensor:
        return largest(self._score(problem), problem.budget)

    def _score(self, problem: SelectionProblem) -> Tensor:  # (n,)
        b = problem.alignment
        if self.by == "alignment":
            return b
        if self.by == "shapley":
            return b - problem.row_sums / 2
        diagonal = problem.diagonal
        movable = diagonal > 0
        if self.by == "cosine":
            length = torch.where(movable, diagonal, 1.0).sqrt()
            return torch.where(movable, b / length, 0.0)
        positive = b.clamp_min(0)
        # The quotient first: the square of a small alignment would underflow.
        return torch.where(movable, positive * (positive / torch.where(movable, diagonal, 1.0)) / 2, 0.0)
