"""What a dataset says of its samples beside the model's inputs, carried past a trainer's collator to its step.

No trainer is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ftw.watching.entries import NAMES

__all__ = ["COLUMNS", "NAMES", "KeepColumns", "texts_of"]

COLUMNS = "ftw_columns"
"""Key of a batch under which its samples' columns stand."""


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
        columns = {name: [_plain(each.get(name)) for each in features] for name in found}
        if self.drop and found:
            features = [{name: value for name, value in each.items() if name not in found} for each in features]
        batch = self.collator(features)
        if found:
            batch[COLUMNS] = columns
        return batch


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


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
