"""The samples that are worth learning, learnable and not yet learnt."""

from __future__ import annotations

from torch import Tensor

from ftw.filters.base import Filter
from ftw.filters.ranking import column, largest
from ftw.problem import SelectionProblem


class RhoLoss(Filter):
    """The k candidates with the largest reducible loss, equal ones by their position in the pool.

    The score is `loss_i - reference_loss_i`, in nats: the model's loss less that of a reference model trained on
    held-out data. Noise has a large loss under both, what is learnt a small one under both; neither scores high.

    Reads the columns "loss" and "reference_loss": one number for each candidate, averaged over the same tokens.

    Source: Mindermann et al. 2022, "Prioritized training on points that are learnable, worth learning, and not yet
    learnt", equation 3 and algorithm 1, without deviation. There as here the reference losses are computed once,
    before the run. The target plays no part, except that the reference model may have been trained on it.
    """

    columns = ("loss", "reference_loss")

    def __call__(self, problem: SelectionProblem) -> Tensor:
        who = "the filter 'rho_loss'"
        reducible = column(problem, "loss", who) - column(problem, "reference_loss", who)
        return largest(reducible, problem.budget)
