"""`torch.optim.Adam` and `torch.optim.AdamW` as affine updates: M is the diagonal 1/(sqrt(v_hat)+eps)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, OptimizerStateError
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
from ftw.optim_state.moments import add_decay, bias_correction, fed, no_step_yet, steps_taken

_FLOOR = "ftw_floor"  # key that `prepare` adds to its copy of the state


class Adam(Preconditioner):
    """The step of `torch.optim.Adam` (Kingma & Ba, 2015, Algorithm 1; L2 decay inside the gradient).

    With t the number of the coming step and h = G (+ decay*theta for L2) (DESIGN, section 2):

        v_hat = (b2*v + (1-b2)*h_ref^2) / (1-b2^t)      P = lr / (sqrt(v_hat) + eps)
        M     = kappa*P,  kappa = (1-b1)/(1-b1^t)       o = P*b1*m/(1-b1^t) + decay

    where decay is `M*decay*theta` for L2 and `lr*decay*theta` where it is decoupled. M is a function of the
    gradient through v_hat alone, which the reference predicts: exact if the reference is the gradient used.
    Without one, v_hat is that of the last step, while kappa and o are those of the coming one.

    Deviations of torch from the papers, followed here: eps is added outside the square root after v is
    corrected for bias (as Algorithm 1 has it, not as its "eps hat" variant); amsgrad takes the maximum of v
    before bias correction (Reddi et al., 2018, correct nothing); with `capturable` the bias corrections are
    rounded to the step counter's float32; `maximize` negates the gradient before L2 decay is added.

    Args:
        floor: sqrt(v_hat) is taken as at least `floor` times its root mean square over the parameter at the
            last step, so that an entry whose gradient was nearly zero so far gets no huge M. 0, the default,
            is the exact step; so is a parameter's first step, before which nothing is stored. Anything above
            models a step that torch does not take, on purpose.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (torch.optim.Adam,)

    decoupled: ClassVar[bool] = False
    """Whether decay bypasses the moments, where the group itself does not say (torch before 2.7)."""

    def __init__(self, floor: float = 0.0) -> None:
        if not 0.0 <= floor < math.inf:
            raise ConfigurationError(
                f"floor is {floor!r}; allowed are finite numbers from 0 (the exact step) up; "
                "it is relative to the root mean square of sqrt(v_hat), so try 0.01."
            )
        self.floor = float(floor)

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        refuse_differentiable(optimizer)

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int:
        return steps_taken(state)

    def prepare(self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds the least sqrt(v_hat), one number for the whole tensor, if a floor was asked for."""
        if not self.floor or not steps_taken(state):
            return state
        mean = working(self._stored_second_moment(parameter, group, state)).mean()
        correction = bias_correction(group["betas"][1], state, group, ahead=0)
        return {**state, _FLOOR: (mean / correction).sqrt() * self.floor}

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M, o and kappa of the coming step.

        Raises:
            OptimizerStateError: no reference and no step taken yet; an entry of the state is missing; or a
                floor was asked for and `state` did not pass through `prepare`.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        lr, eps = float(group["lr"]), float(group["eps"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        coupled = not group.get("decoupled_weight_decay", self.decoupled)
        gradient = fed(parameter, group, reference, coupled=coupled)
        root = self._root_second_moment(parameter, group, state, gradient, beta2)

        correction1 = bias_correction(beta1, state, group, ahead=1)
        step = root.add_(eps).reciprocal_().mul_(lr)  # P
        gain = (1.0 - beta1) / correction1
        scale = step * gain
        if state:
            offset = step.mul_(working(state["exp_avg"])).mul_(beta1 / correction1)
        else:
            offset = step.zero_()
        add_decay(offset, parameter, group, scale=scale if coupled else None)
        sign = direction(group)
        return TensorUpdate(Diagonal(scale), offset if sign > 0 else offset.neg_(), gain, sign)

    def _root_second_moment(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        gradient: Tensor | None,  # h
        beta2: float,
    ) -> Tensor:
        """sqrt(v_hat), shaped as the parameter: a tensor of its own, which the caller may overwrite."""
        taken = steps_taken(state)
        if state:
            stored = working(self._stored_second_moment(parameter, group, state))
        if gradient is None:
            if not taken:
                raise no_step_yet(parameter)
            second, correction2 = stored, bias_correction(beta2, state, group, ahead=0)
        else:
            second = gradient.square().mul_(1.0 - beta2)
            if state:
                second.add_(working(state["exp_avg_sq"]), alpha=beta2)
                if group.get("amsgrad"):
                    second = torch.maximum(stored, second)
            correction2 = bias_correction(beta2, state, group, ahead=1)
        root = second.sqrt().div_(math.sqrt(correction2))
        if self.floor and taken:
            if _FLOOR not in state:
                raise OptimizerStateError(
                    f"floor={self.floor} needs a number from the whole tensor, which this state lacks (it "
                    f"has {sorted(state)}); pass what prepare(parameter, group, state) returns, or rows of "
                    "it."
                )
            root = torch.maximum(root, state[_FLOOR])
        return root

    @staticmethod
    def _stored_second_moment(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """What stands under the root of the last step, before bias correction."""
        key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        require_state(state, ("step", "exp_avg", "exp_avg_sq", key), parameter)
        stored: Tensor = state[key]
        return stored


class AdamW(Adam):
    """The step of `torch.optim.AdamW`: as `Adam`, decay decoupled (Loshchilov & Hutter, 2019, Algorithm 2).

    torch scales the decay by lr (`theta *= 1 - lr*decay`), the paper by a schedule multiplier of its own.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (torch.optim.AdamW,)
    decoupled: ClassVar[bool] = True
