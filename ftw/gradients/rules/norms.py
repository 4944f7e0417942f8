"""Rules of layers that scale every token by a vector: LayerNorm, RMSNorms of any library, DoRA's magnitude."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.gradients.pieces import Piece
from ftw.gradients.rules.base import Call, LayerRule, accumulate, broadcast, is_plain


class LayerNormRule(LayerRule):
    """`y = normalise(x) * w + b` over the trailing dimensions."""

    summary = "normalised input times output gradient"

    def handles(self, module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward and is_plain(module)

    def event(self, module: nn.Module) -> int:
        return len(module.normalized_shape)  # type: ignore[arg-type]

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        if "weight" in wanted:
            dtype = accumulate(wanted["weight"])
            normal = F.layer_norm(call.inputs.to(dtype), call.module.normalized_shape, None, None, call.module.eps)
            yield "weight", broadcast(call, wanted["weight"], call.grad.to(dtype) * normal)
        if "bias" in wanted:
            yield "bias", broadcast(call, wanted["bias"], call.grad)


class RMSNormRule(LayerRule):
    """Root-mean-square norms: torch's own and every module class named `...RMSNorm` with one 1-d weight.

    Model libraries carry a class each (some scale by w, some by 1 + w; the precision of the square differs).
    All are affine in w, so the module itself, evaluated at w = 1 and w = 0, gives the derivative in the
    module's own arithmetic: `dy/dw = y(1) - y(0)`.
    """

    summary = "module evaluated at weight 1 and 0, times output gradient"

    def handles(self, module: nn.Module) -> bool:
        own = dict(module.named_parameters())
        return type(module).__name__.endswith("RMSNorm") and set(own) == {"weight"} and own["weight"].dim() == 1

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        weight = wanted["weight"]
        slope = _evaluate(call, torch.ones_like(weight), call.inputs)
        if type(call.module) is not nn.RMSNorm:
            # A row, not one of the inputs, which may be zero, tells `w * x` from `(1 + w) * x`.
            nothing = torch.zeros_like(weight)
            if bool(_evaluate(call, nothing, torch.ones_like(call.inputs[:1])).count_nonzero()):
                slope = slope - _evaluate(call, nothing, call.inputs)
        yield "weight", broadcast(call, weight, call.grad.to(accumulate(weight)) * slope)


def _evaluate(call: Call, weight: Tensor, inputs: Tensor) -> Tensor:
    # The forward itself, not the call: the module's hooks, ours included, stay out of it.
    own = call.module._parameters
    original, own["weight"] = own["weight"], weight
    try:
        with torch.no_grad():
            result: Tensor = call.module.forward(inputs)
        return result
    finally:
        own["weight"] = original
