"""The plainest filter: the largest first-order gains."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.filters.base import Filter
from ftw.problem import SelectionProblem


class TopK(Filter):
    """The k candidates with the largest alignment b_i, equal ones by their position in the pool.

    Always k of them, even where b_i is negative; `Threshold` leaves those out.
    """

    def __call__(self, problem: SelectionProblem) -> Tensor:
        return torch.argsort(problem.alignment, descending=True, stable=True)[: problem.budget]
