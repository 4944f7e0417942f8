"""Rule of `nn.MultiheadAttention`, which uses its children's weights without calling them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.errors import CandidateLayoutError, RecordingError
from ftw.gradients.pieces import Piece
from ftw.gradients.rules.base import Call, LayerRule, accumulate, broadcast, outer_product

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


class MultiheadAttentionRule(LayerRule):
    """`out_proj(attention(query Wq', key Wk', value Wv'))`, as one unit.

    The attention is computed again for the whole batch; its gradient at the three projections and at the input of the
    last one gives every parameter by products of factors. Handled: separate or joint projections, biases, `bias_k`,
    `bias_v`, `add_zero_attn`, masks of both kinds, both outputs.

    Raises:
        RecordingError: in the backward, with dropout in training mode.
        CandidateLayoutError: in the backward, with `batch_first=False`; where candidates are tokens, with keys of other
            lengths than the queries, or learned ones.
    """

    keeps_all = True
    saves_outputs = True
    summary = "attention computed again, factors of its four projections"

    def handles(self, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.MultiheadAttention)
            and type(module).forward is nn.MultiheadAttention.forward
            and module._qkv_same_embed_dim == ("q_proj_weight" not in self.parameters(module))
            and set(self.parameters(module)) <= _PARAMETERS
        )

    def parameters(self, module: nn.Module) -> dict[str, Parameter]:
        return dict(module.named_parameters(remove_duplicate=False))

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        module = call.module
        _refuse(module)
        given = _arguments(call)
        _refuse_tokens(call, given)
        dtype = accumulate(module.out_proj.weight)
        query, key, value = (given[name].to(dtype) for name in ("query", "key", "value"))
        weights, biases = _projections(module)
        extra = {}  # the learned key and value, one for each row, so that each has its gradient
        # Autograd takes what is computed here, no more: the parameters are detached.
        with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
            lifted = [
                F.linear(x, W.to(dtype), None if b is None else b.to(dtype)).requires_grad_()
                for x, W, b in zip((query, key, value), weights, biases, strict=True)
            ]
            for name in ("bias_k", "bias_v"):
                if getattr(module, name) is not None:
                    extra[name] = getattr(module, name).detach().to(dtype).repeat(len(key), 1, 1).requires_grad_()
            mixed, attention = _attend(module, given, lifted, extra, call.grads)
            last, bias = module.out_proj.weight.detach(), module.out_proj.bias
            output = F.linear(mixed, last.to(dtype), None if bias is None else bias.detach().to(dtype))
        outputs = output, attention
        reached = [(out, grad) for out, grad in zip(outputs, call.grads, strict=False) if grad is not None]
        results = torch.autograd.grad(
            [out for out, _ in reached],
            [*lifted, *extra.values()],
            [grad.to(dtype) for _, grad in reached],
            allow_unused=True,
            materialize_grads=True,
        )
        by_rows = dict(zip(extra, results[3:], strict=True))
        if call.grads[0] is not None:
            first = call.grads[0].to(dtype)
            if "out_proj.weight" in wanted:
                yield "out_proj.weight", outer_product(call, wanted["out_proj.weight"], first, mixed.detach())
            if "out_proj.bias" in wanted:
                yield "out_proj.bias", broadcast(call, wanted["out_proj.bias"], first)
        for name, grad in by_rows.items():
            if name in wanted:
                yield name, broadcast(call, wanted[name], grad[:, None])
        if "in_proj_bias" in wanted:
            # Query and keys may have different numbers of tokens: then each is summed over its own.
            each = list(results[:3])
            if key.shape[1] != query.shape[1]:
                each = [grad.sum(1) for grad in each]
            yield "in_proj_bias", broadcast(call, wanted["in_proj_bias"], torch.cat(each, dim=-1))
        width = module.embed_dim
        for i, (x, grad) in enumerate(zip((query, key, value), results[:3], strict=True)):
            tokens = call.tokens(x)
            left, right = tokens.take(grad), tokens.take(x)
            if "in_proj_weight" in wanted:
                yield (
                    "in_proj_weight",
                    outer_product(call, wanted["in_proj_weight"], left, right, tokens=tokens, first_row=i * width),
                )
            elif _SEPARATE[i] in wanted:
                yield _SEPARATE[i], outer_product(call, wanted[_SEPARATE[i]], left, right, tokens=tokens)


_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_PARAMETERS = {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias", *_SEPARATE}


def _refuse(module: Any) -> None:
    if module.dropout > 0 and module.training:
        raise RecordingError(
            f"nn.MultiheadAttention has dropout={module.dropout} in training mode, and its weights' gradients need the "
            "attention once more, with the same draws; only dropout=0 can be recorded; set module.dropout = 0.0, put "
            "the module into eval mode, or freeze it."
        )
    if not module.batch_first:
        raise CandidateLayoutError(
            "nn.MultiheadAttention has batch_first=False: its first dimension is time, not the candidates'; make it "
            "with batch_first=True and give it (rows, T, d), or freeze it."
        )


def _arguments(call: Call) -> dict[str, Any]:
    args, kwargs = call.arguments
    bound = _SIGNATURE.bind(call.module, *args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if given["query"].dim() != 3:
        raise CandidateLayoutError(
            f"nn.MultiheadAttention got a query of shape {tuple(given['query'].shape)}; (rows, T, d) is needed, as "
            "its rows are the candidates; add the dimension."
        )
    return given


def _refuse_tokens(call: Call, given: Mapping[str, Any]) -> None:
    """A map of tokens says whose each query is; keys must be the same tokens."""
    by_token = call.layout.owner is not None and call.layout.owner.dim() == 2
    uneven = given["query"].shape[1] != given["key"].shape[1]
    if by_token and (uneven or call.module.bias_k is not None):
        raise CandidateLayoutError(
            f"nn.MultiheadAttention {'got other tokens as keys than as queries' if uneven else 'has a learned key'}, "
            f"and candidates are {call.layout.describe()}; whose those keys are is not known; give one candidate a "
            "row, or freeze that attention."
        )


def _projections(module: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases of query, key and value, detached."""
    if module._qkv_same_embed_dim:
        weights = list(module.in_proj_weight.detach().chunk(3))
    else:
        weights = [getattr(module, name).detach() for name in _SEPARATE]
    if module.in_proj_bias is None:
        return weights, [None, None, None]
    return weights, list(module.in_proj_bias.detach().chunk(3))


