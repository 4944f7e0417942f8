"""`torch.optim.RAdam` as an affine update: plain momentum at first, then Adam with a rectified step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw.optim_state.base import (
    Diagonal,
    Preconditioner,
    Scalar,
    TensorUpdate,
    direction,
    no_offset,
    refuse_differentiable,
    require_dense_real,
    require_state,
    working,
)
from ftw.optim_state.moments import add_decay, bias_correction, counter, fed, second_moment, steps_taken


class RAdam(Preconditioner):
    """The step of `torch.optim.RAdam` (Liu et al., 2020, Algorithm 2).

    With t the number of the coming step and h = G (+ decay*theta for L2):

        rho_inf = 2/(1-b2) - 1                          rho_t = rho_inf - 2 t b2^t / (1-b2^t)
        r_t = sqrt( (rho_t-4)(rho_t-2) rho_inf / ((rho_inf-4)(rho_inf-2) rho_t) )
        P = lr r_t sqrt(1-b2^t) / (sqrt(b2*v + (1-b2)*h_ref^2) + eps)    if rho_t > 5, else  P = lr
        M = kappa*P,  kappa = (1-b1)/(1-b1^t)           o = P*b1*m/(1-b1^t) + decay, decay as in `Adam`

    While rho_t <= 5 (the first five steps for b2 = .999, for ever if b2 <= 2/3) M is a multiple of the identity,
    exact for every gradient, and `age` is None: there is no history that would have to be waited for. After that it
    is exact if the reference is the gradient used; without a reference, v is that of the last step.

    Deviations of torch from the paper, followed here: it rectifies from rho_t > 5 on, the paper from 4; eps, which
    the paper has not, is added to sqrt(v) before bias correction, unlike in `torch.optim.Adam`.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (torch.optim.RAdam,)

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        refuse_differentiable(optimizer)

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int | None:
        """Steps taken so far; None while the coming step does not adapt, so that M needs no history."""
        return None if _rectification(group, state) is None else steps_taken(state)

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M, o and kappa of the coming step.

        Raises:
            OptimizerStateError: an entry of the state is missing.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        if state:
            require_state(state, ("step", "exp_avg", "exp_avg_sq"), parameter)
        lr, beta1 = float(group["lr"]), float(group["betas"][0])
        coupled = not group.get("decoupled_weight_decay", False)
        correction1 = bias_correction(beta1, state, group, ahead=1)
        gain = (1.0 - beta1) / correction1
        rectified = _rectification(group, state)
        step: Tensor | float  # P
        if rectified is None:
            step = lr
        else:
            step = _adapted(parameter, group, state, fed(parameter, group, reference, coupled=coupled))
            step.mul_(lr * rectified)
        scale = step * gain
        if state:
            offset = working(state["exp_avg"]) * step * (beta1 / correction1)
        else:
            offset = no_offset(parameter).clone()
        add_decay(offset, parameter, group, scale=scale if coupled else None)
        sign = direction(group)
        operator = Diagonal(scale) if isinstance(scale, Tensor) else Scalar(scale)
        return TensorUpdate(operator, offset if sign > 0 else offset.neg_(), gain, sign)


def _adapted(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor | None) -> Tensor:
    """`sqrt(1-b2^t) / (sqrt(v) + eps)`, shaped as the parameter."""
    beta2 = float(group["betas"][1])
    second = second_moment(parameter, state, "exp_avg_sq", gradient, beta2)
    correction2 = bias_correction(beta2, state, group, ahead=0 if gradient is None else 1)
    return second.sqrt_().add_(float(group["eps"])).reciprocal_().mul_(math.sqrt(correction2))


def _rectification(group: Mapping[str, Any], state: Mapping[str, Any]) -> float | None:
    """r_t of the coming step; None where it does not adapt."""
    beta2 = float(group["betas"][1])
    t = counter(state, group, ahead=1)
    power = beta2**t
    longest = 2 / (1 - beta2) - 1  # rho_inf
    length = longest - 2 * t * power / (1 - power)  # rho_t
    if not length > 5.0:
        return None
    squared = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return float(squared**0.5)
