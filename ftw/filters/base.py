"""The interface of filters: which candidates may keep a weight. Called by the selector, once a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ftw.problem import SelectionProblem


class Filter(ABC):
    """Picks S, |S| <= k, from the pool.

    Law: for every problem `index = filter(problem)` is a LongTensor on the CPU of distinct values in [0, n),
    at most `problem.budget` of them (`All`, which ignores the budget, says so by `honours_budget = False`),
    best first; the same problem and generator state give the same index; the problem is left as it was.
    """

    needs_gram: ClassVar[bool] = False
    """Whether the filter reads K; one that does not also serves problems posed without it (`gram=None`)."""

    honours_budget: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, problem: SelectionProblem) -> Tensor:
        """Indices of the chosen candidates, LongTensor (m,), m <= k, best first; empty if nothing is worth taking."""
