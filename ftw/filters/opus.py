"""OPUS: candidates drawn by the softmax of their utility, less their redundancy with those drawn before."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ftw.arguments import at_least
from ftw.filters.base import Filter
from ftw.filters.draws import generator_of, gumbel
from ftw.filters.gram_columns import gram_columns
from ftw.filters.ranking import largest
from ftw.problem import SelectionProblem
from ftw.solvers.polyhedron import Vector


class Opus(Filter):
    """Draws k candidates one after the other with odds `exp(U_i / tau)`, `U_i = b_i - s sum_{j in S} K_ij`.

    S is what is drawn so far, and U is computed anew after each draw. Randomness comes from the problem's generator.

    Source: Wang et al. 2026, "OPUS: towards efficient and principled data selection in large language model
    pre-training in every iteration", equations 23 and 26 and algorithm 1:

        U_z = eta u_z . g - eta^2 u_z . G,   G = sum_{j in S} u_j,   p(z) ~ exp(U_z / tau),   tau = 0.9

    with u_z the optimizer's update of the sample's gradient. Deviations, each of which puts units right:

    - The Hessian of the target loss, theirs the identity, is the optimizer's own P^-1: `u_i'P^-1 u_j` is K_ij of the
      curvature geometry. Against the identity the penalty is the square of a learning rate times a squared update, in
      no unit of b; it is then far below b or far above.
    - s, the weight of a chosen candidate, is theirs 1 per summed gradient. Here it is the common weight that would be
      best for the k candidates T of largest b, `s = sum_T b / sum_TT K` (0 where that is negative): with it the
      penalty of a full set is as large, on average over T, as the alignment. `redundancy` multiplies it.
    - tau is `temperature` times the standard deviation of b over the pool (times the mean of |b| where all are equal).
      Theirs is 0.9 in nats of one step, where utilities differ by 1e-3 and less, so that draws are nearly uniform.

    So neither the loss's scale nor the target's changes the odds.

    Cost: k columns of K, and n k numbers from the generator.

    Args:
        temperature: in units of the spread of b, at least 0; 0 takes the largest U, equal ones by position.
        redundancy: multiplier of s, at least 0; 0 draws by alignment alone.

    Raises:
        ConfigurationError: an argument is negative; at a step, the problem has no generator.
    """

    needs_gram = True

    def __init__(self, temperature: float = 0.9, redundancy: float = 1.0) -> None:
        at_least("temperature", temperature, 0.0)
        at_least("redundancy", redundancy, 0.0)
        self.temperature, self.redundancy = float(temperature), float(redundancy)

    def __call__(self, problem: SelectionProblem) -> Tensor:
        generator = generator_of(problem, "opus")
        weight = self.redundancy * _common_weight(problem)
        spread = self.temperature * _spread(problem.alignment)
        read, utility = gram_columns(problem), problem.alignment.numpy().copy()
        drawn: list[int] = []
        for _ in range(problem.budget):
            noise = spread * gumbel(generator, problem.size).numpy() if spread > 0 else 0.0
            best = int(np.argmax(utility + noise))
            drawn.append(best)
            utility -= weight * read(best)
            utility[best] = -np.inf
        return torch.tensor(drawn, dtype=torch.long)


def _common_weight(problem: SelectionProblem) -> float:
    """The best weight, none negative, that the k candidates of largest alignment can share."""
    top = largest(problem.alignment, problem.budget)
    gain, bend = float(problem.alignment[top].sum()), float(problem.gram_block(top).sum())
    return gain / bend if gain > 0 and bend > 0 else 0.0


def _spread(b: Tensor) -> float:
    """The standard deviation of b, or where all are equal the mean of |b|; 1 where all are 0 and any unit will do."""
    values: Vector = b.numpy()
    height = float(np.abs(values).max(initial=0.0))
    if not height:
        return 1.0
    values = values / height  # squares of small numbers underflow
    deviation = float(values.std())
    return height * (deviation if deviation > 1e-12 else 1.0)
