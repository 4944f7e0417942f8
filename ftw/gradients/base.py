"""Contributions of one window, and the interface of extractors, which decide in what form they are kept.

The recorder fills `Contributions` during the trainer's backward; the assembly reads it block by block, once;
the selector asks it for the weighted gradient. DESIGN, sections 3.1, 3.3, 3.5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.errors import ConfigurationError
from ftw.gradients.blocks import SPARE, Block, FactorBlock, Products
from ftw.gradients.cost import prefers_factors
from ftw.gradients.pieces import Dense, OuterProduct, Piece, Rows, as_rows
from ftw.optim_state.base import ScaleOperator

BLOCK_BYTES = {"cpu": 8 << 20}
"""Default size of a block by device type; measured: 1 to 2 MB cost a third more, 16 to 64 MB as much as 8."""

ACCELERATOR_BLOCK_BYTES = 64 << 20
"""Elsewhere: large enough that launching kernels costs nothing against running them."""

__all__ = ["Block", "Contributions", "GradientExtractor", "Products"]


class Contributions:
    """c_i for every candidate i of a window and every recorded parameter, with the loss scale divided out.

    Law: `combine(ones)` is the gradient that the trainer's backward makes of the pool.

    Args:
        pieces: parameter -> what was recorded for it.
        count: n, the number of candidates.
        excluded: numbers of quarantined candidates. They count as zero everywhere and are never read by `combine`.
        block_bytes: bound on the memory of one block, in bytes (one row of the parameter at least); default by device.
    """

    def __init__(
        self,
        pieces: Mapping[Parameter, list[Piece]],
        count: int,
        *,
        excluded: tuple[int, ...] = (),
        block_bytes: int | None = None,
    ) -> None:
        self._pieces = {p: list(kept) for p, kept in pieces.items() if kept}
        self.count = count
        self.excluded = excluded
        self.block_bytes = block_bytes

    @property
    def parameters(self) -> list[Parameter]:
        """Parameters for which something was recorded."""
        return list(self._pieces)

    def pieces(self, parameter: Parameter) -> list[Piece]:
        """What is kept of a parameter, quarantined candidates included."""
        return list(self._pieces.get(parameter, ()))

    @property
    def error(self) -> float | None:
        """Estimated relative error of the products that were read; None: they are exact."""
        return None

    def without(self, excluded: tuple[int, ...]) -> Contributions:
        """The same contributions with these candidates in quarantine."""
        return type(self)(self._pieces, self.count, excluded=excluded, block_bytes=self.block_bytes)

    def only(self, members: Tensor) -> Contributions:
        """The contributions of these candidates, (m,), numbered anew in their order."""
        chosen = members.tolist()
        pieces = {p: [piece.only(chosen) for piece in kept] for p, kept in self._pieces.items()}
        return Contributions(pieces, len(chosen), block_bytes=self.block_bytes)

    def numel(self) -> int:
        """Numbers kept in memory."""
        return sum(piece.numel for kept in self._pieces.values() for piece in kept)

    def is_small(self, parameter: Parameter) -> bool:
        """Whether all candidates' gradients are written out and together take a fraction of a block."""
        kept = self._pieces[parameter]
        size = self._row_bytes(kept) * prod(kept[0].shape[:1])
        return all(isinstance(piece, Dense) for piece in kept) and 4 * size <= self._block_bound(kept)

    def bundles(self, parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
        """Small parameters of one device and dtype, cut into lists that fill a block each."""
        bundle: list[Parameter] = []
        size = 0
        for p in parameters:
            kept = self._pieces[p]
            needed = self._row_bytes(kept) * kept[0].shape[0]
            if bundle and size + needed > self._block_bound(kept):
                yield bundle
                bundle, size = [], 0
            bundle.append(p)
            size += needed
        if bundle:
            yield bundle

    def side_by_side(self, parameters: Sequence[Parameter]) -> Block:  # memory (n + SPARE, sum of numel)
        """Several small parameters, each flattened, as one block."""
        first = self._pieces[parameters[0]][0]
        sizes = [prod(self._pieces[p][0].shape) for p in parameters]
        memory = torch.empty((self.count + SPARE, sum(sizes)), dtype=first.dtype, device=first.device)
        at = 0
        for p, size in zip(parameters, sizes, strict=True):
            kept = self._pieces[p]
            part = memory[: self.count, at : at + size].unflatten(1, kept[0].shape)
            self._write(kept, part, slice(0, kept[0].shape[0]))
            at += size
        return Block(slice(0, at), memory)

    def blocks(self, parameter: Parameter, *, split: bool = True, structure: str = "any") -> Iterator[Block]:
        """All rows of a parameter, block by block.

        Args:
            split: False gives all rows as a single block.
            structure: what the reader promises about M: "scalar" (a multiple of the identity), "separable" (it passes
                through outer products, `ScaleOperator.separable`), or "any". With a promise a block may hold the
                candidates in a cheaper form; with "any" it is written out.
        """
        kept = self._pieces[parameter]
        shape = kept[0].shape
        if structure in ("scalar", "separable"):
            products = tuple(
                piece for piece in kept if isinstance(piece, OuterProduct) and piece.touched_rows() is None
            )
            tokens = sum(piece.bounds[-1] for piece in products)
            if len(products) == len(kept) and prefers_factors(self.count, tokens, *shape):
                yield FactorBlock(slice(0, shape[0]), None, products, self.count, self.excluded)
                return
        if split:
            touched = [piece.touched_rows() for piece in kept]
            if all(rows is not None for rows in touched):
                yield from self._sparse_blocks(kept, torch.cat([rows for rows in touched if rows is not None]).unique())
                return
        step = max(1, self._block_bound(kept) // max(1, self._row_bytes(kept))) if split else max(1, shape[0])
        workspace = self._workspace(kept, min(step, shape[0]))
        for first in range(0, shape[0], step):
            rows = slice(first, min(first + step, shape[0]))
            yield Block(rows, self._fill(kept, workspace, rows, rows.stop - rows.start))

    def _sparse_blocks(self, kept: list[Piece], touched: Tensor) -> Iterator[Block]:
        step = max(1, self._block_bound(kept) // max(1, self._row_bytes(kept)))
        workspace = self._workspace(kept, min(step, len(touched)))
        for rows in touched.split(step):
            if len(rows):
                yield Block(rows, self._fill(kept, workspace, rows, len(rows)))
        rest = torch.ones(kept[0].shape[0], dtype=torch.bool, device=touched.device)
        rest[touched] = False
        for rows in rest.nonzero().flatten().split(step * max(1, self.count)):
            if len(rows):
                yield Block(rows, None)

    def _block_bound(self, kept: list[Piece]) -> int:
        return self.block_bytes or BLOCK_BYTES.get(kept[0].device.type, ACCELERATOR_BLOCK_BYTES)

    def _row_bytes(self, kept: list[Piece]) -> int:
        return (self.count + SPARE) * prod(kept[0].shape[1:]) * kept[0].dtype.itemsize

    def _workspace(self, kept: list[Piece], rows: int) -> Tensor:
        # Flat in candidate and row, so that a shorter last block is still contiguous.
        shape = ((self.count + SPARE) * max(1, rows), *kept[0].shape[1:])
        return torch.empty(shape, dtype=kept[0].dtype, device=kept[0].device)

    def _fill(self, kept: list[Piece], workspace: Tensor, rows: Rows, length: int) -> Tensor:
        total = self.count + SPARE
        memory = workspace[: total * length].view(total, length, *kept[0].shape[1:])
        self._write(kept, memory[: self.count], rows)
        return memory

    def _write(self, kept: list[Piece], out: Tensor, rows: Rows) -> None:
        """The rows of every candidate, quarantined ones as zeros."""
        written = [False] * self.count
        for piece in kept:
            span = slice(piece.start, piece.start + piece.count)
            before = written[span]
            if any(before) and not all(before):  # forwards that share some of their candidates
                for i in range(span.start, span.stop):
                    if not written[i]:
                        out[i] = 0
                before = [True]
            piece.add_rows(out[span], rows, overwrite=not all(before))
            written[span] = [True] * piece.count
        for i, done in enumerate(written):
            if not done or i in self.excluded:  # a layer that some forward of the window did not use
                out[i] = 0

    def per_candidate(self, parameter: Parameter) -> Tensor:  # -> (n, *shape)
        """c_i of one parameter, written out: n times the parameter's memory. For tests and small parameters."""
        (block,) = Contributions.blocks(self, parameter, split=False)
        assert block.values is not None
        return block.values.clone().view(self.count, *parameter.shape)

    def alignment(self, direction: Mapping[Parameter, Tensor]) -> Tensor:  # -> (n,) float64
        """`c_i' d` summed over the parameters in `direction`, on the CPU. Writes no gradient out."""
        sums: dict[torch.device, Tensor] = {}
        for parameter, kept in self._pieces.items():
            if parameter not in direction:
                continue
            along = as_rows(direction[parameter])
            for piece in kept:
                into = sums.setdefault(piece.device, torch.zeros(self.count, dtype=torch.float64, device=piece.device))
                into[piece.start : piece.start + piece.count] += piece.alignment(along)
        result = torch.zeros(self.count, dtype=torch.float64)
        for part in sums.values():
            result += part.cpu()
        result[list(self.excluded)] = 0.0
        return result

    def gram(
        self, scale: Mapping[Parameter, ScaleOperator], index: Tensor | None = None
    ) -> Tensor:  # -> (m, m) float64
        """`c_i' M c_j` for the candidates in `index` (all by default), on the CPU."""
        chosen = torch.arange(self.count) if index is None else index
        result = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
        for parameter in self._pieces:
            if parameter not in scale:
                continue
            for block in self.blocks(parameter, split=False):
                assert block.values is not None
                values = block.values[chosen.to(block.values.device)].view(-1, *parameter.shape)
                root = scale[parameter].power(0.5).apply(values).flatten(1)
                result += (root @ root.T).to("cpu", torch.float64)
        return result

    def combine(
        self, weights: Tensor | None = None, parameters: Iterable[Parameter] | None = None
    ) -> dict[Parameter, Tensor]:
        """`sum_i w_i c_i` for every recorded parameter, in the parameter's shape and dtype.

        Args:
            weights: (n,); None: all 1. Candidates of weight 0 and quarantined ones are not read.
            parameters: those wanted; default: all.
        """
        if weights is not None and weights.shape != (self.count,):
            raise ConfigurationError(
                f"weights have shape {tuple(weights.shape)}; ({self.count},) is needed, one per candidate; 0 drops one."
            )
        if self.excluded:
            weights = torch.ones(self.count, dtype=torch.float64) if weights is None else weights.clone()
            weights[list(self.excluded)] = 0.0
        if weights is not None and bool((weights == 1).all()):
            weights = None
        wanted = self._pieces if parameters is None else [p for p in parameters if p in self._pieces]
        return {p: self._combine(p, self._pieces[p], weights) for p in wanted}

    def factors(self, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """Inputs (N, columns) and output gradients (N, rows) of a matrix at all N tokens, loss scale divided out.

        None where some of the parameter's gradients are kept in another form, or are those of an expert's own rows.
        """
        kept = [piece for piece in self._pieces[parameter] if isinstance(piece, OuterProduct)]
        if len(kept) < len(self._pieces[parameter]) or any(piece.touched_rows() is not None for piece in kept):
            return None
        inputs = torch.cat([piece.inputs.to(piece.dtype) for piece in kept])
        return inputs, torch.cat([piece.grads.to(piece.dtype) * piece.scale for piece in kept])

    def total(self, parameter: Parameter) -> Tensor:
        """`sum_i c_i` of one parameter, quarantined candidates left out."""
        weights = None
        if self.excluded:
            weights = torch.ones(self.count, dtype=torch.float64)
            weights[list(self.excluded)] = 0.0
        return self._combine(parameter, self._pieces[parameter], weights)

    @staticmethod
    def _combine(parameter: Parameter, kept: list[Piece], weights: Tensor | None) -> Tensor:
        total = torch.zeros(kept[0].shape, dtype=kept[0].dtype, device=parameter.device)
        for piece in kept:
            piece.add_combined(total, None if weights is None else weights[piece.start : piece.start + piece.count])
        # Pieces may be those of some of the parameter's rows alone (`Piece.cut`).
        shape = (-1, *parameter.shape[1:]) if parameter.dim() else ()
        return total.view(shape).to(parameter.dtype)

    def reached(self) -> Tensor:  # (n,) bool
        """Which candidates have any gradient at all; padding has none."""
        result = torch.zeros(self.count, dtype=torch.bool)
        for kept in self._pieces.values():
            for piece in kept:
                result[piece.start : piece.start + piece.count] |= piece.reached().cpu()
        return result

    def nonfinite_candidates(self) -> tuple[int, ...]:
        """Numbers of candidates with NaN or infinity in any contribution. Reads everything once."""
        bad = torch.zeros(self.count, dtype=torch.bool)
        for parameter in self._pieces:
            for block in self.blocks(parameter):
                if block.values is not None:
                    bad |= ~torch.isfinite(block.values.flatten(1)).all(1).cpu()
        return tuple(int(i) for i in bad.nonzero().flatten())


class GradientExtractor(ABC):
    """Decides in which form the pieces of a contribution are kept until the weights are known.

    Law: whatever the form, alignments, Gram and combination are the same to rounding, unless the extractor
    documents an approximation.
    """

    def check(self, model: nn.Module, parameters: Mapping[str, Parameter]) -> None:
        """Raise `CoverageError` if the extractor cannot serve these parameters. The base serves all."""

    @abstractmethod
    def keep(self, piece: Piece) -> Piece:
        """The piece in the form to keep; called in the backward, as soon as a layer's gradient is known."""

    def contributions(self, pieces: Mapping[Parameter, list[Piece]], count: int) -> Contributions:
        """The contributions of a window; an extractor with a form of its own overrides this."""
        return Contributions(pieces, count)
