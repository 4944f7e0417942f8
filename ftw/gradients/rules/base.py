"""The interface of rules: how one kind of layer yields each candidate's gradient of its parameters.

A rule is trusted only after the audit: in the first recorded step the sum of the contributions is compared with the
gradient that autograd formed (`completeness.leftover`). Called by the recorder, in the middle of the trainer's own
backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.gradients.layout import Layout, Tokens
from ftw.gradients.pieces import Broadcast, OuterProduct, Piece, as_rows

LIVE_LOOK_FLOPS = {"cpu": 1e8}
"""A weight gradient cheaper than this is not searched for tokens without gradient, by device type."""

ACCELERATOR_LIVE_LOOK_FLOPS = 2e11
"""Elsewhere: half a millisecond of products against the wait that the search costs. Reasoned, not measured."""


@dataclass(frozen=True)
class Call:
    """One call of one layer, seen from its backward."""

    module: Any  # the layer
    arguments: tuple[tuple[Any, ...], dict[str, Any]]  # of its forward, tensors detached; empty unless `keeps_all`
    inputs: Tensor  # the first of its tensor arguments
    grads: tuple[Tensor | None, ...]  # gradient of the loss with respect to each tapped output, one reached at least
    layout: Layout
    flat: bool  # the rule's `flat`
    scale: float  # one over the loss scale
    evaluation: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What to evaluate the module in, should a rule do it: the forward's autocast, the recorder's hooks inert."""

    @property
    def grad(self) -> Tensor:
        """The gradient of the first output. A layer's rule with a single output uses it."""
        (first,) = self.grads
        assert first is not None
        return first

    def tokens(self, tensor: Tensor, event: int = 1) -> Tokens:
        """The candidates' tokens in a tensor whose last `event` dimensions belong to each token."""
        return self.layout.tokens(tensor.shape[: tensor.dim() - event], self.flat)


class LayerRule(ABC):
    """The parameter gradients of one kind of layer, candidate by candidate.

    Law: the pieces' sum over candidates is the gradient that autograd forms for that call of the layer.
    """

    keeps_all: ClassVar[bool] = False
    """Whether the rule needs every argument of the call, or only the first tensor."""

    saves_outputs: ClassVar[bool] = False
    """Whether autograd may have saved an output (an exponential's, say): the tap, in place, must then have a copy."""

    flat: bool = False
    """Whether the layer's rows may be tokens, row by row, where the model's own are not."""

    summary: ClassVar[str]
    """How parameters are handled, in a few words, for `selector.coverage()`."""

    def bind(self, model: nn.Module) -> Self:
        """The rule for the modules of one model, asked before any of them is shown to it. The base: itself."""
        return self

    @abstractmethod
    def handles(self, module: nn.Module) -> bool:
        """Whether the module is of this kind, with no option that the rule does not model."""

    @abstractmethod
    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        """Pieces of the wanted parameters, by their name in the layer."""

    def parameters(self, module: nn.Module) -> dict[str, Parameter]:
        """The parameters that the rule covers, by their name in the layer. The base: the module's own."""
        return {key: p for key, p in module._parameters.items() if p is not None}

    def event(self, module: nn.Module) -> int:
        """How many of the last dimensions of the first tensor argument belong to each token."""
        return 1


def outer_product(
    call: Call,
    parameter: Parameter,
    left: Tensor,
    right: Tensor,
    *,
    transposed: bool = False,
    tokens: Tokens | None = None,
    first_row: int = 0,
) -> Piece:
    """`sum_t left[t] right[t]'`, tokens without gradient left out.

    Args:
        left: (..., rows of the parameter); right: (..., columns).
        transposed: the output gradient is `right` and not `left`.
        tokens: of left and right, where the caller has them already divided: both are then (N, d).
        first_row: where the matrix begins in a parameter that holds several.
    """
    if tokens is None:
        tokens = call.tokens(call.inputs)
        left, right = tokens.take(left), tokens.take(right)
    bounds = tokens.bounds
    live = _live_tokens(right if transposed else left, 2.0 * left.numel() * right.shape[1])
    if live is not None:
        ends = torch.zeros(left.shape[0] + 1, dtype=torch.long, device=live.device)
        ends[live + 1] = 1
        counted = ends.cumsum(0).tolist()
        bounds = tuple(counted[b] for b in bounds)
        left, right = left[live], right[live]
    shape = tuple(as_rows(parameter).shape)
    return OuterProduct(
        start=call.layout.start,
        shape=shape,
        dtype=accumulate(parameter),
        bounds=bounds,
        grads=left,
        scale=call.scale,
        inputs=right,
        first_row=first_row,
    )


def broadcast(call: Call, parameter: Parameter, grads: Tensor) -> Piece:
    """A parameter that meets every token alike: `grads` is (..., *parameter.shape)."""
    event, shape = parameter.dim(), tuple(as_rows(parameter).shape)
    tokens = call.tokens(grads, event)
    return Broadcast(
        start=call.layout.start,
        shape=shape,
        dtype=accumulate(parameter),
        bounds=tokens.bounds,
        grads=tokens.take(grads, event).reshape(-1, *shape),
        scale=call.scale,
    )


def accumulate(parameter: Tensor) -> torch.dtype:
    """The precision that contributions are formed in: the parameter's, float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def is_plain(module: nn.Module) -> bool:
    """Whether the module's parameters are its own weight and bias: a reparametrised one computes its weight."""
    return set(module._parameters) <= {"weight", "bias"}


def _live_tokens(gradient: Tensor, flops: float) -> Tensor | None:
    """Tokens with any gradient, ascending; None: (nearly) all of them, or not worth the search.

    Padding carries no gradient anywhere, prompt tokens none at the head. One column is looked at first; only tokens
    that are zero there are read whole.
    """
    least = LIVE_LOOK_FLOPS.get(gradient.device.type, ACCELERATOR_LIVE_LOOK_FLOPS)
    if gradient.numel() == 0 or flops < least:
        return None
    suspects = (gradient[:, 0] == 0).nonzero().flatten()
    if 16 * len(suspects) < len(gradient):
        return None
    dead = suspects[~gradient[suspects].any(1)]
    if 16 * len(dead) < len(gradient):
        return None
    alive = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
    alive[dead] = False
    return alive.nonzero().flatten()
