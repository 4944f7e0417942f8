"""The hard filter of the paper's ablation: only candidates that help."""

from __future__ import annotations

import math

from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.filters.base import Filter
from ftw.filters.ranking import largest
from ftw.problem import SelectionProblem


class Threshold(Filter):
    """The candidates with `b_i > value`, the k best of them at most; possibly none.

    Args:
        value: in the units of b: nats per unit weight with the curvature geometry. Only 0 has a meaning that no
            change of scale can touch.

    Raises:
        ConfigurationError: value is not a finite number.
    """

    def __init__(self, value: float = 0.0) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigurationError(
                f"value is {value!r}; a finite number is needed; leave it out for 0, every candidate that helps."
            )
        self.value = float(value)

    def __call__(self, problem: SelectionProblem) -> Tensor:
        return largest(problem.alignment, problem.budget, problem.alignment > self.value)
