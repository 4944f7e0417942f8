"""`torch.optim.Muon` as an affine update: M is a polynomial of the momentum's Gram, acting on one side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, UnsupportedOptimizerError
from ftw.optim_state.base import (
    Preconditioner,
    RowColumn,
    TensorUpdate,
    TwoSided,
    require_dense_real,
    require_state,
    working,
)
from ftw.optim_state.moments import no_step_yet

Coefficients = tuple[float, float, float]


class Muon(Preconditioner):
    """The step of `torch.optim.Muon` (Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks").

    With momentum u, buffer B, X = B~ / max(|B~|, eps) and (a, b, c) the coefficients of the Newton-Schulz iteration,

        B~     = kappa G + (1-kappa) B          kappa = 1-u, or 1-u^2 with Nesterov
        X     <- (a I + b X X' + c (X X')^2) X                  k times
        dtheta = -lr' X - lr*decay*theta        lr' = lr adjusted to the shape (R, C)

    An iteration multiplies each singular value s of X by f(s^2), f(x) = a + b x + c x^2, and keeps the singular
    vectors. All k together are `Q(X X') X` with Q(x) = f(x_0) ... f(x_k-1), x_0 = x, x_i+1 = x_i f(x_i)^2. Q is a
    function of the Gram of the first X, hence symmetric, and positive definite where f > 0 on what the x_i reach:
    everywhere for torch's coefficients, a > 0 and b^2 = 22.8 < 4ac = 28.0; others are checked, starting from [0, 1].
    With Q taken at the reference's B~, and Q_f likewise but with squared singular values of f^2/min(R, C) at least,

        M G = kappa*lr' Q_f G / max(|B~_ref|, eps)
        o   = lr' (Q - Q_f) X_ref + M B (1-kappa)/kappa + lr*decay*theta

    where Q acts from the left, or from the right (on X'X) if R > C: `TwoSided`, separable. In exact arithmetic this is
    the step if the reference is the gradient used, whatever f. Without one, it is taken at B~ = B. A reference with
    B~ = 0 gives a finite M, 1/eps large.

    Limits. torch iterates in bfloat16 whatever the parameter's dtype: for random matrices its step differs from this
    map by 1.1 to 2.2% of its norm where both sides have 32 to 256 rows (condition up to 1e4; cosine at least .9997),
    and by 1.6% in the median, 23% at worst, where one has 2 to 16. On gradients of a fine-tuned tiny Llama, whose small
    singular values drown in that rounding, it is 6% of all matrices together; 0.6% where torch is made to iterate in
    float32. Away from the reference the map is a coarse one, because the step turns with G and hardly grows with it:
    with the pool as reference and a random quarter of it as G, displacements are off by .77 of their norm in steps 6 to
    15 and by .54 in 16 to 40 (AdamW: .25 and .092), with f = 0 by 6.2 and 3.4 (`benchmarks/away.py`). It costs
    an eigendecomposition of the smaller side per matrix and step, about twice torch's own step on a CPU.

    Args:
        floor: f, in units of the root mean square singular value of B~_ref. At 0, M is the secant Q itself, whose slope
            is up to a^k = 485 in directions that the reference lacks, where the step does not grow but saturates.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = ("torch.optim.Muon",)
    elementwise: ClassVar[bool] = False

    def __init__(self, floor: float = 1.0) -> None:
        if not 0.0 <= floor < math.inf:
            raise ConfigurationError(
                f"floor is {floor!r}; allowed are finite numbers from 0 (none) up; it is relative to the root mean "
                "square of the singular values, so try 1."
            )
        self.floor = float(floor)

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if not float(group["momentum"]) < 1.0:
                raise UnsupportedOptimizerError(
                    f"Muon has momentum={group['momentum']} in parameter group {index}; below 1 is modelled, for from "
                    "1 on a step does not follow its gradient and nothing can be selected; lower it."
                )
            if not float(group["eps"]) > 0.0:
                raise UnsupportedOptimizerError(
                    f"Muon has eps={group['eps']} in parameter group {index}; above 0 is modelled, for at 0 a "
                    "parameter without gradient becomes NaN; set the default, 1e-7."
                )
            if not _stays_positive(group["ns_coefficients"], group["ns_steps"]):
                raise UnsupportedOptimizerError(
                    f"Muon has ns_coefficients={tuple(group['ns_coefficients'])} in parameter group {index}, with "
                    f"which {group['ns_steps']} steps can flip the sign of a singular value; only coefficients with "
                    "a + b x + c x^2 > 0 on all x that are reached from [0, 1] are modelled, for M must be positive; "
                    "set torch's, (3.4445, -4.775, 2.0315)."
                )

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int | None:
        """0 before the first step; then None, because torch keeps no count."""
        return None if state else 0

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """M, o and kappa of the coming step, of a whole matrix.

        Raises:
            OptimizerStateError: no reference and no step taken yet; or the state has no momentum buffer.
            UnsupportedOptimizerError: a complex parameter or a sparse reference.
        """
        require_dense_real(parameter, reference)
        lr, momentum, decay = (float(group[key]) for key in ("lr", "momentum", "weight_decay"))
        gain = 1.0 - momentum**2 if group["nesterov"] else 1.0 - momentum
        buffer = None
        if state:
            require_state(state, ("momentum_buffer",), parameter)
            buffer = working(state["momentum_buffer"])
        if reference is not None:
            combined = working(reference) * gain if buffer is None else torch.lerp(buffer, working(reference), gain)
        elif buffer is not None:
            combined = buffer
        else:
            raise no_step_yet(parameter)
        step = lr * _adjustment(group["adjust_lr_fn"], parameter.shape)  # lr'
        floored, exact, vectors = self._spectrum(combined, group)
        left = parameter.shape[0] <= parameter.shape[1]
        scale = _on_one_side(floored * (step * gain), vectors, left)
        offset = _on_one_side((exact - floored) * step, vectors, left).apply(combined)
        offset.add_(working(parameter), alpha=lr * decay)
        if buffer is not None:
            offset.add_(scale.apply(buffer), alpha=(1.0 - gain) / gain)
        return TensorUpdate(scale, offset, gain)

    def _spectrum(self, combined: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of Q_f and of Q over max(|B~|, eps), (m,) each, and their vectors, (m, m); m = min(R, C)."""
        norm = torch.linalg.vector_norm(combined)
        finite = bool(torch.isfinite(norm))
        norm = norm.clamp_min(float(group["eps"])) if finite else norm * math.nan
        # Where there are no eigenvectors to be had, NaN is handed on, and the assembly looks for the culprit.
        x = combined / norm if finite else torch.zeros_like(combined)
        squares, vectors = torch.linalg.eigh(x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x)
        least = min(self.floor**2 / max(len(squares), 1), 1.0)
        floored, exact = (
            _newton_schulz(squares.clamp_min(bound), group["ns_coefficients"], group["ns_steps"]) / norm
            for bound in (least, 0.0)
        )
        return floored, exact, vectors


def _on_one_side(values: Tensor, vectors: Tensor, left: bool) -> TwoSided:
    one = values.new_ones(1, 1)
    if left:
        return TwoSided(RowColumn(values[:, None], one), left=vectors)
    return TwoSided(RowColumn(one, values[None, :]), right=vectors)


def _newton_schulz(squares: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """Q at squared singular values."""
    a, b, c = coefficients
    result = torch.ones_like(squares)
    for _ in range(steps):
        factor = a + b * squares + c * squares.square()
        result = result * factor
        squares = squares * factor.square()
    return result


def _adjustment(name: str | None, shape: torch.Size) -> float:
    """lr' / lr, as torch.optim.Muon has it."""
    rows, columns = shape
    if name is None or name == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if name == "match_rms_adamw" else 1.0


def _stays_positive(coefficients: Coefficients, steps: int) -> bool:
    """Whether f > 0 on all squared singular values that the iteration reaches from [0, 1]."""
    a, b, c = (float(value) for value in coefficients)

    def f(x: float) -> float:
        return a + b * x + c * x * x

    def inside(polynomial: list[float]) -> list[float]:
        return [float(x.real) for x in np.roots(polynomial) if abs(x.imag) < 1e-12 and 0.0 < x.real < reach]

    reach = 1.0
    for _ in range(steps):
        if min(f(x) for x in (0.0, reach, *inside([2 * c, b]))) <= 0.0:
            return False
        # Where s f(s^2) is largest: at the end, or where its derivative a + 3b x + 5c x^2 vanishes.
        reach = max(x * f(x) ** 2 for x in (reach, *inside([5 * c, 3 * b, a])))
    return True
