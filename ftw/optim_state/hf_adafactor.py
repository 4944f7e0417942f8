"""`transformers.optimization.Adafactor` as an affine update: as torch's, with a first moment and other switches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ftw.errors import UnsupportedOptimizerError
from ftw.optim_state.adafactor import averaged, multiplied, root_mean_square
from ftw.optim_state.base import (
    Diagonal,
    Preconditioner,
    RowColumn,
    ScaleOperator,
    TensorUpdate,
    no_offset,
    require_dense_real,
    require_state,
    working,
)
from ftw.optim_state.moments import no_step_yet, steps_taken


class HFAdafactor(Preconditioner):
    """The step of `transformers.optimization.Adafactor` (Shazeer & Stern, 2018; fairseq's code).

    With t the number of the coming step, w = t^decay_rate and G a matrix,

        r_i   = (1-w) r_i + w mean_j (G_ref_ij^2 + eps1)        c_j = (1-w) c_j + w mean_i (G_ref_ij^2 + eps1)
        v_ij  = r_i c_j / mean r                                D   = max(1, RMS(G_ref / sqrt(v)) / clip_threshold)
        alpha = max(eps2, RMS(theta)) rho                       rho = min(.01, 1/sqrt(t)), or min(1e-6 t, 1/sqrt(t))
        M     = kappa*alpha / (D sqrt(v)),  kappa = 1-b1        o   = b1*m + alpha*decay*theta

    where max(...) is 1 without `scale_parameter`, rho is lr without `relative_step`, and its second form that of
    `warmup_init`; m is the running mean of past updates, learning rates included, and kappa = 1 where `beta1` is None.
    v is separable always: `RowColumn`, or `Diagonal` for vectors. M is exact if the reference is the gradient used.
    Without one, r and c are those of the last step, D is 1, and alpha is the coming step's. Away from the reference
    D errs as described and measured for torch's `Adafactor`.

    Deviations of the code from the paper, followed here: means instead of sums; m is not corrected for its start at 0,
    so that kappa is 1-b1 from the first step on; decay is decoupled and scaled by alpha, hence by RMS(theta) as well;
    eps1 = 1e-30 vanishes beside any float32 square that is not 0.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = ("transformers.optimization.Adafactor",)
    elementwise: ClassVar[bool] = False

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if group["beta1"] is not None and not float(group["beta1"]) < 1.0:
                raise UnsupportedOptimizerError(
                    f"Adafactor has beta1={group['beta1']} in parameter group {index}; None or below 1 is modelled, "
                    "for at 1 a step does not follow its gradient and nothing can be selected; lower it."
                )
            if group["lr"] is None and not group["relative_step"]:
                raise UnsupportedOptimizerError(
                    f"Adafactor has lr=None and relative_step=False in parameter group {index}, which is no step; "
                    "a number, or relative_step=True, is modelled; set one of them."
                )

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int:
        return steps_taken(state)

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M, o and kappa of the coming step, of a whole parameter.

        Raises:
            OptimizerStateError: no reference and no step taken yet; or an entry of the state is missing.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        taken = steps_taken(state)
        if reference is None and not taken:
            raise no_step_yet(parameter)
        theta, decay = working(parameter), float(group["weight_decay"])
        gradient = None if reference is None else working(reference)
        share = 0.0 if gradient is None else (taken + 1.0) ** float(group["decay_rate"])  # w
        squares = None if gradient is None else gradient.square().add_(float(group["eps"][0]))
        inverse: ScaleOperator  # 1 / sqrt(v)
        if parameter.dim() > 1:
            means = [None if squares is None else squares.mean(dim) for dim in (-1, -2)]
            rows = averaged(parameter, state, "exp_avg_sq_row", means[0], share)
            columns = averaged(parameter, state, "exp_avg_sq_col", means[1], share)
            inverse = RowColumn(
                (rows / rows.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1), columns.rsqrt().unsqueeze(-2)
            )
        else:
            inverse = Diagonal(averaged(parameter, state, "exp_avg_sq", squares, share).rsqrt())

        size = _step_size(theta, group, taken + 1)
        beta1 = 0.0 if group["beta1"] is None else float(group["beta1"])
        offset = no_offset(parameter)
        if beta1 and state:
            require_state(state, ("exp_avg",), parameter)
            offset = working(state["exp_avg"]) * beta1
        if decay:
            offset = offset + theta * (size * decay)
        if gradient is not None:
            size = size / (root_mean_square(inverse.apply(gradient)) / float(group["clip_threshold"])).clamp_min(1.0)
        return TensorUpdate(multiplied(inverse, size * (1.0 - beta1)), offset, 1.0 - beta1)


def _step_size(theta: Tensor, group: Mapping[str, Any], t: int) -> Tensor:  # -> ()
    """alpha of step t."""
    if group["relative_step"]:
        rho = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
    else:
        rho = float(group["lr"])
    if not group["scale_parameter"]:
        return theta.new_tensor(rho)
    return root_mean_square(theta).clamp_min(float(group["eps"][1])) * rho
