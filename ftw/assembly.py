"""Assembly: contributions + optimizer state + target gradient -> the n-dimensional numbers of one step.

One pass over the contributions: each block of rows is written out once, and the reference gradient, the update
scale, alignment and Gram are read from it (DESIGN, section 3.3). Nothing the size of a parameter is kept.
Called by the selector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, NonFiniteError, RecordingError
from ftw.gradients.base import Block, Contributions, Products
from ftw.gradients.pieces import as_rows
from ftw.optim_state.base import Preconditioner, Scalar, ScaleOperator, state_of, state_rows

GEOMETRIES = ("curvature", "update", "vanilla")
OBJECTIVES = ("match", "utility")
REFERENCES = ("pool", "target", "previous")


class Quadratic:
    """`b'w - 1/2 w'Kw` under one scale, float64: sums over parameters, on their device until `to_cpu`.

    Attributes:
        alignment: b = C'M g, (n,).
        gram: K = C'M C, (n, n).
        target: g'M g, ().
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.alignment = torch.zeros(n, dtype=torch.float64, device=device)
        self.gram = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.target = torch.zeros((), dtype=torch.float64, device=device)


class Measurement:
    """What one pass over the contributions yields.

    With M the true update scale, o its offset, kappa the gain and P = M / kappa (DESIGN, section 2):

    Attributes:
        true: b and K under M. b is in nats.
        chosen: b and K under the geometry that selects; the same object as `true` for "curvature".
        gained: `sum_p kappa_p K_p`, (n, n): the curvature of the target under the model H = P^-1.
        coupling: `sum_p kappa_p C_p'o_p`, (n,): how the offset's curvature meets each candidate.
        offset_drop: g'o, (), the first-order drop that the offset brings by itself, in nats.
        offset_curvature: `1/2 o'P^-1 o`, (), in nats.
        excluded: quarantined candidates, ascending.
    """

    def __init__(self, n: int, geometry: str, device: torch.device) -> None:
        self.true = Quadratic(n, device)
        self.chosen = self.true if geometry == "curvature" else Quadratic(n, device)
        self.gained = torch.zeros_like(self.true.gram)
        self.coupling = torch.zeros_like(self.true.alignment)
        self.offset_drop = torch.zeros_like(self.true.target)
        self.offset_curvature = torch.zeros_like(self.true.target)
        self.excluded: tuple[int, ...] = ()

    def first_order(self, weights: Tensor) -> float:
        """`g'(o + M C w)`, in nats."""
        return float(self.offset_drop + self.true.alignment @ weights)

    def curvature(self, weights: Tensor) -> float:
        """`1/2 d'P^-1 d` with `d = o + M C w`, in nats."""
        quadratic = weights @ self.gained @ weights / 2
        return float(quadratic + self.coupling @ weights + self.offset_curvature)

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(torch.isfinite(tensor).all()) for _, _, tensor in self._tensors())

    def add(self, other: Measurement) -> None:
        """Add the sums of another device."""
        for (owner, name, mine), (_, _, theirs) in zip(self._tensors(), other._tensors(), strict=True):
            setattr(owner, name, mine + theirs.to(mine.device))

    def _tensors(self) -> list[tuple[Any, str, Tensor]]:
        names = ("gained", "coupling", "offset_drop", "offset_curvature")
        found: list[tuple[Any, str, Tensor]] = [(self, name, getattr(self, name)) for name in names]
        for quadratic in (self.true,) if self.chosen is self.true else (self.true, self.chosen):
            found += [(quadratic, name, getattr(quadratic, name)) for name in ("alignment", "gram", "target")]
        return found


