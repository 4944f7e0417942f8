"""`torch.optim.NAdam` as an affine update: Adam with a Nesterov step whose momentum is scheduled."""

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
    TensorUpdate,
    direction,
    refuse_differentiable,
    require_dense_real,
    require_state,
    working,
)
from ftw.optim_state.moments import add_decay, bias_correction, counter, fed, second_moment, steps_taken


class NAdam(Preconditioner):
    """The step of `torch.optim.NAdam` (Dozat, 2016, Algorithm 2 with its momentum schedule).

    With t the number of the coming step, psi the momentum decay and h = G (+ decay*theta for L2):

        mu_t  = b1 (1 - 0.96^(t psi) / 2)               Pi_t = mu_1 ... mu_t
        v_hat = (b2*v + (1-b2)*h_ref^2) / (1-b2^t)      P = lr / (sqrt(v_hat) + eps)
        dtheta = -P ( (1-mu_t)/(1-Pi_t) h + mu_(t+1)/(1-Pi_(t+1)) (b1*m + (1-b1) h) )

    so that `M = kappa*P` with kappa = (1-mu_t)/(1-Pi_t) + (1-b1) mu_(t+1)/(1-Pi_(t+1)), and
    `o = P*b1*m*mu_(t+1)/(1-Pi_(t+1)) + decay`, decay as in `Adam`. As there, M is exact if the reference is the
    gradient used; without one, v_hat is that of the last step.

    Deviations of torch from the paper, followed here: m is averaged with b1 throughout, the paper's with mu_t; eps is
    added outside the square root; Pi is kept in the state as float32.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (torch.optim.NAdam,)

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        refuse_differentiable(optimizer)

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int:
        return steps_taken(state)

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M, o and kappa of the coming step.

        Raises:
            OptimizerStateError: no reference and no step taken yet; or an entry of the state is missing.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        if state:
            require_state(state, ("step", "mu_product", "exp_avg", "exp_avg_sq"), parameter)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        coupled = not group.get("decoupled_weight_decay", False)
        gradient = fed(parameter, group, reference, coupled=coupled)
        second = second_moment(parameter, state, "exp_avg_sq", gradient, beta2)

        correction2 = bias_correction(beta2, state, group, ahead=0 if gradient is None else 1)
        step = second.sqrt_().div_(math.sqrt(correction2)).add_(float(group["eps"]))
        step = step.reciprocal_().mul_(float(group["lr"]))  # P
        direct, averaged = _shares(group, state, beta1)  # of h, and of the average of h and m
        gain = direct + averaged * (1.0 - beta1)
        scale = step * gain
        if state:
            offset = step.mul_(working(state["exp_avg"])).mul_(averaged * beta1)
        else:
            offset = step.zero_()
        add_decay(offset, parameter, group, scale=scale if coupled else None)
        sign = direction(group)
        return TensorUpdate(Diagonal(scale), offset if sign > 0 else offset.neg_(), gain, sign)


def _shares(group: Mapping[str, Any], state: Mapping[str, Any], beta1: float) -> tuple[float, float]:
    """`(1-mu_t)/(1-Pi_t)` and `mu_(t+1)/(1-Pi_(t+1))`, rounded as torch rounds them."""
    t = counter(state, group, ahead=1)
    psi = float(group["momentum_decay"])
    now = beta1 * (1.0 - 0.5 * 0.96 ** (t * psi))
    then = beta1 * (1.0 - 0.5 * 0.96 ** ((t + 1) * psi))
    product = state.get("mu_product", 1.0)
    if not isinstance(product, Tensor):
        # The precision in which torch makes its counters.
        wide = torch.get_default_dtype() == torch.float64
        product = torch.tensor(product, dtype=torch.float64 if wide else torch.float32)
    product = product * now
    if not group.get("capturable"):
        product = float(product)
    return float((1.0 - now) / (1.0 - product)), float(then / (1.0 - product * then))
