"""Small symmetric systems, singular ones included. Called by `gram`, `sides`, `ClosedForm` and `Greedy`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from ftw.solvers.polyhedron import Matrix, Vector

EPSILON = float(np.finfo(np.float64).eps)


def solve_psd(
    gram: Matrix,  # K, (q, q), positive semidefinite up to rounding
    right: Vector,  # r, (q,)
    scale: float,  # the size of the terms whose difference r is
    tolerance: float = 1e-13,
    largest: float | None = None,
    back: Callable[[Matrix], Matrix] | None = None,  # (q, ...) -> (p, ...)
) -> tuple[Vector, Vector | None]:  # (q,), (q,) or None
    """`K y = r` in two parts: y, and a direction that has a slope along r but no curvature.

    The second is None where the slope is no larger than `tolerance * scale`: then the system is consistent.
    Otherwise `1/2 y'Ky - r'y` falls along it without end. y has no component along directions without curvature.

    Well conditioned K go through Cholesky, the others through their eigenvectors, where eigenvalues below
    `4 q eps` of the largest count as zero. K is first brought to a unit diagonal, so that a candidate which is
    merely small is not taken for one that is missing. If K is what a reduction left of a larger matrix, its rounding
    has the size of that one: pass its largest entry as `largest`, and eigenvalues are judged against it, without
    rescaling; and pass as `back` what takes y to the larger one's coordinates, in which both parts are returned.
    """
    q = right.size
    if largest is None:
        unit = _lengths(gram)
        gram, right, largest = gram / np.outer(unit, unit), right / unit, 1.0
        back = _divided_by(unit)
    assert back is not None
    if not q:
        return back(right), None
    from scipy.linalg import lapack  # four fifths of the time that importing ftw would take

    factor, failed = lapack.dpotrf(gram, lower=1)
    if not failed and np.diagonal(factor).min() ** 2 > _WELL_CONDITIONED * largest:
        return back(lapack.dpotrs(factor, right, lower=1)[0]), None
    values, vectors = np.linalg.eigh(gram)
    curved = values > 4 * max(q, 4) * EPSILON * max(largest, float(values[-1]))
    parts, vectors = right @ vectors, back(vectors)
    lengths = np.sqrt((vectors * vectors).sum(0))
    # A component at rounding level, divided by a small eigenvalue, would move the weights for no reason.
    kept = curved & (np.abs(parts) > EPSILON * scale * lengths)
    solution = vectors[:, kept] @ (parts[kept] / values[kept])
    flat, slopes = vectors[:, ~curved], parts[~curved]
    if flat.shape[1]:
        basis = np.linalg.qr(flat)[0]
        solution = solution - basis @ (solution @ basis)
        ray = flat @ slopes
        if float(slopes @ slopes) > tolerance * scale * float(np.linalg.norm(ray)):
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

    Reflections spread rounding of the size of K's largest entry. A direction that has no curvature beside it is
    therefore looked at again with K at a unit diagonal, where lengths are uneven.
    """
    found = _solve_reflected(gram, right, rows, scale, tolerance)
    if found[1] is None or not len(rows):
        return found
    unit = _lengths(gram)
    if not _uneven(unit):
        return found
    return _solve_reflected(gram / np.outer(unit, unit), right / unit, _echelon(rows / unit), scale, tolerance, unit)


def _solve_reflected(
    gram: Matrix, right: Vector, rows: Matrix, scale: float, tolerance: float, unit: Vector | None = None
) -> tuple[Vector, Vector | None]:
    reflectors: list[Vector] = []
    largest = float(np.abs(np.diagonal(gram)).max(initial=0.0))
    for v in _reflectors(rows):
        image = gram @ v
        image -= (0.5 * float(v @ image)) * v
        gram = (gram - np.outer(v, image) - np.outer(image, v))[1:, 1:]
        right = (right - v * float(v @ right))[1:]
        reflectors.append(v)
    if not reflectors and unit is None:
        return solve_psd(gram, right, scale, tolerance)
    return solve_psd(gram, right, scale, tolerance, largest, _expanded(reflectors, unit))


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
    found = _solve_thin(factor, ridge, right, rows, scale, tolerance)
    if found[1] is None:
        return found
    unit = np.sqrt((factor * factor).sum(1))
    unit[unit == 0] = 1.0
    if not _uneven(unit):
        return found
    return _solve_thin(factor / unit[:, None], 0.0, right / unit, _echelon(rows / unit), scale, tolerance, unit)


