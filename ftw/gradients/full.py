"""Extractor `full`: every candidate's gradient written out, for every layer."""

from __future__ import annotations

from ftw.gradients.base import GradientExtractor
from ftw.gradients.pieces import Piece


class Full(GradientExtractor):
    """Materialises c_i in the backward: n times the memory of the trainable parameters, nothing else kept.

    Exact for any update scale. Meant for small models, for tests and as the reference of the other extractors.
    """

    def keep(self, piece: Piece) -> Piece:
        return piece.dense()