def _attend(
    module: Any,
    given: Mapping[str, Any],
    lifted: list[Tensor],  # 3 of (rows, T or S, d)
    extra: Mapping[str, Tensor],  # (rows, 1, d)
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """What `out_proj` gets, (rows, T, d), and the attention weights that the module returns."""
    query, key, value = lifted
    if extra:
        key, value = torch.cat([key, extra["bias_k"]], 1), torch.cat([value, extra["bias_v"]], 1)
    if module.add_zero_attn:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    heads = module.num_heads
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = _mask(given, query, key)
    if len(grads) < 2 or grads[1] is None:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(2), mixed
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    attention = (scores if mask is None else scores + mask).softmax(-1)
    mixed = (attention @ value).transpose(1, 2).flatten(2)
    return mixed, attention.mean(1) if given["average_attn_weights"] else attention


def _mask(given: Mapping[str, Any], query: Tensor, key: Tensor) -> Tensor | None:
    """Both masks as one addend, (rows or 1, heads or 1, T or 1, S); learned and zero keys are never masked."""
    rows, heads, length, _ = query.shape
    total: Tensor | None = None
    padding, mask = given["key_padding_mask"], given["attn_mask"]
    if mask is not None:  # (T, S) or (rows * heads, T, S)
        total = _addend(mask, query.dtype)
        total = total[None, None] if mask.dim() == 2 else total.view(rows, heads, length, -1)
    if padding is not None:  # (rows, S)
        other = _addend(padding, query.dtype)[:, None, None]
        total = other if total is None else total + other
    return None if total is None else F.pad(total, (0, key.shape[2] - total.shape[3]))


def _addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask.to(dtype)
