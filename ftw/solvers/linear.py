"""Small symmetric systems, singular ones included. Called by `gram`, `sides`, `ClosedForm` and `Greedy`."""

from __future__ import annotations

import math

import numpy as np

from ftw.solvers.polyhedron import Matrix, Vector

EPSILON = float(np.finfo(np.float64).eps)


def solve_psd(
    gram: Matrix,  # K, (q, q), positive semidefinite up to rounding
    right: Vector,  # r, (q,)
    scale: float,  # the size of the terms whose difference r is
    tolerance: float = 1e-13,
    largest: float | None = None,
) -> tuple[Vector, Vector | None]:  # (q,), (q,) or None
    """`K y = r` in two parts: y, and a direction that has a slope along r but no curvature.

    The second is None where the slope is no larger than `tolerance * scale`: then the system is consistent.
    Otherwise `1/2 y'Ky - r'y` falls along it without end. y has no component along directions without curvature.

    Well conditioned K go through Cholesky, the others through their eigenvectors, where eigenvalues below
    `4 q eps` of the largest count as zero. K is first brought to a unit diagonal, so that a candidate which is
    merely small is not taken for one that is missing. If K is what an orthogonal reduction left of a larger
    matrix, its rounding has the size of that one: pass its largest entry as `largest`, and eigenvalues are
    judged against it, without rescaling.
    """
    q = right.size
    if not q:
        return right.copy(), None
    unit = np.ones(q)
    if largest is None:
        diagonal = np.diagonal(gram)
        np.sqrt(diagonal, out=unit, where=diagonal > 0)
        gram, right, largest = gram / np.outer(unit, unit), right / unit, 1.0
    from scipy.linalg import lapack  # four fifths of the time that importing ftw would take

    factor, failed = lapack.dpotrf(gram, lower=1)
    if not failed and np.diagonal(factor).min() ** 2 > _WELL_CONDITIONED * largest:
        return lapack.dpotrs(factor, right, lower=1)[0] / unit, None
    values, vectors = np.linalg.eigh(gram)
    curved = values > 4 * max(q, 4) * EPSILON * max(largest, float(values[-1]))
    vectors = vectors / unit[:, None]
    parts, lengths = right * unit @ vectors, np.sqrt((vectors * vectors).sum(0))
    # A component at rounding level, divided by a small eigenvalue, would move the weights for no reason.
    kept = curved & (np.abs(parts) > EPSILON * scale * lengths)
    solution = vectors[:, kept] @ (parts[kept] / values[kept])
    flat = vectors[:, ~curved]
    if flat.shape[1]:
        basis = np.linalg.qr(flat)[0]
        solution = solution - basis @ (solution @ basis)
        ray = flat @ parts[~curved]
        if float(right * unit @ ray) > tolerance * scale * float(np.linalg.norm(ray)):
            return solution, ray
    return solution, None


_WELL_CONDITIONED = 1e-8
"""Ratio of a squared Cholesky pivot to the largest entry, above which the solve loses no more than half the digits."""


def solve_on_rows(
    gram: Matrix,  # K, (q, q)
    right: Vector,  # r, (q,)
    rows: Matrix,  # A, (m, q)
    scale: float,
    tolerance: float = 1e-13,
) -> tuple[Vector, Vector | None]:  # (q,), (q,) or None
    """As `solve_psd`, for `min 1/2 y'Ky - r'y` on `A y = 0`.

    Each row is eliminated by a Householder reflection of K, r and the rows left, O(q^2): orthogonal, so singular K
    need no care, and cheaper than a basis of the null space while rows are few. Dependent rows are skipped.
    """
    reflectors: list[Vector] = []
    largest = float(np.abs(np.diagonal(gram)).max(initial=0.0))
    sizes = np.sqrt((rows * rows).sum(1))
    for size in sizes:
        v, rows = _reflector(rows[0], size), rows[1:]
        if v is None:
            continue
        image = gram @ v
        image -= (0.5 * float(v @ image)) * v
        gram = (gram - np.outer(v, image) - np.outer(image, v))[1:, 1:]
        right = (right - v * float(v @ right))[1:]
        rows = (rows - np.outer(rows @ v, v))[:, 1:]
        reflectors.append(v)
    solution, ray = solve_psd(gram, right, scale, tolerance, largest if reflectors else None)
    return _expand(solution, reflectors), None if ray is None else _expand(ray, reflectors)


def solve_thin_on_rows(
    factor: Matrix,  # F, (q, r), q >= r
    ridge: float,
    right: Vector,  # (q,)
    rows: Matrix,  # A, (m, q)
    scale: float,
    tolerance: float = 1e-13,
) -> tuple[Vector, Vector | None]:  # (q,), (q,) or None
    """As `solve_on_rows` for `K = F F' + ridge I`, which is not formed: O(q r^2).

    With F = Q R, Q orthonormal, K is `R R' + ridge I` (r, r) on the columns of Q and the ridge alone beside them.
    """
    reflectors: list[Vector] = []
    sizes = np.sqrt((rows * rows).sum(1))
    for size in sizes:
        v, rows = _reflector(rows[0], size), rows[1:]
        if v is None:
            continue
        factor = (factor - np.outer(v, v @ factor))[1:]
        right = (right - v * float(v @ right))[1:]
        rows = (rows - np.outer(rows @ v, v))[:, 1:]
        reflectors.append(v)
    basis, corner = np.linalg.qr(factor)
    inner = right @ basis
    beside = right - basis @ inner
    beside -= basis @ (beside @ basis)
    gram = corner @ corner.T
    gram.flat[:: len(gram) + 1] += ridge
    part, ray = solve_psd(gram, inner, scale, tolerance, float(np.diagonal(gram).max(initial=0.0)))
    solution = basis @ part
    if ridge:
        return _expand(solution + beside / ridge, reflectors), None
    flat = beside if ray is None else beside + basis @ ray
    steep = float(right @ flat) > tolerance * scale * math.sqrt(float(flat @ flat))
    return _expand(solution, reflectors), _expand(flat, reflectors) if steep else None


def _reflector(row: Vector, size: float) -> Vector | None:
    """v such that `I - v v'` turns the row onto the first axis; None for a row that the others imply."""
    length = math.sqrt(float(row @ row))
    if length <= 1e-13 * size or length == 0:
        return None
    v = row.copy()
    v[0] += length if v[0] >= 0 else -length
    v *= math.sqrt(2) / math.sqrt(float(v @ v))  # H = I - v v'
    return v


def _expand(reduced: Vector, reflectors: list[Vector]) -> Vector:
    for v in reversed(reflectors):
        full = np.concatenate((np.zeros(1), reduced))
        reduced = full - v * float(v @ full)
    return reduced
