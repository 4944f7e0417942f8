"""The weights that serve the worst served of several targets best: a QP with one variable more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigurationError, SolverError
from ftw.problem import Solution, Status, as_columns, as_gram, as_numbers, as_vector
from ftw.solvers.base import WeightSolver, infeasible
from ftw.solvers.constraints import ConstraintSet, NonNegative, require_set
from ftw.solvers.gram import LowRank, largest_exponent
from ftw.solvers.linear_sets import Linear
from ftw.solvers.polyhedron import Matrix, Polyhedron, Vector
from ftw.solvers.projected_gradient import ProjectedGradient
from ftw.solvers.scaling import UnitProblem


@dataclass(frozen=True)
class WorstCase(Solution):
    """A solution over several targets.

    Attributes:
        values: (m,), `b_j'w`: what the weights bring each target, to first order.
        mixture: (m,), at least 0, sum 1: the multipliers of the targets. The weights are optimal for the one alignment
            `B mixture`, too, and targets with a positive share are those served worst.
    """

    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    mixture: Tensor = field(default_factory=lambda: torch.zeros(0))


def solve_worst_case(
    gram: Tensor | LowRank,  # K, (n, n)
    alignments: Tensor,  # B, (n, m)
    constraints: ConstraintSet | None = None,
    solver: WeightSolver | None = None,
    *,
    start: Tensor | None = None,  # (n,)
    throw: bool = True,
) -> WorstCase:
    """`max_w min_j b_j'w - 1/2 w'Kw` over the set: the worst case over m targets, each b_j a column of B.

    The epigraph form `max t - 1/2 w'Kw`, `b_j'w >= t`, is a QP in (w, t) over a `Linear` set, which any solver that
    honours such sets can solve. Its certificate is of that problem. For weighted sums of targets pass `B @ shares` to
    `WeightSolver.solve`; for none made worse, the set `NoHarm`.

    Args:
        constraints: the set of w; `NonNegative()` by default.
        solver: `ProjectedGradient()` by default.
        start, throw: as for `WeightSolver.solve`.

    Raises:
        ConfigurationError, SolverError: as `WeightSolver.solve`; also if there is no target.
    """
    given = as_numbers("alignments", alignments)
    columns = as_columns("alignments", given, len(given) if given.dim() else 0)
    n, m = columns.shape
    if not m:
        raise ConfigurationError(
            f"alignments have shape ({n}, 0); at least one target is needed; pass a column for each."
        )
    base = NonNegative() if constraints is None else constraints
    require_set(base)
    solver = ProjectedGradient() if solver is None else solver
    if not base.feasible(n):
        if throw:
            raise SolverError(f"{type(solver).__name__}: {Status.INFEASIBLE}. {Status.INFEASIBLE.sentence}")
        return WorstCase(**vars(infeasible(columns[:, 0])), values=torch.zeros(m), mixture=torch.zeros(m))
    exponent = largest_exponent(columns.numpy())
    unit = math.ldexp(1.0, exponent or 0)  # t counts in it, so as to be of the size of the weights
    lifted, level = _epigraph(base, columns.numpy() / unit), torch.zeros(n + 1, dtype=torch.float64)
    level[n] = unit
    K = _with_zero(gram, n)
    first = None
    if start is not None:
        near = as_vector("start", start)
        first = torch.cat((near, (near @ columns / unit).min()[None])) if len(near) == n else near
    solution = solver.solve(K, level, lifted, start=first, throw=throw)
    weights = solution.weights[:n]
    return WorstCase(
        **(vars(solution) | {"weights": weights}),
        values=columns.T @ weights,
        mixture=_mixture(K, level, lifted, solution.weights, m),
    )


def _epigraph(base: ConstraintSet, columns: Matrix) -> Linear:
    """(w, t) with w in the base and `columns' w >= t`."""
    n, m = columns.shape
    rows, least, most = np.zeros((0, n)), np.zeros(0), np.zeros(0)
    if isinstance(base, Linear):
        rows, least, most, base = base.rows, base.least, base.most, base.base
    rows = np.concatenate((np.column_stack((rows, np.zeros(len(rows)))), np.column_stack((columns.T, -np.ones(m)))))
    least, most = np.concatenate((least, np.zeros(m))), np.concatenate((most, np.full(m, math.inf)))
    return Linear(_WithLevel(base, columns), rows, least, most)


class _WithLevel(ConstraintSet):
    """(w, t) with w in a set; t is free, but for a bound that it cannot reach where the set is bounded."""

    def __init__(self, base: ConstraintSet, columns: Matrix) -> None:
        self.base = base
        reach = 2 * base.polyhedron(len(columns)).radius * math.sqrt(float((columns * columns).sum(0).max(initial=0.0)))
        self.reach = reach if 0 < reach < math.inf else math.inf

    def __repr__(self) -> str:
        return f"{self.base!r} with the level of several targets"

    def feasible(self, n: int) -> bool:
        return self.base.feasible(n - 1)

    def project_array(self, point: Vector) -> Vector:
        level = min(max(float(point[-1]), -self.reach), self.reach)
        return np.append(self.base.project_array(point[:-1]), level)

    def polyhedron(self, n: int) -> Polyhedron:
        inner = self.base.polyhedron(n - 1)
        return replace(
            inner,
            lower=np.append(inner.lower, -self.reach),
            upper=np.append(inner.upper, self.reach),
            rows=np.column_stack((inner.rows, np.zeros(len(inner.rows)))),
            sides=np.column_stack((inner.sides, np.zeros(len(inner.sides)))),
            members=np.append(inner.members, 0.0),
        )


def _with_zero(gram: Tensor | LowRank, n: int) -> Tensor | LowRank:
    """K with a row and a column of zeros for the level."""
    if isinstance(gram, LowRank):
        if not gram.ridge:
            return LowRank(torch.cat((gram.factor, torch.zeros_like(gram.factor[:1]))))
        gram = gram.dense()
    return torch.nn.functional.pad(as_gram(gram, n), (0, 1, 0, 1))


def _mixture(gram: Tensor | LowRank, level: Tensor, lifted: Linear, weights: Tensor, m: int) -> Tensor:
    """The targets' multipliers at the projection that certifies the weights."""
    if not bool(torch.isfinite(weights).all()):
        return torch.zeros(m, dtype=level.dtype)
    problem = UnitProblem.of(gram, level, lifted)
    point = weights.numpy() / problem.unit
    omega, gamma = problem.sizes(point)
    step = omega / gamma
    multipliers = lifted.project_with_multipliers((point - step * problem.gradient(point)) * problem.unit)[1][-m:]
    shares = torch.from_numpy(np.maximum(-multipliers, 0.0))
    total = shares.sum()
    return shares / total if total > 0 else shares
