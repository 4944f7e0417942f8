"""A part of the pool as a problem of its own. Called by filters that hand candidates on to another filter."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from ftw import registry
from ftw.errors import ConfigurationError
from ftw.filters.base import Filter
from ftw.problem import GramSource, SelectionProblem


def subproblem(
    problem: SelectionProblem,
    index: Tensor,  # (m,)
    budget: int,
    alignment: Tensor | None = None,  # (m,)
) -> SelectionProblem:
    """The problem posed to the candidates `index` alone; the generator is shared, so draws go on where they stood.

    Args:
        index: LongTensor of distinct candidates; candidate i of the result is `index[i]` of `problem`.
        budget: at most m.
        alignment: b of the result, where it is not that of `problem`.
    """
    assert problem.mass is not None
    return SelectionProblem(
        gram=_gram(problem, index),
        alignment=problem.alignment[index] if alignment is None else alignment,
        budget=budget,
        mass=problem.mass[index],
        generator=problem.generator,
        factor=None if problem.factor is None else problem.factor[index],
        alignments=None if problem.alignments is None else problem.alignments[index],
        extras=_entries(problem.extras, index),
    )


def _gram(problem: SelectionProblem, index: Tensor) -> GramSource | None:
    if problem.gram is None:
        return None
    # On demand: a filter that does not look at K shall not pay for a copy of it.
    return lambda part: problem.gram_block(index if part is None else index[part])


def _entries(extras: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    positions = index.tolist()
    return {
        name: values[index.to(values.device)] if isinstance(values, Tensor) else [values[i] for i in positions]
        for name, values in extras.items()
    }


def labels_of(name: str, values: Any) -> list[Any]:
    """A column's entries as plain values, so that equal labels are equal whatever held them.

    Raises:
        ConfigurationError: an entry that cannot tell a group, such as a list.
    """
    labels = [value.item() if hasattr(value, "item") else value for value in values]
    wrong = [label for label in labels if not isinstance(label, Hashable)]
    if wrong:
        raise ConfigurationError(
            f"the column {name!r} holds {wrong[0]!r}; labels are strings, numbers or other values that can be keys of "
            "a dictionary; pass one such label for each candidate."
        )
    return labels


def inner_filter(filter: Any, who: str) -> Filter:
    """The filter that `who` runs on parts of the pool, by name, class or instance.

    Raises:
        UnknownComponentError, BrokenPluginError, DuplicateComponentError: see `ftw.registry.resolve`.
        ConfigurationError: it is no filter, or one that ignores budgets, which parts of a pool need.
    """
    resolved: Filter = registry.resolve("filters", filter)
    if not resolved.honours_budget:
        raise ConfigurationError(
            f"the filter {who!r} was given {type(resolved).__name__} to pick with; it ignores budgets, and one that "
            "keeps to them is needed; use 'topk' or 'greedy'."
        )
    return resolved
