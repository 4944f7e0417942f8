"""Per-candidate gradients, recorded during the trainer's own backward."""

from ftw.gradients.auto import Auto
from ftw.gradients.base import Block, Contributions, GradientExtractor
from ftw.gradients.factorized import Factorized
from ftw.gradients.full import Full
from ftw.gradients.layout import Layout, packed_candidates
from ftw.gradients.lora import LoRA
from ftw.gradients.pieces import Broadcast, Dense, OuterProduct, Piece, RowScatter
from ftw.gradients.projection import Projection
from ftw.gradients.recorder import Recorder

__all__ = [
    "Auto",
    "Block",
    "Broadcast",
    "Contributions",
    "Dense",
    "Factorized",
    "Full",
    "GradientExtractor",
    "Layout",
    "LoRA",
    "OuterProduct",
    "Piece",
    "Projection",
    "Recorder",
    "RowScatter",
    "packed_candidates",
]
