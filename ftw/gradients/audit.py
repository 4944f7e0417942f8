"""Checks that what was recorded belongs to whom it is ascribed. Called by the recorder.

Completeness (`ftw.gradients.completeness`) is blind to rows mixed up; identity proves the rest (DESIGN, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ftw.errors import CandidateLayoutError
from ftw.gradients.layout import Layout, Tokens
from ftw.modes import quiet

if TYPE_CHECKING:
    from ftw.gradients.coverage import TappedLayer


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor whose leading dimension counts a forward's rows.

    Raises:
        CandidateLayoutError: there is no tensor with a leading dimension.
    """
    named = [kwargs[key] for key in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(key), Tensor)]
    for value in [*named, *tree_leaves((args, dict(kwargs)))]:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] > 0:
            return value
    raise CandidateLayoutError(
        "the model was called without a tensor that has rows, so its candidates cannot be counted; "
        "call it with a batch whose first dimension is the candidates'."
    )


def refuse_packed(kwargs: Mapping[str, Any]) -> None:
    """Raise `CandidateLayoutError` where one row holds several samples: packed or padding-free input."""
    lengths = [key for key in kwargs if key.startswith(("cu_seq_lens", "cu_seqlens")) and kwargs[key] is not None]
    if lengths:
        raise CandidateLayoutError(
            f"the forward got {lengths[0]}: padding-free input, where a row is no candidate; say whose each "
            "token is, record(candidates=ftw.packed_candidates(cu_seq_lens=...)), or switch packing and padding-free "
            "collation off."
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
            f"position_ids restart within row {row}: several samples are packed into it; say whose each "
            "token is, record(candidates=ftw.packed_candidates(position_ids)), or switch packing off."
        )


