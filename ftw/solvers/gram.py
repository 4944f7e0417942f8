"""K as solvers meet it: a matrix, or a factor that is not multiplied out. Called by the weight problem.

`LowRank` is what a caller passes; `Dense` and `Thin` are K at unit scale, with the few operations that solvers need.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import as_columns, as_numbers
from ftw.solvers.faces import Face
from ftw.solvers.linear import solve_on_rows, solve_thin_on_rows
from ftw.solvers.polyhedron import Matrix, Vector


@dataclass(frozen=True, eq=False)
class LowRank:
    """`K = F F' + ridge I`, for many candidates and few directions, r < n. Passed to a solver in the place of K.

    Args:
        factor: F, (n, r); converted to float64 on the CPU.
        ridge: at least 0, in the units of K.

    Raises:
        ConfigurationError: F is no finite matrix, or the ridge is no finite number of at least 0.
    """

    factor: Tensor
    ridge: float = 0.0

    def __post_init__(self) -> None:
        given = as_numbers("factor", self.factor)
        object.__setattr__(self, "factor", as_columns("factor", given, len(given) if given.dim() else 0))
        if float(self.factor.abs().max() if self.factor.numel() else 0.0) > _LARGEST:
            raise ConfigurationError(
                f"factor holds {float(self.factor.abs().max()):.1e}; its squares leave float64; bring the loss to a "
                "scale of the order of 1."
            )
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, (int, float)) or not 0 <= self.ridge < math.inf:
            raise ConfigurationError(
                f"ridge is {self.ridge!r}; a finite number of at least 0 is needed; leave it out for none."
            )

    def dense(self) -> Tensor:  # (n, n)
        """K, written out."""
        gram = self.factor @ self.factor.T
        gram.diagonal().add_(self.ridge)
        return gram


class Quadratic(ABC):
    """`2^exponent K`, n by n; what the caller passed is neither changed nor copied, but in extreme ranges."""

    @abstractmethod
    def times(self, vector: Vector) -> Vector:
        """(n,) -> (n,)."""

    @abstractmethod
    def minimise(
        self, face: Face, right: Vector, scale: float, tolerance: float = 1e-13
    ) -> tuple[Vector, Vector | None]:
        """`min 1/2 y'Ky - r'y` over the moves y of a face, in its coordinates, as `solve_on_rows` has it."""

    norm: float
    """||K||_F, at least the largest eigenvalue."""

    matrix: Matrix
    """(n, n), formed at the first use."""


class Dense(Quadratic):
    """Of a symmetric matrix."""

    def __init__(self, gram: Matrix, exponent: int) -> None:
        largest = largest_exponent(gram) or 0
        if max(abs(exponent), abs(largest)) > _SAFE:
            gram, exponent = np.ldexp(gram, exponent), 0
        self._gram, self._scale = gram, math.ldexp(1.0, exponent)

    def times(self, vector: Vector) -> Vector:
        product: Vector = self._gram @ vector
        product *= self._scale
        return product

    def minimise(
        self, face: Face, right: Vector, scale: float, tolerance: float = 1e-13
    ) -> tuple[Vector, Vector | None]:
        return solve_on_rows(face.reduce_gram(self._gram) * self._scale, right, face.rows, scale, tolerance)

    @cached_property
    def norm(self) -> float:  # type: ignore[override]
        return self._scale * math.sqrt(float(np.vdot(self._gram, self._gram)))

    @cached_property
    def matrix(self) -> Matrix:  # type: ignore[override]
        return self._gram * self._scale


class Thin(Quadratic):
    """Of `F F' + ridge I`."""

    def __init__(self, factor: Matrix, ridge: float, exponent: int) -> None:
        half, odd = divmod(exponent, 2)
        self._factor = np.ldexp(factor, half)
        self._scale = 2.0**odd
        self._ridge = math.ldexp(ridge, exponent)

    def times(self, vector: Vector) -> Vector:
        product: Vector = self._factor @ (vector @ self._factor)
        product *= self._scale
        if self._ridge:
            product += self._ridge * vector
        return product

    def minimise(
        self, face: Face, right: Vector, scale: float, tolerance: float = 1e-13
    ) -> tuple[Vector, Vector | None]:
        factor = face.reduce(self._factor)
        # All divided by the scale, of which only the root could go into F, inexactly.
        ridge, right, scale = self._ridge / self._scale, right / self._scale, scale / self._scale
        q, r = factor.shape
        if q > _THIN * r:
            return solve_thin_on_rows(factor, ridge, right, face.rows, scale, tolerance)
        gram = factor @ factor.T
        gram.flat[:: q + 1] += ridge
        return solve_on_rows(gram, right, face.rows, scale, tolerance)

    @cached_property
    def norm(self) -> float:  # type: ignore[override]
        n, r = self._factor.shape
        inner = self._factor.T @ self._factor if r <= n else self._factor @ self._factor.T
        inner *= self._scale
        square = float(np.vdot(inner, inner)) + self._ridge * (2 * float(np.trace(inner)) + n * self._ridge)
        return math.sqrt(square)

    @cached_property
    def matrix(self) -> Matrix:  # type: ignore[override]
        gram = self._factor @ self._factor.T
        gram *= self._scale
        gram.flat[:: len(gram) + 1] += self._ridge
        return gram


def quadratic(gram: Tensor | LowRank, exponent: int) -> Quadratic:
    """`2^exponent K` of a checked K, float64 on the CPU."""
    if isinstance(gram, LowRank):
        return Thin(gram.factor.numpy(), gram.ridge, exponent)
    return Dense(gram.numpy(), exponent)


def gram_exponent(gram: Tensor | LowRank) -> int | None:
    """`largest_exponent` of K."""
    if isinstance(gram, LowRank):
        exponent = largest_exponent(gram.factor.numpy()) or 0  # taken out: squares would overflow
        # On the diagonal stands the largest entry of a semidefinite matrix.
        largest = largest_exponent(np.square(np.ldexp(gram.factor.numpy(), -exponent)).sum(1))
        ridge = math.frexp(gram.ridge)[1] if gram.ridge else None
        return max(
            (e for e in (None if largest is None else largest + 2 * exponent, ridge) if e is not None), default=None
        )
    return largest_exponent(gram.numpy())


def largest_exponent(values: Vector | Matrix) -> int | None:
    """e with 2^(e-1) <= max|values| < 2^e; None if all are zero."""
    largest = max(float(values.max()), -float(values.min())) if values.size else 0.0
    return math.frexp(largest)[1] if largest else None


_LARGEST = 1e150

_SAFE = 400
"""Binary exponents up to this one leave squares and products of K within float64."""

_THIN = 1.5
"""Ratio of moves to directions from which an orthogonal basis of F costs less than K between the moves."""
