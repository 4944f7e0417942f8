"""Sets of allowed weights. Made by the selector or the user, read by every weight solver.

A set is told to a solver in two ways: by its exact Euclidean projection and as a polyhedron (bounds, equalities
and, for the cone, a cap that moves with the total). Further linear constraints, such as quotas, are put on top of any
of these sets in `linear_sets`. The arithmetic is numpy's: at these sizes it has a third of torch's overhead.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import as_numbers
from ftw.solvers.polyhedron import Polyhedron, Vector
from ftw.solvers.projections import project_capped_cone, project_capped_simplex

PerCandidate = float | Sequence[float] | Tensor | Vector
"""One number for all candidates, or one for each, (n,)."""

ROUNDING = 1e-12
"""Relative slack within which two sides of a constraint count as equal, so that `cap = total / n` is feasible."""


class ConstraintSet(ABC):
    """A convex polyhedron of weights, for any number n of candidates.

    Law: `project(x)` lies in the set, and `(x - project(x))'(y - project(x)) <= 0` for every y in the set; the
    projection and the polyhedron describe one set, at every scale of x.
    """

    @abstractmethod
    def feasible(self, n: int) -> bool:
        """Whether the set has a point for n candidates."""

    @abstractmethod
    def project_array(self, point: Vector) -> Vector:  # (n,) -> (n,)
        """The point of a feasible set nearest to `point`; exact up to rounding, `point` is left as it was."""

    @abstractmethod
    def polyhedron(self, n: int) -> Polyhedron:
        """The same set as bounds and rows."""

    def restricted(self, index: Tensor) -> ConstraintSet:  # (m,)
        """The set for the candidates `index` alone, in their order; a total is then theirs.

        For sets that say something of single candidates; the others hold for any of them.
        """
        return self

    def project(self, point: Tensor) -> Tensor:  # (n,) -> (n,) float64
        """As `project_array`, for a tensor.

        Raises:
            ConfigurationError: the set is empty, or one of its vectors does not have n entries.
        """
        array = as_numbers("the point", point).numpy()
        if not self.feasible(array.size):
            raise ConfigurationError(
                f"{self!r} has no point for {array.size} candidates; only a non-empty set has a projection; "
                "raise the cap or lower the total."
            )
        return torch.from_numpy(self.project_array(array))

    def contains(self, weights: Tensor, tolerance: float = 1e-9) -> bool:
        """Whether the weights, (n,), break no constraint by more than `tolerance`, relative."""
        array = as_numbers("weights", weights).numpy()
        finite = bool(np.isfinite(array).all())
        return finite and self.feasible(array.size) and self.polyhedron(array.size).violation(array) <= tolerance


def require_set(given: Any) -> None:
    """Refuses what is no set of weights."""
    if not isinstance(given, ConstraintSet):
        raise ConfigurationError(
            f"{given!r} is no set of weights; allowed are instances such as Free(), NonNegative(), Box(0.0, 1.0), "
            "Simplex(n) or CappedCone(4.0) of ftw.solvers; make one."
        )


@dataclass(frozen=True, eq=False)
class Free(ConstraintSet):
    """All weights."""

    def feasible(self, n: int) -> bool:
        return True

    def project_array(self, point: Vector) -> Vector:
        return point.copy()

    def polyhedron(self, n: int) -> Polyhedron:
        return _bounds(np.full(n, -math.inf), np.full(n, math.inf))


@dataclass(frozen=True, eq=False)
class NonNegative(ConstraintSet):
    """`w >= 0`."""

    def feasible(self, n: int) -> bool:
        return True

    def project_array(self, point: Vector) -> Vector:
        return np.maximum(point, 0.0)

    def polyhedron(self, n: int) -> Polyhedron:
        return _bounds(np.zeros(n), np.full(n, math.inf))


@dataclass(frozen=True, eq=False)
class Box(ConstraintSet):
    """`lower <= w <= upper`; either side may be infinite, or one number per candidate."""

    lower: PerCandidate = 0.0
    upper: PerCandidate = 1.0

    def __post_init__(self) -> None:
        lower, upper = _numbers("lower", self.lower), _numbers("upper", self.upper)
        if (lower.ndim and upper.ndim and lower.size != upper.size) or bool(
            np.any(lower > upper) or np.any(lower == math.inf) or np.any(upper == -math.inf)
        ):
            raise ConfigurationError(
                f"Box has lower={self.lower} and upper={self.upper}; allowed is lower <= upper for each candidate; "
                "exchange or widen the bounds."
            )
        _freeze(self, lower=lower, upper=upper)

    def feasible(self, n: int) -> bool:
        self.polyhedron(n)
        return True

    def project_array(self, point: Vector) -> Vector:
        return np.minimum(np.maximum(point, self.lower), self.upper)

    def polyhedron(self, n: int) -> Polyhedron:
        return _bounds(_spread("lower", self.lower, n), _spread("upper", self.upper, n))

    def restricted(self, index: Tensor) -> Box:
        return Box(_pick(self.lower, index), _pick(self.upper, index))


@dataclass(frozen=True, eq=False)
class Simplex(ConstraintSet):
    """`w >= 0`, `mass'w = total`; plain `sum(w) = total` without a mass."""

    total: float
    mass: Sequence[float] | Tensor | Vector | None = None

    def __post_init__(self) -> None:
        _freeze(self, total=_total(self.total), mass=_mass(self.mass))

    def feasible(self, n: int) -> bool:
        _spread("mass", self.mass, n)
        return n > 0 or self.total == 0

    def project_array(self, point: Vector) -> Vector:
        n = point.size
        return project_capped_simplex(point, self.total, np.full(n, math.inf), _spread("mass", self.mass, n))

    def polyhedron(self, n: int) -> Polyhedron:
        return _sum(np.full(n, math.inf), self.mass, self.total)

    def restricted(self, index: Tensor) -> Simplex:
        return Simplex(self.total, _pick(self.mass, index))


@dataclass(frozen=True, eq=False)
class CappedSimplex(ConstraintSet):
    """`0 <= w <= cap`, `mass'w = total`; plain `sum(w) = total` without a mass."""

    total: float
    cap: PerCandidate
    mass: Sequence[float] | Tensor | Vector | None = None

    def __post_init__(self) -> None:
        cap = _numbers("cap", self.cap)
        if bool(np.any(cap < 0)):
            raise ConfigurationError(f"cap is {self.cap}; a number of at least 0 is needed; pass a larger one.")
        _freeze(self, total=_total(self.total), cap=cap, mass=_mass(self.mass))

    def feasible(self, n: int) -> bool:
        cap, mass = _spread("cap", self.cap, n), _spread("mass", self.mass, n)
        return bool((cap * mass).sum() >= self.total * (1 - ROUNDING))

    def project_array(self, point: Vector) -> Vector:
        cap, mass = _spread("cap", self.cap, point.size), _spread("mass", self.mass, point.size)
        return project_capped_simplex(point, self.total, cap, mass)

    def polyhedron(self, n: int) -> Polyhedron:
        return _sum(_spread("cap", self.cap, n), self.mass, self.total)

    def restricted(self, index: Tensor) -> CappedSimplex:
        return CappedSimplex(self.total, _pick(self.cap, index), _pick(self.mass, index))


@dataclass(frozen=True, eq=False)
class CappedCone(ConstraintSet):
    """`0 <= w_i <= cap * mean(w)`: relative weights are bounded, their scale is free.

    A cap of n or more binds nobody, a cap of 1 leaves equal weights only. The default is generous, because a
    tight cap costs more than it protects (DESIGN, section 6).
    """

    cap: float = 8.0

    def __post_init__(self) -> None:
        if not _is_number(self.cap) or not self.cap >= 1:
            raise ConfigurationError(
                f"cap is {self.cap!r}; a number of at least 1 is needed, since no weight can be forced below the "
                "mean; pass e.g. 4.0 for at most four times the mean weight."
            )

    def feasible(self, n: int) -> bool:
        return True

    def project_array(self, point: Vector) -> Vector:
        return project_capped_cone(point, self._fewest(point.size))

    def polyhedron(self, n: int) -> Polyhedron:
        fewest = self._fewest(n)
        orthant = _bounds(np.zeros(n), np.full(n, math.inf))
        return replace(orthant, share=1 / fewest if fewest > 1 else math.inf)

    def _fewest(self, n: int) -> float:
        """n / cap, the least number of candidates that can share the total, integral where that is meant.

        Without the snap, a cap of n/3 lands beside 1/3 by rounding, and three equal weights are no member.
        """
        fewest = n / self.cap
        nearest = round(fewest)
        return float(nearest) if abs(fewest - nearest) <= ROUNDING * fewest else fewest


def _bounds(lower: Vector, upper: Vector) -> Polyhedron:
    return Polyhedron(lower, upper, np.zeros((0, lower.size)), np.zeros(0))


def _sum(cap: Vector, mass: Any, total: float) -> Polyhedron:
    row = _spread("mass", mass, cap.size)
    return Polyhedron(np.zeros(cap.size), cap, row[None, :], np.array([total]))


def _spread(name: str, value: Any, n: int) -> Vector:  # -> (n,)
    """One number per candidate: the value itself, or the value n times over; ones for None."""
    if value is None:
        return np.ones(n)
    if value.ndim and value.size != n:
        raise ConfigurationError(
            f"{name} has {value.size} entries for {n} candidates; one each, or one number for all, is needed; "
            "index it like the candidates."
        )
    return value if value.ndim else np.full(n, float(value))


def _pick(value: Any, index: Tensor) -> Any:
    """The entries of the candidates; one number for all, or None, is left as it is."""
    return value[index.numpy()] if value is not None and value.ndim else value


def _numbers(name: str, value: Any) -> Vector:  # -> () or (n,)
    array = as_numbers(name, value).numpy().copy()
    if array.ndim > 1 or bool(np.isnan(array).any()):
        raise ConfigurationError(
            f"{name} has shape {array.shape} and {int(np.isnan(array).sum())} NaN; a number or one number per "
            "candidate is needed; pass a float or a vector (n,)."
        )
    return array


def _mass(value: Any) -> Vector | None:
    if value is None:
        return None
    mass = _numbers("mass", value)
    if mass.ndim != 1 or not bool(np.isfinite(mass).all() and (mass > 0).all()):
        raise ConfigurationError(
            f"mass is {value}; one positive number per candidate is needed; drop candidates without loss instead."
        )
    return mass


def _total(value: float) -> float:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ConfigurationError(
            f"total is {value!r}; a finite number of at least 0 is needed; pass n for a mean weight of 1."
        )
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)


def _freeze(constraints: ConstraintSet, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(constraints, name, value)
