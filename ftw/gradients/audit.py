"""Checks that what was recorded is complete and belongs to whom it is ascribed. Called by the recorder.

Completeness, `sum_i c_i == p.grad`, proves that nothing was missed (tied heads, a weight used outside its layer, a
layer called twice) but is blind to rows mixed up; identity proves the rest (DESIGN, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from ftw.errors import CandidateLayoutError, CompletenessError
from ftw.gradients.base import Contributions
from ftw.gradients.pieces import Piece
from ftw.modes import evaluating

if TYPE_CHECKING:
    from ftw.gradients.coverage import TappedLayer


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many rows a forward has: the leading dimension of its first tensor.

    Raises:
        CandidateLayoutError: there is no tensor with a leading dimension.
    """
    named = [kwargs[key] for key in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(key), Tensor)]
    for value in [*named, *tree_leaves((args, dict(kwargs)))]:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise CandidateLayoutError(
        "the model was called without a tensor that has a leading dimension, so its candidates cannot be counted; "
        "call it with a batch whose first dimension is the candidates'."
    )


def refuse_packed(kwargs: Mapping[str, Any]) -> None:
    """Raise `CandidateLayoutError` where one row holds several samples: packed or padding-free input."""
    lengths = [key for key in kwargs if key.startswith(("cu_seq_lens", "cu_seqlens")) and kwargs[key] is not None]
    if lengths:
        raise CandidateLayoutError(
            f"the forward got {lengths[0]}: padding-free input, where a row is no candidate; one candidate a row is "
            "needed; switch packing and padding-free collation off."
        )
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    elif bool((restarts.any(1) & (positions[:, 0] == positions[:, 1])).any()):
        return  # without a mask, equal leading positions are left padding, not a second sample
    if bool(restarts.any()):
        row = int(restarts.any(1).nonzero()[0])
        raise CandidateLayoutError(
            f"position_ids restart within row {row}: several samples are packed into it; one candidate a row is "
            "needed; switch packing off."
        )


def leftover(
    pieces: Mapping[Parameter, Sequence[Piece]],
    formed: Mapping[Parameter, Tensor],
    count: int,
    precision: float,
) -> dict[Parameter, Tensor]:
    """Gradient that autograd formed and no candidate owns, where it exceeds rounding.

    Args:
        pieces: recorded in the block.
        formed: p.grad made in the block, by autograd, without lean mode.
        count: candidates of the window.
        precision: the coarsest machine epsilon among the gradients that were recorded.

    A parameter whose gradient is not finite is passed over; the recorder repeats the audit in the next block.
    """
    present = {p: list(kept) for p, kept in pieces.items() if kept}
    sums = Contributions(present, count).combine()
    # Sums over rows and tokens in another order than autograd's: a few hundred roundings; half precision rounds the
    # gradient itself, hence the ceiling.
    finite = [float(g.abs().max()) for g in formed.values() if g.numel() and bool(torch.isfinite(g).all())]
    largest = max(finite, default=0.0)
    left = {}
    for p in formed.keys() | sums.keys():
        grad = formed.get(p)
        found = sums.get(p)
        grad = torch.zeros_like(p) if grad is None else grad
        found = torch.zeros_like(p) if found is None else found
        if not bool(torch.isfinite(grad).all() & torch.isfinite(found).all()):
            continue
        eps = max(precision, torch.finfo(p.dtype).eps)
        rest = grad - found
        allowed = min(1e3 * eps, 0.05) * max(float(grad.abs().max()), float(found.abs().max())) + 10 * eps * largest
        if float(rest.abs().max()) > allowed:
            left[p] = rest
    return left


