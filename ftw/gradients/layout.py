"""Layout: which candidate each row, or each token, of a forward belongs to.

The default is one row a candidate. A map of rows serves preference pairs (two rows, one candidate); a map of tokens
serves packed rows (several candidates in one row), models that flatten or transpose their rows, and selection of
tokens. Made by the recorder for each forward, read by the rules of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from ftw.errors import CandidateLayoutError, ConfigurationError


@dataclass(frozen=True)
class Tokens:
    """Where a layer's tokens stand, candidate by candidate, in its flattened leading dimensions.

    Law: `take(x)[bounds[i]:bounds[i + 1]]` are candidate i's rows of x, in their order.
    """

    index: Tensor | None  # (N,) int64 positions; None: all of them as they stand
    bounds: tuple[int, ...]  # (count + 1,)

    def take(self, tensor: Tensor, event: int = 1) -> Tensor:  # (*leading, *event) -> (N, *event)
        """The tokens' entries of a tensor whose last `event` dimensions belong to each token."""
        flat = tensor.reshape(-1, *tensor.shape[tensor.dim() - event :])
        return flat if self.index is None else flat[self.index.to(flat.device)]

    @property
    def even(self) -> int | None:
        """How many tokens every candidate has, where all have as many."""
        return even_length(self.bounds)


def even_length(bounds: tuple[int, ...]) -> int | None:
    """The distance between neighbouring borders, where it is the same for all."""
    lengths = {b - a for a, b in pairwise(bounds)}
    return lengths.pop() if len(lengths) == 1 else None


class Layout:
    """The candidates of one forward.

    Args:
        rows: leading dimension of the forward's inputs.
        start: number of the first candidate in the window.
        owner: (rows,) or (rows, T) int64: the candidate of each row or token, counted from 0; -1 is nobody's. None:
            row i is candidate i.
        count: how many candidates; at least one more than the largest owner.
    """

    def __init__(self, rows: int, start: int = 0, owner: Tensor | None = None, count: int | None = None) -> None:
        self.rows = rows
        self.start = start
        self.owner = owner
        self.count = rows if owner is None else int(owner.max()) + 1 if count is None else count
        self._known: dict[tuple[tuple[int, ...], bool], Tokens] = {}

    def fits(self, leading: Sequence[int], flat: bool = False) -> bool:
        """Whether a tensor with these leading dimensions can be divided among the candidates."""
        if not leading:
            return False
        if self.owner is not None and self.owner.dim() == 2:
            whole = tuple(leading[:2]) == tuple(self.owner.shape) or leading[0] == self.owner.numel()
            return whole and prod(leading) > 0
        return leading[0] == self.rows or (flat and leading[0] > 0 and leading[0] % self.rows == 0)

    def tokens(self, leading: Sequence[int], flat: bool = False) -> Tokens:
        """The candidates' tokens in a tensor with these leading dimensions.

        Args:
            leading: every dimension in front of a token's own numbers.
            flat: the first dimension may be rows times tokens, row by row.

        Raises:
            CandidateLayoutError: the dimensions are not those of the candidates.
        """
        key = tuple(leading), flat
        if key not in self._known:
            if not self.fits(leading, flat):
                raise CandidateLayoutError(
                    f"a tensor of leading dimensions {tuple(leading)} cannot be divided among {self.describe()}."
                )
            self._known[key] = self._divide(tuple(leading))
        return self._known[key]

    def of_nobody(self, tensor: Tensor, flat: bool = False) -> Tensor | None:  # (*leading, ...) -> (m, numbers each)
        """What of a tensor belongs to no candidate; None: nothing can, or it is not divided among them."""
        if self.owner is None or not bool((self.owner < 0).any()):
            return None
        if not tensor.numel() or not self.fits(tensor.shape, flat):
            return None
        return tensor.reshape(self.owner.numel(), -1)[(self.owner.flatten() < 0).to(tensor.device)]

    def describe(self) -> str:
        """What a leading dimension may be, for messages."""
        if self.owner is None:
            return f"{self.rows} rows"
        if self.owner.dim() == 1:
            return f"{self.rows} rows of {self.count} candidates"
        return f"{tuple(self.owner.shape)} tokens of {self.count} candidates"

    def _divide(self, leading: tuple[int, ...]) -> Tokens:
        total = prod(leading)
        if self.owner is None:
            each = total // self.rows
            return Tokens(None, tuple(range(0, total + 1, each)) if each else (0,) * (self.count + 1))
        each = total // self.owner.numel()
        owner = self.owner.flatten().repeat_interleave(each)
        lengths = torch.bincount(owner[owner >= 0], minlength=self.count)
        bounds = (0, *lengths.cumsum(0).tolist())
        order = torch.argsort(owner, stable=True)[total - bounds[-1] :]
        ordered = bounds[-1] == total and bool((order == torch.arange(total)).all())
        return Tokens(None if ordered else order, bounds)


