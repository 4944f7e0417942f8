"""The window: what was recorded since the last optimizer step. Filled by the recorder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from ftw.gradients.layout import Layout
from ftw.gradients.output_gradient import OutputGradient
from ftw.gradients.pieces import Piece


class Ledger:
    """The bytes that a set of tensors keeps alive: every storage once and whole, however many tensors look at it.

    Attributes:
        bytes: now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.peak = 0
        self._held: dict[tuple[torch.device, int], tuple[int, int]] = {}  # storage -> how many tensors, bytes

    def extra(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that adding these would add."""
        new = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for key, size in new.items() if key not in self._held)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """They are kept from now on."""
        for tensor in tensors:
            key = _storage(tensor)
            count, size = self._held.get(key, (0, tensor.untyped_storage().nbytes()))
            self.bytes += 0 if count else size
            self._held[key] = count + 1, size
        self.peak = max(self.peak, self.bytes)

    def remove(self, tensors: Iterable[Tensor]) -> None:
        """They are kept no longer."""
        for tensor in tensors:
            key = _storage(tensor)
            count, size = self._held.pop(key)
            if count > 1:
                self._held[key] = count - 1, size
            else:
                self.bytes -= size


@dataclass
class Forward:
    """One forward of the model inside `record()`.

    Attributes:
        layout: whose its rows and tokens are.
        recomputable: no other forward was waiting for its backward when this one ran.
        call: arguments, where they are needed again (`keep_calls`), and the random state before the forward.
        output: which output's gradient is kept, and that gradient.
        reached: a backward has come by.
    """

    layout: Layout
    recomputable: bool
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    random_state: list[Tensor] = field(default_factory=list)
    output: int | None = None
    output_gradient: OutputGradient | None = None
    reached: bool = False
    drew: bool = False
    """Whether the forward drew random numbers (dropout); known where calls are kept."""

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept to run it again."""
        held = [leaf for leaf in tree_leaves(self.call) if isinstance(leaf, Tensor)]
        return held if self.output_gradient is None else [*held, *self.output_gradient.tensors]

    def candidates(self) -> Tensor:  # (rows,) or (rows, T)
        """The number in the window of each row's or token's candidate; -1: nobody."""
        layout = self.layout
        owner = torch.arange(layout.rows) if layout.owner is None else layout.owner
        return torch.where(owner >= 0, owner + layout.start, -1)


@dataclass(frozen=True)
class Mark:
    """How far a window was at the beginning of a block."""

    count: int
    forwards: int
    pieces: Mapping[Parameter, int]  # how many
    touched: frozenset[Parameter]
    residual: Mapping[Parameter, Tensor]


@dataclass
class Window:
    """Candidates, pieces and gradient without an owner, of all blocks of `record()` since the last step."""

    count: int = 0
    forwards: list[Forward] = field(default_factory=list)
    pieces: dict[Parameter, list[Piece]] = field(default_factory=dict)
    residual: dict[Parameter, Tensor] = field(default_factory=dict)
    touched: set[Parameter] = field(default_factory=set)
    ledger: Ledger = field(default_factory=Ledger)
    """Of the pieces, and of what forwards keep to be run again."""
    alignment: Tensor | None = None
    """(n,) float64, where pieces were dropped under a memory cap: what is left of them."""
    faulty: Sequence[int] = ()
    """Candidates that a decision has quarantined; a replay keeps clear of them."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that the window keeps alive."""
        return self.ledger.bytes

    def mark(self) -> Mark:
        """What `rewind` needs."""
        kept = {p: len(pieces) for p, pieces in self.pieces.items()}
        return Mark(self.count, len(self.forwards), kept, frozenset(self.touched), dict(self.residual))

    def rewind(self, mark: Mark) -> None:
        """Forget what came after the mark."""
        self.count, self.touched, self.residual = mark.count, set(mark.touched), dict(mark.residual)
        for forward in self.forwards[mark.forwards :]:
            self.ledger.remove(forward.tensors)
        del self.forwards[mark.forwards :]
        for p, pieces in self.pieces.items():
            for piece in pieces[mark.pieces.get(p, 0) :]:
                self.ledger.remove(tensors_of(piece))
            del pieces[mark.pieces.get(p, 0) :]
        if self.alignment is not None:
            self.alignment = self.alignment[: self.count] if self.count else None

    def since(self, mark: Mark) -> dict[Parameter, list[Piece]]:
        """The pieces that came after the mark."""
        return {p: pieces[mark.pieces.get(p, 0) :] for p, pieces in self.pieces.items()}

    def wants(self, p: Parameter) -> bool:
        """Whether pieces of the parameter are recorded here."""
        return True

    def keep(self, p: Parameter, piece: Piece, cap: int | None) -> bool:
        """Keep a piece; False: it was not, because there is no room for it below the cap, in bytes."""
        tensors = tensors_of(piece)
        if cap is not None and self.ledger.bytes + self.ledger.extra(tensors) > cap:
            return False
        self.pieces.setdefault(p, []).append(piece)
        self.ledger.add(tensors)
        return True

    def drop(self, p: Parameter) -> None:
        """Keep a parameter's pieces no longer."""
        for piece in self.pieces.pop(p, []):
            self.ledger.remove(tensors_of(piece))

    def keep_call(self, forward: Forward, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Keep a forward's arguments."""
        forward.call = call
        self.ledger.add(forward.tensors)

    def keep_output(self, forward: Forward, gradient: OutputGradient) -> None:
        """Keep the gradient of a forward's output, in place of what was kept of it."""
        if forward.output_gradient is not None:
            self.ledger.remove(forward.output_gradient.tensors)
        forward.output_gradient = gradient
        self.ledger.add(gradient.tensors)

    def alignments(self) -> Tensor:  # (n,) float64
        """What is left of the dropped pieces, on the CPU; 0 where there were none."""
        assert self.alignment is not None
        found = self.alignment.cpu()
        return torch.cat([found, found.new_zeros(self.count - len(found))])

    def keep_outputs_of(self, chosen: Tensor) -> None:
        """Drop the output gradients of all rows in which no chosen candidate, (m,), has a part."""
        wanted = torch.zeros(self.count, dtype=torch.bool)
        wanted[chosen] = True
        for forward in self.forwards:
            if forward.output_gradient is None:
                continue
            candidates = forward.candidates()
            here = (candidates >= 0) & wanted[candidates.clamp_min(0)]
            rows = here.flatten(1).any(1) if here.dim() > 1 else here
            if not bool(rows.all()):
                self.keep_output(forward, forward.output_gradient.only(rows.nonzero().flatten()))

    def unreached(self) -> list[int]:
        """Candidates without a gradient at any kept output, such as those whose labels are all masked."""
        reached = torch.zeros(self.count, dtype=torch.bool)
        for forward in self.forwards:
            candidates, gradient = forward.candidates(), forward.output_gradient
            alive = torch.ones_like(candidates, dtype=torch.bool)
            if gradient is not None:
                here = gradient.reached
                fits = candidates.dim() == 1 or candidates.shape == here.shape
                alive = here.any(1) if candidates.dim() == 1 else here if fits else alive
            reached[candidates[alive & (candidates >= 0)]] = True
        return (~reached).nonzero().flatten().tolist()

    def align(self, piece: Piece, direction: Tensor) -> None:
        """Add a piece's alignment to what is left of the dropped ones."""
        end = piece.start + piece.count
        if self.alignment is None:
            self.alignment = torch.zeros(end, dtype=torch.float64, device=piece.device)
        if len(self.alignment) < end:
            self.alignment = torch.cat([self.alignment, self.alignment.new_zeros(end - len(self.alignment))])
        self.alignment[piece.start : end] += piece.alignment(direction).to(self.alignment.device, torch.float64)


def tensors_of(piece: Piece) -> list[Tensor]:
    """The tensors that a piece keeps alive."""
    values = (getattr(piece, each.name) for each in fields(piece))
    return [value for value in values if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    """Where a tensor's numbers are; views share it."""
    return tensor.device, tensor.untyped_storage().data_ptr()
