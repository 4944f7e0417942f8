"""The tap: an identity on a layer's outputs whose backward hands saved tensors and output gradients to a listener.

Installed by the recorder. In place (`mark_dirty`), because a view would break models that modify the output
in place; with `setup_context`, so that `torch.func` transforms accept it; the inputs are kept by
`save_for_backward`, so that activation checkpointing frees and recomputes them like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftw.errors import RecordingError

Listener = Callable[[tuple[Tensor, ...], tuple[Tensor | None, ...]], None]
"""Called in the backward with the saved tensors and the gradient of each output (None: not reached)."""


class Tap(torch.autograd.Function):
    """`Tap.apply(listener, count, anchor, *outputs, *saved) -> outputs`, `count` of them.

    The anchor is a scalar that requires grad and never receives any: it makes autograd come by even where the
    layer ran with a detached weight on an input that needs no gradient.
    """

    @staticmethod
    def forward(listener: Listener, count: int, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.listener, ctx.count, _, *tensors = inputs
        ctx.mark_dirty(*tensors[: ctx.count])
        ctx.save_for_backward(*tensors[ctx.count :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RecordingError(
                "a backward with create_graph=True ran inside record(), where gradients of gradients (a gradient "
                "penalty) are not recorded; leave that term out, or take it outside of the block."
            )
        saved = ctx.saved_tensors
        with torch.no_grad():
            ctx.listener(saved, grads)
        return (None, None, None, *grads, *[None] * len(saved))


# Looked up at every call otherwise, a tenth of a millisecond for each layer.
Tap.forward.__signature__ = inspect.signature(Tap.forward)  # type: ignore[attr-defined]
