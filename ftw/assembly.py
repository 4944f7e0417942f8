"""Assembly: contributions + optimizer state + target gradient -> the n-dimensional numbers of one step.

One pass over the contributions: each block of rows is written out once, and the reference gradient, the update
scale, alignment and Gram are read from it (DESIGN, section 3.3). Nothing the size of a parameter is kept.
Called by the selector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.curvature.base import Curvature
from ftw.errors import ConfigurationError, NonFiniteError, RecordingError
from ftw.gradients.base import Block, Contributions, Products
from ftw.gradients.pieces import Rows, as_rows
from ftw.measurement import Measurement, Quadratic
from ftw.optim_state.base import Preconditioner, Scalar, ScaleOperator, TensorUpdate, state_of
from ftw.optim_state.operators import Product

GEOMETRIES = ("curvature", "update", "vanilla")
OBJECTIVES = ("match", "utility")
REFERENCES = ("pool", "target", "previous")

UNEXPLAINED = (
    "alignment, Gram or offset is not finite, and no candidate's contribution is to blame; numbers overflow, or the "
    "optimizer's state or a gradient outside the candidates holds NaN; inspect optimizer.state, or lower the loss."
)


def measure(
    contributions: Contributions,
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    geometry: str,
    reference: str = "pool",
    total: Mapping[Parameter, Tensor] | None = None,
    curvature: Curvature | None = None,
    further: Sequence[Mapping[Parameter, Tensor]] = (),
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
        curvature: model of the target's Hessian; None: the optimizer's own, P^-1.
        further: gradients g_j of several targets whose alignments are wanted beside those of g.

    Raises:
        NonFiniteError: numbers that are not finite although no candidate is to blame.
    """
    if geometry not in GEOMETRIES:
        raise ConfigurationError(f"geometry is {geometry!r}; allowed are {', '.join(GEOMETRIES)}.")
    rest = optimizer, preconditioner, target, residual, geometry, reference, total, curvature, further
    result = _pass(contributions, *rest)
    if result.is_finite():
        return result
    # Rare: look for the culprits, and measure the others without them (also out of the reference).
    excluded = contributions.nonfinite_candidates()
    if excluded and len(excluded) < contributions.count:
        result = _pass(contributions.without(excluded), *rest)
        result.excluded = excluded
        if result.is_finite():
            return result
    elif excluded:
        raise NonFiniteError(
            f"all {contributions.count} candidates of the pool have NaN or infinite contributions; there is nothing "
            "to select; lower the learning rate or look at the loss."
        )
    raise NonFiniteError(UNEXPLAINED)


def _pass(
    contributions: Contributions,
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    geometry: str,
    reference: str,
    total: Mapping[Parameter, Tensor] | None,
    curvature: Curvature | None,
    further: Sequence[Mapping[Parameter, Tensor]],
) -> Measurement:
    n = contributions.count
    # One set of sums a device and one transfer at the end: a transfer a block would stall an accelerator's queue.
    sums: dict[torch.device, Measurement] = {}
    parts = optimizer, preconditioner, target, residual, reference, total or {}, curvature, further
    for part in _parts(contributions, *parts):
        into = sums.setdefault(part.g.device, Measurement(n, geometry, part.g.device, len(further)))
        update, offset = part.update, part.offset
        root = update.scale.sqrt()
        pull = root.solve(offset)
        into.offset_drop += _dot(part.g, offset)
        for j, g in enumerate(part.further):
            into.offset_drops[j] += _dot(g, offset)
            _align(into.true, j, part.block, update.scale.apply(g))
            if into.chosen is not into.true:
                _align(into.chosen, j, part.block, chosen_scale(geometry, update.scale, part.group).apply(g))
        if into.chosen is not into.true:
            scale = chosen_scale(geometry, update.scale, part.group).sqrt()
            _add(into.chosen, part.block.products(scale, part.g, pull, last=False), scale, part.g)
        if part.hessian is None:
            products = part.block.products(root, part.g, pull)
            into.offset_curvature += update.gain / 2 * _dot(pull, pull)
            if products is not None:
                into.gained += update.gain * products.gram
                into.coupling += update.gain * products.coupling
        else:
            products = part.block.products(root, part.g, pull, last=False)
            bent = part.hessian.sqrt()
            pull = bent.apply(offset)
            into.offset_curvature += _dot(pull, pull) / 2
            curved = part.block.products(Product(bent, update.scale), part.g, pull)
            if curved is not None:
                into.gained += curved.gram
                into.coupling += curved.coupling
        _add(into.true, products, root, part.g)
    result = Measurement(n, geometry, torch.device("cpu"), len(further))
    for share in sums.values():
        result.add(share)
    return result


