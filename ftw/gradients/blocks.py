"""Blocks: all candidates' rows of a parameter in a form that answers for their inner products.

Made by `Contributions.blocks`, read once each by the assembly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ftw.gradients.pieces import OuterProduct, Rows
from ftw.optim_state.base import ScaleOperator

SPARE = 2
"""Rows of a block behind the candidates', for a reader's directions: one matrix product then serves b and K."""


class Products(NamedTuple):
    """Inner products of a block under M, float64, with r = M^(-1/2) o for the offset o."""

    gram: Tensor  # (n, n) C'M C
    alignment: Tensor  # (n,) C'M g
    target: Tensor  # () g'M g
    coupling: Tensor  # (n,) C'M^(1/2) r


@dataclass(frozen=True)
class Block:
    """Some rows of one parameter, or several parameters side by side, for all candidates of the window, written out.

    A subclass may hold the candidates in another form; readers use `total` and `products` alone.

    Attributes:
        rows: which rows of the parameter.
        memory: (n + SPARE, r, *shape[1:]), contiguous; the spare rows hold anything. The reader may write to it; the
            next block reuses it. None where no candidate touches the rows.
    """

    rows: Rows
    memory: Tensor | None

    @property
    def values(self) -> Tensor | None:
        """The rows of every c_i, (n, r, *shape[1:]): a view of the memory."""
        return None if self.memory is None else self.memory[:-SPARE]

    def total(self) -> Tensor | None:
        """The sum over candidates, (r, *shape[1:]); None: zero."""
        return None if self.values is None else self.values.sum(0)

    def alignment(self, direction: Tensor) -> Tensor | None:
        """`c_i' d` for a direction (r, *shape[1:]), (n,) float64; None where no candidate touches the rows."""
        return None if self.values is None else (self.values.flatten(1) @ direction.flatten()).double()

    def products(self, root: ScaleOperator, g: Tensor, pull: Tensor, *, last: bool = True) -> Products | None:
        """Inner products under M; None where no candidate touches the rows.

        Args:
            root: M^(1/2) on these rows.
            g: (r, *shape[1:]) target gradient; pull: r, of the same shape.
            last: nothing will be read from the block afterwards, so that it may be written over.
        """
        if self.memory is None:
            return None
        memory = self.memory if last else self.memory.clone()
        n = len(memory) - SPARE
        memory[n] = g
        root.apply_(memory[: n + 1])
        memory[n + 1] = pull
        flat = memory.flatten(1)
        # Matrix products like multiples of four rows; the two spare rows often make one.
        height = next((m for m in (n, n + 1, n + 2) if m % 4 == 0), n)
        gram = (flat[:height] @ flat[:height].T)[:n, :n].double()
        along = (flat[: n + 1] @ flat[n]).double()
        return Products(gram, along[:n], along[n], (flat[:n] @ flat[n + 1]).double())


@dataclass(frozen=True)
class FactorBlock(Block):
    """A whole matrix by its factors, for a separable M: `K_ij = sum (A A') o (B B')` over i's and j's tokens, with
    M^(1/2) applied to both factors.

    The ghost inner product (Li et al., 2022, "Large language models can be strong differentially private learners",
    section 4, for norms; Wang et al., 2024, In-Run Data Shapley, for pairs). It never forms a candidate's gradient,
    and costs tokens squared: `cost.prefers_factors` says when that is the cheaper way.
    """

    pieces: tuple[OuterProduct, ...] = ()
    count: int = 0  # n
    excluded: tuple[int, ...] = ()

    def total(self) -> Tensor | None:
        out = torch.zeros(self.pieces[0].shape, dtype=self.pieces[0].dtype, device=self.pieces[0].device)
        for piece in self.pieces:
            keep = torch.ones(piece.count)
            keep[[i - piece.start for i in self.excluded if piece.start <= i < piece.start + piece.count]] = 0.0
            piece.add_combined(out, keep if self.excluded else None)
        return out

    def alignment(self, direction: Tensor) -> Tensor:
        found = torch.zeros(self.count, dtype=torch.float64, device=self.pieces[0].device)
        for piece in self.pieces:
            found[piece.start : piece.start + piece.count] += piece.alignment(direction).double()
        found[list(self.excluded)] = 0.0
        return found

    def products(self, root: ScaleOperator, g: Tensor, pull: Tensor, *, last: bool = True) -> Products:
        owner = torch.cat([piece.owners() + piece.start for piece in self.pieces])
        inputs = torch.cat([piece.inputs.to(piece.dtype) for piece in self.pieces])
        grads = torch.cat([piece.grads.to(piece.dtype) * piece.scale for piece in self.pieces])
        kept = torch.ones(self.count, dtype=torch.bool, device=owner.device)
        kept[list(self.excluded)] = False
        alive = kept[owner]
        owner = owner[alive]
        inputs, grads = root.apply_factors(inputs[alive], grads[alive])
        pairs = (inputs @ inputs.T).mul_(grads @ grads.T)
        gram = pairs.new_zeros(self.count, pairs.shape[1]).index_add_(0, owner, pairs)
        gram = gram.new_zeros(self.count, self.count).index_add_(1, owner, gram)

        def along(direction: Tensor) -> Tensor:
            shares = torch.linalg.vecdot(inputs @ direction.T, grads)
            return shares.new_zeros(self.count).index_add_(0, owner, shares).double()

        # Without momentum and decay the offset is zero, and so is its pull.
        coupling = along(pull.to(inputs.dtype)) if bool(pull.count_nonzero()) else gram.new_zeros(self.count).double()
        toward = root.apply(g.to(inputs.dtype))
        target = torch.linalg.vecdot(toward.flatten(), toward.flatten()).double()
        return Products(gram.double(), along(toward), target, coupling)
