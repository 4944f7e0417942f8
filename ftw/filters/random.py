"""Random candidates: the baseline that every other filter has to beat at the same budget."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.filters.base import Filter
from ftw.filters.draws import generator_of
from ftw.problem import SelectionProblem


class Random(Filter):
    """k candidates drawn uniformly without replacement from the problem's generator.

    Raises:
        ConfigurationError: the problem has no generator; the global one is not used, or runs would not repeat.
    """

    def __call__(self, problem: SelectionProblem) -> Tensor:
        generator = generator_of(problem, "random")
        order = torch.randperm(problem.size, generator=generator, device=generator.device)
        return order[: problem.budget].cpu()
