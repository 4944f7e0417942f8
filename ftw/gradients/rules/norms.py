"""Rules of layers that scale every token by a vector: LayerNorm, norms of any library, DoRA's magnitude."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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


class AffineNormRule(LayerRule):
    """Norms of any library: classes named `...Norm` whose output is affine in a weight over the last dimensions.

    Model libraries carry a class each (some scale by w, some by 1 + w; some centre; the precision differs). Whether
    one is `y = f(x) * w + g(x) + b` is measured when the layers are sought, on a small random input: one that scales
    before it normalises, or whose channels are not the last dimension, is not handled. The module itself, evaluated
    at w = 1 and w = 0, gives the derivative in the module's own arithmetic: `dy/dw = y(1) - y(0)`.
    """

    keeps_all = True
    summary = "module evaluated at weight 1 and 0, times output gradient"

    def handles(self, module: nn.Module) -> bool:
        return type(module).__name__.endswith("Norm") and self._fits(module, 1)

    def event(self, module: nn.Module) -> int:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.dim()

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        if "weight" in wanted:
            weight = wanted["weight"]
            with call.evaluation():
                slope = _slope(call, weight)
            yield "weight", broadcast(call, weight, call.grad.to(accumulate(weight)) * slope)
        if "bias" in wanted:
            yield "bias", broadcast(call, wanted["bias"], call.grad)

    def _fits(self, module: nn.Module, arguments: int) -> bool:
        own = {key: p for key, p in module._parameters.items() if p is not None}
        weight = own.get("weight")
        if weight is None or not set(own) <= {"weight", "bias"} or any(True for _ in module.children()):
            return False
        return _is_affine(module, own, arguments)


class GatedNormRule(AffineNormRule):
    """Norms with a gate as second argument, `...NormGated`; their tokens may come flattened, row by row."""

    flat = True

    def handles(self, module: nn.Module) -> bool:
        return type(module).__name__.endswith("NormGated") and self._fits(module, 2)


class DoraMagnitudeRule(LayerRule):
    """peft's DoRA of linear layers: `y = (m / |W + s B A| - 1) * (x W') + m / |W + s B A| * s B A x`, affine in m.

    The norm is a constant to autograd (section 4.3 of the DoRA paper), and is so here.
    """

    keeps_all = True
    summary = "module evaluated at magnitude 1 and 0, times output gradient"

    def handles(self, module: nn.Module) -> bool:
        return type(module).__name__ == "DoraLinearLayer" and set(dict(module.named_parameters())) == {"weight"}

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        magnitude = wanted["weight"]
        args, kwargs = call.arguments
        with call.evaluation():
            slope = _evaluate(call.module, {"weight": torch.ones_like(magnitude)}, args, kwargs)
            base = kwargs.get("base_result")
            if base is None:
                slope = slope - _evaluate(call.module, {"weight": torch.zeros_like(magnitude)}, args, kwargs)
            else:  # y(0) is -x W', which was passed in: no second norm of the weights
                bias = kwargs["base_layer"].bias
                slope = slope + (base if bias is None else base - bias.detach())
        yield "weight", broadcast(call, magnitude, call.grad.to(accumulate(magnitude)) * slope)


def _slope(call: Call, weight: Parameter) -> Tensor:
    module, (args, kwargs) = call.module, call.arguments
    slope = _evaluate(module, {"weight": torch.ones_like(weight)}, args, kwargs)
    if type(module) is nn.RMSNorm:
        return slope
    nothing = {"weight": torch.zeros_like(weight)}
    if not kwargs and len(args) == 1:
        # A row, not one of the inputs, which may be zero, tells `w * x` from `(1 + w) * x`.
        row = torch.ones_like(call.inputs[:1])
        if not bool(_evaluate(module, nothing, (row,), {}).count_nonzero()):
            return slope
    return slope - _evaluate(module, nothing, args, kwargs)


def _is_affine(module: nn.Module, own: Mapping[str, Parameter], arguments: int) -> bool:
    """Whether y(w, b) is y(0, 0) + w (y(1, 0) - y(0, 0)) + b on inputs (2, m, *w.shape), in float32."""
    shape, device = own["weight"].shape, own["weight"].device
    generator = torch.Generator().manual_seed(0)
    length = 2 if shape[-1] == 3 else 3  # so that channels in the middle do not fit

    def draw(*leading: int) -> Tensor:
        return torch.randn(*leading, *shape, generator=generator).to(device)

    inputs = tuple(draw(2, length) for _ in range(arguments))
    none = {key: torch.zeros(p.shape, device=device) for key, p in own.items()}
    some = {key: draw() for key in own} if all(p.shape == shape for p in own.values()) else None
    if some is None:
        return False
    try:
        zero, one, found = (
            _evaluate(module, values, tuple(x.clone() for x in inputs), {})
            for values in (none, none | {"weight": torch.ones(shape, device=device)}, some)
        )
        expected = zero + some["weight"] * (one - zero) + some.get("bias", torch.zeros((), device=device))
        return found.shape == inputs[0].shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    except Exception:  # not made for such an input
        return False


def _evaluate(module: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    # The forward itself, not the call: the module's hooks, ours included, stay out of it.
    own: dict[str, Any] = module._parameters
    originals = {key: own[key] for key in values}
    own.update(values)
    try:
        with torch.no_grad():
            result: Tensor = module.forward(*args, **kwargs)
        return result
    finally:
        own.update(originals)
