"""What the elementwise preconditioners share: step counts, bias corrections, and what the moments are fed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftw.errors import OptimizerStateError
from ftw.optim_state.base import direction, working


def steps_taken(state: Mapping[str, Any]) -> int:
    """Steps taken so far, t - 1. A counter that lives on a device is read from there."""
    return int(state["step"]) if "step" in state else 0


def counter(state: Mapping[str, Any], group: Mapping[str, Any], *, ahead: int) -> float | Tensor:
    """Steps taken plus `ahead` as torch counts them: a float32 tensor with `capturable`, a number otherwise.

    The difference shows: with `capturable` torch works in the counter's precision, and at t = 1 with b2 = .999 the
    bias correction is 1e-5 from the true one.
    """
    taken = state.get("step", 0.0)
    if not group.get("capturable"):
        return float(taken) + ahead
    return (taken if isinstance(taken, Tensor) else torch.tensor(taken, dtype=torch.float32)) + ahead


def bias_correction(beta: Any, state: Mapping[str, Any], group: Mapping[str, Any], *, ahead: int) -> float:
    """`1 - beta^t`, t the steps taken plus `ahead`, in the arithmetic that torch uses."""
    return float(1 - float(beta) ** counter(state, group, ahead=ahead))


def fed(parameter: Tensor, group: Mapping[str, Any], reference: Tensor | None, *, coupled: bool) -> Tensor | None:
    """h, what the moments are fed with: the reference, negated where the group maximises, plus L2 decay.

    torch negates before it decays (`grad = -grad`, then `grad.add(param, alpha=weight_decay)`).

    Args:
        coupled: whether decay is L2, inside the gradient.

    Returns:
        Shaped as the parameter, in the working precision, possibly the reference itself; None without a reference.
    """
    if reference is None:
        return None
    gradient = working(reference)
    if direction(group) < 0:
        gradient = -gradient
    decay = float(group["weight_decay"])
    return torch.add(gradient, working(parameter), alpha=decay) if coupled and decay else gradient


def second_moment(
    parameter: Tensor, state: Mapping[str, Any], key: str, gradient: Tensor | None, beta: float
) -> Tensor:  # (*shape), a tensor of its own
    """`beta*v + (1-beta)*h^2`, v the state's entry `key`; v as the last step left it where there is no gradient.

    Raises:
        OptimizerStateError: no gradient, and no step taken yet.
    """
    if gradient is None:
        if not steps_taken(state):
            raise no_step_yet(parameter)
        return working(state[key]).clone()
    second = gradient.square().mul_(1.0 - beta)
    return second.add_(working(state[key]), alpha=beta) if state else second


def add_decay(
    offset: Tensor, parameter: Tensor, group: Mapping[str, Any], *, scale: Tensor | float | None = None
) -> Tensor:
    """The offset with decay added, in place: `M*decay*theta` for L2, where `scale` is M; else `lr*decay*theta`."""
    decay = float(group["weight_decay"])
    if not decay:
        return offset
    theta = working(parameter)
    if scale is None:
        return offset.add_(theta, alpha=float(group["lr"]) * decay)
    if isinstance(scale, Tensor):
        return offset.addcmul_(theta, scale, value=decay)
    return offset.add_(theta, alpha=scale * decay)


def no_step_yet(parameter: Tensor) -> OptimizerStateError:
    """The error of a stale second moment asked for before there is one."""
    return OptimizerStateError(
        f"the optimizer has taken no step yet for a parameter of shape {tuple(parameter.shape)}, so there is no second "
        "moment of a last step; pass a reference gradient, or take the first step in vanilla geometry (preconditioner "
        "'identity')."
    )
