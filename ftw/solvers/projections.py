"""Exact Euclidean projections onto the two sets that couple the weights. Called by `constraints`.

Both look for the piece of a monotone piecewise linear equation that holds the root, and solve there; no bisection,
hence no tolerance. Nothing here compares against an absolute number: x may be 1e-16 or 1e16.
"""

from __future__ import annotations

import numpy as np

from ftw.solvers.polyhedron import Vector


def project_capped_simplex(
    point: Vector,  # x, (n,)
    total: float,  # T
    cap: Vector,  # u, (n,), may be infinite
    mass: Vector,  # a, (n,), positive
) -> Vector:  # (n,)
    """`argmin ||w - x||` over `0 <= w <= u`, `a'w = T`; the set must not be empty.

    The minimiser is `w_i(v) = clip(x_i - v a_i, 0, u_i)`, where v solves `a'w(v) = T` (Duchi et al. 2008 for
    u = inf and a = 1; here with caps and mass). a'w(v) falls from a'u to 0 with breakpoints (x - u)/a and x/a.
    Newton's method finds the piece that holds the root in a few steps, each without sorting; where it does not, the
    breakpoints are swept.
    """
    if not point.size or mass @ cap <= total:
        return cap.copy()
    close, square = 4 * point.size * _EPSILON * total, mass * mass
    shifted, excess, slope = point, float(mass @ point) - total, float(square.sum())
    for _ in range(_NEWTON_STEPS):
        shifted = shifted - (excess / slope) * mass
        weights = np.maximum(shifted, 0.0)
        np.minimum(weights, cap, out=weights)
        excess = float(mass @ weights) - total
        if abs(excess) <= close:
            return weights
        slope = float(square @ ((weights > 0) & (weights < cap)))
        if slope == 0:
            break
    shifted = point
    for _ in range(_PASSES):
        # Relative to the multiplier found so far: where x is far larger than T, x - v a loses the digits of w.
        shifted = shifted - _crossing(shifted, total, cap, mass) * mass
        weights = np.minimum(np.maximum(shifted, 0.0), cap)
        excess = float(mass @ weights) - total
        if abs(excess) <= close:
            break
    return weights


_NEWTON_STEPS = 12

_PASSES = 4
"""The first finds the piece and leaves rounding of the size of x, the second rounding of the size of T."""

_EPSILON = float(np.finfo(np.float64).eps)


def _crossing(point: Vector, total: float, cap: Vector, mass: Vector) -> float:
    """v with a'w(v) = T, by a sweep from the largest breakpoint, where a'w = 0, downwards.

    Between x_i/a_i and (x_i - u_i)/a_i weight i rises from 0 to its cap. Where x is so large that the two coincide
    by rounding, the rise becomes a jump, and v is placed on it.
    """
    square, start, end = mass * mass, point / mass, (point - cap) / mass
    capped = np.isfinite(cap)
    lost = np.zeros(point.size)
    lost[capped] = (mass * cap)[capped] - square[capped] * (start - end)[capped]
    points = np.concatenate((start, end[capped]))
    order = np.argsort(-points, kind="stable")
    points = points[order]
    rising = np.cumsum(np.concatenate((np.ones(point.size), np.full(int(capped.sum()), -1.0)))[order])
    # Where no weight rises the sum is flat; what rounding leaves of the slope, times a large gap, would not be.
    slopes = np.where(rising > 0, np.cumsum(np.concatenate((square, -square[capped]))[order]), 0.0)
    jumps = np.concatenate((np.zeros(point.size), lost[capped]))[order]
    gaps = points[:-1] - points[1:]
    reached = np.cumsum(np.concatenate((jumps[:1], slopes[:-1] * gaps + jumps[1:])))
    piece = max(int(np.searchsorted(reached, total, side="right")) - 1, 0)
    lower = float(points[piece + 1]) if piece + 1 < points.size else -np.inf
    missing, slope = total - float(reached[piece]), float(slopes[piece])
    if slope <= 0:
        return float(points[piece]) if lower == -np.inf else lower
    return max(float(points[piece]) - missing / slope, lower)


def project_capped_cone(point: Vector, fewest: float) -> Vector:  # (n,), q = n / cap -> (n,)
    """`argmin ||w - x||` over `w >= 0`, `q w_i <= sum(w)`.

    With multipliers mu of the caps, `eta = sum(mu)/q` and the common bound `theta = sum(w)/q`, the minimiser is
    `w_i = clip(x_i + eta, 0, theta)` and `mu_i = (x_i - tau)_+` for `tau = theta - eta`. So `eta(tau)` is
    explicit, and what is left, `psi(tau) = theta - sum(w)/q = 0`, is piecewise linear and, unless the projection
    is 0, increasing: with p weights at the bound and f free its slope is `(1 - p/q)^2 + p f / q^2`.
    """
    q = fewest
    plain = np.maximum(point, 0.0)
    if q <= 1 or not point.size or q * plain.max() <= plain.sum():
        return plain
    order = np.argsort(-point, kind="stable")
    x = point[order]
    sums = np.concatenate((np.zeros(1), np.cumsum(x)))
    if _sum_of_largest(x, sums, q) <= 4 * _EPSILON * np.abs(x).sum():
        return np.zeros_like(point)  # x'v <= 0 for every v of the cone: its projection is the apex
    bound = _count_at_bound(x, sums, q)
    positive, eta, theta = _face(x, sums, q, bound)
    weights = np.zeros_like(point)
    weights[order[:bound]] = theta
    weights[order[bound:positive]] = np.clip(x[bound:positive] + eta, 0.0, theta)
    return weights


def _sum_of_largest(x: Vector, sums: Vector, q: float) -> float:
    """The largest x'v over v in the cone with sum(v) = q: the q largest entries, the last one in part."""
    whole = min(int(q), x.size)
    rest = (q - whole) * x[whole] if whole < x.size else 0.0
    return float(sums[whole] + rest)


def _count_at_bound(x: Vector, sums: Vector, q: float) -> int:
    """p: psi is evaluated at tau = x_1 >= x_2 >= ...; its root lies below the p-th."""
    count = np.arange(1, x.size + 1)
    eta = (sums[1:] - count * x) / q
    theta = x + eta
    positive = np.maximum(np.searchsorted(-x, eta, side="left"), count)  # number of i with x_i + eta > 0
    total = count * theta + (sums[positive] - sums[1:]) + (positive - count) * eta
    above = q * theta > total
    return x.size if above.all() else max(int(np.argmin(above)), 1)


def _face(x: Vector, sums: Vector, q: float, p: int) -> tuple[int, float, float]:
    """The number of positive weights, eta and theta, with p weights at the bound.

    `(q - p) theta - f eta = sum_F x` and `p theta + (q - p) eta = sum_U x` for every possible f; the right f is
    the last one whose smallest member stays positive (the argument of Duchi et al. 2008, figure 1).
    """
    upper = sums[p]
    free = np.arange(1, x.size - p + 1)
    inner = sums[p + 1 :] - upper
    determinant = (q - p) ** 2 + p * free
    eta = ((q - p) * upper - p * inner) / determinant
    f = int((x[p:] + eta > 0).sum())
    if f:
        return p + f, float(eta[f - 1]), float(((q - p) * inner[f - 1] + f * upper) / determinant[f - 1])
    # Nobody is free: then p = q and theta is the mean of those at the bound, or all weights are 0 up to rounding.
    return p, 0.0, float(upper / p) if p == q else 0.0
