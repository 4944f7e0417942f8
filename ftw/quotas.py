"""Quotas on where the weight goes: shares of the total for each label of a column, such as the candidates' source.

Passed as the selector's `constraints`; made into a set of weights once it is known who was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ftw.solvers.constraints import CappedCone, ConstraintSet
from ftw.solvers.linear_sets import Quota


class WeightQuota:
    """At most, or at least, a share of the weight for each label: `sum_{i in G} mu_i w_i <= share * mu'w`.

    Among the chosen: a filter that leaves no candidate of a label with a least share leaves no weights but 0. The
    filter `quota` sees to who is chosen.

    Args:
        at_most, at_least: label -> share of the total, from 0 to 1.
        column: of `record(extras=...)` that holds the labels.
        base: the set that is cut; `CappedCone(4.0)` by default.

    Raises:
        ConfigurationError: see `ftw.solvers.Quota`.
    """

    def __init__(
        self,
        at_most: Mapping[Any, float] | None = None,
        at_least: Mapping[Any, float] | None = None,
        *,
        column: str = "source",
        base: ConstraintSet | None = None,
    ) -> None:
        self.at_most, self.at_least = dict(at_most or {}), dict(at_least or {})
        self.column = column
        self.base = CappedCone(4.0) if base is None else base
        Quota(self.base, [], self.at_most, self.at_least)  # shares that make no sense are found here

    def __call__(self, mass: Tensor, count: int, labels: Sequence[Any]) -> Quota:
        """The set for the chosen candidates; mass (m,), count n of the pool, labels of the chosen."""
        return Quota(self.base, labels, self.at_most, self.at_least, mass)
