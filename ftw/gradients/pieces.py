"""Pieces: what one call of one layer adds to the contributions of some candidates to one parameter.

A contribution c_i is the sum of its pieces (several micro-batches, a layer called twice, a tied weight used by
two layers). A parameter is seen as rows, its first dimension (all but the last where it has three or more), because
a diagonal M acts row block by row block and memory is then bounded by the block. Made by the rules of the layers,
kept by an extractor, read by `Contributions`.

Longer than others: the forms are short, and share one law that is best read side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ftw.gradients.layout import even_length

Rows = slice | Tensor
"""Some rows of a parameter: a slice with start and stop, or a LongTensor of ascending row numbers."""


def as_rows(tensor: Tensor) -> Tensor:
    """A parameter, or anything of its shape, as rows: (R,), (R, d); a single number is one row."""
    return tensor.flatten(0, -2) if tensor.dim() > 2 else tensor.reshape(1) if tensor.dim() == 0 else tensor


@dataclass(frozen=True)
class Piece(ABC):
    """Candidates `start ... start + count - 1` of the window.

    Laws, with `dense` the (count, *shape) tensor of all the piece's gradients:
    `add_rows` adds `dense[:, rows]`; `add_combined` adds `einsum("i,i...->...", weights, dense)`;
    `alignment(d)` is `einsum("i...,...->i", dense, d)`; `cut(rows)` has `dense[:, rows]`.
    """

    start: int
    shape: tuple[int, ...]  # of the parameter, as rows
    dtype: torch.dtype  # of the results: the parameter's, float32 at least

    @property
    @abstractmethod
    def count(self) -> int:
        """Candidates in this piece."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """Numbers kept in memory."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes kept in memory."""

    @abstractmethod
    def add_rows(self, out: Tensor, rows: Rows, *, overwrite: bool) -> None:
        """Add rows of each candidate's gradient to `out` (count, r, *shape[1:]), or write them there."""

    @abstractmethod
    def add_combined(self, out: Tensor, weights: Tensor | None) -> None:
        """Add the weighted sum over candidates to `out` (*shape); None: all weights are 1.

        Candidates of weight 0 are not read, so that their NaN or infinity cannot leak (0 * inf is NaN).
        """

    @abstractmethod
    def alignment(self, direction: Tensor) -> Tensor:  # (*shape) -> (count,)
        """Each candidate's gradient along a direction, without writing the gradients out; in `dtype`."""

    @abstractmethod
    def only(self, members: Sequence[int]) -> Piece:
        """The piece of these candidates of the window, numbered anew in their order; zero for those it lacks."""

    @abstractmethod
    def cut(self, rows: slice) -> Piece:
        """The piece of these rows alone, in a parameter of (stop - start, *shape[1:])."""

    @abstractmethod
    def reached(self) -> Tensor:  # (count,) bool
        """Which candidates have any gradient here."""

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
    def nbytes(self) -> int:
        return self.values.nbytes

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

    def alignment(self, direction: Tensor) -> Tensor:
        return self.values.flatten(1) @ direction.to(self.dtype).flatten()

    def cut(self, rows: slice) -> Dense:
        values = self.values[:, rows]
        return replace(self, shape=tuple(values.shape[1:]), values=values)

    def reached(self) -> Tensor:
        return self.values.flatten(1).any(1)

    def only(self, members: Sequence[int]) -> Dense:
        values = self.values.new_zeros(len(members), *self.shape)
        for new, old in enumerate(members):
            if self.start <= old < self.start + self.count:
                values[new] = self.values[old - self.start]
        return replace(self, start=0, values=values)


