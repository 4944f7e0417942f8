"""GREATS: greedy on the first-order gain less the interaction with what is chosen, weights taken for granted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ftw.arguments import at_least, one_of
from ftw.filters.base import Filter
from ftw.filters.gram_columns import gram_columns
from ftw.filters.ranking import column
from ftw.problem import SelectionProblem


class Greats(Filter):
    """Adds k times the candidate with the largest `b_i - lr s sum_{j in S} K_ij`, S being what is chosen so far.

    Source: Wang et al. 2024, "GREATS: online selection of high-quality data for LLM training in every iteration",
    its marginal gain and greedy loop, as in the published code:

        U(z | S) = lr grad_z . g - lr^2 sum_{j in S} grad_z . grad_j

    where grad_z is the gradient of the loss of one sample, the Hessian of the target loss is taken for the identity,
    and neither the candidate's curvature with itself nor a refit of weights appears. In the units of the problem, with
    `geometry="vanilla"` and equal masses, `c_i = grad_i / n`, `b_i = lr c_i . g` and `K_ij = lr c_i . c_j`, so that

        U(z | S) = n (b_z - lr n sum_{j in S} K_zj)

    which is the score above with `s = n`, up to the factor n that all share. s is the weight of a chosen candidate
    (plain training is 1): n where gradients are summed, as the paper writes it, and n/k where they are averaged, as its
    trainer does and as equal, mean-preserving weights do here (`reduction`). Deviation: only that other choice of s.
    Other geometries put their M in the place of lr I.

    The units show what the identity means: a curvature of 1 in every direction of parameter space. With the learning
    rates of fine-tuning the second term is 1e-4 of the first or less, and the filter is `TopK`. `learning_rate=1.0`
    gives the optimizer's own curvature H = P^-1 instead (DESIGN, section 2).

    k candidates come back even where nothing gains, equal scores by position. Cost: k columns of K.

    Args:
        learning_rate: lr, positive or 0. None reads it from the column "learning_rate", one number for each candidate.
        reduction: "sum" (s = n) or "mean" (s = n/k).

    Raises:
        ConfigurationError: an argument is out of its range; at a step, the column is needed and missing.
    """

    needs_gram = True

    def __init__(self, learning_rate: float | None = None, reduction: str = "sum") -> None:
        if learning_rate is not None:
            at_least("learning_rate", learning_rate, 0.0)
        one_of("reduction", reduction, ("sum", "mean"))
        self.learning_rate, self.reduction = learning_rate, reduction
        self.columns = ("learning_rate",) if learning_rate is None else ()

    def __call__(self, problem: SelectionProblem) -> Tensor:
        if self.learning_rate is None:
            rate = column(problem, "learning_rate", "the filter 'greats'").numpy()
        else:
            rate = np.full(problem.size, float(self.learning_rate))
        if not problem.budget:
            return torch.zeros(0, dtype=torch.long)
        weight = float(problem.size) if self.reduction == "sum" else problem.size / problem.budget
        read, score = gram_columns(problem), problem.alignment.numpy().copy()
        chosen: list[int] = []
        for _ in range(problem.budget):
            best = int(np.argmax(score))
            chosen.append(best)
            score -= rate * weight * read(best)
            score[best] = -np.inf
        return torch.tensor(chosen, dtype=torch.long)