def candidate_maps(candidates: Any, *, nobody: bool = False) -> list[Tensor] | None:
    """The `candidates` argument of `record()`, checked: one map for each forward of the block, on the CPU.

    Args:
        nobody: whether a block may be without candidates: of a sharded model that has to run all the same.

    Raises:
        ConfigurationError: no map of rows or of tokens.
    """
    if candidates is None:
        return None
    given = [candidates] if isinstance(candidates, Tensor) else list(candidates)
    if given and not isinstance(given[0], Tensor | Sequence):  # one map as a list of numbers
        given = [torch.tensor(given)]
    maps = [torch.as_tensor(each).detach().cpu() for each in given]
    for each in maps:
        if each.dim() not in (1, 2) or each.is_floating_point() or each.dtype == torch.bool or not each.numel():
            raise ConfigurationError(
                f"candidates holds a tensor of shape {tuple(each.shape)} and dtype {each.dtype}; integers of shape "
                "(rows,) or (rows, T) are needed, the candidate of each row or token, -1 for nobody; pass one for "
                "each forward of the block."
            )
    maps = [each.long() for each in maps]
    largest = max((int(each.max()) for each in maps), default=-1)
    used = torch.cat([each.flatten() for each in maps]).unique() if maps else torch.zeros(0)
    if (largest < 0 and not (maps and nobody)) or int(used.min()) < -1 or len(used[used >= 0]) <= largest:
        missing = sorted(set(range(largest + 1)) - set(used.tolist()))[:5]
        raise ConfigurationError(
            f"candidates names {len(used[used >= 0])} candidates up to number {largest}"
            f"{f', without {missing}' if missing else ''}; they must be numbered 0, 1, 2, ... with none left out, and "
            "-1 for nobody; renumber them (torch.unique with return_inverse does it)."
        )
    return maps


def packed_candidates(
    position_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Tensor:
    """The map of tokens of packed rows, for `record(candidates=...)`.

    Args:
        position_ids: (rows, T); a sample begins wherever they do not go up.
        attention_mask: (rows, T); tokens where it is 0 belong to nobody.
        cu_seq_lens: (m + 1,) borders of the samples in one long row, instead of `position_ids`.

    Returns:
        (rows, T) int64, samples counted from 0 over all rows; (1, total) from `cu_seq_lens`.

    Raises:
        ConfigurationError: neither or both were given.
    """
    if (position_ids is None) == (cu_seq_lens is None):
        raise ConfigurationError(
            "packed_candidates needs either position_ids or cu_seq_lens; pass the one that the model's forward gets."
        )
    if cu_seq_lens is not None:
        lengths = cu_seq_lens.long().cpu().diff()
        return torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    assert position_ids is not None
    positions = position_ids.cpu()
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    owner = begins.flatten().cumsum(0).view_as(positions) - 1
    if attention_mask is None:
        return owner
    used = owner[attention_mask.cpu().bool()].unique()
    renumbered = torch.full((int(owner.max()) + 1,), -1)
    renumbered[used] = torch.arange(len(used))
    return renumbered[owner].masked_fill(~attention_mask.cpu().bool(), -1)
