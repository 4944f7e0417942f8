"""Extractor `auto`: the default; each piece is kept in the smaller of its two forms."""

from __future__ import annotations

from math import prod

from ftw.gradients.base import GradientExtractor
from ftw.gradients.pieces import Piece


class Auto(GradientExtractor):
    """Chooses between factors and written-out gradients, piece by piece, by memory.

    For a matrix of d_out x d_in and T tokens a candidate, the factors take T (d_in + d_out) numbers and the gradient
    d_in d_out. Low-rank adapters, norms and biases are hence written out at once (and their inputs freed); wide
    layers on short contexts stay factors; wide layers on long contexts are written out. Either way is exact.
    """

    def keep(self, piece: Piece) -> Piece:
        written_out = piece.count * prod(piece.shape)
        return piece.dense() if written_out <= piece.numel else piece
