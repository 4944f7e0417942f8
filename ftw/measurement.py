"""What one pass over the contributions yields: the n-dimensional numbers of a step. Filled by the assembly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Quadratic:
    """`b'w - 1/2 w'Kw` under one scale, float64: sums over parameters, on their device until `to_cpu`.

    Attributes:
        alignment: b = C'M g, (n,).
        gram: K = C'M C, (n, n).
        target: g'M g, ().
        alignments: `C'M g_j` for each of m further targets, (n, m); none by default.
    """

    SUMS = ("alignment", "gram", "target", "alignments")

    def __init__(self, n: int, device: torch.device, targets: int = 0) -> None:
        self.alignment = torch.zeros(n, dtype=torch.float64, device=device)
        self.gram = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.target = torch.zeros((), dtype=torch.float64, device=device)
        self.alignments = torch.zeros(n, targets, dtype=torch.float64, device=device)


class Measurement:
    """What one pass over the contributions yields.

    With M the true update scale, o its offset, kappa the gain and P = M / kappa (DESIGN, section 2):

    Attributes:
        true: b and K under M. b is in nats.
        chosen: b and K under the geometry that selects; the same object as `true` for "curvature".
        gained: `C'M H M C`, (n, n): the curvature of the target under the model H; `sum_p kappa_p K_p` for H = P^-1.
        coupling: `C'M H o`, (n,): how the offset's curvature meets each candidate; `sum_p kappa_p C_p'o_p`.
        offset_drop: g'o, (), the first-order drop that the offset brings by itself, in nats.
        offset_curvature: `1/2 o'H o`, (), in nats.
        offset_drops: `g_j'o` for each of m further targets, (m,), in nats.
        excluded: quarantined candidates, ascending.
    """

    def __init__(self, n: int, geometry: str, device: torch.device, targets: int = 0) -> None:
        self.true = Quadratic(n, device, targets)
        self.chosen = self.true if geometry == "curvature" else Quadratic(n, device, targets)
        self.offset_drops = self.true.alignment.new_zeros(targets)
        self.gained = torch.zeros_like(self.true.gram)
        self.coupling = torch.zeros_like(self.true.alignment)
        self.offset_drop = torch.zeros_like(self.true.target)
        self.offset_curvature = torch.zeros_like(self.true.target)
        self.excluded: tuple[int, ...] = ()

    def first_order(self, weights: Tensor) -> float:
        """`g'(o + M C w)`, in nats."""
        return float(self.offset_drop + self.true.alignment @ weights)

    def curvature(self, weights: Tensor) -> tuple[float, float, float]:
        """`1/2 d'H d` with `d = o + M C w`, in nats, in three parts: constant, linear and quadratic in w."""
        quadratic = weights @ self.gained @ weights / 2
        return float(self.offset_curvature), float(self.coupling @ weights), float(quadratic)

    def first_orders(self, weights: Tensor) -> Tensor:
        """As `first_order` for each further target, (m,)."""
        return self.offset_drops + weights @ self.true.alignments

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(torch.isfinite(tensor).all()) for _, _, tensor in self._tensors())

    def add(self, other: Measurement) -> None:
        """Add the sums of another device."""
        for (owner, name, mine), (_, _, theirs) in zip(self._tensors(), other._tensors(), strict=True):
            setattr(owner, name, mine + theirs.to(mine.device))

    def flat(self) -> Tensor:
        """All sums as one float64 vector on the CPU."""
        return torch.cat([tensor.cpu().flatten() for _, _, tensor in self._tensors()])

    def like(self, flat: Tensor) -> Measurement:
        """A measurement of this one's form with the sums of such a vector."""
        n, m = self.true.alignments.shape
        result = Measurement(n, "curvature" if self.chosen is self.true else "vanilla", flat.device, m)
        parts = flat.split([tensor.numel() for _, _, tensor in self._tensors()])
        for (owner, name, tensor), part in zip(result._tensors(), parts, strict=True):
            setattr(owner, name, part.view(tensor.shape))
        return result

    def shared_by(self, m: int) -> Measurement:
        """This measurement of a single candidate as one of m, each with an equal part: exact for equal weights."""
        geometry = "curvature" if self.chosen is self.true else "vanilla"
        result = Measurement(m, geometry, self.true.gram.device, len(self.offset_drops))
        for (owner, name, _), (_, _, whole) in zip(result._tensors(), self._tensors(), strict=True):
            size = getattr(owner, name).shape
            order = {"gram": 2, "gained": 2, "alignment": 1, "alignments": 1, "coupling": 1}.get(name, 0)
            setattr(owner, name, (whole / m**order).expand(size).clone())
        return result

    def _tensors(self) -> list[tuple[Any, str, Tensor]]:
        names = ("gained", "coupling", "offset_drop", "offset_drops", "offset_curvature")
        found: list[tuple[Any, str, Tensor]] = [(self, name, getattr(self, name)) for name in names]
        for quadratic in (self.true,) if self.chosen is self.true else (self.true, self.chosen):
            found += [(quadratic, name, getattr(quadratic, name)) for name in Quadratic.SUMS]
        return found
