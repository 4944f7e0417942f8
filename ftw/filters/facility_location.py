"""CRAIG: candidates that stand near all the others."""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

from ftw.filters.base import Filter
from ftw.filters.gram_columns import gram_columns
from ftw.problem import SelectionProblem
from ftw.solvers.polyhedron import Matrix, Vector


class FacilityLocation(Filter):
    """Adds, one at a time, the candidate that shortens most the way from everyone to their nearest chosen one.

    Maximises `sum_i max_{j in S} (d_0 - d_ij)`, `d_ij = ||c_i - c_j||_M = sqrt(K_ii + K_jj - 2 K_ij)`, greedily, which
    comes within 1 - 1/e of the best set of that size. `d_0 = 2 max_i ||c_i||_M` is at least every d_ij, and no choice
    depends on it. Equal gains go by position. Ends at k, or once every candidate has a chosen one in its place.

    Source: Mirzasoleiman et al. 2020, "Coresets for data-efficient training of machine learning models" (CRAIG),
    section 3.2 and algorithm 1; lazy evaluation: Minoux 1978. Deviations: distances are between contributions under M,
    not between gradients of the last layer; the weights of the paper, how many candidates are nearest to each chosen
    one, are not handed on, because the weight solver sets the weights. The target plays no part: the chosen stand for
    the pool, whatever the pool is good for.

    The loss's scale changes nothing. Cost: n columns of K for the first choice, then as many as bounds leave in
    doubt, mostly few; n numbers of memory for each, O(n r) time with a factor.
    """

    needs_gram = True

    def __call__(self, problem: SelectionProblem) -> Tensor:
        n = problem.size
        distances = _Distances(problem)
        if not distances.longest > 0 or not problem.budget:
            return torch.zeros(0, dtype=torch.long)
        ways = np.full(n, 2 * distances.longest)  # to the nearest chosen one
        gains = [gain for start in range(0, n, _BLOCK) for gain in distances.first_gains(start)]
        least = _ROUNDING * max(gains)
        bounds = [(-gain, j) for j, gain in enumerate(gains)]  # gains only fall as S grows: old ones are bounds
        heapq.heapify(bounds)
        known = [0] * n  # how many were chosen when the bound was computed
        chosen: list[int] = []
        while len(chosen) < problem.budget:
            best, ready = 0.0, []
            while bounds and -bounds[0][0] >= (1 - _ROUNDING) * best:
                gain, j = -bounds[0][0], heapq.heappop(bounds)[1]
                if known[j] < len(chosen):
                    gain, known[j] = _gain(ways, distances.of(j)), len(chosen)
                best = max(best, gain)
                ready.append((-gain, j))
            if best <= least:
                break
            # Two that are nearest to each other gain the same: rounding must not decide between them.
            pick = min(j for gain, j in ready if -gain >= (1 - _ROUNDING) * best)
            chosen.append(pick)
            ways = np.minimum(ways, distances.of(pick))
            for each in ready:
                if each[1] != pick:
                    heapq.heappush(bounds, each)
        return torch.tensor(chosen, dtype=torch.long)


class _Distances:
    """Columns of d_ij."""

    def __init__(self, problem: SelectionProblem) -> None:
        self._problem, self._column = problem, gram_columns(problem)
        self._squares = problem.diagonal.numpy()
        self.longest = float(np.sqrt(self._squares.max(initial=0.0)))

    def of(self, j: int) -> Vector:  # (n,)
        return _apart(self._squares + self._squares[j], self._column(j))

    def first_gains(self, start: int) -> list[float]:
        """`sum_i (d_0 - d_ij)` for the candidates j of a block, all at once: a product of matrices is faster."""
        block = torch.arange(start, min(start + _BLOCK, self._squares.size))
        products = self._problem.columns(block).numpy()  # (n, block)
        gains = 2 * self.longest - _apart(self._squares[:, None] + self._squares[block.numpy()], products)
        found: list[float] = gains.sum(0).tolist()
        return found


_BLOCK = 64
"""Columns of distances held at once."""

_ROUNDING = 1e-12
"""Part of the terms of a difference that is taken for rounding."""


def _apart(both: Matrix, products: Matrix) -> Matrix:  # of one shape
    """d_ij from `K_ii + K_jj` and K_ij."""
    squares = both - 2 * products
    return np.sqrt(np.where(squares > _ROUNDING * both, squares, 0.0))


def _gain(ways: Vector, distances: Vector) -> float:
    return float(np.maximum(ways - distances, 0.0).sum())
