"""The window: what was recorded since the last optimizer step. Filled by the recorder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.gradients.layout import Layout
from ftw.gradients.pieces import Piece


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
    output_grad: Tensor | None = None
    reached: bool = False
    drew: bool = False
    """Whether the forward drew random numbers (dropout); known where calls are kept."""

    def keep_output_grad(self, grad: Tensor) -> None:
        """A tensor hook on the output."""
        self.output_grad = grad.detach() if self.output_grad is None else self.output_grad + grad


@dataclass
class Window:
    """Candidates, pieces and gradient without an owner, of all blocks of `record()` since the last step."""

    count: int = 0
    forwards: list[Forward] = field(default_factory=list)
    pieces: dict[Parameter, list[Piece]] = field(default_factory=dict)
    residual: dict[Parameter, Tensor] = field(default_factory=dict)
    touched: set[Parameter] = field(default_factory=set)
    kept_bytes: int = 0
    alignment: Tensor | None = None
    """(n,) float64, where pieces were dropped under a memory cap: what is left of them."""

    def mark(self) -> tuple[int, int, dict[Parameter, int]]:
        """What `rewind` needs."""
        return self.count, len(self.forwards), {p: len(kept) for p, kept in self.pieces.items()}

    def rewind(self, mark: tuple[int, int, dict[Parameter, int]]) -> None:
        """Forget what came after the mark."""
        self.count, forwards, kept = mark
        del self.forwards[forwards:]
        if not forwards:
            self.residual.clear()
        for p in list(self.pieces):
            del self.pieces[p][kept.get(p, 0) :]
        self.kept_bytes = sum(piece.nbytes for pieces in self.pieces.values() for piece in pieces)
        if self.alignment is not None:
            self.alignment = self.alignment[: self.count] if self.count else None

    def since(self, mark: tuple[int, int, dict[Parameter, int]]) -> dict[Parameter, list[Piece]]:
        """The pieces that came after the mark."""
        return {p: pieces[mark[2].get(p, 0) :] for p, pieces in self.pieces.items()}

    def align(self, piece: Piece, direction: Tensor) -> None:
        """Add a piece's alignment to what is left of the dropped ones."""
        end = piece.start + piece.count
        if self.alignment is None:
            self.alignment = torch.zeros(end, dtype=torch.float64, device=piece.device)
        if len(self.alignment) < end:
            self.alignment = torch.cat([self.alignment, self.alignment.new_zeros(end - len(self.alignment))])
        self.alignment[piece.start : end] += piece.alignment(direction).to(self.alignment.device, torch.float64)
