"""The projection that belongs to the entropy: weights proportional to given ones, as far as caps let them be."""

from __future__ import annotations

import numpy as np

from ftw.solvers.polyhedron import Vector


def scale_to_total(
    shape: Vector,  # q, (n,), positive
    cap: Vector,  # u, (n,), at least 0, may be infinite
    row: Vector,  # a, (n,), positive
    total: float,  # T, at most a'u but for rounding
) -> Vector:  # (n,)
    """`w_i = min(t q_i, u_i)` with `a'w = T`.

    Of all weights from 0 to u with that total it has the least entropy `sum a_i w_i log(w_i / q_i)` relative to q,
    whose derivative by `a_i w_i` is then the same for all that are below their cap.
    """
    if not shape.size:
        return shape
    with np.errstate(over="ignore"):
        ratios = cap / shape
    order = np.argsort(ratios, kind="stable")
    capped = np.concatenate((np.zeros(1), np.cumsum((row * cap)[order[:-1]])))
    # Of those that are free, summed from the last: no small ones are lost beside large ones that have left.
    free = np.cumsum((row * shape)[order[::-1]])[::-1]
    factors = (total - capped) / free  # with the first 0, 1, ... at their caps
    first = int(np.argmax(factors <= ratios[order])) if np.any(factors <= ratios[order]) else shape.size - 1
    return np.minimum(max(float(factors[first]), 0.0) * shape, cap)


def positive(shape: Vector) -> Vector:
    """The shape with what has vanished beside its largest entry kept above 0."""
    return np.maximum(shape, _LEAST * float(shape.max(initial=0.0)))


_LEAST = 1e-150