@dataclass(frozen=True)
class _Part:
    """What is measured at once: some rows of a parameter, or several small parameters side by side."""

    parameter: Parameter
    block: Block  # of the candidates
    update: TensorUpdate
    offset: Tensor  # (*shape), o with the residual's share
    g: Tensor  # (*shape)
    further: tuple[Tensor, ...]  # of (*shape)
    group: Mapping[str, Any]
    hessian: ScaleOperator | None = None  # None: P^-1


def _parts(
    contributions: Contributions,
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    reference: str,
    total: Mapping[Parameter, Tensor],
    curvature: Curvature | None,
    further: Sequence[Mapping[Parameter, Tensor]],
) -> Iterator[_Part]:
    groups = groups_of(optimizer, contributions.parameters)
    alike: dict[Any, list[_Rows]] = {}
    for p in contributions.parameters:
        theta, state = preconditioner.held(p, groups[p], state_of(optimizer, p))
        others = tuple(g[p] for g in further)
        whole = _Rows(p, theta, target[p], others, residual.get(p), total.get(p), groups[p], state)
        hessian = None if curvature is None else curvature.operator(p)
        # A single number is read as a whole: entries of its state that are like it cannot be told from counters.
        if hessian is not None or not preconditioner.elementwise or not p.dim():
            yield from _apart(contributions, _updated(preconditioner, reference, whole, contributions, hessian))
        elif contributions.is_small(p):
            alike.setdefault(_kind(theta, groups[p], state), []).append(whole)
        else:
            flat = whole.as_rows()
            for block in contributions.blocks(p, structure=preconditioner.structure):
                yield _updated(preconditioner, reference, flat.cut(block.rows), block)
    for members in alike.values():
        every = {rows.parameter: rows for rows in members}
        for bundle in contributions.bundles(list(every)):
            side_by_side = _Rows.side_by_side([every[p] for p in bundle])
            yield _updated(preconditioner, reference, side_by_side, contributions.side_by_side(bundle))


@dataclass(frozen=True)
class _Rows:
    """Everything but the candidates: a parameter, some rows of it, or several small ones side by side."""

    parameter: Parameter
    theta: Tensor  # (*shape), as all tensors here
    g: Tensor
    further: tuple[Tensor, ...]
    extra: Tensor | None  # the residual
    total: Tensor | None  # the sum of the pool's contributions, where it is not that of the block
    group: Mapping[str, Any]
    state: Mapping[str, Any]

    def as_rows(self) -> _Rows:
        return self._each(as_rows)

    def cut(self, rows: Rows) -> _Rows:
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> _Rows:
        return replace(
            self,
            theta=change(self.theta),
            g=change(self.g),
            further=tuple(change(g) for g in self.further),
            extra=None if self.extra is None else change(self.extra),
            total=None if self.total is None else change(self.total),
            state={k: change(v) if _is_like(v, self.theta) else v for k, v in self.state.items()},
        )

    @staticmethod
    def side_by_side(members: list[_Rows]) -> _Rows:
        first = members[0]

        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            if all(tensor is None for tensor in tensors):
                return None
            zeros = (torch.zeros_like(rows.theta) for rows in members)
            pairs = zip(tensors, zeros, strict=True)
            return torch.cat([(zero if tensor is None else tensor).flatten() for tensor, zero in pairs])

        state = {
            key: joined([rows.state[key] for rows in members]) if _is_like(value, first.theta) else value
            for key, value in first.state.items()
        }
        theta, g = joined([rows.theta for rows in members]), joined([rows.g for rows in members])
        assert theta is not None
        assert g is not None
        further = tuple(
            torch.cat([g.flatten() for g in each]) for each in zip(*(r.further for r in members), strict=True)
        )
        extra, total = joined([rows.extra for rows in members]), joined([rows.total for rows in members])
        return _Rows(first.parameter, theta, g, further, extra, total, first.group, state)


def _updated(
    preconditioner: Preconditioner,
    reference: str,
    rows: _Rows,
    source: Block | Contributions,
    hessian: ScaleOperator | None = None,
) -> _Part:
    """The update of these rows. `source`: the block with the candidates; or, for a whole parameter, where to sum."""
    seen = None
    if preconditioner.structure != "scalar":
        seen = _reference(reference, rows, source)
    update = preconditioner.linearise_tensor(rows.theta, rows.group, rows.state, seen)
    offset = update.offset if rows.extra is None else update.offset + update.scale.apply(rows.extra)
    block = source if isinstance(source, Block) else Block(slice(0, 0), None)
    return _Part(rows.parameter, block, update, offset, rows.g, rows.further, rows.group, hessian)


