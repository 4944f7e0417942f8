"""The interface of weight solvers: the weights of the chosen candidates. Called by the selector, once a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigurationError, SolverError
from ftw.problem import Solution, Status, as_gram, as_numbers, as_vector
from ftw.solvers.certificate import certify
from ftw.solvers.constraints import ConstraintSet, NonNegative, require_set
from ftw.solvers.gram import LowRank


class WeightSolver(ABC):
    """Minimises `1/2 w'Kw - b'w` over a convex set of weights.

    Law: a solution with status `optimal` lies in the set and its `kkt_residual` is at most the solver's
    `tolerance`, for every symmetric positive semidefinite K, singular ones included.
    """

    tolerance: float = 1e-8
    """Largest relative KKT residual that is called optimal."""

    needs_gram: ClassVar[bool] = True
    """Whether the weights are other than equal; those of a solver that says no can do without K."""

    takes_factor: ClassVar[bool] = False
    """Whether `_solve` may be given a `LowRank` in the place of K; for the others it is multiplied out."""

    takes_start: ClassVar[bool] = False
    """Whether `_solve` takes weights to start from, as its keyword `start`."""

    def solve(
        self,
        gram: Tensor | LowRank,  # K, (m, m)
        alignment: Tensor,  # b, (m,)
        constraints: ConstraintSet | None = None,
        *,
        start: Tensor | None = None,  # (m,)
        throw: bool = True,
    ) -> Solution:
        """Weights for m candidates.

        Args:
            gram: K, symmetric positive semidefinite, converted to float64 on the CPU; or a `LowRank`.
            alignment: b, in the units of K times weight.
            constraints: the set of allowed weights; `NonNegative()` by default.
            start: weights near the solution, such as those of the last step, in the set or not. The solution does not
                depend on them beyond the tolerance; where several weights are optimal, it may be another of these.
            throw: raise `SolverError` unless the status is `optimal` or `inaccurate`.

        Raises:
            ConfigurationError: shapes that do not fit, non-finite, asymmetric or clearly indefinite input, a set that
                this solver cannot honour, or a start for one that does not iterate (`takes_start`).
            SolverError: see `throw`.
        """
        vector = as_vector("alignment", alignment)
        matrix = _checked(gram, vector.numel())
        options: dict[str, Any] = {}
        if start is not None:
            if not self.takes_start:
                raise ConfigurationError(
                    f"{type(self).__name__} was given weights to start from; it does not iterate from any; "
                    "leave start out, or use the solver 'pgd'."
                )
            options["start"] = as_vector("start", start)
            if len(options["start"]) != len(vector):
                raise ConfigurationError(
                    f"start has {len(options['start'])} entries for {len(vector)} candidates; one each is needed; "
                    "index it like the candidates."
                )
        allowed = NonNegative() if constraints is None else constraints
        require_set(allowed)
        given = matrix.dense() if isinstance(matrix, LowRank) and not self.takes_factor else matrix
        solution = self._solve(given, vector, allowed, **options)  # type: ignore[arg-type]
        if math.isnan(solution.primal_residual) and solution.weights.shape == vector.shape:
            found = certify(matrix, vector, allowed, solution.weights)
            solution = replace(
                solution,
                primal_residual=found.primal_residual,
                dual_residual=found.dual_residual,
                complementarity=found.complementarity,
            )
        if throw and solution.status not in (Status.OPTIMAL, Status.INACCURATE):
            raise SolverError(f"{type(self).__name__}: {solution.status}. {solution.status.sentence}")
        return solution

    @abstractmethod
    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        """As `solve`, on checked float64 input. `solve` adds the residuals that the solution lacks."""


def require_positive(**values: float) -> None:
    """Refuses options of a solver that are not positive."""
    numbers = {name: isinstance(value, (int, float)) and not isinstance(value, bool) for name, value in values.items()}
    wrong = {name: value for name, value in values.items() if not (numbers[name] and value > 0)}
    if wrong:
        raise ConfigurationError(
            f"{', '.join(f'{name} is {value!r}' for name, value in wrong.items())}; a positive number is needed; "
            "leave it out for the default."
        )


def require_count(**values: int) -> None:
    """Refuses options of a solver that are no integers of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(
                f"{name} is {value!r}; an integer of at least 1 is needed; leave it out for the default."
            )


def infeasible(alignment: Tensor) -> Solution:
    """What every solver returns where the set is empty."""
    return Solution(torch.zeros_like(alignment), Status.INFEASIBLE, math.inf, 0, math.inf, math.inf, math.inf)


def _checked(gram: Tensor | LowRank, n: int) -> Tensor | LowRank:
    """K in float64 on the CPU: symmetric, finite and not clearly indefinite."""
    if isinstance(gram, LowRank):
        if len(gram.factor) != n:
            raise ConfigurationError(
                f"factor has {len(gram.factor)} rows for {n} candidates; one each is needed; index it like the "
                "candidates."
            )
        return gram
    matrix = as_numbers("gram", gram)
    # What as_gram does takes more time than many a solve; nothing is left for it to do on what passes here.
    if tuple(matrix.shape) != (n, n) or not math.isfinite(float(matrix.sum())) or not _symmetric(matrix.numpy()):
        matrix = as_gram(matrix, n)
    _require_semidefinite(matrix.numpy())
    return matrix


def _symmetric(matrix: np.ndarray) -> bool:
    """To the bit; by blocks that fit the cache, since reading a large matrix by columns takes long."""
    n, size = len(matrix), 128
    for i in range(0, n, size):
        for j in range(i, n, size):
            if not np.array_equal(matrix[i : i + size, j : j + size], matrix[j : j + size, i : i + size].T):
                return False
    return True


def _require_semidefinite(gram: np.ndarray) -> None:
    """Refuses K with an eigenvalue below -1e-4 trace(K): more than the rounding of half-precision contributions.

    On such a K the objective has a saddle or no minimum, and a stationary point would pass for an optimum.
    """
    trace = float(gram.trace())
    size = trace if trace > 0 else float(np.abs(gram).max(initial=0.0))
    if not size:
        return
    # Single precision is exact enough to acquit, and twice as fast; double precision has the last word.
    if not any(_has_factor(gram, size, kind) for kind in (np.float32, np.float64)):
        lowest = float(np.linalg.eigvalsh(gram)[0])
        raise ConfigurationError(
            f"gram has the eigenvalue {lowest:.1e} at a trace of {trace:.1e}; it must be positive semidefinite; "
            "pass K = C'MC with M positive semidefinite."
        )


def _has_factor(gram: np.ndarray, size: float, kind: type) -> bool:
    from scipy.linalg import lapack  # four fifths of the time that importing ftw would take

    shifted = np.divide(gram, size).astype(kind, copy=False)
    shifted.flat[:: len(gram) + 1] += _INDEFINITE
    potrf = lapack.spotrf if kind is np.float32 else lapack.dpotrf
    return int(potrf(shifted.T, lower=0, clean=0, overwrite_a=1)[1]) == 0


_INDEFINITE = 1e-4
