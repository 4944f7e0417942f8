"""One rule per kind of layer, in the order in which they are asked."""

from ftw.gradients.rules.base import Call, LayerRule
from ftw.gradients.rules.functional import FunctionalRule
from ftw.gradients.rules.table import RULES, rules_for

__all__ = ["RULES", "Call", "FunctionalRule", "LayerRule", "rules_for"]
