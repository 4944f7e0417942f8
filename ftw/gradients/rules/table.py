"""The built-in rules, and those that the user adds. Called by the selector; read by coverage."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ftw.errors import ConfigurationError
from ftw.gradients.rules.attention import MultiheadAttentionRule
from ftw.gradients.rules.base import LayerRule
from ftw.gradients.rules.embedding import EmbeddingRule
from ftw.gradients.rules.experts import ExpertsRule, FlattenedLinearRule, RouterRule
from ftw.gradients.rules.functional import FunctionalRule
from ftw.gradients.rules.matrix import Conv1DRule, LinearRule
from ftw.gradients.rules.norms import AffineNormRule, DoraMagnitudeRule, GatedNormRule, LayerNormRule

RULES: tuple[LayerRule, ...] = (
    FlattenedLinearRule(ExpertsRule()),
    LinearRule(),
    Conv1DRule(),
    EmbeddingRule(),
    LayerNormRule(),
    AffineNormRule(),
    GatedNormRule(),
    DoraMagnitudeRule(),
    MultiheadAttentionRule(),
    ExpertsRule(),
    RouterRule(),
)
"""Asked in this order."""


def rules_for(functional: Sequence[str | type[nn.Module] | LayerRule] = ()) -> tuple[LayerRule, ...]:
    """The built-in rules, with what the user wants treated otherwise in front.

    Args:
        functional: names of modules or classes for `FunctionalRule`, or rules of the user's own.

    Raises:
        ConfigurationError: something else was given. Names and classes are compared with the model when it is bound.
    """
    if isinstance(functional, str | type | LayerRule):
        raise ConfigurationError(
            f"functional is {functional!r}; it takes a list of module names and classes; write functional=[...]."
        )
    own = tuple(each for each in functional if isinstance(each, LayerRule))
    named = [each for each in functional if not isinstance(each, LayerRule)]
    return (*own, *((FunctionalRule(*named),) if named else ()), *RULES)