def measure(
    contributions: Contributions,
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    geometry: str,
    reference: str = "pool",
    total: Mapping[Parameter, Tensor] | None = None,
) -> Measurement:
    """One pass over the contributions; candidates with NaN or infinity are found and quarantined.

    Args:
        contributions: of the window.
        optimizer: read, not written.
        preconditioner: models the optimizer.
        target: g, parameter -> gradient.
        residual: gradient that no candidate owns; joins the reference and, through M, the offset.
        geometry: "curvature", "update" or "vanilla".
        total: sum of the pool's contributions, where those given are not the whole pool.
        reference: what this step's second moment is predicted from: "pool" (the sum of the contributions), "target"
            (g) or "previous" (the second moment as the last step left it; the pool at a parameter's first step).

    Raises:
        NonFiniteError: numbers that are not finite although no candidate is to blame.
    """
    if geometry not in GEOMETRIES:
        raise ConfigurationError(f"geometry is {geometry!r}; allowed are {', '.join(GEOMETRIES)}.")
    result = _pass(contributions, optimizer, preconditioner, target, residual, geometry, reference, total)
    if result.is_finite():
        return result
    # Rare: look for the culprits, and measure the others without them (also out of the reference).
    excluded = contributions.nonfinite_candidates()
    if excluded and len(excluded) < contributions.count:
        rest = contributions.without(excluded)
        result = _pass(rest, optimizer, preconditioner, target, residual, geometry, reference, total)
        result.excluded = excluded
        if result.is_finite():
            return result
    elif excluded:
        raise NonFiniteError(
            f"all {contributions.count} candidates of the pool have NaN or infinite contributions; there is nothing "
            "to select; lower the learning rate or look at the loss."
        )
    raise NonFiniteError(
        "alignment or Gram is not finite although every candidate's contribution is; numbers overflow, or the "
        "optimizer's state or a gradient outside the candidates holds NaN; inspect optimizer.state, or lower the loss."
    )


def _pass(
    contributions: Contributions,
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    geometry: str,
    reference: str,
    total: Mapping[Parameter, Tensor] | None,
) -> Measurement:
    n = contributions.count
    # One set of sums a device and one transfer at the end: a transfer a block would stall an accelerator's queue.
    sums: dict[torch.device, Measurement] = {}
    for part in _parts(contributions, optimizer, preconditioner, target, residual, total or {}):
        into = sums.setdefault(part.theta.device, Measurement(n, geometry, part.theta.device))
        seen = None if preconditioner.structure == "scalar" else _reference(part, reference)
        update = preconditioner.linearise_tensor(part.theta, part.group, part.state, seen)
        offset = update.offset if part.extra is None else update.offset + update.scale.apply(part.extra)
        root = update.scale.power(0.5)
        pull = whitened(root, offset)
        into.offset_drop += _dot(part.g, offset)
        into.offset_curvature += update.gain / 2 * _dot(pull, pull)
        if into.chosen is not into.true:
            scale = chosen_scale(geometry, update.scale, part.group).power(0.5)
            _add(into.chosen, part.block.products(scale, part.g, pull, last=False), scale, part.g)
        products = part.block.products(root, part.g, pull)
        _add(into.true, products, root, part.g)
        if products is not None:
            into.gained += update.gain * products.gram
            into.coupling += update.gain * products.coupling
    result = Measurement(n, geometry, torch.device("cpu"))
    for share in sums.values():
        result.add(share)
    return result


@dataclass(frozen=True)
class _Part:
    """What is measured at once: some rows of a parameter, or several small parameters side by side."""

    block: Block  # of the candidates
    theta: Tensor  # (*shape)
    g: Tensor  # (*shape)
    extra: Tensor | None  # (*shape), the residual
    total: Tensor | None  # (*shape), the sum of the pool's contributions, where it is not the block's
    group: Mapping[str, Any]
    state: Mapping[str, Any]


def _parts(
    contributions: Contributions,
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    total: Mapping[Parameter, Tensor],
) -> Iterator[_Part]:
    groups = groups_of(optimizer, contributions.parameters)
    alike: dict[Any, list[tuple[Parameter, Mapping[str, Any]]]] = {}
    for p in contributions.parameters:
        theta = p.detach()
        state = preconditioner.prepare(theta, groups[p], state_of(optimizer, p))
        if preconditioner.elementwise and contributions.is_small(p):
            alike.setdefault(_kind(theta, groups[p], state), []).append((p, state))
            continue
        if not preconditioner.elementwise:
            (block,) = contributions.blocks(p, split=False)
            assert block.memory is not None
            whole_block = Block(block.rows, block.memory.view(-1, *p.shape))
            yield _Part(whole_block, theta, target[p], residual.get(p), total.get(p), groups[p], state)
            continue
        rows_state = {k: as_rows(v) if _is_like(v, theta) else v for k, v in state.items()}
        whole, g = as_rows(theta), as_rows(target[p])
        extra, summed = (as_rows(each[p]) if p in each else None for each in (residual, total))
        for block in contributions.blocks(p, structure=preconditioner.structure):
            rows = block.rows
            added, known = (None if each is None else each[rows] for each in (extra, summed))
            yield _Part(block, whole[rows], g[rows], added, known, groups[p], state_rows(rows_state, whole, rows))
    for members in alike.values():
        states = dict(members)
        for bundle in contributions.bundles([p for p, _ in members]):
            yield _side_by_side(contributions, bundle, states, target, residual, total, groups[bundle[0]])


