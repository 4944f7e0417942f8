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
from torch import Tensor

from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.polyhedron import Matrix, Polyhedron, Vector


@dataclass(frozen=True)
class UnitProblem:
    """`min 1/2 v'Kv - b'v` over `{w / unit: w in the set}`, largest entries of K and b at most 1; w = unit * v.

    Attributes:
        gram: K, (n, n), of the scaled problem.
        alignment: b, (n,), of the scaled problem.
        constraints: the set of w, not scaled.
        polyhedron: the scaled set.
        unit: the size that weights are expected to have.
    """

    gram: Matrix
    alignment: Vector
    constraints: ConstraintSet
    polyhedron: Polyhedron
    unit: float

    @classmethod
    def of(cls, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> UnitProblem:
        """Scales a problem whose set is feasible; K and b float64 on the CPU."""
        K, b = gram.numpy(), alignment.numpy()
        polyhedron = constraints.polyhedron(b.size)
        nearest = _exponent(constraints.project_array(np.zeros(b.size)))
        slope, curvature = _exponent(b), _exponent(K)
        # Weights have the size b/K unless the set says otherwise; a missing scale (zero) is left to the others.
        expected = slope - curvature if slope is not None and curvature is not None else None
        radius = _exponent(np.array([polyhedron.radius])) if math.isfinite(polyhedron.radius) else None
        if expected is None and slope is not None:
            expected = radius
        if expected is not None and radius is not None:
            expected = min(expected, radius)
        unit = max((e for e in (expected, nearest) if e is not None), default=0)
        unit = min(max(unit, -_LARGEST), _LARGEST)
        terms = [e for e in (slope, None if curvature is None else curvature + unit) if e is not None]
        objective = max(terms, default=0)
        factor = math.ldexp(1.0, unit)
        return cls(
            gram=np.ldexp(K, unit - objective),
            alignment=np.ldexp(b, -objective),
            constraints=constraints,
            polyhedron=polyhedron.scaled(1 / factor),
            unit=factor,
        )

    @cached_property
    def norm(self) -> float:
        """||K||_F, at least the largest eigenvalue."""
        return float(np.linalg.norm(self.gram))

    @cached_property
    def slope(self) -> float:
        """||b||."""
        return float(np.linalg.norm(self.alignment))

    @cached_property
    def reference(self) -> float:
        """A size that weights have even where they are 0: ||b||/||K||, or the radius of a smaller set."""
        return min(self.slope / self.norm if self.norm else math.inf, self.polyhedron.radius)

    def gradient(self, weights: Vector) -> Vector:  # (n,) -> (n,)
        return self.gram @ weights - self.alignment

    def project(self, point: Vector) -> Vector:  # (n,) -> (n,)
        return self.constraints.project_array(point * self.unit) / self.unit

    def sizes(self, weights: Vector) -> tuple[float, float]:
        """(omega, gamma): what a weight and a gradient are to be compared with; see `kkt_residual`."""
        size = math.sqrt(float(weights @ weights))
        reference = self.reference
        if math.isinf(reference):  # K = 0 on a cone: only directions have a meaning
            reference = 0.0 if size else 1.0
        return size + reference, self.norm * size + self.slope

    def residual(self, weights: Vector) -> float:
        """See `kkt_residual`."""
        if not np.isfinite(weights).all():
            return math.inf
        omega, gamma = self.sizes(weights)
        step = omega / gamma if gamma else 0.0
        moved = weights - self.project(weights - step * self.gradient(weights))
        distance = math.sqrt(float(moved @ moved))
        if omega:
            return distance / omega
        return 0.0 if distance == 0 else math.inf


_LARGEST = 900
"""Binary exponent beyond which a unit would bring float64 close to overflow."""


def _exponent(values: Vector | Matrix) -> int | None:
    """e with 2^(e-1) <= max|values| < 2^e; None if all are zero."""
    largest = float(np.abs(values).max()) if values.size else 0.0
    return math.frexp(largest)[1] if largest else None
