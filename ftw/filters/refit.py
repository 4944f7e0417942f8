"""Non-negative weights of a few candidates, refitted after each choice. Called by matching pursuits."""

from __future__ import annotations

import numpy as np

from ftw.solvers.linear import EPSILON, solve_psd
from ftw.solvers.polyhedron import Matrix, Vector


def descend(
    block: Matrix,  # K, (q, q), positive semidefinite
    right: Vector,  # b, (q,)
    weights: Vector,  # (q,), none negative
) -> tuple[list[int], Vector]:  # (p,), (p,)
    """`min 1/2 w'Kw - b'w` over w >= 0 from feasible weights, without taking up again what falls to 0 on the way.

    The inner loop of Lawson and Hanson's NNLS ("Solving least squares problems", 1974, chapter 23).

    Returns:
        Which weights are positive, and their values.
    """
    index = list(range(right.size))
    while index:
        scale = float(np.abs(block).sum(1) @ np.abs(weights) + np.abs(right).sum())
        move, _ = solve_psd(block, right - block @ weights, scale)
        target = weights + move
        if (target > 0).all():
            return index, target
        falling = target <= 0
        reaches = np.where(falling, 0.0, np.inf)
        np.divide(weights, -move, out=reaches, where=falling & (move < 0))
        first = int(np.argmin(reaches))
        weights = weights + reaches[first] * move
        stays = ~falling | (weights > EPSILON * np.abs(weights).max())
        stays[first] = False
        index = [i for i, kept in zip(index, stays, strict=True) if kept]
        block, right, weights = block[np.ix_(stays, stays)], right[stays], weights[stays]
    return index, weights


def non_negative(
    block: Matrix,  # K, (q, q), positive semidefinite
    right: Vector,  # b, (q,)
    weights: Vector,  # (q,), none negative
) -> Vector:  # (q,)
    """`argmin 1/2 w'Kw - b'w` over w >= 0, from feasible weights: Lawson and Hanson's NNLS, started warm."""
    on_offer = np.ones(right.size, dtype=bool)
    while True:
        terms = block * weights
        slope = right - terms.sum(1)
        rounding = ROUNDING * (np.abs(right) + np.abs(terms).sum(1))
        useful = on_offer & (weights == 0) & (slope > rounding)
        if not useful.any():
            return weights
        best = int(np.argmax(np.where(useful, slope, -np.inf)))
        index = np.flatnonzero((weights > 0) | (np.arange(right.size) == best))
        kept, found = descend(block[np.ix_(index, index)], right[index], weights[index])
        if best not in index[kept]:
            on_offer[best] = False  # only rounding does this: its slope was positive
            continue
        weights = np.zeros(right.size)
        weights[index[kept]] = found


ROUNDING = 1e-12
"""Part of the terms of a residual that is taken for rounding of their difference."""
