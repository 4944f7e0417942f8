"""Rules of mixtures of experts in transformers: experts whose matrices are 3-d parameters, and their routers.

Their tokens come flattened, (rows * T, d), row by row; a routed token carries its candidate. Other layers in the same
block get flattened tokens too (Qwen2-MoE's shared expert): `FlattenedLinearRule`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.gradients.layout import Tokens
from ftw.gradients.pieces import Piece, RowScatter
from ftw.gradients.rules.base import Call, LayerRule, accumulate, outer_product
from ftw.gradients.rules.functional import FunctionalRule
from ftw.gradients.rules.matrix import LinearRule

_BIASES = {"up_proj": "up_proj_bias", "gate_up_proj": "gate_up_proj_bias"}


class ExpertsRule(LayerRule):
    """`y_t = sum_j weight_tj down_e(gate(up_e(x_t)))` with e = index_tj, for each token t and each of its k slots j.

    Classes that transformers' `use_experts_implementation` decorates, with or without a gate, biases, transposed
    matrices; which of its implementations the trainer runs does not matter. `gate_up_proj` is (E, 2 I, H), or (E, H,
    2 I) where transposed. Both matrix products of every expert are done again for the tokens that reached it.
    Experts across devices and norms behind experts are not handled.
    """

    keeps_all = True
    flat = True
    summary = "factors of each expert's matrix products, over the tokens routed to it"

    def handles(self, module: nn.Module) -> bool:
        if not all(isinstance(getattr(module, name, None), bool) for name in _OPTIONS):
            return False
        if module._is_expert_parallel or module.has_post_expert_norm:
            return False
        if not hasattr(module, "_apply_gate" if module.has_gate else "act_fn"):
            return False
        up = "gate_up_proj" if module.has_gate else "up_proj"
        expected = {up, "down_proj"} | ({_BIASES[up], "down_proj_bias"} if module.has_bias else set())
        own = dict(module.named_parameters())
        return set(own) == expected and own[up].dim() == own["down_proj"].dim() == 3

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        module = call.module
        hidden, index, weights = _arguments(call)
        routes = _route(call, index)
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        up, down = _Matrices(module, up_name), _Matrices(module, "down_proj")
        right = hidden[routes.token]  # (S, H): the tokens, expert by expert, and candidate by candidate within each
        grad = (call.grad[routes.token] * weights.flatten()[routes.slot, None]).to(hidden.dtype)
        if not routes.hit:
            return
        before = routes.each(lambda e, rows: up.product(e, right[rows]))
        with call.evaluation(), torch.enable_grad():
            leaf = before.requires_grad_()
            inside = module._apply_gate(leaf) if module.has_gate else module.act_fn(leaf)
            after = routes.each(lambda e, rows: down.pull(e, grad[rows]))
            (left,) = torch.autograd.grad(inside, leaf, after.to(inside.dtype))
        inside = inside.detach()
        factors = {up_name: (left, right, up), "down_proj": (grad, inside, down)}
        for name, (gradient, inputs, matrices) in factors.items():
            if name in wanted:
                for expert, rows in routes.hit:
                    tokens = Tokens(None, routes.bounds[expert])
                    outer = gradient[rows], inputs[rows]
                    yield (
                        name,
                        outer_product(
                            call,
                            wanted[name],
                            *(reversed(outer) if matrices.transposed else outer),
                            transposed=matrices.transposed,
                            tokens=tokens,
                            first_row=expert * matrices.rows,
                        ),
                    )
            bias = f"{name}_bias"
            if bias in wanted:
                yield bias, _bias_rows(call, wanted[bias], gradient, routes)


class RouterRule(FunctionalRule):
    """Routers: `(..., d)` tokens to logits, scores and indices, by `torch.func` on all of what gets gradient.

    Classes named `...TopKRouter` or `...TopkRouter` with a 2-d weight (and a bias) of their own and no children.
    """

    flat = True
    summary = "torch.func on the router, candidate by candidate"

    def __init__(self) -> None:
        super().__init__(flat=True)

    def handles(self, module: nn.Module) -> bool:
        own = module._parameters
        return (
            type(module).__name__.lower().endswith("topkrouter")
            and set(dict(module.named_parameters())) <= {"weight", "bias"}
            and not any(True for _ in module.children())
            and isinstance(own.get("weight"), Parameter)
            and own["weight"].dim() == 2  # type: ignore[union-attr]
        )


class FlattenedLinearRule(LinearRule):
    """Linear layers of a module that also holds experts: their tokens may be flattened, (rows * T, d), row by row.

    That they are row by row, as the experts' own are, is proved by the audit of identity.
    """

    flat = True

    def __init__(self, experts: LayerRule) -> None:
        self._experts = experts
        self._beside: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def bind(self, model: nn.Module) -> Self:
        bound = copy(self)
        bound._beside = weakref.WeakSet()
        for module in model.modules():
            if any(self._experts.handles(child) for child in module.children()):
                bound._beside.update(module.modules())
        return bound

    def handles(self, module: nn.Module) -> bool:
        return module in self._beside and super().handles(module)


_OPTIONS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
_NAMES = ("hidden_states", "top_k_index", "top_k_weights")


def _arguments(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    args, kwargs = call.arguments
    names = list(inspect.signature(inspect.unwrap(type(call.module).forward)).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    hidden, index, weights = (given.get(name, given.get(own)) for name, own in zip(_NAMES, names, strict=False))
    return hidden, index, weights  # type: ignore[return-value]


@dataclass(frozen=True)
class _Routes:
    """The S slots that count, sorted by expert, then by candidate."""

    slot: Tensor  # (S,) place in the flattened (N, k) index
    token: Tensor  # (S,) its token
    expert: Tensor  # (S,)
    owner: Tensor  # (S,)
    hit: list[tuple[int, slice]]  # experts with tokens, and which of the S are theirs
    bounds: dict[int, tuple[int, ...]]  # where each candidate's begin, counted from the expert's first; (count + 1,)

    def each(self, function: Callable[[int, slice], Tensor]) -> Tensor:  # (S, ...)
        """`function(expert, rows)` of every expert that was hit, one below the other."""
        return torch.cat([function(expert, rows) for expert, rows in self.hit])


def _route(call: Call, index: Tensor) -> _Routes:
    """Sort slots by expert and candidate. The counts come to the host: one wait for the device."""
    experts, count = call.module.num_experts, call.layout.count
    tokens = call.layout.tokens(call.inputs.shape[:-1], True)
    lengths = torch.tensor(tokens.bounds).diff()
    position = torch.arange(tokens.bounds[-1]) if tokens.index is None else tokens.index
    owner = torch.full((len(index),), -1)
    owner[position] = torch.arange(count).repeat_interleave(lengths)
    chosen = index.flatten()
    owners = owner.to(index.device).repeat_interleave(index.shape[1])
    # Nobody's tokens and those sent to no expert (numbered E) go last.
    key = torch.where((owners >= 0) & (chosen < experts), chosen * count + owners, experts * count)
    order = torch.argsort(key, stable=True)
    table = torch.bincount(key, minlength=experts * count + 1)[:-1].view(experts, count).tolist()
    hit, bounds, first = [], {}, 0
    for expert, numbers in enumerate(table):
        if not any(numbers):
            continue
        ends = [0]
        for number in numbers:
            ends.append(ends[-1] + number)
        hit.append((expert, slice(first, first + ends[-1])))
        bounds[expert] = tuple(ends)
        first += ends[-1]
    slot = order[:first]
    return _Routes(slot, slot // index.shape[1], chosen[slot], owners[slot], hit, bounds)


class _Matrices:
    """One of the experts' 3-d parameters, with its biases."""

    def __init__(self, module: Any, name: str) -> None:
        self.weight: Tensor = getattr(module, name).detach()
        self.bias: Tensor | None = getattr(module, f"{name}_bias").detach() if module.has_bias else None
        self.transposed: bool = module.is_transposed

    @property
    def rows(self) -> int:
        """Rows of the parameter that belong to each expert."""
        return self.weight.shape[1]

    def product(self, expert: int, x: Tensor) -> Tensor:
        weight = self.weight[expert].to(x.dtype)
        y = x @ (weight if self.transposed else weight.T)
        return y if self.bias is None else y + self.bias[expert].to(x.dtype)

    def pull(self, expert: int, grad: Tensor) -> Tensor:
        """The gradient of the inputs."""
        weight = self.weight[expert].to(grad.dtype)
        return grad @ (weight.T if self.transposed else weight)


def _bias_rows(call: Call, parameter: Parameter, gradient: Tensor, routes: _Routes) -> Piece:
    """Biases (E, d): row e gets the gradient of the slots that went there."""
    order = torch.argsort(routes.owner, stable=True)
    counts = torch.bincount(routes.owner, minlength=call.layout.count).cumsum(0).tolist()
    return RowScatter(
        start=call.layout.start,
        shape=tuple(parameter.shape),
        dtype=accumulate(parameter),
        bounds=(0, *counts),
        grads=gradient[order],
        scale=call.scale,
        row_of=routes.expert[order],
    )
