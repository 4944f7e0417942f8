"""Exact projection onto a set cut by linear inequalities. Called by `Linear`, whose base can project without them.

Dual: with a multiplier for every cut, the projection is the base's own projection of a shifted point. Newton's method
finds the multipliers in a few steps where the point is about as large as the set; where it does not, the pivoting
of `pivots` does, whatever the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ftw.solvers.faces import SIDE_ROUNDING, Face, finite_size
from ftw.solvers.linear import EPSILON, solve_psd
from ftw.solvers.pivots import project_by_pivots
from ftw.solvers.polyhedron import Flags, Matrix, Polyhedron, Vector


@dataclass(frozen=True, eq=False)
class Cuts:
    """`least <= rows @ w <= most` for the w of a base.

    Attributes:
        base: the polyhedron that is cut. project: its exact projection, (n,) -> (n,).
        rows, least, most: (q, n), (q,), (q,); `least == most` is an equality, infinity an open side.
    """

    base: Polyhedron
    project: Callable[[Vector], Vector]
    rows: Matrix
    least: Vector
    most: Vector

    def rounding(self, weights: Vector) -> Vector:  # (q,)
        """How far each cut may be missed by rounding alone."""
        sizes, offsets = self._sizes
        return 0.25 * SIDE_ROUNDING * (sizes @ np.abs(weights) + offsets)

    def is_nothing(self, weights: Vector, point: Vector) -> bool:
        """Whether the weights are what rounding leaves of 0, the apex of a cone."""
        size = float(np.abs(point).max(initial=0.0))
        return self._is_cone and float(np.abs(weights).max(initial=0.0)) <= _NOTHING * size

    @cached_property
    def _is_cone(self) -> bool:
        numbers = (self.base.lower, self.base.upper, self.base.values, self.least, self.most)
        return all(bool(np.all((each == 0) | np.isinf(each))) for each in numbers)

    @cached_property
    def offset(self) -> float:
        """The largest distance of a cut's bound from 0."""
        lengths = np.sqrt((self.rows * self.rows).sum(1))
        lengths[lengths == 0] = math.inf
        return float((self._sizes[1] / lengths).max(initial=0.0))

    @cached_property
    def _sizes(self) -> tuple[Matrix, Vector]:
        return np.abs(self.rows), np.maximum(finite_size(self.least), finite_size(self.most))


def project_between(point: Vector, cuts: Cuts) -> tuple[Vector, Vector]:  # (n,) -> (n,), (q,)
    """`argmin ||w - x||` over the cut base, which must not be empty, and the multipliers of the cuts.

    A positive multiplier pushes down from `most`, a negative one up from `least`:
    `w = P_base(x - rows' multipliers)`.
    """
    state = _newton(point, cuts)
    if state.done:
        return state.weights, state.multipliers
    if math.isinf(cuts.base.share):
        weights, multipliers = project_by_pivots(point, cuts)
    else:  # the moving bound as so many cuts
        n, q = point.size, len(cuts.rows)
        rows, most = np.concatenate((cuts.rows, cuts.base.caps())), np.concatenate((cuts.most, np.zeros(n)))
        least = np.concatenate((cuts.least, np.full(n, -math.inf)))
        orthant = replace(cuts.base, share=math.inf)
        weights, multipliers = project_by_pivots(point, Cuts(orthant, cuts.project, rows, least, most))
        multipliers = multipliers[:q]
    return (np.zeros_like(point) if cuts.is_nothing(weights, point) else weights), multipliers


@dataclass
class _State:
    """A point shifted by multipliers, and its projection onto the base."""

    shifted: Vector
    multipliers: Vector
    weights: Vector
    done: bool = False


def _newton(point: Vector, cuts: Cuts) -> _State:
    """Ascent of the dual function, concave and piecewise quadratic, whose slopes are what the cuts are missed by."""
    state = _State(point, np.zeros(len(cuts.rows)), cuts.project(point))
    far = float(np.abs(point).max(initial=0.0)) > _FAR * max(float(np.abs(state.weights).max(initial=0.0)), cuts.offset)
    for _ in range(1 if far else _STEPS if math.isinf(cuts.base.share) else 4 * _STEPS):
        values, near = cuts.rows @ state.weights, cuts.rounding(state.weights)
        idle = state.multipliers == 0
        above = (state.multipliers > 0) | (idle & (values - cuts.most > near))
        below = (state.multipliers < 0) | (idle & (cuts.least - values > near))
        held = above | below
        targets = np.where(above, cuts.most, np.where(below, cuts.least, values))
        slopes = values - targets
        if cuts.is_nothing(state.weights, point):
            state.weights, state.done = np.zeros_like(point), True
            return state
        if np.all(np.abs(slopes) <= near):
            state.done = True
            return state
        if far:
            break
        direction = np.zeros(len(values))
        direction[held] = _model_step(state, cuts, slopes, above, held, float(near.max()))
        _line_search(state, cuts, direction, targets, slopes)
    return state


