"""Pieces: what one call of one layer adds to the contributions of some candidates to one parameter.

A contribution c_i is the sum of its pieces (several micro-batches, a layer called twice, a tied weight used by
two layers). A parameter is seen as rows, its first dimension, because a diagonal M acts row block by row
block and memory is then bounded by the block. Made by `layers`, kept by an extractor, read by `Contributions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor
"""Some rows of a parameter: a slice with start and stop, or a LongTensor of ascending row numbers."""


@dataclass(frozen=True)
class Piece(ABC):
    """Candidates `start ... start + count - 1` of the pool, `count` rows of one forward.

    Laws, with `dense` the (count, *shape) tensor of all the piece's gradients:
    `add_rows` adds `dense[:, rows]`; `add_combined` adds `einsum("i,i...->...", weights, dense)`.
    """

    start: int
    shape: tuple[int, ...]  # of the parameter
    dtype: torch.dtype  # of the results: the parameter's, float32 at least

    @property
    @abstractmethod
    def count(self) -> int:
        """Candidates in this piece."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """Numbers kept in memory."""

    @abstractmethod
    def add_rows(self, out: Tensor, rows: Rows, *, overwrite: bool) -> None:
        """Add rows of each candidate's gradient to `out` (count, r, *shape[1:]), or write them there."""

    @abstractmethod
    def add_combined(self, out: Tensor, weights: Tensor | None) -> None:
        """Add the weighted sum over candidates to `out` (*shape); None: all weights are 1.

        Candidates of weight 0 are not read, so that their NaN or infinity cannot leak (0 * inf is NaN).
        """

    def touched_rows(self) -> Tensor | None:
        """The only rows that can be non-zero, ascending; None: all."""
        return None

    def dense(self) -> Piece:
        """This piece with every candidate's gradient written out."""
        out = torch.empty((self.count, *self.shape), dtype=self.dtype, device=self.device)
        self.add_rows(out, slice(0, self.shape[0]), overwrite=True)
        return Dense(self.start, self.shape, self.dtype, out)

    @property
    @abstractmethod
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Dense(Piece):
    """Gradients written out."""

    values: Tensor  # (count, *shape)

    @property
    def count(self) -> int:
        return self.values.shape[0]

    @property
    def numel(self) -> int:
        return self.values.numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dense(self) -> Dense:
        return self

    def add_rows(self, out: Tensor, rows: Rows, *, overwrite: bool) -> None:
        if overwrite:
            out.copy_(self.values[:, rows])
        else:
            out.add_(self.values[:, rows])

    def add_combined(self, out: Tensor, weights: Tensor | None) -> None:
        if weights is None:
            out.add_(self.values.sum(0))
            return
        keep = weights.nonzero().flatten()
        if len(keep):
            chosen = weights[keep].to(self.values.device, self.dtype)
            out.add_(torch.tensordot(chosen, self.values[keep.to(self.values.device)], dims=1))


@dataclass(frozen=True)
class OuterProduct(Piece):
    """A matrix product's weight gradient by its factors: `c_i = scale * sum_t grads[i, t] inputs[i, t]'`.

    The sum over tokens is of products, never a product of sums (DESIGN, section 7).
    """

    inputs: Tensor  # A, (count, T, d_in)
    grads: Tensor  # B, (count, T, d_out)
    scale: float  # one over the loss scale

    @property
    def count(self) -> int:
        return self.inputs.shape[0]

    @property
    def numel(self) -> int:
        return self.inputs.numel() + self.grads.numel()

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def add_rows(self, out: Tensor, rows: Rows, *, overwrite: bool) -> None:
        left = self.grads[:, :, rows].to(self.dtype).transpose(1, 2)  # (count, r, T)
        right = self.inputs.to(self.dtype)
        if overwrite and self.scale == 1.0:
            torch.bmm(left, right, out=out)
        else:
            torch.baddbmm(out, left, right, beta=0.0 if overwrite else 1.0, alpha=self.scale, out=out)

    def add_combined(self, out: Tensor, weights: Tensor | None) -> None:
        inputs, grads, factor = self.inputs, self.grads, self.scale
        if weights is not None:
            keep = weights.nonzero().flatten()
            if not len(keep):
                return
            chosen = weights[keep].to(grads.device, self.dtype)
            keep = keep.to(grads.device)
            inputs, grads = inputs[keep], grads[keep].to(self.dtype) * (chosen * factor)[:, None, None]
            factor = 1.0
        out.addmm_(grads.flatten(0, 1).to(self.dtype).T, inputs.flatten(0, 1).to(self.dtype), alpha=factor)


@dataclass(frozen=True)
class RowScatter(Piece):
    """A look-up table's gradient: `c_i = scale * sum_t e(rows[i, t]) grads[i, t]'`, e the unit vector of a row."""

    row_of: Tensor  # (count, T) int64; -1 where the look-up has no gradient (padding_idx)
    grads: Tensor  # (count, T, d)
    scale: float

    @property
    def count(self) -> int:
        return self.row_of.shape[0]

    @property
    def numel(self) -> int:
        return self.row_of.numel() + self.grads.numel()

    @property
    def device(self) -> torch.device:
        return self.grads.device

    def touched_rows(self) -> Tensor | None:
        rows = self.row_of.unique()
        return rows[rows >= 0]

    def add_rows(self, out: Tensor, rows: Rows, *, overwrite: bool) -> None:
        if overwrite:
            out.zero_()
        if isinstance(rows, slice):
            position = self.row_of - rows.start
            inside = (self.row_of >= rows.start) & (self.row_of < rows.stop)
        else:
            place = self.row_of.new_full((self.shape[0],), -1)
            place[rows] = torch.arange(len(rows), device=rows.device)
            position = place[self.row_of.clamp_min(0)]
            inside = (position >= 0) & (self.row_of >= 0)
        candidate = torch.arange(self.count, device=out.device)[:, None].expand_as(position)
        target = candidate[inside] * out.shape[1] + position[inside]
        out.view(-1, *self.shape[1:]).index_add_(0, target, self.grads[inside].to(self.dtype), alpha=self.scale)

    def add_combined(self, out: Tensor, weights: Tensor | None) -> None:
        row_of, grads = self.row_of, self.grads.to(self.dtype)
        if weights is not None:
            keep = weights.nonzero().flatten().to(grads.device)
            row_of = row_of[keep]
            grads = grads[keep] * weights.to(grads.device, self.dtype)[keep][:, None, None]
        inside = row_of >= 0
        out.index_add_(0, row_of[inside], grads[inside], alpha=self.scale)
