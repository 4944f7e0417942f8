"""Kronecker-factored curvature (K-FAC, EK-FAC), estimated from the factors that selection records anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.arguments import integer
from ftw.curvature.base import Curvature
from ftw.errors import ConfigurationError
from ftw.optim_state.operators import Diagonal, RowColumn, ScaleOperator, TwoSided

if TYPE_CHECKING:
    from ftw.gradients.base import Contributions

Rotated = tuple[Tensor, Tensor]
"""Eigenvalues, ascending, and eigenvectors in columns."""


@dataclass(frozen=True)
class _Estimate:
    """Of one matrix parameter (R, C). Tensors are replaced, never written to."""

    inputs: Tensor  # (C, C), moving average of A, not yet corrected for its start at 0
    grads: Tensor  # (R, R), of B
    weight: float  # what corrects them: 1 - decay^windows
    basis: tuple[Rotated, Rotated]  # of B and A, as they were when they were last diagonalised
    moments: Tensor | None = None  # (R, C), EK-FAC: moving average of squares in that basis
    moments_weight: float = 0.0


class KFAC(Curvature):
    """`H = B (x) A` for every matrix whose gradients are kept as factors: Martens & Grosse (2015), "Optimizing neural
    networks with Kronecker-factored approximate curvature", for shared weights as Eschenhagen et al. (2023) "expand".

    With inputs a_t and output gradients b_t at the N tokens that carry gradient, b_t of a loss that is their mean,

        A = 1/N sum a_t a_t'      B = N sum b_t b_t'      H X = (B + sqrt(damping) mean(B) I) X (A + ... I)

    averaged over windows. Damping is that of Martens & Grosse, section 6.3 (factored Tikhonov, with pi^2 the ratio of
    the mean eigenvalues), relative to the mean eigenvalue of H.

    Deviations: the Fisher is the empirical one, with the labels as they are, of the pool and not of the target (its
    factors are the ones recorded); it differs from the Hessian wherever the model fits badly (Kunstner et al., 2019).
    Tables, norms, biases and gradients written out have no factors: there H stays the optimizer's own.

    Args:
        damping: relative to the mean eigenvalue of H.
        decay: of the moving averages, per window.
        refresh: windows between two diagonalisations, which cost R^3 + C^3.
        largest: parameters with a longer side are left to the optimizer's own model.
    """

    def __init__(self, damping: float = 0.1, decay: float = 0.95, refresh: int = 10, largest: int = 4096) -> None:
        if not damping > 0:
            raise ConfigurationError(
                f"damping is {damping!r}; it must be positive, for estimates of low rank say nothing about most "
                "directions; the default is 0.1."
            )
        if not 0.0 <= decay < 1.0:
            raise ConfigurationError(f"decay is {decay!r}; it must lie in [0, 1); 0 keeps the last window only.")
        integer("refresh", refresh, 1)
        integer("largest", largest, 1)
        self.damping = damping
        self.decay = decay
        self.refresh = refresh
        self.largest = largest
        self._windows = 0
        self._estimates: dict[str, _Estimate] = {}
        self._names: Mapping[Parameter, str] = {}

    def observe(self, contributions: Contributions, names: Mapping[Parameter, str]) -> None:
        diagonalise = self._windows % self.refresh == 0
        estimates = dict(self._estimates)
        for p in contributions.parameters:
            factors = contributions.factors(p) if p.dim() == 2 and max(p.shape) <= self.largest else None
            if factors is None:
                continue
            inputs, grads = _alive(*factors)
            if len(grads):
                old = estimates.get(names[p])
                estimates[names[p]] = self._averaged(old, inputs, grads, diagonalise or old is None)
        if not estimates:
            raise ConfigurationError(
                f"{type(self).__name__} found no matrix whose gradients are kept as factors; it has nothing to learn "
                "from; use gradients='factorized', or curvature='optimizer'."
            )
        self._windows, self._estimates, self._names = self._windows + 1, estimates, names

    def operator(self, parameter: Parameter) -> ScaleOperator | None:
        estimate = self._estimates.get(self._names.get(parameter, ""))
        if estimate is None:
            return None
        (_, left), (_, right) = estimate.basis
        device = parameter.device
        return TwoSided(self._values(estimate, device), left.to(device), right.to(device))

    def _values(self, estimate: _Estimate, device: torch.device) -> ScaleOperator:
        """H in its eigenbasis."""
        (rows, _), (columns, _) = estimate.basis
        share = self.damping**0.5
        damped = [(values + share * values.mean()).to(device) for values in (rows, columns)]
        return RowColumn(damped[0][:, None], damped[1][None, :])

    def _averaged(self, old: _Estimate | None, inputs: Tensor, grads: Tensor, diagonalise: bool) -> _Estimate:
        count, keep = len(grads), self.decay
        a, b = inputs.T @ inputs / count, grads.T @ grads * count
        if old is None:
            a, b, weight = a * (1 - keep), b * (1 - keep), 1 - keep
        else:
            a, b = (keep * mine + (1 - keep) * new for mine, new in ((old.inputs, a), (old.grads, b)))
            weight = keep * old.weight + (1 - keep)
        if old is not None and not diagonalise:
            return replace(old, inputs=a, grads=b, weight=weight)
        return _Estimate(a, b, weight, (_rotated(b / weight), _rotated(a / weight)))

    def snapshot(self) -> Any:
        return self._windows, self._estimates, self._names

    def restore(self, snapshot: Any) -> None:
        self._windows, self._estimates, self._names = snapshot

    def state_dict(self) -> dict[str, Any]:
        found = {
            name: {
                "inputs": e.inputs,
                "grads": e.grads,
                "weight": e.weight,
                "basis": [list(each) for each in e.basis],
                "moments": e.moments,
                "moments_weight": e.moments_weight,
            }
            for name, e in self._estimates.items()
        }
        return {"windows": self._windows, "estimates": found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        estimates = {}
        for name, kept in state["estimates"].items():
            (b_values, b), (a_values, a) = kept["basis"]
            estimates[name] = _Estimate(**{**kept, "basis": ((b_values, b), (a_values, a))})
        self._windows, self._estimates = int(state["windows"]), estimates


class EKFAC(KFAC):
    """K-FAC's eigenbasis with the right second moments in it: George et al. (2018), "Fast approximate natural gradient
    descent in a Kronecker-factored eigenbasis", equation 9.

        H X = Q_B (S * (Q_B' X Q_A)) Q_A'      S_ij = N sum_t (Q_B' b_t)_i^2 (Q_A' a_t)_j^2  + damping mean(S)

    Squares are those of tokens, as in K-FAC's own expectation, not of whole samples. Arguments and deviations as
    `KFAC`; after each diagonalisation the moving average of S begins anew.
    """

    def _values(self, estimate: _Estimate, device: torch.device) -> ScaleOperator:
        assert estimate.moments is not None
        moments = estimate.moments / estimate.moments_weight
        return Diagonal((moments + self.damping * moments.mean()).to(device))

    def _averaged(self, old: _Estimate | None, inputs: Tensor, grads: Tensor, diagonalise: bool) -> _Estimate:
        new = super()._averaged(old, inputs, grads, diagonalise)
        (_, left), (_, right) = new.basis
        squares = ((grads @ left).square().T @ (inputs @ right).square()) * len(grads)
        keep = self.decay
        if new.moments is None:
            return replace(new, moments=squares * (1 - keep), moments_weight=1 - keep)
        moments = keep * new.moments + (1 - keep) * squares
        return replace(new, moments=moments, moments_weight=keep * new.moments_weight + (1 - keep))


def _alive(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens with a gradient, and with finite numbers only."""
    alive = grads.any(1) & torch.isfinite(inputs).all(1) & torch.isfinite(grads).all(1)
    return inputs[alive], grads[alive]


def _rotated(matrix: Tensor) -> Rotated:
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0.0), vectors
