"""Gradients of a forward's output, kept so that rows of it can be run again. Filled by the recorder, read by a replay.

For a language model they are rows x T x vocabulary numbers, more than anything else that a window beyond its memory cap
holds. Hence positions without gradient (prompt, padding) are left out where that is worth a copy, and rows that turn
out not to be needed can be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ftw.errors import RecordingError

WORTH_A_COPY = 1 / 8
"""Share of positions without gradient from which on they are left out."""


@dataclass(frozen=True)
class OutputGradient:
    """The gradient of the loss with respect to one output, (rows, ..., V); an output (rows,) has V = 1.

    Law: until rows are dropped, `weighted(all rows, ones)` is the gradient itself.

    Attributes:
        shape: of the output.
        reached: (rows, positions) bool on the CPU: where the gradient is not zero.
        values: (N, V) the gradient at the positions in `index`.
        index: (N,) int64, ascending, positions of all rows counted on; None: all of them.
        held: (rows,) bool on the CPU: rows that were not dropped.
    """

    shape: torch.Size
    reached: Tensor
    values: Tensor
    index: Tensor | None
    held: Tensor

    @staticmethod
    def of(grad: Tensor) -> OutputGradient:
        """Positions without gradient are left out (that copies the others), or the tensor itself is kept."""
        flat = grad.flatten(0, -2) if grad.dim() > 1 else grad[:, None]
        alive = torch.linalg.vector_norm(flat, float("inf"), dim=1) != 0  # NaN is not 0
        reached = alive.view(grad.shape[0], -1).cpu()
        held = torch.ones(grad.shape[0], dtype=torch.bool)
        if int((~reached).sum()) < max(1.0, WORTH_A_COPY * reached.numel()):
            return OutputGradient(grad.shape, reached, flat, None, held)
        index = alive.nonzero().flatten()
        return OutputGradient(grad.shape, reached, flat[index], index, held)

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept in memory."""
        return [self.values] if self.index is None else [self.values, self.index]

    def __add__(self, other: OutputGradient) -> OutputGradient:
        """Of two backwards through the same output."""
        rows, ones = torch.arange(self.shape[0]), torch.ones(self.shape[0])
        return OutputGradient.of(self.weighted(rows, ones) + other.weighted(rows, ones))

    def only(self, rows: Tensor) -> OutputGradient:
        """Without the other rows."""
        held = torch.zeros_like(self.held)
        held[rows] = True
        held &= self.held
        wanted = held[:, None].expand(self.reached.shape).flatten().to(self.values.device)
        if self.index is not None:
            inside = wanted[self.index]
            return replace(self, values=self.values[inside], index=self.index[inside], held=held)
        index = wanted.nonzero().flatten()
        return replace(self, values=self.values[index], index=index, held=held)

    def weighted(self, rows: Tensor, factor: Tensor) -> Tensor:  # (m,), (m,) or (m, positions) -> (m, *shape[1:])
        """These rows of the gradient times a factor for each row or position, a new tensor.

        Where the factor is 0 the result is, whatever stands there (NaN too). An output that has one position less than
        the factor predicts the next token, which the last does not have.

        Raises:
            RecordingError: a row was dropped, or the output has no such positions.
        """
        if factor.dim() == 2 and self.shape[1:2] == (factor.shape[1] - 1,):
            factor = factor[:, :-1]
        if factor.dim() == 2 and self.shape[1:2] != factor.shape[1:]:
            raise RecordingError(
                f"an output of shape {tuple(self.shape)} has no gradient for each of {factor.shape[1]} tokens, so that "
                "candidates cannot be run again by themselves; give each candidate rows of its own, or raise "
                "memory_cap so that nothing is run again."
            )
        used = factor != 0 if factor.dim() == 1 else (factor != 0).any(1)
        if bool((used & ~self.held[rows]).any()):
            raise RecordingError(
                "output gradients of rows that are to be run again were dropped when another choice was made; "
                "discard() the window and record the step anew."
            )
        each = self.reached.shape[1]
        at = (rows[:, None] * each + torch.arange(each)).flatten().to(self.values.device)
        if self.index is None:
            out = self.values[at]
        else:
            place = at.new_full((self.reached.numel(),), -1)
            place[self.index] = torch.arange(len(self.index), device=at.device)
            at = place[at]
            inside = at >= 0
            out = self.values.new_zeros(len(at), self.values.shape[1])
            out[inside] = self.values[at[inside]]
        shares, dropped, scaled = out.view(*factor.shape, -1), factor == 0, (factor != 0) & (factor != 1)
        if bool(dropped.any()):
            shares.masked_fill_(dropped.to(out.device)[..., None], 0)
        if bool(scaled.any()):
            shares.mul_(factor.to(out.device, out.dtype)[..., None])
        return out.view(len(rows), *self.shape[1:])
