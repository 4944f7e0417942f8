"""`torch.optim.SGD` as an affine update: momentum, dampening, Nesterov, weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw.errors import UnsupportedOptimizerError
from ftw.optim_state.base import (
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


class SGD(Preconditioner):
    """The step of `torch.optim.SGD`, which is affine in the gradient with no linearisation at all.

    With momentum u, dampening d, weight decay l and buffer a (the algorithm box of torch.optim.SGD; unlike
    Sutskever et al., 2013, torch keeps lr out of the buffer):

        h = G + l*theta;   a' = u*a + (1-d)*h;   dtheta = -lr*a'   or, Nesterov, -lr*(h + u*a')

    so `M = kappa*lr*I` with kappa = 1-d, or 1 + u*(1-d) for Nesterov. At a parameter's first step torch sets
    a' = h and dampening plays no part: kappa = 1, or 1+u. M needs no history, so `age` is None: no warm-up.
    With `maximize` torch negates G before decay is added.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (torch.optim.SGD,)
    structure: ClassVar[str] = "scalar"

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        refuse_differentiable(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if group["momentum"] and group["dampening"] >= 1:
                raise UnsupportedOptimizerError(
                    f"SGD has dampening={group['dampening']} in parameter group {index}; below 1 is "
                    "modelled, for from 1 on a step does not follow its gradient and nothing can be "
                    "selected; lower it."
                )

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M does not depend on the reference, which is only checked to be dense.

        Raises:
            OptimizerStateError: a buffer of another shape.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        lr, momentum, decay = (float(group[key]) for key in ("lr", "momentum", "weight_decay"))
        buffer = state.get("momentum_buffer") if momentum else None

        carried = 1.0 if buffer is None else 1.0 - float(group["dampening"])  # share of h in a'
        gain = 1.0 + momentum * carried if group["nesterov"] else carried
        offset = no_offset(parameter)
        if buffer is not None:
            require_state(state, ("momentum_buffer",), parameter)
            # a' holds u*a, which Nesterov multiplies by u once more.
            offset = working(buffer) * (lr * momentum * (momentum if group["nesterov"] else 1.0))
        if decay:
            offset = offset + working(parameter) * (lr * gain * decay)
        sign = direction(group)
        return TensorUpdate(Scalar(lr * gain), offset if sign > 0 else -offset, gain, sign)
