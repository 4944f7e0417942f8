"""Sets cut by linear constraints: general ones, quotas for groups of candidates, no harm to any of several targets."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import as_columns, as_numbers
from ftw.solvers.constraints import ROUNDING, ConstraintSet, require_set
from ftw.solvers.half_spaces import Cuts, project_between
from ftw.solvers.polyhedron import Matrix, Polyhedron, Vector

Bound = float | Sequence[float] | Tensor | Vector
"""One number for all rows, or one for each, (q,)."""


class Linear(ConstraintSet):
    """The weights of another set with `least <= rows @ w <= most`.

    Args:
        base: the set that is cut; another `Linear` is merged with this one.
        rows: (q, n), finite; so the set is for n candidates only.
        least, most: equal ones are an equality, infinite ones an open side.

    Projection: exact, by the dual (`half_spaces`, `pivots`). Whether the set is empty is decided by a linear program
    where no easy point settles it; a set that misses a point by less than 1e-9 of its rows' terms counts as one that
    has it.

    Raises:
        ConfigurationError: shapes that do not fit, numbers that are not finite, or least > most.
    """

    base: ConstraintSet
    rows: Matrix
    least: Vector
    most: Vector

    def __init__(self, base: ConstraintSet, rows: Any, least: Bound = -math.inf, most: Bound = math.inf) -> None:
        matrix = _matrix(rows)
        require_set(base)
        low, high = (_bound(name, value, len(matrix)) for name, value in (("least", least), ("most", most)))
        if np.any(low > high) or np.any(low == math.inf) or np.any(high == -math.inf):
            raise ConfigurationError(
                f"Linear has least={least} and most={most}; allowed is least <= most for each row; exchange or widen "
                "them."
            )
        if isinstance(base, Linear):
            if base.rows.shape[1] != matrix.shape[1]:
                raise ConfigurationError(
                    f"rows are for {matrix.shape[1]} candidates and the base's for {base.rows.shape[1]}; both need "
                    "one column per candidate; index them alike."
                )
            matrix = np.concatenate((base.rows, matrix))
            low, high = np.concatenate((base.least, low)), np.concatenate((base.most, high))
            base = base.base
        self.base, self.rows, self.least, self.most = base, matrix, low, high

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r}, {len(self.rows)} rows for {self.rows.shape[1]} candidates)"

    def feasible(self, n: int) -> bool:
        self._check_size(n)
        return self._feasible

    def project_array(self, point: Vector) -> Vector:
        return self.project_with_multipliers(point)[0]

    def project_with_multipliers(self, point: Vector) -> tuple[Vector, Vector]:  # (n,) -> (n,), (q,)
        """The projection p and a multiplier for each row, with which p is the base's projection of `x - rows' y`.

        A multiplier is positive only where the row is at `most`, negative only where it is at `least`.
        """
        self._check_size(point.size)
        weights, multipliers = project_between(point, self._cuts)
        return weights, np.ldexp(multipliers, -self._exponents)

    def polyhedron(self, n: int) -> Polyhedron:
        self._check_size(n)
        return self._polyhedron

    def restricted(self, index: Tensor) -> Linear:
        return Linear(self.base.restricted(index), self.rows[:, index.numpy()], self.least, self.most)

    @cached_property
    def _cuts(self) -> Cuts:
        base, exponents = self.base.polyhedron(self.rows.shape[1]), -self._exponents
        rows = np.ldexp(self.rows, exponents[:, None])
        least, most = np.ldexp(self.least, exponents), np.ldexp(self.most, exponents)
        return Cuts(base, self.base.project_array, rows, least, most)

    @cached_property
    def _exponents(self) -> NDArray[np.intc]:  # (q,)
        """Powers of two that bring the largest entry of each row between 1 and 2: backends take small rows for none."""
        return np.frexp(np.abs(self.rows).max(1, initial=0.0))[1] - 1

    @cached_property
    def _polyhedron(self) -> Polyhedron:
        cuts = self._cuts
        base, equal = cuts.base, self.least == self.most
        return replace(
            base,
            rows=np.concatenate((base.rows, cuts.rows[equal])),
            values=np.concatenate((base.values, cuts.least[equal])),
            sides=cuts.rows[~equal],
            least=cuts.least[~equal],
            most=cuts.most[~equal],
        )

    @cached_property
    def _feasible(self) -> bool:
        n = self.rows.shape[1]
        if not self.base.feasible(n):
            return False
        nearest = self.base.project_array(np.zeros(n))
        if self._polyhedron.violation(nearest) <= ROUNDING:
            return True
        return n > 0 and least_miss(self._polyhedron, float(np.abs(nearest).max())) <= _MISSED

    def _check_size(self, n: int) -> None:
        if n != self.rows.shape[1]:
            raise ConfigurationError(
                f"{self!r} was used for {n} candidates; its rows and groups need one entry for each; index them like "
                "the candidates, with `restricted` or where you make the set."
            )


_MISSED = 1e-9


class Quota(Linear):
    """The weights of another set in which groups keep to a share of the total: `sum_G mu_i w_i <= share * mu'w`.

    Shares are of the set's own total, whatever it is, so that quotas bound a cone as well as a simplex.

    Args:
        base: a set without negative weights.
        groups: a label for each candidate, such as its source.
        at_most, at_least: label -> share, from 0 to 1; labels that are not named are free. A label that no candidate
            has, with a least share, leaves no weights but 0.
        mass: mu, (n,), positive; by default the base's own, or 1.

    Raises:
        ConfigurationError: a share out of range, least shares that sum to more than 1 or exceed the largest, a base
            with negative weights, shapes that do not fit.
    """

    def __init__(
        self,
        base: ConstraintSet,
        groups: Sequence[Hashable] | Tensor,
        at_most: Mapping[Any, float] | None = None,
        at_least: Mapping[Any, float] | None = None,
        mass: Sequence[float] | Tensor | Vector | None = None,
    ) -> None:
        require_set(base)
        if not isinstance(groups, Iterable) or not all(
            isinstance(shares, Mapping | None) for shares in (at_most, at_least)
        ):
            raise ConfigurationError(
                f"Quota has groups of type {type(groups).__name__}, at_most={at_most!r} and at_least={at_least!r}; a "
                "label for each candidate and mappings from label to share are needed; pass a list and dictionaries."
            )
        labels = groups.tolist() if isinstance(groups, Tensor | np.ndarray) else list(groups)
        n, most, least = len(labels), dict(at_most or {}), dict(at_least or {})
        _check_shares(most, least)
        if np.any(base.polyhedron(n).lower < 0):
            raise ConfigurationError(
                f"Quota was given the base {base!r}, which holds negative weights; a share of the total needs weights "
                "of at least 0; use NonNegative, Box from 0, or a simplex or cone."
            )
        given = getattr(base, "mass", None) if mass is None else mass
        if isinstance(base, Linear) and mass is None:
            given = getattr(base.base, "mass", None)
        mu = np.ones(n) if given is None else _array("mass", given)
        if mu.shape != (n,) or not np.all(np.isfinite(mu) & (mu > 0)):
            raise ConfigurationError(
                f"mass has shape {mu.shape} for {n} groups; one positive number per candidate is needed; index it like "
                "the groups."
            )
        self.labels, self.at_most, self.at_least, self.mass = labels, most, least, mu
        pinned = {label for label in most if least.get(label) == most[label]}
        sides = [(label, share, 0.0 if label in pinned else -math.inf, 0.0) for label, share in most.items()]
        sides += [(label, share, 0.0, math.inf) for label, share in least.items() if label not in pinned]
        groups_of = [np.array([each == label for each in labels], dtype=float) for label, *_ in sides]
        rows = [mu * (group - side[1]) for group, side in zip(groups_of, sides, strict=True)]
        self._own = len(rows)
        super().__init__(base, np.array(rows).reshape(len(rows), n), [s[2] for s in sides], [s[3] for s in sides])

    def restricted(self, index: Tensor) -> Linear:
        if len(self.rows) > self._own:  # the base was cut, too
            return super().restricted(index)
        at = index.tolist()
        return Quota(
            self.base.restricted(index), [self.labels[i] for i in at], self.at_most, self.at_least, self.mass[at]
        )


def _check_shares(most: Mapping[Any, float], least: Mapping[Any, float]) -> None:
    for name, shares in (("at_most", most), ("at_least", least)):
        for label, share in shares.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ConfigurationError(
                    f"{name}[{label!r}] is {share!r}; a share of the total, from 0 to 1, is needed; a third is 1 / 3."
                )
    crossed = [label for label in least if least[label] > most.get(label, 1.0)]
    if crossed or sum(least.values()) > 1 + ROUNDING:
        raise ConfigurationError(
            f"at_least is {dict(least)} and at_most {dict(most)}; least shares may sum to 1 at most, and none may "
            "exceed its label's largest; lower them."
        )


class NoHarm(Linear):
    """The weights of another set that make no target worse, to first order: `b_j'w >= 0` for each target j.

    Args:
        base: the set that is cut.
        alignments: (n, m), a column b_j for each target.

    On a cone the set is a cone again, so that nothing depends on the scale of any b_j. On a simplex it may be empty.

    Source: conflict-free directions as in GEM (Lopez-Paz and Ranzato 2017, eq. 7), for weights instead of gradients.

    Raises:
        ConfigurationError: alignments that are no finite matrix.
    """

    def __init__(self, base: ConstraintSet, alignments: Any) -> None:
        given = _array("alignments", alignments)
        columns = as_columns("alignments", given, len(given) if given.ndim else 0).numpy()
        self.alignments = columns
        super().__init__(base, columns.T, 0.0, math.inf)


def least_miss(polyhedron: Polyhedron, size: float) -> float:
    """The least violation that any weights have, relative to the rows' terms; infinity if bounds and caps clash.

    By the simplex method of HiGHS, on weights of the size 1.
    """
    from scipy.optimize import linprog  # only where the question is open

    n, unit = polyhedron.lower.size, size or _offset(polyhedron) or 1.0
    scaled = polyhedron.scaled(1 / unit)
    rows = np.concatenate((scaled.rows, scaled.sides))
    least, most = np.concatenate((scaled.values, scaled.least)), np.concatenate((scaled.values, scaled.most))
    lengths = np.abs(rows).sum(1)
    lengths[lengths == 0] = 1.0
    rows, least, most = rows / lengths[:, None], least / lengths, most / lengths
    above, below = np.isfinite(most), np.isfinite(least)
    inequalities = np.concatenate((rows[above], -rows[below]))
    inequalities = np.column_stack((inequalities, -np.ones(len(inequalities))))
    limits = np.concatenate((most[above], -least[below]))
    if math.isfinite(scaled.share):
        caps = np.column_stack((scaled.caps(), np.zeros(n)))
        inequalities, limits = np.concatenate((inequalities, caps)), np.concatenate((limits, np.zeros(n)))
    bounds = np.column_stack((np.append(scaled.lower, 0.0), np.append(scaled.upper, math.inf)))
    cost = np.append(np.zeros(n), 1.0)
    found = linprog(cost, inequalities, limits, bounds=bounds, options={"primal_feasibility_tolerance": 1e-10})
    return float(found.x[-1]) if found.x is not None else math.inf


def _offset(polyhedron: Polyhedron) -> float:
    offsets = np.abs(np.concatenate((polyhedron.values, polyhedron.least, polyhedron.most)))
    return float(offsets[np.isfinite(offsets)].max(initial=0.0))


def _matrix(rows: Any) -> Matrix:
    matrix = _array("rows", rows)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ConfigurationError(
            f"rows have shape {matrix.shape}; a finite matrix (q, n) is needed, one column per candidate; put a single "
            "row into a list."
        )
    return matrix


def _bound(name: str, value: Any, q: int) -> Vector:
    array = _array(name, value)
    if array.ndim > 1 or (array.ndim and array.size != q) or np.isnan(array).any():
        raise ConfigurationError(
            f"{name} has shape {array.shape} for {q} rows; one number for all, or one each, is needed; give one per "
            "row."
        )
    return np.broadcast_to(array, (q,)).copy()


def _array(name: str, value: Any) -> Matrix:
    return as_numbers(name, value).numpy().copy()
