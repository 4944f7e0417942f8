"""No filter: the whole pool, for training on everything and for weighing everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.filters.base import Filter
from ftw.problem import SelectionProblem


class All(Filter):
    """Every candidate in the order of the pool; the budget is ignored, as `honours_budget` says."""

    honours_budget = False

    def __call__(self, problem: SelectionProblem) -> Tensor:
        return torch.arange(problem.size)
