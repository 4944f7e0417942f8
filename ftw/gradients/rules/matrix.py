"""Rules of matrix products: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn import Parameter

from ftw.gradients.pieces import Piece
from ftw.gradients.rules.base import Call, LayerRule, broadcast, is_plain, outer_product


class LinearRule(LayerRule):
    """`y = x W' + b`. Subclasses with a forward of their own are not handled."""

    summary = "factors of a matrix product"

    def handles(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and is_plain(module)

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        if "weight" in wanted:
            yield "weight", outer_product(call, wanted["weight"], call.grad, call.inputs)
        if "bias" in wanted:
            yield "bias", broadcast(call, wanted["bias"], call.grad)


class Conv1DRule(LinearRule):
    """`y = x W + b`, the transposed linear layer of GPT-2 (`transformers.pytorch_utils.Conv1D`), known by its shape."""

    def handles(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        shape = getattr(module, "nx", None), getattr(module, "nf", None)
        return type(module).__name__ == "Conv1D" and is_plain(module) and weight is not None and weight.shape == shape

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        if "weight" in wanted:
            yield "weight", outer_product(call, wanted["weight"], call.inputs, call.grad, transposed=True)
        if "bias" in wanted:
            yield "bias", broadcast(call, wanted["bias"], call.grad)
