"""Another filter's picks, with no more or no fewer than a share of them for each label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.filters.base import Filter
from ftw.filters.ranking import largest
from ftw.filters.subpool import inner_filter, labels_of, subproblem
from ftw.problem import SelectionProblem


class Quota(Filter):
    """Picks of another filter that keep to limits on how many carry each label, such as the source of the sample.

    With k the budget, at most `floor(share k)` candidates of a label come, and at least `ceil(share k)`.

    1. The other filter picks from the whole pool. If that keeps to every limit, it stands.
    2. Labels with too many keep as many as they may, the best by that filter's order, and their other candidates leave
       the pool; the filter picks again, until no label has too many.
    3. For labels with too few the filter picks from their candidates alone; whom it passes over comes by alignment.
       Where that is more than k in all, the last picks of labels with more than their least make room.

    For filters that rank candidates one by one this is the best choice there is under the limits.

    Args:
        filter: name, class or instance of the filter that picks.
        column: name of the column with one label for each candidate.
        at_most: largest share for each label named; or one number for every label. By default 0.5 where at_least is
            not given either, and no limit where it is.
        at_least: smallest share for each label named. The sum is at most 1.

    Raises:
        ConfigurationError: shares are no shares or contradict each other, or `filter` ignores budgets; at a step, the
            column is missing or the pool has too few candidates of a label with a least share.
    """

    def __init__(
        self,
        filter: Any = "greedy",
        column: str = "source",
        at_most: float | Mapping[Any, float] | None = None,
        at_least: Mapping[Any, float] | None = None,
    ) -> None:
        self.filter, self.column = inner_filter(filter, "quota"), column
        if at_most is None:
            at_most = 0.5 if at_least is None else 1.0
        self.everyone = 1.0 if isinstance(at_most, Mapping) else at_most
        self.at_most = dict(at_most) if isinstance(at_most, Mapping) else {}
        self.at_least = dict(at_least or {})
        for name, share in (("at_most", self.everyone), *_pairs("at_most", self.at_most)):
            _check_share(name, share)
        for name, share in _pairs("at_least", self.at_least):
            _check_share(name, share)
        if sum(self.at_least.values()) > 1 + 1e-9:
            raise ConfigurationError(
                f"at_least is {self.at_least}, {sum(self.at_least.values())} in all; the shares of all labels are at "
                "most 1 together; lower them."
            )
        self.needs_gram = self.filter.needs_gram
        self.columns = tuple(dict.fromkeys((column, *self.filter.columns)))

    def __call__(self, problem: SelectionProblem) -> Tensor:
        labels = labels_of(self.column, problem.extra(self.column, "the filter 'quota'"))
        most, least = self._limits(labels, problem.budget)
        picks = self._capped(problem, labels, most)
        return torch.tensor(self._filled(problem, labels, least, picks), dtype=torch.long)

    def _limits(self, labels: list[Any], k: int) -> tuple[dict[Any, int], dict[Any, int]]:
        """Largest and smallest number of picks by label."""
        here = Counter(labels)
        # 1e-9: a third of 3 is 1, whatever 3 * (1 / 3) rounds to.
        most = {label: math.floor(self.at_most.get(label, self.everyone) * k + 1e-9) for label in here}
        least = {label: math.ceil(share * k - 1e-9) for label, share in self.at_least.items()}
        for label, number in least.items():
            if number > min(here[label], most.get(label, 0)):
                raise ConfigurationError(
                    f"at_least asks for {number} of {k} picks with {self.column} {label!r}; the pool has {here[label]} "
                    f"and at_most allows {most.get(label, 0)}; lower at_least, raise at_most, or offer more candidates "
                    "with that label."
                )
        if sum(least.values()) > k:
            raise ConfigurationError(
                f"at_least asks for {least} picks, more in all than the budget of {k}, because parts of a pick count "
                "as one; lower the shares or raise the budget."
            )
        return most, least

    def _capped(self, problem: SelectionProblem, labels: list[Any], most: dict[Any, int]) -> list[int]:
        """Picks of the filter, best first, with no label above its limit."""
        on_offer = torch.arange(problem.size)
        while True:
            part = subproblem(problem, on_offer, min(problem.budget, len(on_offer)))
            picks: list[int] = on_offer[self.filter(part)].tolist()
            taken: Counter[Any] = Counter()
            kept = []
            for candidate in picks:
                taken[labels[candidate]] += 1
                if taken[labels[candidate]] <= most[labels[candidate]]:
                    kept.append(candidate)
            full = {label for label, number in taken.items() if number > most[label]}
            if not full:
                return picks
            stays = [i for i in on_offer.tolist() if labels[i] not in full or i in set(kept)]
            on_offer = torch.tensor(stays, dtype=torch.long)

    def _filled(
        self, problem: SelectionProblem, labels: list[Any], least: dict[Any, int], picks: list[int]
    ) -> list[int]:
        """The picks with more of the labels that have too few, and fewer of others where the budget asks for it."""
        taken = Counter(labels[candidate] for candidate in picks)
        added: list[int] = []
        for label, number in least.items():
            missing = number - taken[label]
            if missing > 0:
                added += self._more(problem, [i for i, each in enumerate(labels) if each == label], picks, missing)
        surplus = len(picks) + len(added) - problem.budget
        for candidate in reversed(picks.copy()):
            if surplus > 0 and taken[labels[candidate]] > least.get(labels[candidate], 0):
                picks.remove(candidate)
                taken[labels[candidate]] -= 1
                surplus -= 1
        return [*picks, *added]

    def _more(self, problem: SelectionProblem, alike: list[int], picks: list[int], missing: int) -> list[int]:
        """`missing` further candidates of one label."""
        left = torch.tensor([i for i in alike if i not in picks], dtype=torch.long)
        chosen: list[int] = left[self.filter(subproblem(problem, left, missing))].tolist()
        others = torch.tensor([i for i in left.tolist() if i not in chosen], dtype=torch.long)
        by_alignment = others[largest(problem.alignment[others], missing - len(chosen))]
        return [*chosen, *by_alignment.tolist()]


def _pairs(name: str, shares: Mapping[Any, float]) -> list[tuple[str, float]]:
    return [(f"{name}[{label!r}]", share) for label, share in shares.items()]


def _check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ConfigurationError(f"{name} is {share!r}; a share of the picks from 0 to 1 is needed; half is 0.5.")
