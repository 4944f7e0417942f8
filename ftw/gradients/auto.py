"""Extractor `auto`: the default; the cheaper of the exact forms, layer by layer and call by call."""

from __future__ import annotations

from ftw.gradients.base import GradientExtractor
from ftw.gradients.cost import prefers_written_out
from ftw.gradients.pieces import OuterProduct, Piece


class Auto(GradientExtractor):
    """Chooses by shape what is kept, and by shape and M's structure how it is read (`ftw.gradients.cost`).

    In the backward, each call of a layer is kept as factors or written out, whichever is smaller: a memory cap is then
    reached as late as possible. When b and K are read, factors are written out row block by row block, or
    multiplied token by token where M is a multiple of the identity and that is cheaper. Every form is exact.
    """

    def keep(self, piece: Piece) -> Piece:
        if isinstance(piece, OuterProduct):
            rows = piece.last_row - piece.first_row
            if rows < piece.shape[0]:  # one expert of several: written out, it would take the room of all
                return piece
            return piece.dense() if prefers_written_out(piece.count, piece.bounds[-1], *piece.shape) else piece
        written_out = piece.count
        for size in piece.shape:
            written_out *= size
        return piece.dense() if written_out <= piece.numel else piece
