"""Checks that what was recorded is complete, `sum_i c_i == p.grad`. Called by the recorder.

It proves that nothing was missed: tied heads, a weight used outside its layer, a layer called twice (DESIGN, section
3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.errors import CompletenessError
from ftw.gradients.base import Contributions
from ftw.gradients.pieces import Piece
from ftw.optim_state.shards import is_dtensor, is_sharded

if TYPE_CHECKING:
    from ftw.gradients.coverage import TappedLayer


def leftover(
    pieces: Mapping[Parameter, Sequence[Piece]],
    dropped: Mapping[Parameter, Tensor],
    formed: Mapping[Parameter, Tensor],
    precision: float,
) -> dict[Parameter, Tensor]:
    """Gradient that autograd formed and no candidate owns, where it exceeds rounding.

    Args:
        pieces: recorded in the block.
        dropped: sums, as rows, of those that were not kept.
        formed: p.grad made in the block, by autograd, without lean mode.
        precision: the coarsest machine epsilon among the gradients that were recorded.

    A parameter whose gradient is not finite is passed over; the recorder repeats the audit in the next block.
    """
    present = {p: list(kept) for p, kept in pieces.items() if kept}
    count = max((piece.start + piece.count for kept in present.values() for piece in kept), default=0)
    sums = Contributions(present, count).combine()
    for p, total in dropped.items():
        sums[p] = sums.get(p, torch.zeros_like(p)) + total.view(p.shape).to(p.dtype)
    gaps = []
    for p in formed.keys() | sums.keys():
        grad, found = formed.get(p, torch.zeros_like(p)), sums.get(p, torch.zeros_like(p))
        gaps.append((p, Gap.between(grad, found)))
    largest = max((gap.formed for _, gap in gaps if math.isfinite(gap.formed)), default=0.0)
    return {p: gap.rest for p, gap in gaps if gap.is_wide(max(precision, torch.finfo(p.dtype).eps), largest)}


class Gap(NamedTuple):
    """What lies between a parameter's gradient and the sum of what was recorded of it; norms."""

    rest: Tensor
    formed: float
    found: float

    @staticmethod
    def between(formed: Tensor, found: Tensor) -> Gap:
        """Of two tensors of one shape."""
        return Gap(formed - found, float(formed.norm()), float(found.norm()))

    def is_wide(self, eps: float, largest: float) -> bool:
        """Whether it exceeds rounding; what is not finite tells nothing.

        Args:
            eps: machine epsilon of the gradients. largest: norm of a gradient among all parameters.
        """
        size = max(self.formed, self.found)
        if not math.isfinite(size):
            return False
        # Sums in another order than autograd's differ by some hundred roundings; half precision rounds the gradient
        # itself, to some 0.3 % of its norm. The second term is for gradients that vanish but for rounding.
        return float(self.rest.norm()) > min(1e3 * eps, 0.02) * size + 10 * eps * largest


class WholeGradients:
    """Completeness of sharded parameters (FSDP2): their gradient is compared where it is a whole, in the backward.

    As soon as autograd has formed it; then it is dropped, so that it is neither kept nor summed over the processes. A
    process so compares its own candidates with its own gradient.

    Args:
        pieces: of a parameter, recorded so far in the block.
        scale: what contributions have been multiplied with, and the gradients have not.
    """

    def __init__(self, pieces: Callable[[Parameter], Sequence[Piece]], scale: float) -> None:
        self._pieces, self._scale = pieces, scale
        self._handles: dict[Tensor, Any] = {}
        self._read: dict[Parameter, int] = {}  # pieces that a gradient was compared with
        self._gaps: list[tuple[Parameter, Gap]] = []

    def watch(self, layer: TappedLayer) -> None:
        """Compare the parameters that the layer is about to use."""
        for p, (_, _, held) in zip(layer.parameters.values(), layer.places(), strict=True):
            if is_sharded(p) and not is_dtensor(held) and held not in self._handles:
                self._handles[held] = held.register_post_accumulate_grad_hook(partial(self._compare, p))

    def _compare(self, p: Parameter, held: Tensor) -> None:
        with torch.no_grad():
            assert held.grad is not None
            formed, held.grad = held.grad * self._scale, None
            self._add(p, formed)

    def _add(self, p: Parameter, formed: Tensor) -> None:
        pieces = self._pieces(p)
        new, self._read[p] = pieces[self._read.get(p, 0) :], len(pieces)
        found = torch.zeros_like(formed)
        if new:
            found = Contributions({p: list(new)}, max(piece.start + piece.count for piece in new)).combine()[p]
        gap = Gap.between(formed, found.to(formed.dtype))
        self._gaps.append((p, gap._replace(rest=gap.rest.norm())))  # a number, not the size of the parameter

    def finish(self, parameters: Sequence[Parameter], precision: float) -> dict[Parameter, tuple[float, float]]:
        """Parameters whose gradient and contributions differ: by how much, and how large the gradient is.

        Args:
            parameters: all that are recorded.
        """
        self.close()
        for p in parameters:
            if is_sharded(p) and len(self._pieces(p)) > self._read.get(p, 0):  # recorded, and never formed
                self._add(p, torch.zeros(p.shape, dtype=p.dtype, device=p.device))
        largest = max((gap.formed for _, gap in self._gaps if math.isfinite(gap.formed)), default=0.0)
        wide = [(p, g) for p, g in self._gaps if g.is_wide(max(precision, torch.finfo(p.dtype).eps), largest)]
        return {p: (float(gap.rest), gap.formed) for p, gap in wide}

    @property
    def finite(self) -> bool:
        """Whether no gradient held NaN or infinity."""
        return all(math.isfinite(gap.formed) for _, gap in self._gaps)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


def completeness_error(left: Mapping[str, tuple[float, float]]) -> CompletenessError:
    """The error for gradient without an owner, by the parameter's name: its norm, and that of the whole gradient."""
    shares = [f"{name} ({rest:.3g} of {whole:.3g})" for name, (rest, whole) in left.items()]
    return CompletenessError(
        f"contributions do not add up to the gradient of {len(shares)} parameters: {', '.join(shares[:5])}"
        f"{' ...' if len(shares) > 5 else ''}; all gradient must flow through recorded calls of their layers; either a "
        "weight is used outside its layer's forward (a functional or fused call), or the loss has a term that no "
        "candidate owns (a regulariser): pass residual='keep' to add such a gradient unweighted, or freeze the "
        "parameter."
    )
