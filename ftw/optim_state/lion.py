"""Lion as an affine update: the sign of its momentum, linearised at a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, OptimizerStateError, UnsupportedOptimizerError
from ftw.optim_state.base import (
    Diagonal,
    Preconditioner,
    TensorUpdate,
    direction,
    require_dense_real,
    require_state,
    working,
)
from ftw.optim_state.moments import add_decay, fed, no_step_yet
from ftw.optim_state.shards import local

_FLOOR = "ftw_floor"  # key that `prepare` adds to its copy of the state
_LEAST = 1e-12  # the floor where there is no momentum yet: M stays finite where the reference is 0


class Lion(Preconditioner):
    """The step of Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2).

    With m the momentum and decay decoupled,

        u = b1*m + (1-b1) G        dtheta = -lr sign(u) - lr*decay*theta

    The sign is linearised at the reference, `sign(u) ~ sign(u_ref) + (u - u_ref) / max(|u_ref|, f)`, which is u/|u_ref|
    wherever |u_ref| is at least f: `M = kappa*P` with `P = lr / max(|u_ref|, f)` and kappa = 1-b1. Adam's map is the
    same with sqrt(v_hat) for |u_ref|. Exact if the reference is the gradient used, whatever f; without one it is
    linearised at G = m.

    Limits. The true slope is 0 on both sides of a jump; the one taken here is that of the secant from 0 to u_ref, so
    that an entry of `M G` says how far G carries u in units of what a sign stands for. It is no forecast of G's own
    sign: where u changes sign between the reference and G(w) the map is wrong by up to 2*lr, and where it does not,
    u/|u_ref| stands for +-1. Measured (`benchmarks/lion.py`: a 0.8M Llama, 4 of 16 candidates kept, the pool as
    reference, steps 16 to 100): 21 % of the entries of u change sign; the displacement of G(w) is foreseen with a
    relative error of .74 and a cosine of .73 with floor 1, 1.06 and .68 with .3, 380 and .01 with none; the step that
    the pool's gradient would make, whatever G(w), has .93 and .57. Up to step 15, while m is small beside G, the
    error is 1.4 to 2.5, the cosine .64 to .71.

    Args:
        floor: f in units of the mean of |m| over the parameter, 0 for none. Without it an entry whose u_ref happens to
            be tiny has an unbounded slope. At a parameter's first step there is no m yet, and f is 1e-12.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (
        "lion_pytorch.lion_pytorch.Lion",
        "lion_pytorch.foreach.Lion",
    )

    def __init__(self, floor: float = 1.0) -> None:
        if not 0.0 <= floor < math.inf:
            raise ConfigurationError(
                f"floor is {floor!r}; allowed are finite numbers from 0 (none) up; it is relative to the mean of the "
                "momentum's size, so try 1."
            )
        self.floor = float(floor)

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        if getattr(optimizer, "decoupled_wd", False):
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__qualname__} has decoupled_weight_decay=True, which divides weight_decay by the "
                "first learning rate out of the groups' sight; only False is modelled; pass weight_decay divided by "
                "lr instead: it is the same step."
            )
        for index, group in enumerate(optimizer.param_groups):
            if not float(group["betas"][0]) < 1.0:
                raise UnsupportedOptimizerError(
                    f"Lion has betas={tuple(group['betas'])} in parameter group {index}; a first beta below 1 is "
                    "modelled, for at 1 a step does not follow its gradient and nothing can be selected; lower it."
                )

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int | None:
        """0 before the first step; then None, because most Lions keep no count."""
        return None if state else 0

    def prepare(self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds f, one number for the whole tensor."""
        if not state:
            return state
        require_state(state, ("exp_avg",), parameter)
        mean = local(working(state["exp_avg"]).abs().mean())  # of the whole, where it is sharded
        return {**state, _FLOOR: (mean * self.floor).clamp_min(_LEAST)}

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M, o and kappa of the coming step.

        Raises:
            OptimizerStateError: no reference and no step taken yet; or `state` did not pass through `prepare`.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        lr, gain = float(group["lr"]), 1.0 - float(group["betas"][0])
        gradient = fed(parameter, group, reference, coupled=False)
        if state:
            if _FLOOR not in state:
                raise OptimizerStateError(
                    f"the floor is a number from the whole tensor, which this state lacks (it has {sorted(state)}); "
                    "pass what prepare(parameter, group, state) returns, or rows of it."
                )
            momentum = working(state["exp_avg"])
            gradient = momentum if gradient is None else gradient
            at = torch.add(momentum * (1.0 - gain), gradient, alpha=gain)  # u_ref
            size = torch.maximum(at.abs(), state[_FLOOR])
        elif gradient is None:
            raise no_step_yet(parameter)
        else:
            at = gradient * gain
            size = at.abs().clamp_min_(_LEAST)
        step = size.reciprocal_().mul_(lr)  # P
        scale = step * gain
        offset = torch.sign(at).mul_(lr).addcmul_(scale, gradient, value=-1)
        add_decay(offset, parameter, group)
        sign = direction(group)
        return TensorUpdate(Diagonal(scale), offset if sign > 0 else offset.neg_(), gain, sign)