def _side_by_side(
    contributions: Contributions,
    bundle: list[Parameter],
    states: Mapping[Parameter, Mapping[str, Any]],
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    total: Mapping[Parameter, Tensor],
    group: Mapping[str, Any],
) -> _Part:
    first = states[bundle[0]]
    state = {
        key: torch.cat([states[p][key].flatten() for p in bundle]) if _is_like(value, bundle[0]) else value
        for key, value in first.items()
    }
    extra = None
    if any(p in residual for p in bundle):
        extra = torch.cat([(residual[p] if p in residual else torch.zeros_like(p)).flatten() for p in bundle])
    return _Part(
        block=contributions.side_by_side(bundle),
        theta=torch.cat([p.detach().flatten() for p in bundle]),
        g=torch.cat([target[p].flatten() for p in bundle]),
        extra=extra,
        total=torch.cat([total[p].flatten() for p in bundle]) if total else None,
        group=group,
        state=state,
    )


def _kind(theta: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    """What small parameters must share for one update to serve them side by side."""
    shared = tuple(
        (key, None if _is_like(value, theta) else value.item() if isinstance(value, Tensor) else value)
        for key, value in sorted(state.items())
    )
    return id(group), theta.device, theta.dtype, shared


def _is_like(value: Any, theta: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == theta.shape


def _reference(part: _Part, reference: str) -> Tensor | None:
    """The gradient that this step's second moment is predicted from; None: the second moment as it stands."""
    if reference == "target":
        return part.g
    if reference == "previous" and part.state:
        return None
    # A parameter's first step has no previous one.
    total = part.block.total() if part.total is None else part.total
    total = torch.zeros_like(part.theta) if total is None else total.to(part.theta.dtype)
    return total if part.extra is None else total + part.extra


def groups_of(optimizer: Optimizer, parameters: Sequence[Parameter]) -> dict[Parameter, Mapping[str, Any]]:
    """Parameter -> its group. Where all learning rates are 0 (the first step of a linear warm-up), they read as 1.

    Everything is linear in the learning rate, so that the weights are those of any small rate, and the moments of
    the optimizer are fed as well as in any other step.
    """
    groups: dict[Parameter, Mapping[str, Any]] = {p: group for group in optimizer.param_groups for p in group["params"]}
    if any(p not in groups for p in parameters):
        raise RecordingError(
            "the optimizer's parameter groups lost parameters between record() and apply(); a window must be applied "
            "to the optimizer it was recorded for; discard() it first."
        )
    if is_idle(optimizer):
        groups = {p: {**group, "lr": 1.0} for p, group in groups.items()}
    return groups


def is_idle(optimizer: Optimizer) -> bool:
    """Whether all learning rates are 0, so that the next step moves nothing."""
    return all(float(group["lr"]) == 0.0 for group in optimizer.param_groups)


def _add(into: Quadratic, products: Products | None, root: ScaleOperator, g: Tensor) -> None:
    """Add a block's share to b, K and g'Mg."""
    if products is None:
        along = root.apply(g)
        into.target += _dot(along, along)
        return
    into.gram += products.gram
    into.alignment += products.alignment
    into.target += products.target


def whitened(root: ScaleOperator, offset: Tensor) -> Tensor:
    """`M^(-1/2) o`; where M is 0 (a learning rate of 0) the offset is 0 as well, and so is the quotient."""
    if isinstance(root, Scalar) and not root.value:
        return torch.zeros_like(offset)
    return torch.where(offset == 0, 0.0, root.power(-1.0).apply(offset))


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return torch.linalg.vecdot(first.to(second.dtype).flatten(), second.flatten())


def chosen_scale(geometry: str, scale: ScaleOperator, group: Mapping[str, Any]) -> ScaleOperator:
    """The scale that selects: M itself, its square, or the learning rate alone."""
    if geometry == "curvature":
        return scale
    return scale.power(2.0) if geometry == "update" else Scalar(float(group["lr"]))
