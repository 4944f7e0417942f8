"""Plain gradients: M = lr * I whatever the optimizer. The geometry called `vanilla`, and the way on for an
optimizer that no preconditioner models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ftw.errors import UnsupportedOptimizerError
from ftw.optim_state.base import (
    Preconditioner,
    Scalar,
    TensorUpdate,
    direction,
    no_offset,
    require_dense_real,
)


class Identity(Preconditioner):
    """`dtheta = -lr * G`, or `+lr * G` where the group maximises: no momentum, no second moment, no decay (DESIGN,
    section 2, geometry `vanilla`).

    Takes any optimizer whose groups have an `lr`. It is that optimizer's step only for SGD without momentum
    and decay; the others are not modelled but replaced.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = ()
    structure: ClassVar[str] = "scalar"

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if group.get("lr") is None:
                given = "lr=None" if "lr" in group else "no 'lr'"
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__qualname__} has {given} in parameter group {index} (it has "
                    f"{sorted(group)}); plain gradients need one to be in the units of the step; set "
                    "group['lr'], or use preconditioner='auto' with geometry='vanilla' where the optimizer is modelled."
                )

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M = lr * I, o = 0, kappa = 1; state and reference play no part."""
        require_dense_real(parameter, reference)
        return TensorUpdate(
            scale=Scalar(float(group["lr"])), offset=no_offset(parameter), gain=1.0, sign=direction(group)
        )
