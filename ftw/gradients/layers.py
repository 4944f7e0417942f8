"""Rules: how a layer's input and output gradient give each candidate's gradient of the layer's parameters.

One rule per kind of layer. A rule is trusted only after the audit: in the first recorded step the sum of the
contributions is compared with the gradient that autograd formed (`audit.leftover`).
Called by the recorder, in the middle of the trainer's own backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.gradients.pieces import Dense, OuterProduct, Piece, RowScatter


@dataclass(frozen=True)
class Call:
    """One call of one layer, seen from its backward."""

    module: Any  # the layer
    inputs: Tensor  # its first argument, (count, ...); rows are candidates
    grads: Tensor  # gradient of the loss with respect to its output, (count, ...)
    start: int  # number of the first candidate
    scale: float  # one over the loss scale


class LayerRule(ABC):
    """The parameter gradients of one kind of layer, candidate by candidate.

    Law: the piece's sum over candidates is the gradient that autograd forms for that call of the layer.
    """

    @abstractmethod
    def handles(self, module: nn.Module) -> bool:
        """Whether the module is of this kind, with no option that the rule does not model."""

    @abstractmethod
    def piece(self, call: Call, name: str, parameter: Parameter) -> Piece:
        """The piece of the parameter that the layer calls `name`."""


class LinearRule(LayerRule):
    """`y = x W' + b`. Subclasses with a forward of their own are not handled."""

    def handles(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and _plain(module)

    def piece(self, call: Call, name: str, parameter: Parameter) -> Piece:
        if name == "bias":
            return _summed(call.grads, call, parameter)
        A, B = _tokens(call.inputs), _tokens(call.grads)
        return OuterProduct(call.start, tuple(parameter.shape), _accumulate(parameter), A, B, call.scale)


class EmbeddingRule(LayerRule):
    """`y = W[ids]`. Options that change W in the forward (`max_norm`) or its gradient are not handled."""

    def handles(self, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Embedding)
            and type(module).forward is nn.Embedding.forward
            and module.max_norm is None
            and not module.scale_grad_by_freq
            and not module.sparse
            and _plain(module)
        )

    def piece(self, call: Call, name: str, parameter: Parameter) -> Piece:
        ids = call.inputs.flatten(1) if call.inputs.dim() > 1 else call.inputs[:, None]
        row_of = ids.long()
        if call.module.padding_idx is not None:
            row_of = row_of.masked_fill(row_of == call.module.padding_idx, -1)
        return RowScatter(
            call.start, tuple(parameter.shape), _accumulate(parameter), row_of, _tokens(call.grads), call.scale
        )


class LayerNormRule(LayerRule):
    """`y = normalise(x) * w + b` over the trailing dimensions."""

    def handles(self, module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward and _plain(module)

    def piece(self, call: Call, name: str, parameter: Parameter) -> Piece:
        if name == "bias":
            return _summed(call.grads, call, parameter)
        dtype = _accumulate(parameter)
        normal = F.layer_norm(call.inputs.to(dtype), call.module.normalized_shape, None, None, call.module.eps)
        return _summed(call.grads.to(dtype) * normal, call, parameter)


class RMSNormRule(LayerRule):
    """Root-mean-square norms: torch's own and every module class named `...RMSNorm` with one 1-d weight.

    Model libraries carry a class each (some scale by w, some by 1 + w; the precision of the square differs).
    All are affine in w, so the module itself, evaluated at w = 1 and w = 0, gives the derivative in the
    module's own arithmetic: `dy/dw = y(1) - y(0)`.
    """

    def handles(self, module: nn.Module) -> bool:
        own = dict(module.named_parameters())
        return type(module).__name__.endswith("RMSNorm") and set(own) == {"weight"} and own["weight"].dim() == 1

    def piece(self, call: Call, name: str, parameter: Parameter) -> Piece:
        slope = self._evaluate(call, torch.ones_like(parameter), call.inputs)
        if type(call.module) is not nn.RMSNorm:
            # A row, not one of the inputs, which may be zero, tells `w * x` from `(1 + w) * x`.
            nothing = torch.zeros_like(parameter)
            if bool(self._evaluate(call, nothing, torch.ones_like(call.inputs[:1])).count_nonzero()):
                slope = slope - self._evaluate(call, nothing, call.inputs)
        return _summed(call.grads.to(_accumulate(parameter)) * slope, call, parameter)

    @staticmethod
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


RULES: tuple[LayerRule, ...] = (LinearRule(), EmbeddingRule(), LayerNormRule(), RMSNormRule())


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule that handles the module, or None."""
    return next((rule for rule in RULES if rule.handles(module)), None)


def _plain(module: nn.Module) -> bool:
    # A reparametrised layer (weight norm) computes its weight from others.
    return set(module._parameters) <= {"weight", "bias"}


def _tokens(tensor: Tensor) -> Tensor:  # (count, ..., d) -> (count, T, d)
    return tensor.flatten(1, -2) if tensor.dim() > 2 else tensor[:, None, :]


def _accumulate(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _summed(grads: Tensor, call: Call, parameter: Parameter) -> Piece:
    # Sum over everything between the candidate and the parameter's own dimensions.
    dtype, shape = _accumulate(parameter), tuple(parameter.shape)
    values = grads.reshape(grads.shape[0], -1, *shape).sum(1, dtype=dtype)
    return Dense(call.start, shape, dtype, values if call.scale == 1.0 else values * call.scale)
