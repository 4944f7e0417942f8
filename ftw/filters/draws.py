"""Random numbers for filters that draw: from the problem's generator and from nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import SelectionProblem


def generator_of(problem: SelectionProblem, who: str) -> torch.Generator:
    """The problem's source of randomness.

    Raises:
        ConfigurationError: it has none; the global one is not used, or runs would not repeat.
    """
    if problem.generator is None:
        raise ConfigurationError(
            f"the filter {who!r} was given a problem with generator=None; it needs a source of randomness; "
            "pass generator=torch.Generator().manual_seed(seed)."
        )
    return problem.generator


def uniform(generator: torch.Generator, count: int) -> Tensor:  # (count,) float64 on the CPU
    """Independent draws from [0, 1)."""
    return torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device).cpu()


def gumbel(generator: torch.Generator, count: int) -> Tensor:  # (count,) float64 on the CPU
    """Independent standard Gumbel draws: `argmax(score + gumbel)` has the law `softmax(score)`."""
    # 1 - u lies in (0, 1], so that the inner logarithm is finite; where it is 0 the draw is +inf, with odds of 2^-53.
    return -(-(1.0 - uniform(generator, count)).log()).log()
