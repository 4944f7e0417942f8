"""The tap: an identity on a layer's output whose backward hands (input, output gradient) to whoever listens.

Installed by the recorder. In place (`mark_dirty`), because a view would break models that modify the output
in place; with `setup_context`, so that `torch.func` transforms accept it; the input is kept by
`save_for_backward`, so that activation checkpointing frees and recomputes it like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Listener = Callable[[Tensor, Tensor], None]
"""Called in the backward with the layer's input and the gradient of its output."""


class Tap(torch.autograd.Function):
    """`Tap.apply(output, anchor, inputs, listener) -> output`.

    The anchor is a scalar that requires grad and never receives any: it makes autograd come by even where the
    layer ran with a detached weight on an input that needs no gradient.
    """

    @staticmethod
    def forward(output: Tensor, anchor: Tensor, inputs: Tensor, listener: Listener) -> Tensor:
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Listener], output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])
        ctx.save_for_backward(inputs[2])
        ctx.listener = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.listener(inputs, grads[0])
        return grads[0], None, None, None
