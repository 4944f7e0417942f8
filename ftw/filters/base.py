"""The interface of filters: which candidates may keep a weight. Called by the selector, once a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import SelectionProblem


class Filter(ABC):
    """Picks S, |S| <= k, from the pool.

    Law: for every problem `index = filter(problem)` is a LongTensor on the CPU of distinct values in [0, n),
    at most `problem.budget` of them (`All`, which ignores the budget, says so by `honours_budget = False`),
    best first; the same problem and generator state give the same index; the problem is left as it was.

    The three attributes below say what a filter needs; a class sets them, or an instance where its options decide.
    """

    needs_gram: bool = False
    """Whether the filter reads K; one that does not also serves problems posed without it (`gram=None`)."""

    honours_budget: bool = True
    """Whether at most `problem.budget` candidates come back."""

    columns: tuple[str, ...] = ()
    """Names of the columns in `problem.extras` that the filter reads; without one of them it raises."""

    @abstractmethod
    def __call__(self, problem: SelectionProblem) -> Tensor:
        """Indices of the chosen candidates, LongTensor (m,), m <= k, best first; empty if nothing is worth taking."""

    def shortlist(self, problem: SelectionProblem) -> tuple[Tensor, Filter | None]:
        """What can be picked without K, and the filter that picks from it; None: the pick is final.

        For pools whose K is dear: it is then formed for the shortlist only.

        Args:
            problem: posed without K.
        """
        if self.needs_gram:
            return torch.arange(problem.size), self
        return self(problem), None

    def require_columns(self, given: Collection[str]) -> None:
        """Checks before a step is run that the columns the filter reads will be there.

        Args:
            given: names of the columns that will stand in the problem's extras.

        Raises:
            ConfigurationError: one is missing; the message names all that are.
        """
        missing = [name for name in self.columns if name not in given]
        if missing:
            raise ConfigurationError(
                f"the filter {type(self).__name__} needs the columns {list(self.columns)} of each candidate, and "
                f"{missing} are missing among {sorted(given)}; pass them with record(extras={{name: one entry for each "
                "candidate}), or with the extras= of what calls it, or in the problem's extras."
            )