def _reference(reference: str, rows: _Rows, source: Block | Contributions) -> Tensor | None:
    """The gradient that this step's second moment is predicted from; None: the second moment as it stands."""
    if reference == "target":
        return rows.g
    if reference == "previous" and rows.state:
        return None
    # A parameter's first step has no previous one.
    total = rows.total
    if total is None:
        total = source.total() if isinstance(source, Block) else source.total(rows.parameter)
    total = torch.zeros_like(rows.theta) if total is None else total.to(rows.theta.dtype)
    return total if rows.extra is None else total + rows.extra


def _apart(contributions: Contributions, part: _Part) -> Iterator[_Part]:
    """The blocks of a parameter whose update is known as a whole: cut to rows, unless an operator mixes them."""
    scales = [part.update.scale, *([] if part.hessian is None else [part.hessian])]
    structure = "separable" if all(scale.separable for scale in scales) else "any"
    mixed = any(scale.mixes_rows for scale in scales)
    for block in contributions.blocks(part.parameter, split=not mixed, structure=structure):
        if mixed:
            yield replace(part, block=block)
            continue
        rows = block.rows
        scale, offset = part.update.scale.cut(rows), as_rows(part.offset)[rows]
        yield replace(
            part,
            block=block,
            update=replace(part.update, scale=scale, offset=offset),
            offset=offset,
            g=as_rows(part.g)[rows],
            further=tuple(as_rows(g)[rows] for g in part.further),
            hessian=None if part.hessian is None else part.hessian.cut(rows),
        )


def _kind(theta: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    """What small parameters must share for one update to serve them side by side."""
    shared = tuple((key, _mark(value, theta)) for key, value in sorted(state.items(), key=lambda item: str(item[0])))
    return id(group), theta.device, theta.dtype, shared


def _mark(value: Any, theta: Tensor) -> Any:
    """Alike where one entry of the state may stand for the other; entries like the parameter are joined instead."""
    if _is_like(value, theta):
        return ...
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else id(value)


def _is_like(value: Any, theta: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == theta.shape


def groups_of(optimizer: Optimizer, parameters: Sequence[Parameter]) -> dict[Parameter, Mapping[str, Any]]:
    """Parameter -> its group. Where all learning rates are 0 (the first step of a linear warm-up), they read as the
    rates that a scheduler starts from (`initial_lr`), or as 1 where there are none.

    Weights depend on the ratios of the groups' rates alone, so that they are those of the warm-up's next step, and the
    moments of the optimizer are fed as well as in any other step.
    """
    groups: dict[Parameter, Mapping[str, Any]] = {p: group for group in optimizer.param_groups for p in group["params"]}
    if any(p not in groups for p in parameters):
        raise RecordingError(
            "the optimizer's parameter groups lost parameters between record() and apply(); a window must be applied "
            "to the optimizer it was recorded for; discard() it first."
        )
    if is_idle(optimizer):
        started = [float(group.get("initial_lr") or 0.0) for group in optimizer.param_groups]
        scheduled = any(started)
        groups = {
            p: {**group, "lr": rate if scheduled else 1.0}
            for group, rate in zip(optimizer.param_groups, started, strict=True)
            for p in group["params"]
        }
    return groups


def is_idle(optimizer: Optimizer) -> bool:
    """Whether all learning rates are 0, so that the next step moves nothing."""
    return all(group["lr"] is not None and float(group["lr"]) == 0.0 for group in optimizer.param_groups)


def _align(into: Quadratic, j: int, block: Block, direction: Tensor) -> None:
    """Add a block's share to `C'M g_j`."""
    found = block.alignment(direction)
    if found is not None:
        into.alignments[:, j] += found


def _add(into: Quadratic, products: Products | None, root: ScaleOperator, g: Tensor) -> None:
    """Add a block's share to b, K and g'Mg."""
    if products is None:
        along = root.apply(g)
        into.target += _dot(along, along)
        return
    into.gram += products.gram
    into.alignment += products.alignment
    into.target += products.target


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return torch.linalg.vecdot(first.to(second.dtype).flatten(), second.flatten())


def chosen_scale(geometry: str, scale: ScaleOperator, group: Mapping[str, Any]) -> ScaleOperator:
    """The scale that selects: M itself, its square, or the learning rate alone."""
    if geometry == "curvature":
        return scale
    if geometry == "update":
        return scale.power(2.0)
    return Scalar(1.0 if group["lr"] is None else float(group["lr"]))