@dataclass(frozen=True)
class TokenPiece(Piece):
    """A piece kept token by token: candidate i's tokens are `bounds[i] ... bounds[i + 1] - 1`."""

    bounds: tuple[int, ...]  # (count + 1,)
    grads: Tensor  # B, (N, d_out): the gradient at each token
    scale: float  # one over the loss scale
    tokenwise: ClassVar[tuple[str, ...]] = ("grads",)
    """The tensors that are kept, one entry for each token."""

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def device(self) -> torch.device:
        return self.grads.device

    @property
    def numel(self) -> int:
        return sum(getattr(self, name).numel() for name in self.tokenwise)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.tokenwise)

    @property
    def even(self) -> int | None:
        """Tokens of every candidate, where all have as many."""
        return even_length(self.bounds)

    def owners(self) -> Tensor:  # (N,)
        """The candidate of each token."""
        lengths = torch.tensor(self.bounds, device=self.device).diff()
        return torch.arange(self.count, device=self.device).repeat_interleave(lengths, output_size=self.bounds[-1])

    def chosen(self, weights: Tensor) -> tuple[Tensor | slice, Tensor]:
        """The tokens of candidates with a weight other than 0, and each one's weight, (m, 1)."""
        factor = (weights * self.scale).to(self.device, self.dtype)
        each = self.even
        kept = weights.nonzero().flatten().tolist()
        if len(kept) == self.count:
            index: Tensor | slice = slice(None)
        else:
            spans = [torch.arange(self.bounds[i], self.bounds[i + 1], device=self.device) for i in kept]
            index = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long, device=self.device)
        kept_factor = factor[torch.tensor(kept, dtype=torch.long, device=self.device)]
        if each is not None:
            return index, kept_factor.repeat_interleave(each)[:, None]
        spans_of = [self.bounds[i + 1] - self.bounds[i] for i in kept]
        lengths = torch.tensor(spans_of, dtype=torch.long, device=self.device)
        return index, kept_factor.repeat_interleave(lengths)[:, None]

    def reached(self) -> Tensor:
        alive = self.grads.flatten(1).any(1).to(torch.int32)
        return alive.new_zeros(self.count).index_add_(0, self.owners(), alive) > 0

    def of_tokens(self, kept: Tensor) -> TokenPiece:
        """The piece without the other tokens; `kept` (N,) bool."""
        before = [0, *kept.cumsum(0).tolist()]
        bounds = tuple(before[b] for b in self.bounds)
        return replace(self, bounds=bounds, **{name: getattr(self, name)[kept] for name in self.tokenwise})

    def only(self, members: Sequence[int]) -> TokenPiece:
        bounds, spans = [0], []
        for each in members:
            own = self.start <= each < self.start + self.count
            first, last = self.bounds[each - self.start : each - self.start + 2] if own else (0, 0)
            bounds.append(bounds[-1] + last - first)
            spans.append(torch.arange(first, last, device=self.device))
        index = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long, device=self.device)
        tokens = {name: getattr(self, name)[index] for name in self.tokenwise}
        return replace(self, start=0, bounds=tuple(bounds), **tokens)

    @abstractmethod
    def token_alignment(self, direction: Tensor) -> Tensor:  # (*shape) -> (N,)
        """Each token's own share of `alignment`; in `dtype`."""

    def alignment(self, direction: Tensor) -> Tensor:
        shares = self.token_alignment(direction)
        each = self.even
        if each is not None:
            return shares.view(self.count, each).sum(1)
        return shares.new_zeros(self.count).index_add_(0, self.owners(), shares)


@dataclass(frozen=True)
class OuterProduct(TokenPiece):
    """A matrix product's weight gradient by its factors: `c_i = scale * sum_t grads[t] inputs[t]'` over i's tokens.

    The sum over tokens is of products, never a product of sums (DESIGN, section 7). Where the matrix is one of
    several in a parameter (an expert's), it fills the rows from `first_row` on.
    """

    inputs: Tensor  # A, (N, d_in)
    first_row: int = 0
    tokenwise: ClassVar[tuple[str, ...]] = ("grads", "inputs")

    @property
    def last_row(self) -> int:
        """One past the last row that the matrix fills."""
        return self.first_row + self.grads.shape[1]

    def touched_rows(self) -> Tensor | None:
        if self.last_row - self.first_row == self.shape[0]:
            return None
        return torch.arange(self.first_row, self.last_row, device=self.device)

    def add_rows(self, out: Tensor, rows: Rows, *, overwrite: bool) -> None:
        if self.last_row - self.first_row < self.shape[0]:
            out, rows, overwrite = self._own_rows(out, rows, overwrite)
            if not out.shape[1]:
                return
        left = self.grads[:, rows].to(self.dtype)  # (N, r)
        right = self.inputs.to(self.dtype)
        each = self.even
        if each is not None:
            left = left.view(self.count, each, left.shape[1]).transpose(1, 2)
            right = right.view(self.count, each, right.shape[1])
            if overwrite and self.scale == 1.0:
                torch.bmm(left, right, out=out)
            else:
                torch.baddbmm(out, left, right, beta=0.0 if overwrite else 1.0, alpha=self.scale, out=out)
            return
        for i, (first, last) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            if last > first:
                beta = 0.0 if overwrite else 1.0
                a, b = left[first:last].T, right[first:last]
                torch.addmm(out[i], a, b, beta=beta, alpha=self.scale, out=out[i])
            elif overwrite:
                out[i] = 0

    def dense(self) -> Piece:
        each, tall = self.even, 4 * self.inputs.shape[1] <= self.grads.shape[1]
        if each is None or not tall or self.touched_rows() is not None:
            return super().dense()
        # A tall product is slow: its transpose, wide, is made instead (measured twice as fast on a CPU).
        left = self.inputs.to(self.dtype).view(self.count, each, self.inputs.shape[1]).transpose(1, 2)
        values = torch.bmm(left, self.grads.to(self.dtype).view(self.count, each, self.grads.shape[1]))
        values = values.transpose(1, 2)
        return Dense(self.start, self.shape, self.dtype, values if self.scale == 1.0 else values * self.scale)

    def _own_rows(self, out: Tensor, rows: Rows, overwrite: bool) -> tuple[Tensor, Rows, bool]:
        """The part of `out` that belongs to this matrix, and its rows within the matrix."""
        if overwrite:
            out.zero_()
        if isinstance(rows, slice):
            first, last = max(rows.start, self.first_row), min(rows.stop, self.last_row)
            last = max(first, last)
            inside = slice(first - self.first_row, last - self.first_row)
            return out[:, first - rows.start : last - rows.start], inside, False
        # Ascending row numbers: those of this matrix stand together.
        first, last = (int(torch.searchsorted(rows, edge)) for edge in (self.first_row, self.last_row))
        return out[:, first:last], rows[first:last] - self.first_row, False

    def cut(self, rows: slice) -> TokenPiece:
        first, last = max(rows.start, self.first_row), min(rows.stop, self.last_row)
        shape = (rows.stop - rows.start, *self.shape[1:])
        if first >= last:  # of an expert elsewhere
            nothing = replace(self, shape=shape, first_row=0, grads=self.grads[:, : shape[0]])
            return nothing.of_tokens(torch.zeros(len(self.grads), dtype=torch.bool, device=self.device))
        grads = self.grads[:, first - self.first_row : last - self.first_row]
        return replace(self, shape=shape, first_row=first - rows.start, grads=grads)

    def add_combined(self, out: Tensor, weights: Tensor | None) -> None:
        out = out[self.first_row : self.last_row]
        if weights is None:
            out.addmm_(self.grads.to(self.dtype).T, self.inputs.to(self.dtype), alpha=self.scale)
            return
        index, factor = self.chosen(weights)
        if len(factor):
            grads, inputs = self.grads[index].to(self.dtype), self.inputs[index].to(self.dtype)
            # The narrower factor takes the weights.
            if grads.shape[1] <= inputs.shape[1]:
                grads = grads * factor
            else:
                inputs = inputs * factor
            out.addmm_(grads.T, inputs)

    def token_alignment(self, direction: Tensor) -> Tensor:
        along = direction[self.first_row : self.last_row].to(self.dtype)
        grads, inputs = self.grads.to(self.dtype), self.inputs.to(self.dtype)
        if grads.shape[1] <= inputs.shape[1]:
            return torch.linalg.vecdot(inputs @ along.T, grads) * self.scale
        return torch.linalg.vecdot(grads @ along, inputs) * self.scale


