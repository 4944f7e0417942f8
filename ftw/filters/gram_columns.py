"""Columns of K one at a time: what sequential filters read instead of the whole matrix."""

from __future__ import annotations

from collections.abc import Callable

from ftw.problem import SelectionProblem
from ftw.solvers.polyhedron import Vector

ColumnReader = Callable[[int], Vector]
"""`j -> K[:, j]`, (n,) float64; not to be written to."""


def gram_columns(problem: SelectionProblem) -> ColumnReader:
    """Reads columns of K in numpy, O(n r) each where the problem has a factor, without forming K."""
    if problem.factor is not None:
        F = problem.factor.numpy()
        return lambda j: F @ F[j]
    K = problem.full_gram.numpy()
    return lambda j: K[j]  # symmetric, and a row lies in one piece