def check_identity(
    model: nn.Module,
    layers: Sequence[TappedLayer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    reached: Mapping[str, int],
    forward: Callable[..., Any] | None = None,
) -> bool:
    """Raise `CandidateLayoutError` unless candidate i's part of every tapped layer's input depends on i alone.

    Forwards without gradients, dropout off, mode and random state restored. Candidates are numbered in
    binary; for each digit, those with a 1 are exchanged for other data, then those with a 0: whatever
    permutation or mixture a layer sees, one of these 2 log2(n) forwards moves a candidate that should have stayed.

    A layer in which nobody moved, in some call that got gradient, is looked at in a batch of one row less: if it gets
    as many rows then, they are not the batch's (positions or latent queries, as many as the batch by chance).

    Args:
        reached: layer -> how many of its calls got gradient.
        forward: runs the model; default: the model itself.

    Returns:
        Whether every candidate of every layer did move when it was exchanged; otherwise (constant or
        duplicate rows) nothing is proved yet.
    """
    batch = _Batch(model if forward is None else forward, layers, args, dict(kwargs), layout)
    depths = {leaf.dim() for leaf in tree_leaves((batch.args, batch.kwargs)) if batch.divides(leaf)}
    with quiet(model):
        base = batch.fingerprints()
        try:
            return _exchange_all(batch, base, reached)
        except CandidateLayoutError:
            if len(depths) < 2 or 1 not in depths:
                raise
            # A vector as long as the batch by chance (positions, say) is no batch: leave vectors alone.
            return _exchange_all(replace(batch, least=2), base, reached)


@dataclass(frozen=True)
class _Batch:
    """A forward's arguments, and what the tapped layers get of each candidate when it runs."""

    forward: Callable[..., Any]
    layers: Sequence[TappedLayer]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Layout
    least: int = 1  # dimensions of an argument that is divided into rows

    def divides(self, leaf: Any) -> bool:
        """Whether an argument has the batch's rows."""
        return isinstance(leaf, Tensor) and leaf.dim() >= self.least and leaf.shape[0] == self.layout.rows

    def changed(self, change: Callable[[Tensor], Tensor], layout: Layout | None = None) -> _Batch:
        """Another batch, by a change of the arguments that have rows."""
        args, kwargs = tree_map(lambda leaf: change(leaf) if self.divides(leaf) else leaf, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, layout=self.layout if layout is None else layout)

    def fingerprints(self) -> list[list[Tensor]]:
        """One number per candidate and call of each layer: a fixed pseudo-random projection of its input."""
        seen: list[list[Tensor]] = [[] for _ in self.layers]

        def watch(calls: list[Tensor], layer: TappedLayer, module: nn.Module, inputs: Any, named: Any) -> None:
            tensor = next((leaf for leaf in tree_leaves((inputs, named)) if isinstance(leaf, Tensor)), None)
            if tensor is None:
                return
            leading = tensor.shape[: tensor.dim() - layer.rule.event(module)]
            # Not of this layout: shared by all candidates; if gradient arrives there, the backward says so.
            if self.layout.fits(leading, layer.rule.flat):
                calls.append(_projection(tensor, prod(leading), self.layout.tokens(leading, layer.rule.flat)))

        handles = [
            layer.module.register_forward_pre_hook(partial(watch, calls, layer), with_kwargs=True)
            for calls, layer in zip(seen, self.layers, strict=True)
        ]
        try:
            self.forward(*self.args, **self.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _exchange_all(batch: _Batch, base: list[list[Tensor]], reached: Mapping[str, int]) -> bool:
    layers, layout = batch.layers, batch.layout
    numbers = torch.arange(layout.count)
    moved = [torch.zeros(len(calls), layout.count, dtype=torch.bool) for calls in base]
    content = first_tensor(batch.args, batch.kwargs)
    for digit in range((layout.count - 1).bit_length()):
        ones = (numbers >> digit) & 1 == 1
        for changed in (ones, ~ones):
            exchange = partial(_exchange, changed=changed, owner=layout.owner, content=content)
            after = batch.changed(exchange).fingerprints()
            for i, (layer, old, new) in enumerate(zip(layers, base, after, strict=True)):
                moved[i] |= _compare(layer, old, new, changed, layout)
    still, proved = [], True
    for i, (layer, calls) in enumerate(zip(layers, base, strict=True)):
        # What looks up the same for all candidates (positions) tells nothing.
        telling = torch.tensor([not _looks_up_alike(layer, call) for call in calls], dtype=torch.bool)
        proved &= not bool(telling.any()) or bool(moved[i].any(0).all())
        at_rest = int((telling & ~moved[i].any(1)).sum())
        if at_rest and reached.get(layer.name, 0) > len(calls) - at_rest:
            still.append(i)
    if still and layout.rows > 1:
        _require_rows(batch, base, still)
    return proved


def _require_rows(batch: _Batch, base: list[list[Tensor]], still: Sequence[int]) -> None:
    """Raise unless these layers, by number, have a row less where the batch has."""
    layers, layout, rows = batch.layers, batch.layout, batch.layout.rows - 1
    fewer = Layout(rows, owner=None if layout.owner is None else layout.owner[:rows], count=layout.count)
    try:
        after = batch.changed(lambda leaf: leaf[:rows], fewer).fingerprints()
    except Exception:  # a model of one size of batch
        return
    for i in still:
        if len(after[i]) < len(base[i]):
            raise CandidateLayoutError(
                f"layer {layers[i].name} ({type(layers[i].module).__name__}) gets {layout.rows} rows, as many as the "
                "batch has, in a smaller batch too: they are not its candidates but shared by them (positions, latent "
                "queries); expand them to one set for each row (positions of shape (1, T) are expanded by ftw), name "
                "the module around them in functional=[...], or freeze that layer."
            )


def _looks_up_alike(layer: TappedLayer, call: Tensor) -> bool:
    return layer.rule.event(layer.module) == 0 and bool((call == call[0]).all())


def _compare(
    layer: TappedLayer, before: list[Tensor], after: list[Tensor], changed: Tensor, layout: Layout
) -> Tensor:  # (calls, n) bool
    """Which candidates moved in which call; raises if one moved that was not exchanged."""
    if len(before) != len(after):
        raise CandidateLayoutError(
            f"layer {layer.name} ({type(layer.module).__name__}) is called {len(before)} times for one batch and "
            f"{len(after)} times for another of the same shape; its calls cannot be ascribed to candidates; freeze it."
        )
    moved = torch.zeros(len(before), len(changed), dtype=torch.bool)
    for each, first, second in zip(moved, before, after, strict=True):
        each |= (first - second).abs() > 1e-4 * first.abs().max().clamp_min(1e-30)
    wrong = moved.any(0) & ~changed
    if bool(wrong.any()):
        raise _mixed(layer, int(wrong.nonzero()[0]), packed=layout.owner is not None and layout.owner.dim() == 2)
    return moved


def _mixed(layer: TappedLayer, candidate: int, *, packed: bool) -> CandidateLayoutError:
    where = f"the input of layer {layer.name} ({type(layer.module).__name__}) changes in"
    if packed:
        return CandidateLayoutError(
            f"{where} candidate {candidate} when only others change; samples that are packed into one row must not see "
            "one another; choose an attention that stops at their borders (in Hugging Face's models 'sdpa', 'eager' or "
            "flash attention, given position_ids, no attention_mask and no cache), or switch packing and padding-free "
            "collation off."
        )
    return CandidateLayoutError(
        f"{where} row {candidate} when only other candidates change; row i must depend on candidate i alone; look for "
        "permuted, time-first or mixed rows before that layer, say in record(candidates=...) whose each row or token "
        "is, or freeze it."
    )


def _exchange(leaf: Tensor, changed: Tensor, owner: Tensor | None, content: Tensor) -> Tensor:
    if owner is not None and owner.dim() == 2:
        # Tokens are exchanged one by one, where they hold the data; positions and masks hold the borders.
        if leaf.shape[:2] != owner.shape or not (leaf is content or leaf.is_floating_point()):
            return leaf
        where = (changed[owner.clamp_min(0)] & (owner >= 0)).flatten().to(leaf.device)
        flat = leaf.flatten(0, 1)
        return torch.where(where.view(-1, *[1] * (flat.dim() - 1)), flat.roll(1, 0), flat).view_as(leaf)
    rows = changed if owner is None else changed[owner.clamp_min(0)] & (owner >= 0)
    other = leaf.roll(1, 0)
    if leaf.dim() > 1:  # a neighbour that is a duplicate changes nothing: take the row itself, reversed
        same = (other == leaf).flatten(1).all(1)
        other = torch.where(same.view(-1, *[1] * (leaf.dim() - 1)), leaf.flip(1), other)
    result = leaf.clone()
    result[rows] = other[rows]
    return result


def _projection(tensor: Tensor, positions: int, tokens: Tokens) -> Tensor:  # (n,) float64
    flat = tensor.detach().reshape(positions, -1).to(torch.float32)
    pattern = torch.cos(torch.arange(flat.shape[1], device=flat.device, dtype=torch.float32) * 1.7 + 0.3)
    each = (flat @ pattern).to("cpu", torch.float64)
    each = each if tokens.index is None else each[tokens.index]
    begins = torch.tensor(tokens.bounds)
    count = len(begins) - 1
    owner = torch.arange(count).repeat_interleave(begins.diff())
    place = torch.arange(len(each)) - begins[owner]
    return torch.zeros(count, dtype=torch.float64).index_add_(0, owner, each * torch.cos(place * 0.7 + 0.1))
