"""Several filters one after the other: a cheap one before a dear one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftw import registry
from ftw.errors import ConfigurationError
from ftw.filters.base import Filter
from ftw.filters.subpool import subproblem
from ftw.problem import SelectionProblem


class Chain(Filter):
    """Each filter picks from what the one before it picked; the last has the budget k.

    The default, `topk` for 2 k candidates and then `greedy`, keeps matching pursuit to candidates that help. The order
    is that of the last filter. A filter that reads K sees the K of its own candidates, so that a problem whose K is
    formed on demand forms no more than those columns and rows.

    Args:
        filters: names, classes or instances, at least one.
        keep: how many candidates each but the last passes on: a float is a multiple of k (rounded up), an int a
            number. Never fewer than k, nor more than there are.

    Raises:
        ConfigurationError: no filter, or not one `keep` for each but the last, or one that is out of its range.
    """

    def __init__(self, filters: Sequence[Any] = ("topk", "greedy"), keep: Sequence[float] = (2.0,)) -> None:
        if isinstance(filters, str) or not len(filters) or len(keep) != len(filters) - 1:
            raise ConfigurationError(
                f"filters is {filters!r} and keep is {keep!r}; at least one filter is needed, and one keep for each "
                'but the last; an example is Chain(["topk", "greedy"], keep=[2.0]).'
            )
        for each in keep:
            if isinstance(each, bool) or not isinstance(each, (int, float)) or not 1 <= each < math.inf:
                raise ConfigurationError(
                    f"keep holds {each!r}; allowed are multiples of k as floats of at least 1.0 and numbers of "
                    "candidates as ints of at least 1; twice the budget is 2.0."
                )
        self.filters: tuple[Filter, ...] = tuple(registry.resolve("filters", each) for each in filters)
        self.keep = tuple(keep)
        self.needs_gram = any(each.needs_gram for each in self.filters)
        self.honours_budget = self.filters[-1].honours_budget
        self.columns = tuple(dict.fromkeys(name for each in self.filters for name in each.columns))

    def __call__(self, problem: SelectionProblem) -> Tensor:
        return self._run(problem, len(self.filters))

    def shortlist(self, problem: SelectionProblem) -> tuple[Tensor, Filter | None]:
        """What the filters before the first that reads K leave, and the rest of the chain."""
        stages = next((i for i, each in enumerate(self.filters) if each.needs_gram), len(self.filters))
        rest = Chain(self.filters[stages:], self.keep[stages:]) if stages < len(self.filters) else None
        return self._run(problem, stages), rest

    def _run(self, problem: SelectionProblem, stages: int) -> Tensor:
        """The candidates that the first so many filters leave."""
        k, index = problem.budget, torch.arange(problem.size)
        for stage, keep in list(zip(self.filters, (*self.keep, None), strict=True))[:stages]:
            wanted = k if keep is None else max(k, math.ceil(keep * k) if isinstance(keep, float) else keep)
            # Always in the order of the pool, so that a later filter breaks its ties by position there.
            index = index.sort().values
            part = subproblem(problem, index, min(wanted, len(index)))
            index = index[stage(part)]
        return index
