"""Assembly: contributions + optimizer state + target gradient -> the n-dimensional numbers of one step.

One pass over the contributions: each block of rows is written out once, and the reference gradient, the update
scale, alignment and Gram are read from it (DESIGN, section 3.3). Nothing the size of a parameter is kept.
Called by the selector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, NonFiniteError, RecordingError
from ftw.gradients.base import Contributions
from ftw.optim_state.base import Preconditioner, Scalar, ScaleOperator, state_of, state_rows

GEOMETRIES = ("curvature", "update", "vanilla")
OBJECTIVES = ("match", "utility")


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
) -> Measurement:
    """One pass over the contributions; candidates with NaN or infinity are found and quarantined.

    Args:
        contributions: of the window.
        optimizer: read, not written.
        preconditioner: models the optimizer.
        target: g, parameter -> gradient.
        residual: gradient that no candidate owns; joins the reference and, through M, the offset.
        geometry: "curvature", "update" or "vanilla".

    Raises:
        NonFiniteError: numbers that are not finite although no candidate is to blame.
    """
    if geometry not in GEOMETRIES:
        raise ConfigurationError(f"geometry is {geometry!r}; allowed are {', '.join(GEOMETRIES)}.")
    result = _pass(contributions, optimizer, preconditioner, target, residual, geometry)
    if result.is_finite():
        return result
    # Rare: look for the culprits, and measure the others without them (also out of the reference).
    excluded = contributions.nonfinite_candidates()
    if excluded and len(excluded) < contributions.count:
        result = _pass(contributions.without(excluded), optimizer, preconditioner, target, residual, geometry)
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
) -> Measurement:
    n = contributions.count
    groups = groups_of(optimizer, contributions)
    # One set of sums a device and one transfer at the end: a transfer a block would stall an accelerator's queue.
    sums: dict[torch.device, Measurement] = {}
    for p in contributions.parameters:
        whole = p.detach()
        state = preconditioner.prepare(whole, groups[p], state_of(optimizer, p))
        into = sums.setdefault(p.device, Measurement(n, geometry, p.device))
        for block in contributions.blocks(p, split=preconditioner.elementwise):
            values, rows = block.values, block.rows
            reference = torch.zeros_like(whole[rows]) if values is None else values.sum(0).to(p.dtype)
            extra = residual[p][rows] if p in residual else None
            if extra is not None:
                reference = reference + extra
            update = preconditioner.linearise_tensor(whole[rows], groups[p], state_rows(state, whole, rows), reference)
            offset = update.offset if extra is None else update.offset + update.scale.apply(extra)
            g = target[p][rows]
            root = update.scale.power(0.5)
            pull = _divide(root, offset)
            into.offset_drop += (g * offset).sum()
            into.offset_curvature += update.gain / 2 * pull.square().sum()
            if block.memory is None:
                continue
            if into.chosen is not into.true:
                scale = _geometry(geometry, update.scale, groups[p])
                _add_block(into.chosen, block.memory.clone(), scale.power(0.5), g, pull)
            gram, coupling = _add_block(into.true, block.memory, root, g, pull)
            into.gained += update.gain * gram
            into.coupling += update.gain * coupling
    result = Measurement(n, geometry, torch.device("cpu"))
    for part in sums.values():
        result.add(part)
    return result


def groups_of(optimizer: Optimizer, contributions: Contributions) -> dict[Parameter, Mapping[str, Any]]:
    """Parameter -> its group. Where all learning rates are 0 (the first step of a linear warm-up), they read as 1.

    Everything is linear in the learning rate, so that the weights are those of any small rate, and the moments of
    the optimizer are fed as well as in any other step.
    """
    groups: dict[Parameter, Mapping[str, Any]] = {p: group for group in optimizer.param_groups for p in group["params"]}
    if any(p not in groups for p in contributions.parameters):
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


def _add_block(into: Quadratic, memory: Tensor, root: ScaleOperator, g: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Add a block's share to b, K and g'Mg; returns its `C'MC` (n, n) and `C' M^(1/2) pull` (n,).

    Everything is read from one product of `X = M^(1/2) [C g pull]`, written over the block.
    """
    n = into.alignment.numel()
    memory[n] = g
    root.apply_(memory[: n + 1])
    memory[n + 1] = pull
    flat = memory.flatten(1)
    products = (flat[: n + 1] @ flat.T).double()
    into.gram += products[:n, :n]
    into.alignment += products[:n, n]
    into.target += products[n, n]
    return products[:n, :n], products[:n, n + 1]


def _divide(root: ScaleOperator, offset: Tensor) -> Tensor:
    """`M^(-1/2) o`; where M is 0 (a learning rate of 0) the offset is 0 as well, and so is the quotient."""
    if isinstance(root, Scalar) and not root.value:
        return torch.zeros_like(offset)
    return torch.where(offset == 0, 0.0, root.power(-1.0).apply(offset))


def _geometry(geometry: str, scale: ScaleOperator, group: Mapping[str, Any]) -> ScaleOperator:
    return scale.power(2.0) if geometry == "update" else Scalar(float(group["lr"]))