def completeness_error(
    left: Mapping[str, Tensor], formed: Mapping[Parameter, Tensor], names: Mapping[Parameter, str]
) -> CompletenessError:
    """The error for gradient without an owner, naming the parameters and how much of their gradient it is."""
    total = {names[p]: grad for p, grad in formed.items()}
    shares = []
    for name, rest in left.items():
        whole = float(total[name].norm()) if name in total else 0.0
        shares.append(f"{name} ({float(rest.norm()):.3g} of {whole:.3g})")
    return CompletenessError(
        f"contributions do not add up to the gradient of {len(shares)} parameters: {', '.join(shares[:5])}"
        f"{' ...' if len(shares) > 5 else ''}; all gradient must flow through recorded calls of their layers; either a "
        "weight is used outside its layer's forward (a functional or fused call), or the loss has a term that no "
        "candidate owns (a regulariser): pass residual='keep' to add such a gradient unweighted, or freeze the "
        "parameter."
    )


def check_identity(
    model: nn.Module,
    layers: Sequence[TappedLayer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rows: int,
) -> None:
    """Raise `CandidateLayoutError` unless row i of every tapped layer's input depends on candidate i alone.

    Forwards without gradients, dropout off, mode and random state restored. Candidates are numbered in
    binary; for each digit, those with a 1 are exchanged for another row, then those with a 0: whatever
    permutation or mixture a layer sees, one of these 2 log2(rows) forwards moves a row that should have stayed.
    """
    if rows < 2:
        return
    with _quiet(model):
        base = _fingerprints(model, layers, args, kwargs, rows)
        numbers = torch.arange(rows)
        for digit in range((rows - 1).bit_length()):
            ones = (numbers >> digit) & 1 == 1
            for changed in (ones, ~ones):
                exchange = partial(_exchange, changed=changed, rows=rows)
                other_args, other_kwargs = tree_map(exchange, (args, dict(kwargs)))
                moved = _fingerprints(model, layers, other_args, other_kwargs, rows)
                for layer, before, after in zip(layers, base, moved, strict=True):
                    _compare(layer, before, after, changed)


def _compare(layer: TappedLayer, before: list[Tensor], after: list[Tensor], changed: Tensor) -> None:
    if len(before) != len(after):
        raise CandidateLayoutError(
            f"layer {layer.name} ({type(layer.module).__name__}) is called {len(before)} times for one batch and "
            f"{len(after)} times for another of the same shape; its calls cannot be ascribed to candidates; freeze it."
        )
    for first, second in zip(before, after, strict=True):
        tolerance = 1e-4 * first.abs().max().clamp_min(1e-30)
        wrong = ((first - second).abs() > tolerance) & ~changed
        if bool(wrong.any()):
            raise CandidateLayoutError(
                f"the input of layer {layer.name} ({type(layer.module).__name__}) changes in row "
                f"{int(wrong.nonzero()[0])} when only other candidates change; row i must depend on candidate i alone; "
                "look for permuted, time-first or mixed rows (batch statistics, packing) before that layer, or "
                "freeze it."
            )


def _exchange(leaf: Any, changed: Tensor, rows: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
        return leaf
    other = leaf.roll(1, 0)
    same = (other == leaf).flatten(1).all(1) if leaf.dim() > 1 else other == leaf
    if leaf.dim() > 1:  # a neighbour that is a duplicate changes nothing: take the row itself, reversed
        other = torch.where(same.view(-1, *[1] * (leaf.dim() - 1)), leaf.flip(1), other)
    result = leaf.clone()
    result[changed] = other[changed]
    return result


def _fingerprints(
    model: nn.Module,
    layers: Sequence[TappedLayer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rows: int,
) -> list[list[Tensor]]:
    """One number per row and call of each layer: a fixed pseudo-random projection of its input."""
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def watch(name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensor = inputs[0] if inputs else next(iter(named.values()))
        flat = tensor.detach().reshape(rows, -1).to(torch.float32)
        pattern = torch.cos(torch.arange(flat.shape[1], device=flat.device, dtype=torch.float32) * 1.7 + 0.3)
        seen[name].append((flat @ pattern).to("cpu", torch.float64))

    handles = [
        layer.module.register_forward_pre_hook(
            lambda module, inputs, named, name=layer.name: watch(name, module, inputs, named),
            with_kwargs=True,
        )
        for layer in layers
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[layer.name] for layer in layers]


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
        yield
