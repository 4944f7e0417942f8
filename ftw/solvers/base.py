"""The interface of weight solvers: the weights of the chosen candidates. Called by the selector, once a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ftw.errors import ConfigurationError, SolverError
from ftw.problem import Solution, Status, as_gram, as_vector
from ftw.solvers.constraints import ConstraintSet, NonNegative


class WeightSolver(ABC):
    """Minimises `1/2 w'Kw - b'w` over a convex set of weights.

    Law: a solution with status `optimal` lies in the set and its `kkt_residual` is at most the solver's
    `tolerance`, for every symmetric positive semidefinite K, singular ones included.
    """

    tolerance: float = 1e-8
    """Largest relative KKT residual that is called optimal."""

    needs_gram: ClassVar[bool] = True
    """Whether the weights depend on K; those of one that says no are equal."""

    def solve(
        self,
        gram: Tensor,  # K, (m, m)
        alignment: Tensor,  # b, (m,)
        constraints: ConstraintSet | None = None,
        *,
        throw: bool = True,
    ) -> Solution:
        """Weights for m candidates.

        Args:
            gram: K, symmetric positive semidefinite; converted to float64 on the CPU.
            alignment: b, in the units of K times weight.
            constraints: the set of allowed weights; `NonNegative()` by default.
            throw: raise `SolverError` unless the status is `optimal` or `inaccurate`.

        Raises:
            ConfigurationError: shapes that do not fit, non-finite, asymmetric or clearly indefinite input, or a
                set that this solver cannot honour.
            SolverError: see `throw`.
        """
        vector = as_vector("alignment", alignment)
        matrix = as_gram(gram, vector.numel())
        _require_semidefinite(matrix)
        solution = self._solve(matrix, vector, NonNegative() if constraints is None else constraints)
        if throw and solution.status not in (Status.OPTIMAL, Status.INACCURATE):
            raise SolverError(f"{type(self).__name__}: {solution.status}. {solution.status.sentence}")
        return solution

    @abstractmethod
    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        """As `solve`, on checked float64 input."""


def _require_semidefinite(gram: Tensor) -> None:
    """Refuses K with an eigenvalue below -1e-4 trace(K): more than the rounding of half-precision contributions.

    On such a K the objective has a saddle or no minimum, and a stationary point would pass for an optimum.
    """
    trace = float(gram.diagonal().sum())
    size = trace if trace > 0 else float(gram.abs().max()) if gram.numel() else 0.0
    if not size:
        return
    shifted = gram / size
    shifted.diagonal().add_(_INDEFINITE)
    if int(torch.linalg.cholesky_ex(shifted).info):
        lowest = float(torch.linalg.eigvalsh(gram)[0])
        raise ConfigurationError(
            f"gram has the eigenvalue {lowest:.1e} at a trace of {trace:.1e}; it must be positive semidefinite; "
            "pass K = C'MC with M positive semidefinite."
        )


_INDEFINITE = 1e-4
