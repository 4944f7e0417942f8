"""The samples that the model does worst on."""

from __future__ import annotations

from torch import Tensor

from ftw.filters.base import Filter
from ftw.filters.ranking import column, largest
from ftw.problem import SelectionProblem


class MaxLoss(Filter):
    """The k candidates with the largest loss, equal ones by their position in the pool.

    Reads the column "loss": one number for each candidate, in nats; the mean over its label tokens makes long and
    short samples comparable.

    Source: Loshchilov and Hutter 2016, "Online batch selection for faster training of neural networks", whose
    probabilities fall with the rank of the loss; and the baseline MaxLoss of GREATS (Wang et al. 2024).
    Deviation from the former: the largest are taken, none are drawn. The target plays no part.
    """

    columns = ("loss",)

    def __call__(self, problem: SelectionProblem) -> Tensor:
        return largest(column(problem, "loss", "the filter 'max_loss'"), problem.budget)
