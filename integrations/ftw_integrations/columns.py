"""What a dataset says of its samples beside the model's inputs, carried past a trainer's collator to its step.

No trainer is imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence, Sized
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ftw.errors import ConfigurationError
from ftw.watching.entries import NAMES, label

__all__ = ["COLUMNS", "NAMES", "KeepColumns", "SteadyColumns", "columns_of", "is_dispatched", "require", "texts_of"]

COLUMNS = "ftw_columns"
"""Key of a batch under which its samples' columns stand, name -> one entry a sample."""


class KeepColumns:
    """A collator that hands on what the one inside could not make a tensor of.

    Args:
        collator: what the trainer would use.
        needed: columns to hand on, that every sample has.
        names: columns to hand on, of those that the samples have.
        spared: those of them that the collator inside does not see.

    Raises:
        ConfigurationError: when called: a sample lacks a column that is needed.
    """

    def __init__(
        self, collator: Callable[[Any], Any], needed: Sequence[str], names: Sequence[str], *, spared: Sequence[str]
    ) -> None:
        self.collator, self.needed, self.names, self.spared = collator, needed, names, spared

    def __call__(self, features: list[Any]) -> Any:
        for each in features if self.needed else ():
            require(self.needed, each if isinstance(each, Mapping) else (), "a sample of train_dataset")
        if not all(isinstance(each, Mapping) for each in features):
            return self.collator(features)
        found = [*self.needed, *(name for name in self.names if any(name in each for each in features))]
        # Taken before the collator runs, which may empty them.
        columns = {name: [_entry(each.get(name)) for each in features] for name in found}
        if self.spared:
            features = [{name: value for name, value in each.items() if name not in self.spared} for each in features]
        batch = self.collator(features)
        if found and isinstance(batch, MutableMapping):
            batch[COLUMNS] = columns
        return batch


def require(needed: Sequence[str], given: Iterable[str], who: str) -> None:
    """Checks that `who` has the columns that the filter reads.

    Raises:
        ConfigurationError: one is missing; names those that are there.
    """
    there = list(given)
    missing = [name for name in needed if name not in there]
    if missing:
        raise ConfigurationError(
            f"the filter reads the column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} of each "
            f"sample, and {who} has {', '.join(there) or 'no columns'}; add it, choose a filter that does without, or "
            "pack no samples into rows where that has taken it away."
        )


def columns_of(dataset: Any) -> list[str] | None:
    """Names of a dataset's columns, by its first sample; None where that would use up a stream."""
    if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset):
        with torch.random.fork_rng(devices=[]):  # samples may be drawn at random
            first = dataset[0] if len(dataset) else {}
        return list(first) if isinstance(first, Mapping) else []
    names = getattr(dataset, "column_names", None)
    return None if names is None else list(names)


def _entry(value: Any) -> str | int | float | None:
    """As `label`, and what is a number stays one: filters may read it."""
    with suppress(AttributeError, ValueError, RuntimeError, TypeError):  # no tensor or array, or one of several numbers
        value = value.item()
    return value if isinstance(value, float) else label(value)


class SteadyColumns:
    """The columns of a run's first micro-batch in each, as `Selector.record` needs them, whatever the data hold."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] | None = None
        self._passed_over: set[str] = set()

    def __call__(self, found: Mapping[str, list[Any]], count: int, longest: int) -> dict[str, list[Any]]:
        """Those of `count` candidates, None where they are not known, no text longer than `longest` characters."""
        columns = dict(found)
        if "text" in columns:  # what the log would cut is not sent to other processes either
            columns["text"] = [None if text is None else str(text)[:longest] for text in columns["text"]]
        if self._names is None:
            self._names = tuple(columns)
        late = columns.keys() - self._names - self._passed_over
        if late:
            self._passed_over |= late
            warnings.warn(
                f"the first samples have no {' and no '.join(sorted(late))}, as later ones do; the decision log goes "
                "by the first and leaves it out; give it to all samples, as None where it is not known.",
                stacklevel=2,
            )
        return {name: columns.get(name, [None] * count) for name in self._names}


def is_dispatched(accelerator: Any, dataset: Any, needed: Sequence[str] = ()) -> bool:
    """Whether one process loads the batches of several, and nothing but tensors reaches the others; warns if so.

    Raises:
        ConfigurationError: it is so, and the filter needs columns.
    """
    dispatched = accelerator.dispatch_batches
    if dispatched is None:
        dispatched = isinstance(dataset, IterableDataset)
    if not dispatched or accelerator.num_processes == 1:
        return False
    why = "one process loads the batches of all, and nothing but tensors reaches the others"
    remedy = (
        "give TrainingArguments(accelerator_config={'dispatch_batches': False}) if each process can read its own part"
    )
    if needed:
        raise ConfigurationError(f"the filter reads the dataset's {', '.join(needed)}, but {why}; {remedy}.")
    warnings.warn(f"{why}: the decision log does without the dataset's columns; {remedy}.", stacklevel=2)
    return True


def texts_of(tokenizer: Any, ids: Tensor, mask: Tensor | None, candidates: Tensor | None, longest: int) -> list[str]:
    """The beginning of each candidate's text, from `longest` tokens of it.

    Args:
        tokenizer: has `batch_decode`.
        ids, mask: (rows, T); mask is 0 on padding.
        candidates: (rows,) or (rows, T), whose each row or token is, -1 for nobody's; None: one candidate a row.
    """
    ids = ids.detach().cpu()
    if candidates is not None and candidates.dim() == 2:
        owner = candidates.cpu()
        rows = [ids[owner == i][:longest] for i in range(int(owner.max()) + 1)]
    else:
        kept = [True] * len(ids) if candidates is None else (candidates >= 0).tolist()
        seen = None if mask is None or mask.shape != ids.shape else mask.detach().cpu().bool()
        rows = [(row if seen is None else row[seen[i]])[:longest] for i, row in enumerate(ids) if kept[i]]
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts
