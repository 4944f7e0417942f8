"""What a dataset says of its samples beside the model's inputs, carried past a trainer's collator to its step.

No trainer is imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from ftw.watching.entries import NAMES, label

__all__ = ["COLUMNS", "NAMES", "KeepColumns", "SteadyColumns", "is_dispatched", "texts_of"]

COLUMNS = "ftw_columns"
"""Key of a batch under which its samples' columns stand, name -> one entry a sample."""


class KeepColumns:
    """A collator that hands on what the one inside could not make a tensor of.

    Args:
        collator: what the trainer would use.
        names: columns to hand on, of those that the samples have.
        drop: whether the collator inside is spared them.
    """

    def __init__(self, collator: Callable[[Any], Any], names: Sequence[str], *, drop: bool) -> None:
        self.collator, self.names, self.drop = collator, names, drop

    def __call__(self, features: list[Any]) -> Any:
        if not all(isinstance(each, Mapping) for each in features):
            return self.collator(features)
        found = [name for name in self.names if any(name in each for each in features)]
        # Taken before the collator runs, which may empty them.
        columns = {name: [label(each.get(name)) for each in features] for name in found}
        if self.drop and found:
            features = [{name: value for name, value in each.items() if name not in found} for each in features]
        batch = self.collator(features)
        if found and isinstance(batch, MutableMapping):
            batch[COLUMNS] = columns
        return batch


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


def is_dispatched(accelerator: Any, dataset: Any) -> bool:
    """Whether one process loads the batches of several, and nothing but tensors reaches the others; warns if so."""
    dispatched = accelerator.dispatch_batches
    if dispatched is None:
        dispatched = isinstance(dataset, IterableDataset)
    if not dispatched or accelerator.num_processes == 1:
        return False
    warnings.warn(
        "one process loads the batches of all, and nothing but tensors reaches the others: the decision log does "
        "without the dataset's columns; give TrainingArguments(accelerator_config={'dispatch_batches': False}) if each "
        "process can read its own part.",
        stacklevel=2,
    )
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
