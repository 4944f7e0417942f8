"""Orders candidates by a score: the last step of every filter that scores candidates one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
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
    values = problem.extra(name, who)
    try:
        return as_vector(f"extras[{name!r}]", values)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{who} was given extras[{name!r}] = {values!r}; a number for each candidate is needed; convert the column."
        ) from error
