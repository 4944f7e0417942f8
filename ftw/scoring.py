"""Scoring without a Gram: update scales of whole parameters, directions M g, alignments.

Where no n x n product is wanted: tokens as candidates, and windows beyond a memory cap, whose M is fixed before the
backward. Called by the selector; the usual way is `assembly`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.assembly import chosen_scale, groups_of
from ftw.gradients.base import Contributions
from ftw.optim_state.base import Preconditioner, TensorUpdate, state_of


@dataclass(frozen=True)
class Scores:
    """First-order numbers of a window.

    Attributes:
        alignment: (n,) float64 under the geometry that selects.
        true: (n,) float64 under M, in nats; the same where the geometry is "curvature".
        offset_drop: g'o, in nats.
        total: the sum of the contributions, where M was read from it.
    """

    alignment: Tensor
    true: Tensor
    offset_drop: float
    total: Mapping[Parameter, Tensor] | None = None


def updates(
    parameters: Iterable[Parameter],
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    reference: str,
    total: Mapping[Parameter, Tensor] | None = None,
    residual: Mapping[Parameter, Tensor] | None = None,
) -> Iterator[tuple[Parameter, Mapping[str, Any], TensorUpdate]]:
    """The coming step, parameter by parameter with its group, residual included in the offset.

    Args:
        reference: "pool" needs `total`; "previous" takes `total`, or else g, at a parameter's first step.
        total: the sum of the contributions.
    """
    parameters = list(parameters)
    groups = groups_of(optimizer, parameters)
    for p in parameters:
        theta, state = preconditioner.held(p, groups[p], state_of(optimizer, p))
        seen: Tensor | None = target[p]
        extra = None if residual is None else residual.get(p)
        if preconditioner.structure == "scalar" or (reference == "previous" and state):
            seen = None
        elif reference != "target" and total is not None:
            seen = total[p] if extra is None else total[p] + extra
        update = preconditioner.linearise_tensor(theta, groups[p], state, seen)
        if extra is not None:
            update = replace(update, offset=update.offset + update.scale.apply(extra))
        yield p, groups[p], update


def directions(
    parameters: Iterable[Parameter],
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    geometry: str,
    reference: str,
) -> dict[Parameter, Tensor]:
    """What a contribution is multiplied with to give its alignment: M g (M^2 g, or lr g, by the geometry).

    Known before the backward, because the reference is not the pool.
    """
    return {
        p: chosen_scale(geometry, update.scale, group).apply(target[p])
        for p, group, update in updates(parameters, optimizer, preconditioner, target, reference)
    }


def score(
    contributions: Contributions,
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    geometry: str,
    reference: str,
) -> Scores:
    """Alignments of all candidates, with nothing the size of n parameters or n x n."""
    parameters = contributions.parameters
    total = contributions.combine() if reference != "target" and preconditioner.structure != "scalar" else None
    along: dict[Parameter, Tensor] = {}
    true: dict[Parameter, Tensor] = {}
    offset_drop = 0.0
    for p, group, update in updates(parameters, optimizer, preconditioner, target, reference, total, residual):
        true[p] = update.scale.apply(target[p])
        along[p] = true[p] if geometry == "curvature" else chosen_scale(geometry, update.scale, group).apply(target[p])
        offset_drop += float((target[p] * update.offset).sum(dtype=torch.float64))
    alignment = contributions.alignment(along)
    exact = alignment if geometry == "curvature" else contributions.alignment(true)
    return Scores(alignment, exact, offset_drop, total)


def curvature(
    gradient: Mapping[Parameter, Tensor],
    optimizer: Optimizer,
    preconditioner: Preconditioner,
    target: Mapping[Parameter, Tensor],
    residual: Mapping[Parameter, Tensor],
    reference: str,
    total: Mapping[Parameter, Tensor] | None = None,
) -> tuple[float, float, float]:
    """`1/2 d'P^-1 d` of the step `d = o + M G`, in nats, in three parts: constant, linear and quadratic in G (DESIGN,
    section 2)."""
    constant = linear = quadratic = 0.0
    for p, _, update in updates(gradient, optimizer, preconditioner, target, reference, total, residual):
        root = update.scale.sqrt()
        pull, push = root.solve(update.offset), root.apply(gradient[p].to(update.offset.dtype))
        constant += update.gain / 2 * float(pull.square().sum(dtype=torch.float64))
        linear += update.gain * float((pull * push).sum(dtype=torch.float64))
        quadratic += update.gain / 2 * float(push.square().sum(dtype=torch.float64))
    return constant, linear, quadratic
