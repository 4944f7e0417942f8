"""Weights by alignment alone, exponentially: the smooth sibling of top-k with equal weights."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver, infeasible, require_positive
from ftw.solvers.constraints import ROUNDING, ConstraintSet
from ftw.solvers.entropy import positive, scale_to_total
from ftw.solvers.gram import LowRank
from ftw.solvers.polyhedron import Polyhedron, Vector
from ftw.solvers.scaling import UnitProblem


class Softmax(WeightSolver):
    """`w_i` proportional to `exp(b_i / (temperature * s))`, s the standard deviation of b; K is for the certificate.

    The weights have the set's total, or the mean 1 on sets without one; weights that would exceed a cap stay at it, and
    the others share the rest in the same proportions. That is the maximiser of `b'w - temperature * s * sum mu_i w_i
    log w_i` over the weights with that total (mu: the set's mass).

    `optimal` means: by this rule, and in the set. As with `Uniform`, `tolerance = inf` says so, and `kkt_residual` of
    the real objective shows what a weight solver could still gain. No weights of that total in a box: `infeasible`.

    Source: Boltzmann weights, as in OPUS's sampling. Deviation: the temperature counts standard deviations of b over
    the candidates at hand, so that the weights depend on no scale.

    Args:
        temperature: towards 0 the best candidate takes all, towards infinity weights are equal.

    Raises:
        ConfigurationError: a temperature that is not positive, or a set with other rows than one positive total, such
            as a quota, which the rule cannot keep.
    """

    tolerance: float = math.inf
    takes_factor: ClassVar[bool] = True

    def __init__(self, temperature: float = 1.0) -> None:
        require_positive(temperature=temperature)
        self.temperature = temperature

    def _solve(self, gram: Tensor | LowRank, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return infeasible(alignment)
        polyhedron = constraints.polyhedron(n)
        row, total, cap = budget_of(type(self).__name__, constraints, polyhedron)
        if np.any(polyhedron.lower > 0):
            raise ConfigurationError(
                f"Softmax was given {constraints!r}; it can keep caps, and no bounds above 0; use the solver 'pgd' for "
                "those."
            )
        if n and float(row @ cap) < total * (1 - ROUNDING):  # a box too small for the mean 1
            return infeasible(alignment)
        weights = (
            scale_to_total(_exponentials(alignment.numpy(), self.temperature), cap, row, total) if n else np.zeros(0)
        )
        problem = UnitProblem.of(gram, alignment, constraints)
        return problem.solution(weights / problem.unit, Status.OPTIMAL)


def budget_of(who: str, constraints: ConstraintSet, polyhedron: Polyhedron) -> tuple[Vector, float, Vector]:
    """A positive row, (n,), its total and the caps, (n,), of a set; ones and n where it has no total.

    Raises:
        ConfigurationError: the set has other rows, or more.
    """
    n, rows = polyhedron.lower.size, polyhedron.rows
    if len(polyhedron.sides) or len(rows) > 1 or np.any(rows <= 0):
        raise ConfigurationError(
            f"{who} was given {constraints!r}; it can keep bounds and one total of positive masses; use the solver "
            "'pgd' for quotas and other rows."
        )
    if len(rows):
        return rows[0], float(polyhedron.values[0]), polyhedron.upper
    cap = polyhedron.share * n if math.isfinite(polyhedron.share) else math.inf
    return np.ones(n), float(n), np.minimum(polyhedron.upper, cap)


def _exponentials(alignment: Vector, temperature: float) -> Vector:
    if not alignment.size:
        return alignment
    above = alignment - alignment.max()
    largest = float(np.abs(above).max())
    spread = largest * float(np.std(above / largest)) if largest else 0.0
    return positive(np.exp(above / (temperature * spread))) if spread else np.ones_like(alignment)
