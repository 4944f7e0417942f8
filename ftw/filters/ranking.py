"""Orders candidates by a score: the last step of every filter that scores candidates one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.problem import SelectionProblem, as_vector


def largest(
    score: Tensor,  # (n,) float64
    count: int,
    eligible: Tensor | None = None,  # (n,) bool
) -> Tensor:  # (m,), m <= count
    """Indices of the largest scores, best first, equal ones by their position in the pool."""
    order = torch.argsort(score, descending=True, stable=True)
    if eligible is not None:
        order = order[eligible[order]]
    return order[:count]


def column(problem: SelectionProblem, name: str, who: str) -> Tensor:  # (n,) float64
    """The column `extras[name]` as finite numbers.

    Raises:
        ConfigurationError: it is missing, not numeric or not finite.
    """
    return as_vector(f"extras[{name!r}] for {who}", problem.extra(name, who))
