"""Matching pursuit with a non-negative refit: candidates are chosen for what the others leave to be done."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftw.arguments import one_of
from ftw.filters.base import Filter
from ftw.filters.gram_columns import gram_columns
from ftw.filters.refit import ROUNDING, descend, non_negative
from ftw.problem import SelectionProblem
from ftw.solvers.polyhedron import Matrix, Vector

Flags = NDArray[np.bool_]

GAINS = ("alone", "refit")


class Greedy(Filter):
    """Adds, one at a time, the candidate that lowers `1/2 w'Kw - b'w` most, and refits all weights in between.

    With `r = b - K_S w_S` (what the chosen leave unmatched), candidate j alone lowers the objective by
    `(r_j)_+^2 / (2 K_jj)`. After each choice `w_S >= 0` is refitted exactly; a candidate whose weight falls to 0
    is dropped and no longer counts towards the budget. Ends at the budget, or as soon as no r_j is positive
    beyond rounding: then the pool has nothing to add, and fewer than k are returned.

    With `gain="refit"` the choice is by the exact objective, all weights refitted with j among them (forward
    selection). Without bounds on w_S that would be `r_j^2 / (2 K_jj.S)`, K_jj.S what the chosen leave of K_jj; it is an
    upper bound with them, and candidates are refitted in its order for as long as it exceeds the best found.

    Source: orthogonal matching pursuit as in GRAD-MATCH (Killamsetty et al. 2021, algorithm 2), which `OMP` has as it
    stands there. Deviations: r_j is divided by `K_jj`, so a candidate is not chosen for being long; the refit is
    non-negative and without ridge; a candidate of no more use is given back.
    Except for the rule of choice this is Lawson and Hanson's NNLS: the objective falls with every choice, no set
    comes twice, and so a dropped candidate may return but nothing cycles.

    A candidate with K_jj = 0 does not move the model and is never chosen. Cost: k columns of K, O(n r) each where the
    problem has a factor; O(n k) per choice for the residual, and as much again with "refit"; k solves of at most k
    unknowns, with "refit" a few times as many.

    Args:
        gain: by what the next is chosen, "alone" (the others' weights as they are) or "refit".

    Raises:
        ConfigurationError: `gain` is neither.
    """

    needs_gram = True

    def __init__(self, gain: str = "alone") -> None:
        one_of("gain", gain, GAINS)
        self.gain = gain

    def __call__(self, problem: SelectionProblem) -> Tensor:
        pursuit = _Pursuit.of(problem, _Left(problem) if self.gain == "refit" else None)
        while len(pursuit.chosen) < problem.budget and pursuit.add():
            pass
        return torch.tensor(pursuit.chosen, dtype=torch.long)


class _Left:
    """What the chosen leave of every K_jj, by Cholesky updates: `K_jj - K_jS K_SS^-1 K_Sj`."""

    def __init__(self, problem: SelectionProblem) -> None:
        self._diagonal = problem.diagonal.numpy()
        self._rows = np.empty((problem.budget, problem.size))
        self._count = 0
        self.values = self._diagonal.copy()

    def take(self, chosen: list[int], rows: Matrix) -> None:
        """The chosen are now these, with `rows` = K[chosen]: one more than before, or others altogether."""
        if len(chosen) != self._count + 1:
            self._count, self.values = 0, self._diagonal.copy()
        for i in range(self._count, len(chosen)):
            known, j = self._rows[:i], chosen[i]
            # All but nothing may be left of j; the bound that is made of it is checked by a refit, and so may be off.
            pivot = math.sqrt(max(float(self.values[j]), ROUNDING * float(self._diagonal[j])))
            self._rows[i] = (rows[i] - known[:, j] @ known) / pivot
            self.values -= self._rows[i] ** 2
        self._count = len(chosen)


class _Pursuit:
    """The chosen, all of positive weight, and K[chosen]."""

    def __init__(self, problem: SelectionProblem, b: Vector, left: _Left | None) -> None:
        self.b, self.diagonal, self.left = b, problem.diagonal.numpy(), left
        self._column = gram_columns(problem)
        self._room = np.empty((problem.budget, b.size))
        self.on_offer: Flags = self.diagonal > 0
        self.chosen: list[int] = []
        self.weights: Vector = np.zeros(0)

    @classmethod
    def of(cls, problem: SelectionProblem, left: _Left | None) -> _Pursuit:
        b = problem.alignment.numpy()
        # A power of two, which changes no digit: squares of large alignments would overflow.
        return cls(problem, np.ldexp(b, -math.frexp(float(np.abs(b).max(initial=0.0)))[1]), left)

    @property
    def rows(self) -> Matrix:
        """K[chosen]."""
        return self._room[: len(self.chosen)]

    def add(self) -> bool:
        """Takes up the best candidate; False if there is none."""
        residual = self.b - self.weights @ self.rows
        best = self._best_alone(residual) if self.left is None else self._best_refitted(residual, self.left.values)
        if best is None:
            return False
        self._room[len(self.chosen)] = self._column(best)
        grown = [*self.chosen, best]
        block, right = self._room[: len(grown)][:, grown], self.b[grown]
        start = np.append(self.weights, 0.0)
        if self.left is None:
            kept, weights = descend(block, right, start)
        else:
            weights = non_negative(block, right, start)
            kept, weights = np.flatnonzero(weights).tolist(), weights[weights > 0]
        if len(self.chosen) not in kept:
            # Only rounding does this: its slope was positive. Passing it over keeps the loop finite.
            self.on_offer[best] = False
            return True
        if len(kept) < len(grown):
            self.on_offer[self.chosen] = True
            self._room[: len(kept)] = self._room[kept]
        self.chosen, self.weights = [grown[i] for i in kept], weights
        self.on_offer[self.chosen] = False
        if self.left is not None:
            self.left.take(self.chosen, self.rows)
        return True

    def _best_alone(self, residual: Vector) -> int | None:
        """The candidate of the largest gain among those whose residual is positive beyond rounding."""
        useful = self.on_offer & (residual > 0)
        if not useful.any():
            return None
        gain = np.full(self.b.size, -np.inf)
        # The quotient first: the square of a small residual would underflow.
        gain[useful] = residual[useful] * (residual[useful] / self.diagonal[useful])
        best = int(np.argmax(gain))
        if residual[best] > ROUNDING * (abs(self.b[best]) + float(self.weights @ np.abs(self.rows[:, best]))):
            return best
        useful = self._useful(residual)  # O(n k), and mostly not needed
        gain[~useful] = -np.inf
        return int(np.argmax(gain)) if useful.any() else None

    def _useful(self, residual: Vector) -> Flags:
        positive: Flags = residual > ROUNDING * (np.abs(self.b) + self.weights @ np.abs(self.rows))
        return positive & self.on_offer

    def _best_refitted(self, residual: Vector, left: Vector) -> int | None:
        """The candidate with which all refitted weights gain most, equal ones by position."""
        useful = np.flatnonzero(self._useful(residual))
        least = np.maximum(left[useful], ROUNDING * self.diagonal[useful])
        bounds = residual[useful] * (residual[useful] / least) / 2
        found: list[tuple[float, int]] = []
        top = 0.0
        for i in np.argsort(-bounds, kind="stable"):
            if bounds[i] < (1 - _EQUAL) * top:
                break
            gain = self._gain(int(useful[i]), residual)
            top = max(top, gain)
            found.append((gain, int(useful[i])))
        return min((j for gain, j in found if gain >= (1 - _EQUAL) * top), default=None)

    def _gain(self, j: int, residual: Vector) -> float:
        """Of the objective, by j and a refit; needs no column of K beyond those of the chosen."""
        grown, m = [*self.chosen, j], len(self.chosen)
        block = np.empty((m + 1, m + 1))
        block[:m] = self.rows[:, grown]
        block[m, :m], block[m, m] = block[:m, m], self.diagonal[j]
        move = non_negative(block, self.b[grown], np.append(self.weights, 0.0))
        move[:m] -= self.weights
        return float(residual[grown] @ move - move @ block @ move / 2)


_EQUAL = 1e-10
"""Part within which two gains count as equal."""