@dataclass(frozen=True)
class Broadcast(TokenPiece):
    """A parameter added to, or multiplied with, every token: `c_i = scale * sum_t grads[t]`, grads (N, *shape)."""

    def add_rows(self, out: Tensor, rows: Rows, *, overwrite: bool) -> None:
        if overwrite:
            out.zero_()
        out.index_add_(0, self.owners(), self.grads[:, rows].to(self.dtype), alpha=self.scale)

    def dense(self) -> Piece:
        each = self.even
        if each is None:
            return super().dense()
        values = self.grads.view(self.count, each, *self.shape).sum(1, dtype=self.dtype)
        return Dense(self.start, self.shape, self.dtype, values if self.scale == 1.0 else values * self.scale)

    def cut(self, rows: slice) -> Broadcast:
        grads = self.grads[:, rows]
        return replace(self, shape=tuple(grads.shape[1:]), grads=grads)

    def add_combined(self, out: Tensor, weights: Tensor | None) -> None:
        if weights is None:
            out.add_(self.grads.sum(0, dtype=self.dtype), alpha=self.scale)
            return
        index, factor = self.chosen(weights)
        out.add_((self.grads[index].to(self.dtype).flatten(1) * factor).sum(0).view(self.shape))

    def token_alignment(self, direction: Tensor) -> Tensor:
        return self.grads.to(self.dtype).flatten(1) @ direction.to(self.dtype).flatten() * self.scale


@dataclass(frozen=True)
class RowScatter(TokenPiece):
    """A look-up table's gradient: `c_i = scale * sum_t e(row_of[t]) grads[t]'`, e the unit vector of a row."""

    row_of: Tensor  # (N,) int64; -1 where the look-up has no gradient (padding_idx)
    tokenwise: ClassVar[tuple[str, ...]] = ("grads", "row_of")

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
        target = self.owners()[inside] * out.shape[1] + position[inside]
        out.view(-1, *self.shape[1:]).index_add_(0, target, self.grads[inside].to(self.dtype), alpha=self.scale)

    def cut(self, rows: slice) -> TokenPiece:
        here = (self.row_of >= rows.start) & (self.row_of < rows.stop)
        shape = (rows.stop - rows.start, *self.shape[1:])
        return replace(self, shape=shape, row_of=self.row_of - rows.start).of_tokens(here)

    def add_combined(self, out: Tensor, weights: Tensor | None) -> None:
        row_of, grads, alpha = self.row_of, self.grads, self.scale
        if weights is not None:
            index, factor = self.chosen(weights)
            row_of, grads, alpha = row_of[index], grads[index].to(self.dtype) * factor, 1.0
        inside = row_of >= 0
        out.index_add_(0, row_of[inside], grads[inside].to(self.dtype), alpha=alpha)

    def token_alignment(self, direction: Tensor) -> Tensor:
        along = direction.to(self.dtype)[self.row_of.clamp_min(0)]
        shares = torch.linalg.vecdot(along, self.grads.to(self.dtype)) * self.scale
        return torch.where(self.row_of >= 0, shares, 0.0)
