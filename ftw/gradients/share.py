"""A share of the parameters: a window for a replay that keeps as many of them as there is room for.

Used by `replay`; filled by the recorder like any window.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.nn import Parameter

from ftw.gradients.pieces import Piece
from ftw.gradients.window import Ledger, Window, tensors_of


@dataclass
class Share(Window):
    """Keeps whole parameters: one whose next piece does not fit is postponed, and what was kept of it is dropped.

    Laws: `ledger.bytes` never exceeds the room; the first parameter to arrive is never postponed, so that every share
    completes one at least, or says what that one needs.

    Attributes:
        pending: parameters that are wanted.
        room: bytes; None: no bound.
        first: the parameter that arrived first.
        postponed: wanted parameters that were not kept for want of room.
        needed: bytes of the first parameter's pieces, where they alone exceed the room; else 0.
    """

    pending: frozenset[Parameter] = frozenset()
    room: int | None = None
    first: Parameter | None = None
    postponed: set[Parameter] = field(default_factory=set)
    needed: int = 0

    def wants(self, p: Parameter) -> bool:
        if self.needed:
            return p is self.first
        return p in self.pending and p not in self.postponed

    def keep(self, p: Parameter, piece: Piece, cap: int | None) -> bool:
        """As `Window.keep`, by the room instead of the cap; what does not fit is postponed, and the answer is True."""
        if self.first is None:
            self.first = p
        if not self.wants(p):  # given up between two pieces of one call, of an expert and the next
            return True
        if self.needed:
            self.needed += Ledger().extra(tensors_of(piece))
            return True
        while not super().keep(p, piece, self.room):
            if p is not self.first:
                self._postpone(p)
                return True
            others = [other for other in self.pieces if other is not p]
            if not others:
                self.needed = self.ledger.bytes + self.ledger.extra(tensors_of(piece))
                self.drop(p)
                return True
            self._postpone(others[-1])
        return True

    def _postpone(self, p: Parameter) -> None:
        self.drop(p)
        self.postponed.add(p)
