"""Extractor `factorized`: matrix layers by their factors, written out row block by row block when they are read."""

from __future__ import annotations

from ftw.gradients.base import GradientExtractor
from ftw.gradients.pieces import Piece


class Factorized(GradientExtractor):
    """Keeps (input, output gradient) of linear layers and look-up tables; norms and biases are written out.

    The factors are the very tensors that autograd holds in a plain backward; they live until the window ends
    instead of until the layer's own backward. Cost is linear in the context length, and the memory of reading
    is bounded by a block. Exact for any update scale; one that is `separable` is applied to the factors themselves
    where products of tokens are cheaper than writing out (`cost`).
    """

    def keep(self, piece: Piece) -> Piece:
        return piece
