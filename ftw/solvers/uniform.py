"""Equal weights on the chosen candidates: the baseline of every comparison with a weight solver."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from torch import Tensor

from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver, infeasible
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.gram import LowRank
from ftw.solvers.polyhedron import Polyhedron
from ftw.solvers.scaling import UnitProblem


class Uniform(WeightSolver):
    """The same weight for everybody, whatever K and b: 1, or what the set's total asks for.

    Equal weights are not meant to minimise the objective, so `optimal` here means: they are in the set. That is
    what `tolerance = inf` says, and the base class's law holds with it. `kkt_residual` is of the real objective
    all the same, and shows how much a weight solver could still gain. Equal weights that the set does not hold
    (a cap below them) are status `infeasible`.
    """

    tolerance: float = math.inf
    needs_gram: ClassVar[bool] = False
    takes_factor: ClassVar[bool] = True

    def _solve(self, gram: Tensor | LowRank, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        n = alignment.numel()
        if constraints.feasible(n):
            polyhedron = constraints.polyhedron(n)
            weights = np.full(n, _common_weight(polyhedron))
            if polyhedron.violation(weights) <= _INSIDE:
                problem = UnitProblem.of(gram, alignment, constraints)
                return problem.solution(weights / problem.unit, Status.OPTIMAL)
        return infeasible(alignment)


_INSIDE = 1e-9
"""Relative, as `ConstraintSet.contains` has it."""


def _common_weight(polyhedron: Polyhedron) -> float:
    """The one value that satisfies the first equality (the others are checked by membership); 1 without any."""
    if not len(polyhedron.values):
        return 1.0
    size = float(np.sum(polyhedron.rows[0]))
    return float(polyhedron.values[0]) / size if size else 0.0