def _solve_thin(
    factor: Matrix,
    ridge: float,
    right: Vector,
    rows: Matrix,
    scale: float,
    tolerance: float,
    unit: Vector | None = None,
) -> tuple[Vector, Vector | None]:
    whole, reflectors = right, []
    for v in _reflectors(rows):
        factor = (factor - np.outer(v, v @ factor))[1:]
        right = (right - v * float(v @ right))[1:]
        reflectors.append(v)
    expand = _expanded(reflectors, unit)
    basis, corner = np.linalg.qr(factor)
    inner = right @ basis
    beside = right - basis @ inner
    beside -= basis @ (beside @ basis)
    gram = corner @ corner.T
    gram.flat[:: len(gram) + 1] += ridge
    largest = float(np.diagonal(gram).max(initial=0.0))
    solution, ray = solve_psd(gram, inner, scale, tolerance, largest, lambda y: expand(basis @ y))
    if ridge:
        return solution + expand(beside / ridge), None
    # Squared, not multiplied with all of r, beside which what rounding leaves of it would have a slope.
    flat, slope = expand(beside), float(beside @ beside)
    if ray is not None:
        flat, slope = flat + ray, slope + float((whole if unit is None else whole * unit) @ ray)
    return solution, flat if slope > tolerance * scale * float(np.linalg.norm(flat)) else None


def _lengths(gram: Matrix) -> Vector:  # (q, q) -> (q,)
    """Roots of K's diagonal; 1 for who has none."""
    diagonal = np.diagonal(gram)
    return np.sqrt(diagonal, out=np.ones(diagonal.size), where=diagonal > 0)


def _uneven(unit: Vector) -> bool:
    return bool(unit.min() < 0.1 * unit.max())


def _reflectors(rows: Matrix) -> Iterator[Vector]:
    """For row after row, v such that `I - v v'` turns what is left of it onto the first axis left.

    A row that the others imply is passed over.
    """
    sizes = np.sqrt((rows * rows).sum(1))
    for size in sizes:
        row, rows = rows[0], rows[1:]
        length = math.sqrt(float(row @ row))
        if length <= 1e-13 * size or length == 0:
            continue
        v = row.copy()
        v[0] += length if v[0] >= 0 else -length
        v *= math.sqrt(2) / math.sqrt(float(v @ v))
        rows = (rows - np.outer(rows @ v, v))[:, 1:]
        yield v


def _expanded(reflectors: list[Vector], unit: Vector | None) -> Callable[[Matrix], Matrix]:
    """What undoes reflections, and then the division by `unit`."""

    def expand(reduced: Matrix) -> Matrix:
        for v in reversed(reflectors):
            full = np.concatenate((np.zeros((1, *reduced.shape[1:])), reduced))
            reduced = full - np.multiply.outer(v, v @ full)
        return reduced if unit is None else _divided_by(unit)(reduced)

    return expand


def _divided_by(unit: Vector) -> Callable[[Matrix], Matrix]:
    return lambda values: values / (unit if values.ndim == 1 else unit[:, None])


def _echelon(rows: Matrix) -> Matrix:  # (m, q) -> (p, q), p <= m
    """Rows of the same span, each with a column of its own that holds its largest entry, 1.

    Gauss-Jordan with complete pivoting: unlike reflections it leaves columns of very uneven size their digits.
    """
    left, terms = rows.copy(), np.abs(rows)
    for each in left, terms:
        each /= np.maximum(np.abs(rows).max(1, initial=0.0), _TINY)[:, None]
    open_rows = np.ones(len(rows), dtype=bool)
    for _ in range(min(rows.shape)):
        sizes = np.where(open_rows[:, None] & (np.abs(left) > 1e-13 * terms), np.abs(left), 0.0)
        i, j = np.unravel_index(int(np.argmax(sizes)), sizes.shape)
        if not sizes[i, j]:
            break
        terms[i] /= abs(left[i, j])
        left[i] /= left[i, j]
        factors = np.where(np.arange(len(rows)) == i, 0.0, left[:, j])
        terms += np.outer(np.abs(factors), terms[i])
        left -= np.outer(factors, left[i])
        left[factors != 0, j] = 0.0
        open_rows[i] = False
    return left[~open_rows]


_TINY = float(np.finfo(np.float64).tiny)
