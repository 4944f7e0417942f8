"""Determinantal point process: candidates that are good, and unlike one another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ftw.arguments import at_least, one_of
from ftw.errors import ConfigurationError
from ftw.filters.base import Filter
from ftw.filters.draws import generator_of, uniform
from ftw.filters.gram_columns import gram_columns
from ftw.problem import SelectionProblem
from ftw.solvers.linear import EPSILON
from ftw.solvers.polyhedron import Matrix, Vector

MODES = ("map", "sample")
QUALITIES = ("positive", "exp")


class DPP(Filter):
    """Sets S with a large `det L_S`, `L = diag(q) S diag(q)`: quality q from b, similarity S the cosines of K.

    `det L_S` is the squared volume that the q_i c_i / ||c_i||_M of the set span: a duplicate has none to add. Where
    the candidates left span nothing new, fewer than k are returned.

    Source: kernel and qualities: Chen et al. 2018, "Fast greedy MAP inference for determinantal point process",
    section 5; Kulesza and Taskar 2012, "Determinantal point processes for machine learning", section 3.1.

    - mode "map" adds, one at a time, the candidate that raises the volume most, by Cholesky updates (Chen et al. 2018,
      algorithm 1), O(n k^2) and k columns of K. Deviation: the end is k or a candidate whose remainder is rounding
      (1e-10 of its squared length), not a remainder below 1, which would depend on the scale of q.
    - mode "sample" draws exactly k with probability `det L_S / sum_|S'|=k det L_S'`: which eigenvectors take part, by
      elementary symmetric polynomials (Kulesza and Taskar 2012, algorithms 7 and 8; here in logarithms, which neither
      overflow nor cancel), then items one by one by the chain rule of a projection process, by Cholesky updates.
      O(n^3); where the problem has a factor with r < n columns, the eigenvectors come from the r x r dual kernel
      (section 3.3), O(n r^2). At most rank(L) can be drawn. Randomness comes from the problem's generator.

    Scales of the loss and of the target change nothing.

    Args:
        mode: "map" or "sample".
        quality: "positive", `q_i = (b_i)_+`, which never takes a candidate that does not help; or "exp",
            `q_i = exp(relevance b_i / max|b|)`, which may, where it differs from the others (the paper's form, its
            r_i scaled to [-1, 1]).
        relevance: of b against diversity, at least 0, with quality "exp" only; 1 by default.

    Raises:
        ConfigurationError: an argument is out of its range; at a step in mode "sample", the problem has no generator.
    """

    needs_gram = True

    def __init__(self, mode: str = "map", quality: str = "positive", relevance: float | None = None) -> None:
        one_of("mode", mode, MODES)
        one_of("quality", quality, QUALITIES)
        if relevance is not None:
            at_least("relevance", relevance, 0.0)
            if quality != "exp":
                raise ConfigurationError(
                    f"relevance={relevance} is given with quality={quality!r}; it acts on quality='exp' only; "
                    "leave it out."
                )
        self.mode, self.quality, self.relevance = mode, quality, 1.0 if relevance is None else float(relevance)

    def __call__(self, problem: SelectionProblem) -> Tensor:
        scale = self._scale(problem)
        if self.mode == "map":
            chosen = _most_likely(problem, scale)
        else:
            generator = generator_of(problem, "dpp")
            values, vectors = _eigen(problem, scale)
            count = min(problem.budget, values.size)
            draws = uniform(generator, values.size).numpy(), uniform(generator, count).numpy()
            part = _eigenvectors_drawn(values, count, draws[0])
            chosen = _items_drawn(vectors[:, part], draws[1])
        return torch.tensor(chosen, dtype=torch.long)

    def _scale(self, problem: SelectionProblem) -> Vector:  # (n,): q_i / ||c_i||, so that L = diag K diag
        b, diagonal = problem.alignment.numpy(), problem.diagonal.numpy()
        height = float(np.abs(b).max(initial=0.0)) or 1.0
        relative = b / height
        quality = np.maximum(relative, 0.0) if self.quality == "positive" else np.exp(self.relevance * (relative - 1))
        movable = diagonal > 0
        return np.divide(quality, np.sqrt(np.where(movable, diagonal, 1.0)), out=np.zeros(b.size), where=movable)


def _most_likely(problem: SelectionProblem, scale: Vector) -> list[int]:
    """Greedy maximisation of log det L_S (Chen et al. 2018, algorithm 1)."""
    column = gram_columns(problem)
    remainder = problem.diagonal.numpy() * scale * scale  # d_i^2: what candidate i would multiply the determinant with
    least = _NOTHING_NEW * remainder
    rows = np.zeros((problem.budget, scale.size))  # rows[:, i] is c_i of the paper
    chosen: list[int] = []
    for step in range(problem.budget):
        left = np.where(remainder > least, remainder, 0.0)
        best = int(np.argmax(left)) if left.size else 0
        if not left.size or not left[best] > 0:
            break
        image = scale * column(best) * scale[best]
        rows[step] = (image - rows[:step, best] @ rows[:step]) / np.sqrt(remainder[best])
        remainder = remainder - rows[step] ** 2
        remainder[best] = 0.0
        chosen.append(best)
    return chosen


_NOTHING_NEW = 1e-10
"""Part of a candidate's squared length below which what the chosen leave of it is taken for rounding."""