def _line_search(state: _State, cuts: Cuts, direction: Vector, targets: Vector, slopes: Vector) -> None:
    """Moves along the direction to where the slope has all but gone; no multiplier changes its sign."""
    shift = direction @ cuts.rows
    limits = np.full(direction.size, math.inf)
    falling = direction * state.multipliers < 0
    np.divide(-state.multipliers, direction, out=limits, where=falling)
    limit, start = float(limits.min()), float(direction @ slopes)
    left, left_slope, side = 0.0, start, 0
    right = right_slope = math.inf
    length = min(1.0, limit)
    for _ in range(_TRIALS):
        landed = cuts.project(state.shifted - length * shift)
        slope = float(direction @ (cuts.rows @ landed - targets))
        if abs(slope) <= 0.3 * start or (slope > 0 and length >= limit):
            break
        if slope < 0:
            right, right_slope = length, slope
            left_slope *= 0.5 if side < 0 else 1.0  # the Illinois rule: no end of the bracket may stay for ever
            side = -1
        else:
            left, left_slope = length, slope
            right_slope *= 0.5 if side > 0 else 1.0
            side = 1
        if math.isinf(right):
            length = min(8 * length, limit)
        else:
            length = (left * right_slope - right * left_slope) / (right_slope - left_slope)
    state.multipliers = state.multipliers + length * direction
    if length >= limit:
        state.multipliers[limits <= limit] = 0.0
    state.shifted, state.weights = state.shifted - length * shift, landed


def _model_step(state: _State, cuts: Cuts, slopes: Vector, above: Flags, held: Flags, noise: float) -> Vector:
    """The change of the held multipliers that maximises the quadratic piece here, none of them past 0."""
    rows, sign = cuts.rows[held], np.where(above[held], 1.0, -1.0)
    face = Face.at(cuts.base, state.weights)
    moves = face.reduce(np.ascontiguousarray(rows.T))  # (f, a): how the cuts' gradients move the weights
    if len(face.rows):
        basis = np.linalg.qr(face.rows.T)[0]
        moves = moves - basis @ (basis.T @ moves)
    gram = (moves.T @ moves) * np.outer(sign, sign)
    right, least = slopes[held] * sign, -np.abs(state.multipliers[held])
    # Where a cut's slope meets no curvature, as far as the point is away: the next piece is not farther.
    far = float(np.abs(state.shifted).max() + np.abs(state.weights).max())
    lengths = np.sqrt((rows * rows).sum(1))
    change, free = np.zeros(right.size), np.ones(right.size, dtype=bool)
    for _ in range(4 * right.size + 4):
        index = np.flatnonzero(free)
        gradient = right[index] - gram[index] @ change
        move, ray = solve_psd(gram[np.ix_(index, index)], gradient, noise / EPSILON)
        if ray is not None:
            move = move + ray * (far / float(np.abs(ray) @ lengths[index]))
        reaches = np.full(index.size, math.inf)
        np.divide(change[index] - least[index], -move, out=reaches, where=move < 0)
        reach = float(reaches.min(initial=math.inf))
        change[index] += min(reach, 1.0) * move
        if reach < 1:
            stopped = index[reaches <= reach]
            change[stopped], free[stopped] = least[stopped], False
            continue
        wrong = ~free & (right - gram @ change > noise)
        if ray is not None or not wrong.any():
            break
        free[int(np.argmax(np.where(wrong, right - gram @ change, -math.inf)))] = True
    return change * sign


_STEPS = 12
"""Newton steps after which pivoting takes over; where Newton's method suits, it needs two to four."""

_FAR = 30.0
"""Size of the point, beside its projection onto the base, from which Newton's method sees only the set's corners."""

_NOTHING = 64 * EPSILON
"""Size beside the point at which weights are rounding."""

_TRIALS = 40
"""Points of one line search."""
