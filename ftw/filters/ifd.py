"""The samples whose answers the prompt explains least, though it does explain them."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.filters.base import Filter
from ftw.filters.ranking import column, largest
from ftw.problem import SelectionProblem


class IFD(Filter):
    """The k candidates with the largest instruction-following difficulty that is not above `most`; possibly fewer.

    The difficulty is `loss_with_prompt_i / loss_without_prompt_i`: the mean loss of the answer's tokens given the
    prompt, over the same mean without any prompt. Above 1 the prompt makes the answer less likely: the two do not
    belong together, and the candidate is left out. An answer that is certain without its prompt (loss 0) has
    nothing to learn and is left out as well.

    Reads the columns "loss_with_prompt" and "loss_without_prompt": one number of at least 0 for each candidate, in
    nats per token, over the tokens of the answer alone. The second needs a forward pass of its own.

    Source: Li et al. 2024, "From quantity to quality: boosting LLM performance with self-guided data selection for
    instruction tuning", the IFD score of section 2, and its published code for the limit of 1. Deviation: the model
    being trained may supply the losses at every step; there a model that saw a few samples scores the whole set once.

    Args:
        most: largest difficulty allowed.

    Raises:
        ConfigurationError: `most` is not positive; at a step, a loss is negative.
    """

    columns = ("loss_with_prompt", "loss_without_prompt")

    def __init__(self, most: float = 1.0) -> None:
        if isinstance(most, bool) or not isinstance(most, (int, float)) or not most > 0:
            raise ConfigurationError(
                f"most is {most!r}; a positive number is needed; leave it out for 1, or pass float('inf') for no limit."
            )
        self.most = float(most)

    def __call__(self, problem: SelectionProblem) -> Tensor:
        conditioned, alone = (column(problem, name, "the filter 'ifd'") for name in self.columns)
        for name, losses in zip(self.columns, (conditioned, alone), strict=True):
            if bool((losses < 0).any()):
                raise ConfigurationError(
                    f"extras[{name!r}] holds {float(losses.min())}; mean token losses of at least 0 are needed; "
                    "pass losses, not log-likelihoods."
                )
        known = alone > 0
        difficulty = torch.where(known, conditioned / torch.where(known, alone, 1.0), torch.inf)
        return largest(difficulty, problem.budget, known & (difficulty <= self.most))
