"""The weight problem at unit scale. Called by the certificate and by the solvers with inner tolerances.

Gradients of language models make K anything between 1e-20 and 1e10; absolute tolerances are meaningless there
(DESIGN, section 6). All factors are powers of two, so that nothing is rounded and a loss multiplied by 65536
gives the very same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import Solution, Status
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.gram import LowRank, Quadratic, gram_exponent, largest_exponent, quadratic
from ftw.solvers.polyhedron import Polyhedron, Vector


@dataclass(frozen=True)
class Certificate:
    """Relative, scale-free residuals of weights; 0 is exact. `ftw.solvers.certify` defines them."""

    kkt_residual: float
    primal_residual: float
    dual_residual: float
    complementarity: float


@dataclass(frozen=True)
class UnitProblem:
    """`min 1/2 v'Kv - b'v` over `{w / unit: w in the set}`, largest entries of K and b at most 1; w = unit * v.

    Attributes:
        quadratic: K, (n, n), of the scaled problem.
        alignment: b, (n,), of the scaled problem.
        constraints: the set of w, not scaled.
        polyhedron: the scaled set.
        unit: the size that weights are expected to have.
        nearest: (n,), the scaled set's point nearest to 0.
    """

    quadratic: Quadratic
    alignment: Vector
    constraints: ConstraintSet
    polyhedron: Polyhedron
    unit: float
    nearest: Vector

    @classmethod
    def of(cls, gram: Tensor | LowRank, alignment: Tensor, constraints: ConstraintSet) -> UnitProblem:
        """Scales a problem whose set is feasible; K and b float64 on the CPU.

        Raises:
            ConfigurationError: K and b are so far apart in size that squares of the weights leave float64.
        """
        b = alignment.numpy()
        polyhedron = constraints.polyhedron(b.size)
        start = constraints.project_array(np.zeros(b.size))
        slope, curvature, nearest = largest_exponent(b), gram_exponent(gram), largest_exponent(start)
        _require_range(slope, curvature)
        # Weights have the size b/K unless the set says otherwise; a missing scale (zero) is left to the others.
        expected = slope - curvature if slope is not None and curvature is not None else None
        radius = polyhedron.radius
        reach = math.frexp(radius)[1] if 0 < radius < math.inf else None
        if expected is None and slope is not None:
            expected = reach
        if expected is not None and reach is not None:
            expected = min(expected, reach)
        unit = max((e for e in (expected, nearest) if e is not None), default=0)
        unit = min(max(unit, -_LARGEST), _LARGEST)
        terms = [e for e in (slope, None if curvature is None else curvature + unit) if e is not None]
        objective = max(terms, default=0)
        factor = math.ldexp(1.0, unit)
        return cls(
            quadratic=quadratic(gram, unit - objective),
            alignment=np.ldexp(b, -objective),
            constraints=constraints,
            polyhedron=polyhedron.scaled(1 / factor),
            unit=factor,
            nearest=start / factor,
        )

    @cached_property
    def norm(self) -> float:
        """||K||_F, at least the largest eigenvalue."""
        return self.quadratic.norm

    @cached_property
    def slope(self) -> float:
        """||b||."""
        return float(np.linalg.norm(self.alignment))

    @cached_property
    def reference(self) -> float:
        """A size that weights have even where they are 0: ||b||/||K||, or the radius of a smaller set."""
        return min(self.slope / self.norm if self.norm else math.inf, self.polyhedron.radius)

    def gradient(self, weights: Vector) -> Vector:  # (n,) -> (n,)
        return self.quadratic.times(weights) - self.alignment

    def change(self, gradient: Vector, move: Vector) -> float:
        """Of the objective, by a move from where it has the gradient."""
        return float(gradient @ move) + 0.5 * float(move @ self.quadratic.times(move))

    def project(self, point: Vector) -> Vector:  # (n,) -> (n,)
        return self.constraints.project_array(point * self.unit) / self.unit

    def begin(self, start: Tensor | None) -> Vector:  # (n,) -> (n,)
        """Where an iteration begins: the set's point nearest to given weights, not scaled, or else to 0."""
        return self.nearest if start is None else self.project(start.numpy() / self.unit)

    def sizes(self, weights: Vector) -> tuple[float, float]:
        """(omega, gamma): what a weight and a gradient are to be compared with; see `kkt_residual`."""
        size = math.sqrt(float(weights @ weights))
        reference = self.reference
        if math.isinf(reference):  # K = 0 on a cone: only directions have a meaning
            reference = 0.0 if size else 1.0
        return size + reference, self.norm * size + self.slope

    def residual(self, weights: Vector, gradient: Vector | None = None) -> float:
        """See `kkt_residual`."""
        if not np.isfinite(weights).all():
            return math.inf
        omega, gamma = self.sizes(weights)
        gradient = self.gradient(weights) if gradient is None else gradient
        return _ratio(weights - self.project(weights - (omega / gamma if gamma else 0.0) * gradient), omega)

    def certify(self, weights: Vector) -> Certificate:
        """See `certify`, for finite weights."""
        omega, gamma = self.sizes(weights)
        gradient = self.gradient(weights)
        step = omega / gamma if gamma else 0.0
        moved = weights - self.project(weights - step * gradient)
        kkt, primal = _ratio(moved, omega), _ratio(weights - self.project(weights), omega)
        if not step:  # K and b are zero, or the set is the point 0
            return Certificate(kkt, primal, kkt, 0.0)
        normal = moved / step - gradient  # so that gradient + normal = moved / step, of size kkt * gamma
        return Certificate(kkt, primal, kkt, abs(float(normal @ moved)) / (omega * gamma))

    def solution(self, weights: Vector, status: Status, iterations: int = 0) -> Solution:
        """The solution with the finite weights `unit * weights` and their certificate."""
        found = self.certify(weights)
        return Solution(
            torch.from_numpy(weights * self.unit),
            status,
            found.kkt_residual,
            iterations,
            found.primal_residual,
            found.dual_residual,
            found.complementarity,
        )


def _ratio(moved: Vector, omega: float) -> float:
    distance = math.sqrt(float(moved @ moved))
    if omega:
        return distance / omega
    return 0.0 if distance == 0 else math.inf


def _require_range(slope: int | None, curvature: int | None) -> None:
    """Refuses binary exponents of b and K that leave no room for the squares of b / K."""
    if slope is None or curvature is None or abs(slope - curvature) <= _APART:
        return
    raise ConfigurationError(
        f"alignment has the size 2^{slope} and gram 2^{curvature}; weights have the size of their ratio, and float64 "
        f"holds the squares of at most 2^{_APART}; bring both losses to scales of the same order."
    )


_APART = 480

_LARGEST = 900
"""Binary exponent beyond which a unit would bring float64 close to overflow."""