def _eigen(problem: SelectionProblem, scale: Vector) -> tuple[Vector, Matrix]:  # (m,), (n, m), m = rank(L)
    """Eigenvalues above rounding and eigenvectors of L, of any length."""
    if not scale.size:
        return scale, np.zeros((0, 0))
    if problem.factor is not None and problem.factor.shape[1] < scale.size:
        B = scale[:, None] * problem.factor.numpy()  # L = B B'
        values, vectors = np.linalg.eigh(B.T @ B)
        kept = values > scale.size * EPSILON * values.max(initial=0.0)
        return values[kept], B @ vectors[:, kept]
    values, vectors = np.linalg.eigh(scale[:, None] * problem.full_gram.numpy() * scale)
    kept = values > scale.size * EPSILON * values.max()
    return values[kept], vectors[:, kept]


def _eigenvectors_drawn(values: Vector, count: int, draws: Vector) -> list[int]:
    """`count` eigenvectors with odds that are the product of their values (Kulesza and Taskar 2012, algorithm 8)."""
    logs = np.log(values / values.max(initial=0.0)) if values.size else values
    table = np.full((values.size + 1, count + 1), -np.inf)  # [i, l]: log e_l of the first i eigenvalues
    table[:, 0] = 0.0
    for i, log in enumerate(logs):
        table[i + 1, 1:] = np.logaddexp(table[i, 1:], log + table[i, :-1])
    chosen: list[int] = []
    for i in range(values.size, 0, -1):
        left = count - len(chosen)
        if not left:
            break
        odds = np.exp(logs[i - 1] + table[i - 1, left - 1] - table[i, left])
        if left == i or draws[i - 1] < odds:
            chosen.append(i - 1)
    return chosen


def _items_drawn(vectors: Matrix, draws: Vector) -> list[int]:  # vectors: (n, q), draws: (q,)
    """Items of the projection process on the span of q eigenvectors, exactly q of them."""
    basis = np.linalg.qr(vectors)[0] if vectors.size else vectors  # orthonormal to the last digit
    remainder = (basis * basis).sum(1)
    rows = np.zeros((draws.size, len(vectors)))
    chosen: list[int] = []
    for step, draw in enumerate(draws):
        odds = np.maximum(remainder, 0.0)
        odds[chosen] = 0.0
        reached = np.cumsum(odds)
        item = int(np.searchsorted(reached, draw * reached[-1], side="right"))
        item = min(item, int(np.flatnonzero(odds)[-1]))  # the product may round up to the total
        rows[step] = (basis @ basis[item] - rows[:step, item] @ rows[:step]) / np.sqrt(remainder[item])
        remainder = remainder - rows[step] ** 2
        chosen.append(item)
    return chosen
