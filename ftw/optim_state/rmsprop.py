"""`torch.optim.RMSprop` as an affine update, centred or not, with or without momentum."""

from __future__ import annotations

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
    no_offset,
    refuse_differentiable,
    require_dense_real,
    require_state,
    working,
)
from ftw.optim_state.moments import add_decay, fed, second_moment, steps_taken


class RMSprop(Preconditioner):
    """The step of `torch.optim.RMSprop` (Hinton, 2012, lecture 6e; centred: Graves, 2013, equations 38 to 45).

    With momentum u, buffer a, alpha the decay of both averages and h = G + decay*theta:

        v' = alpha*v + (1-alpha)*h_ref^2                e' = alpha*e + (1-alpha)*h_ref, centred; otherwise 0
        M  = P = lr / (sqrt(v' - e'^2) + eps)           o = lr*u*a + M*decay*theta

    and kappa = 1: the gradient enters the buffer whole. Exact if the reference is the gradient used; without one, v
    and e are those of the last step.

    Deviations of torch from the sources, followed here: eps stands outside the square root (Graves' inside); the
    buffer collects h / (sqrt(..) + eps) and lr multiplies it afterwards, so that a change of lr acts on the momentum
    too; nothing is corrected for bias. Where rounding makes `v' - e'^2` negative, torch's step is NaN; here the
    difference is taken as 0.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (torch.optim.RMSprop,)

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
        """M, o and kappa = 1 of the coming step.

        Raises:
            OptimizerStateError: no reference and no step taken yet; or an entry of the state is missing.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        lr, momentum, alpha = (float(group[key]) for key in ("lr", "momentum", "alpha"))
        if state:
            needed = ("momentum_buffer",) * (momentum > 0) + ("grad_avg",) * bool(group["centered"])
            require_state(state, ("step", "square_avg", *needed), parameter)
        gradient = fed(parameter, group, reference, coupled=True)
        second = second_moment(parameter, state, "square_avg", gradient, alpha)
        if group["centered"]:
            mean = _mean(state, gradient, alpha)
            second.addcmul_(mean, mean, value=-1).clamp_min_(0.0)
        scale = second.sqrt_().add_(float(group["eps"])).reciprocal_().mul_(lr)
        if state and momentum > 0:
            offset = working(state["momentum_buffer"]) * (lr * momentum)
        else:
            offset = no_offset(parameter).clone()
        add_decay(offset, parameter, group, scale=scale)
        sign = direction(group)
        return TensorUpdate(Diagonal(scale), offset if sign > 0 else offset.neg_(), gain=1.0, sign=sign)


def _mean(state: Mapping[str, Any], gradient: Tensor | None, alpha: float) -> Tensor:
    """e', shaped as the parameter. `lerp` as in torch: what is subtracted from v' must be rounded alike."""
    if gradient is None:
        return working(state["grad_avg"])
    average = working(state["grad_avg"]) if state else torch.zeros_like(gradient)
    common = torch.promote_types(average.dtype, gradient.dtype)
    return average.to(common).lerp(gradient.to(common), 1.0 - alpha)
