"""Approximate forms of contributions and of the update scale, for the study of long contexts and its training runs.

None is part of the library, but for the sketches (`ftw.gradients.Projection`). The gradient that is written
(`combine`) is exact in all of them: what is approximated is what the decision is made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.gradients.base import Contributions, GradientExtractor
from ftw.gradients.blocks import Block
from ftw.gradients.pieces import OuterProduct, Piece
from ftw.gradients.projection import Projection
from ftw.optim_state.adam import AdamW
from ftw.optim_state.base import TensorUpdate
from ftw.optim_state.operators import Diagonal, RowColumn

WHOLE = 1 << 30
"""A block size above any context: all tokens of a candidate in one block."""


class TokenBlocks(GradientExtractor):
    """T-blocks: of `size` consecutive tokens of a candidate, the sum of products is replaced by the product of the
    summed output gradients with the mean input. Exact for size 1; one block over the whole context is the
    contraction of summed activations with summed gradients, a known mistake.

    Look-up tables, norms and biases stay exact.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def keep(self, piece: Piece) -> Piece:
        return piece

    def contributions(self, pieces: Mapping[Parameter, list[Piece]], count: int) -> Blocked:
        return Blocked(pieces, count, size=self.size)


class Blocked(Contributions):
    """Contributions that are read through their T-blocks."""

    def __init__(self, pieces: Mapping[Parameter, list[Piece]], count: int, *, size: int, **options: Any) -> None:
        super().__init__(pieces, count, **options)
        self._size = size
        kept = {p: [blocked(piece, size) for piece in each] for p, each in self._pieces.items()}
        self._read = Contributions(kept, count, **options)

    def without(self, excluded: tuple[int, ...]) -> Blocked:
        return Blocked(self._pieces, self.count, size=self._size, excluded=excluded, block_bytes=self.block_bytes)

    def numel(self) -> int:
        return self._read.numel()

    def blocks(self, parameter: Parameter, *, split: bool = True, structure: str = "any") -> Iterator[Block]:
        return self._read.blocks(parameter, split=split, structure=structure)

    def side_by_side(self, parameters: Sequence[Parameter]) -> Block:
        return self._read.side_by_side(parameters)


def blocked(piece: Piece, size: int) -> Piece:
    """The piece with every `size` tokens of a candidate, the last ones perhaps fewer, as one."""
    if not isinstance(piece, OuterProduct) or size == 1:
        return piece
    grads, inputs, bounds = [], [], [0]
    for first, last in zip(piece.bounds, piece.bounds[1:], strict=False):
        length = last - first
        count = -(-length // size)
        owner = torch.arange(length, device=piece.device) // size
        lengths = torch.bincount(owner, minlength=count)[:, None]
        grads.append(piece.grads.new_zeros(count, piece.grads.shape[1]).index_add_(0, owner, piece.grads[first:last]))
        summed = piece.inputs.new_zeros(count, piece.inputs.shape[1]).index_add_(0, owner, piece.inputs[first:last])
        inputs.append(summed / lengths)
        bounds.append(bounds[-1] + count)
    return replace(piece, grads=torch.cat(grads), inputs=torch.cat(inputs), bounds=tuple(bounds))


class Separable(AdamW):
    """AdamW with every matrix's second moment replaced by the product of its row and column means, as Adafactor has it
    (Shazeer and Stern 2018): M then passes through outer products, and T x T products of factors are possible.

    The offset stays AdamW's own.
    """

    elementwise: ClassVar[bool] = False

    def linearise_tensor(
        self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], reference: Tensor | None
    ) -> TensorUpdate:
        update = super().linearise_tensor(parameter, group, state, reference)
        if parameter.dim() != 2:
            return update
        assert isinstance(update.scale, Diagonal)
        size, least = float(group["lr"]) * update.gain, float(group["eps"]) ** 2
        second = (size / update.scale.values - float(group["eps"])).clamp_min(0.0).square()  # v_hat
        rows, columns = second.mean(1, keepdim=True), second.mean(0, keepdim=True)
        mean = rows.mean().clamp_min(least)
        scale = RowColumn((rows / mean).clamp_min(least).rsqrt() * size, columns.clamp_min(least).rsqrt())
        return replace(update, scale=scale)


def extractor(name: str) -> GradientExtractor | None:
    """`projection 1024`, `blocks 16`, `blocks all`; None for what is no extractor."""
    kind, _, size = name.partition(" ")
    if kind == "projection":
        return Projection(dimension=int(size))
    if kind == "blocks":
        return TokenBlocks(WHOLE if size == "all" else int(size))
    return None


def arguments(name: str) -> dict[str, Any]:
    """Keyword arguments for `ftw.Selector`; none for the exact form."""
    if not name:
        return {}
    if name == "row x column":
        return {"preconditioner": Separable()}
    found = extractor(name)
    if found is None:
        raise ValueError(f"no representation {name!r}")
    return {"gradients": found}
