"""`torch.optim.Adafactor` as an affine update: M is a row times a column factor."""

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
    RowColumn,
    ScaleOperator,
    TensorUpdate,
    direction,
    no_offset,
    require_dense_real,
    require_keys,
    require_shape,
    working,
)
from ftw.optim_state.moments import no_step_yet, steps_taken


class Adafactor(Preconditioner):
    """The step of `torch.optim.Adafactor` (Shazeer & Stern, 2018, Algorithms 4 and 5), without first moment.

    With t the number of the coming step, w = t^beta2_decay (1 - beta2_t in the paper) and h = G, a matrix,

        r_i   = (1-w) r_i + w mean_j h_ref_ij^2         c_j = (1-w) c_j + w mean_i h_ref_ij^2
        v_ij  = max(r_i c_j / max(mean r, eps1), eps1^2)
        alpha = max(eps2, RMS(theta)) min(lr, 1/sqrt(t))
        M     = alpha / (D sqrt(v)),  D = max(1, RMS(h_ref / sqrt(v)) / d)      kappa = 1      o = lr*decay*theta

    For vectors v is the running mean of the squares themselves; of parameters with more dimensions each matrix of the
    last two is factored by itself, while alpha and D are of the whole. M is exact if the reference is the gradient
    used. Without one, r and c are those of the last step, D is 1, and alpha is the coming step's; rows without any
    gradient so far then have M = alpha/eps1, so that stale moments of tables need a few steps before they are of use.

    Structure: `RowColumn`, which passes through outer products; `Diagonal` for vectors, and for a matrix in which the
    lower bound eps1^2 is reached anywhere, because it is not separable. With torch's default eps1, the precision of
    the parameter's dtype, float32 reaches it where h_ref is below about 6e-6 (v ~ h^4/eps1 while h^2 < eps1 = 1.2e-7),
    and in rows that never had a gradient (a table's unused ones).

    Clipping: D depends on the gradient that is really used. It is one number for a parameter, so away from the
    reference a wrong one rescales the step of that parameter and does not turn it. 1/D lies in (0, 1]; for a vector in
    [min(1, d sqrt(w)), 1], since |h| / sqrt(v) is at most 1/sqrt(w); for a matrix there is no lower bound but 0: at
    t = 1, h = diag(1, e) has RMS(h / sqrt(v)) = (1 + e^2) / (2e). Measured with the pool as reference and a random
    quarter of it as G (`benchmarks/away.py`): displacements are off by .43 of their norm in steps 6 to 15 and by .24 in
    16 to 40, without clipping by .33 and .16.

    Deviations of torch from the paper, followed here: means instead of sums of squares; eps1 bounds the mean of r and,
    squared, v, where the paper adds it to h^2; the relative step size min(lr, 1/sqrt(t)) has lr as a bound; decay is
    decoupled and scaled by lr alone; RMS(theta) is taken before decay. With `maximize` G is negated first.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = (torch.optim.Adafactor,)
    elementwise: ClassVar[bool] = False

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            dtypes = {p.dtype for p in group["params"] if p.requires_grad}
            if group["eps"][0] is None and len(dtypes) > 1:
                raise UnsupportedOptimizerError(
                    f"Adafactor has eps[0]=None and parameters of {', '.join(sorted(map(str, dtypes)))} in parameter "
                    f"group {index}, where torch takes the precision of whichever it meets first for all of them; "
                    "one dtype is modelled, or a number; set eps=(1e-7, ...), or make a group for each dtype."
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
        lr, decay, theta = float(group["lr"]), float(group["weight_decay"]), working(parameter)
        eps1, eps2 = group["eps"]
        least = float(torch.finfo(parameter.dtype).eps if eps1 is None else eps1)
        gradient = None if reference is None else working(reference)
        share = 0.0 if gradient is None else (taken + 1.0) ** float(group["beta2_decay"])  # w
        inverse: ScaleOperator  # 1 / sqrt(v)
        if parameter.dim() > 1:
            inverse = _factored(*_averaged_factors(parameter, state, gradient, share), least)
        else:
            squares = None if gradient is None else gradient.square()
            inverse = Diagonal(averaged(parameter, state, "variance", squares, share).clamp_min(least**2).rsqrt())

        size = root_mean_square(theta).clamp_min(float(eps2)) * min(lr, (taken + 1.0) ** -0.5)  # alpha
        if gradient is not None:
            size = size / (root_mean_square(inverse.apply(gradient)) / float(group["d"])).clamp_min(1.0)
        sign = direction(group)
        offset = theta * (sign * lr * decay) if decay else no_offset(parameter)
        return TensorUpdate(multiplied(inverse, size), offset, 1.0, sign)


def averaged(
    parameter: Tensor, state: Mapping[str, Any], key: str, new: Tensor | None, share: float
) -> Tensor:  # shaped as `new` and the entry
    """`(1-share) old + share new`, old the state's entry `key`, 0 where there is no state; old where new is None."""
    if not state:
        assert new is not None
        return new * share
    require_keys(state, ("step", key), parameter)
    if new is not None:
        require_shape(state, key, parameter, new.shape)
    old = working(state[key])
    return old if new is None else torch.lerp(old, new, share)


def root_mean_square(tensor: Tensor) -> Tensor:  # (*shape) -> ()
    """RMS over all entries."""
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm / tensor.numel() ** 0.5


def multiplied(scale: ScaleOperator, factor: Tensor) -> ScaleOperator:
    """`factor M` of a `Diagonal` or a `RowColumn`; factor ()."""
    if isinstance(scale, RowColumn):
        return RowColumn(scale.rows * factor, scale.columns)
    assert isinstance(scale, Diagonal)
    return Diagonal(scale.values * factor)


def _averaged_factors(
    parameter: Tensor, state: Mapping[str, Any], gradient: Tensor | None, share: float
) -> tuple[Tensor, Tensor]:  # (..., R, 1), (..., 1, C)
    """r and c."""
    squares = None if gradient is None else gradient.square()
    means = [None if squares is None else squares.mean(dim, keepdim=True) for dim in (-1, -2)]
    return (
        averaged(parameter, state, "row_var", means[0], share),
        averaged(parameter, state, "col_var", means[1], share),
    )


def _factored(rows: Tensor, columns: Tensor, least: float) -> ScaleOperator:
    """1/sqrt(v), by factors unless its lower bound is reached."""
    mean = rows.mean(-2, keepdim=True).clamp_min(least)
    if rows.numel() and columns.numel():
        smallest = rows.amin(-2, keepdim=True) * columns.amin(-1, keepdim=True) / mean
        if bool((smallest < least**2).any()):
            return Diagonal((rows * columns / mean).clamp_min(least**2).rsqrt())
    return RowColumn((rows / mean).rsqrt(), columns.rsqrt())
