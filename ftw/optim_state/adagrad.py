"""`torch.optim.Adagrad` as an affine update: the second moment is a sum that never forgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw.errors import UnsupportedOptimizerError
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
from ftw.optim_state.moments import add_decay, fed, no_step_yet, steps_taken


class Adagrad(Preconditioner):
    """The step of `torch.optim.Adagrad` (Duchi et al., 2011, the diagonal form of section 1.1).

    With t the number of the coming step, s the sum of squares and h = G + decay*theta:

        M = P = lr / (1 + (t-1)*lr_decay) / (sqrt(s + h_ref^2) + eps)       o = M*decay*theta

    and kappa = 1. Exact if the reference is the gradient used. Without one, s is taken as the last step left it, or
    as `initial_accumulator_value` before the first, if that is not 0.

    torch makes the state together with the optimizer, so that there is one before the first step (but for groups that
    are added later); `lr_decay` is torch's own, the paper's learning rate is constant.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (torch.optim.Adagrad,)

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        refuse_differentiable(optimizer)
        default = optimizer.defaults.get("initial_accumulator_value")
        for index, group in enumerate(optimizer.param_groups):
            own = group["initial_accumulator_value"]
            if own != default and any(not optimizer.state.get(p) for p in group["params"]):
                raise UnsupportedOptimizerError(
                    f"parameter group {index} has initial_accumulator_value={own} and no state yet; torch will start "
                    f"it at the optimizer's own value, {default}, whatever the group says; give the group that value."
                )

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int:
        return steps_taken(state)

    def prepare(self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state; none before the first step, unless something was accumulated in advance."""
        return state if steps_taken(state) or group["initial_accumulator_value"] else {}

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M, o and kappa = 1 of the coming step.

        Raises:
            OptimizerStateError: no reference, no step taken yet and nothing accumulated in advance; or an entry of
                the state is missing.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        taken = steps_taken(state)
        gradient = fed(parameter, group, reference, coupled=True)
        if state:
            require_state(state, ("step", "sum"), parameter)
            total = working(state["sum"])
        else:  # a group that was added later
            total = torch.full_like(working(parameter), float(group["initial_accumulator_value"]))
        if gradient is not None:
            total = total.addcmul(gradient, gradient)
        elif not taken and not bool(total.any()):
            raise no_step_yet(parameter)
        rate = float(group["lr"]) / (1.0 + taken * float(group["lr_decay"]))
        scale = total.sqrt().add_(float(group["eps"])).reciprocal_().mul_(rate)
        offset = add_decay(no_offset(parameter).clone(), parameter, group, scale=scale)
        sign = direction(group)
        return TensorUpdate(Diagonal(scale), offset if sign > 0 else offset.neg_(), gain=1.0, sign=sign)
