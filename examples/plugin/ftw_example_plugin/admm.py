"""A weight solver by operator splitting, for every constraint set that has a projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import Solution, Status
from ftw.solvers import ConstraintSet, WeightSolver, kkt_residual


class ADMM(WeightSolver):
    """Minimises `1/2 w'Kw - b'w` over a set C by the alternating direction method of multipliers.

    With the splitting w = z (Boyd et al., 2011, section 5.2), rho > 0 and the scaled dual u,

        w <- (K + rho I)^-1 (b + rho (z - u))      the objective's part
        z <- P_C(a w + (1-a) z + u)                the set's part, relaxed by a = 1.6
        u <- u + a w + (1-a) z_old - z

    converges for every symmetric positive semidefinite K for which there is an optimum. K is diagonalised
    once, so that rho can follow the balance of the primal and the dual residual at no cost (ibid., section
    3.4.1; it is fixed after `_ADAPT` iterations, which the proof of convergence asks for). z is returned,
    which lies in C exactly; it is called optimal by its KKT residual alone, whatever those two say.

    Args:
        max_iterations: after which the best z so far is returned as `inaccurate`.
        tolerance: largest `kkt_residual` called optimal.
    """

    def __init__(self, max_iterations: int = 5_000, tolerance: float = 1e-8) -> None:
        if max_iterations < 1 or not tolerance > 0:
            raise ConfigurationError(
                f"max_iterations is {max_iterations!r}, tolerance {tolerance!r}; both must be positive; "
                "leave them out for the defaults."
            )
        self.max_iterations = max_iterations
        self.tolerance = tolerance

    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return Solution(torch.zeros_like(alignment), Status.INFEASIBLE, math.inf)
        best = constraints.project(torch.zeros_like(alignment))
        residual = kkt_residual(gram, alignment, constraints, best)
        if residual <= self.tolerance or n == 0:
            return Solution(best, Status.OPTIMAL, residual)

        eigenvalues, basis = torch.linalg.eigh(gram)
        largest = float(eigenvalues[-1])
        rotated = basis.T @ alignment
        z, dual = best, torch.zeros_like(best)
        rho = self._first_rho(largest, float(alignment.norm()), constraints.polyhedron(n).radius)
        for iteration in range(1, self.max_iterations + 1):
            w = basis @ ((rotated + rho * (basis.T @ (z - dual))) / (eigenvalues.clamp_min(0) + rho))
            relaxed = _RELAXATION * w + (1 - _RELAXATION) * z
            before, z = z, constraints.project(relaxed + dual)
            dual = dual + relaxed - z
            if iteration % _EVERY:
                continue
            # Rounding of a projection is relative to its argument, which may dwarf it; a second one mends that.
            candidate = constraints.project(z)
            found = kkt_residual(gram, alignment, constraints, candidate)
            if found < residual:
                best, residual = candidate, found
            if residual <= self.tolerance:
                return Solution(best, Status.OPTIMAL, residual, iteration)
            if self._escapes(gram, alignment, constraints, z, z - before):
                return Solution(best, Status.UNBOUNDED, residual, iteration)
            if iteration <= _ADAPT:
                factor = _balance(w, z, before, dual)
                rho, dual = rho * factor, dual / factor
        return Solution(best, Status.INACCURATE, residual, self.max_iterations)

    @staticmethod
    def _first_rho(curvature: float, slope: float, radius: float) -> float:
        """In the units of K: of its largest eigenvalue, or ||b|| over the size that the set allows."""
        rho = 0.1 * curvature
        if 0 < radius < math.inf:
            rho = max(rho, slope / radius)
        return rho or slope or 1.0

    def _escapes(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet, z: Tensor, step: Tensor) -> bool:
        """Whether the step is a ray d of the set along which the objective falls for ever."""
        length = step.norm()
        if length == 0:
            return False
        ray = step / length
        flat = (gram @ ray).norm() <= _FLAT * gram.norm()
        falls = alignment @ ray > self.tolerance * alignment.norm()
        return bool(flat and falls) and constraints.contains(z + _FAR * (1 + z.norm()) * ray)


def _balance(w: Tensor, z: Tensor, before: Tensor, dual: Tensor) -> float:
    """By how much rho is to grow, so that primal and dual residual come nearer to each other."""
    primal = (w - z).norm() / torch.maximum(w.norm(), z.norm()).clamp_min(_TINY)
    slack = (z - before).norm() / dual.norm().clamp_min(_TINY)
    factor = float((primal.clamp_min(_TINY) / slack.clamp_min(_TINY)).sqrt())
    return min(max(factor, 0.2), 5.0) if not 0.5 < factor < 2.0 else 1.0


_RELAXATION = 1.6
_EVERY = 25
_ADAPT = 4000
_FAR = 1e6
_FLAT = 1e-12  # curvature that is rounding; anything larger ends the fall somewhere
_TINY = 1e-300
