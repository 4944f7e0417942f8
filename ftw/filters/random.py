"""Random candidates: the baseline that every other filter has to beat at the same budget."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.filters.base import Filter
from ftw.problem import SelectionProblem


class Random(Filter):
    """k candidates drawn uniformly without replacement from the problem's generator.

    Raises:
        ConfigurationError: the problem has no generator; the global one is not used, or runs would not repeat.
    """

    def __call__(self, problem: SelectionProblem) -> Tensor:
        generator = problem.generator
        if generator is None:
            raise ConfigurationError(
                "the filter 'random' was given a problem with generator=None; it needs a source of randomness; "
                "pass generator=torch.Generator().manual_seed(seed)."
            )
        order = torch.randperm(problem.size, generator=generator, device=generator.device)
        return order[: problem.budget].cpu()
