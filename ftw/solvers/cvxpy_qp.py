"""Weights by a general QP solver through cvxpy: an independent second opinion, and a door to its backends."""

from __future__ import annotations

import importlib
import math
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigurationError, MissingDependencyError
from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.polyhedron import Polyhedron
from ftw.solvers.scaling import UnitProblem


class CvxpyQP(WeightSolver):
    """Compiles `min 1/2 ||R v||^2 - b'v`, `K = R'R`, once per size and shape of the set, then only sets numbers.

    cvxpy's verdict is never the last word: `optimal` needs both its own "optimal" and our certificate.
    A backend that stops short ("optimal_inaccurate") is `inaccurate`, whatever the certificate says.

    Args:
        backend: a solver that cvxpy knows, such as "CLARABEL", "OSQP" or "SCS"; by default CLARABEL, an
            interior-point method, if it is installed, else cvxpy's own choice.
        tolerance: largest `kkt_residual` called optimal; 1e-6 is what an interior-point method holds on singular
            problems.

    Raises:
        MissingDependencyError: cvxpy, or the backend, is not installed.
        ConfigurationError: cvxpy knows no such backend.
    """

    def __init__(self, backend: str | None = None, tolerance: float = 1e-6) -> None:
        if not tolerance > 0:
            raise ConfigurationError(
                f"tolerance is {tolerance!r}; it must be positive; leave it out for the default 1e-6."
            )
        self.tolerance = tolerance
        self.backend = None if backend is None else _known_backend(backend)
        self._compiled: OrderedDict[tuple[Any, ...], _Compiled] = OrderedDict()

    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return Solution(torch.zeros_like(alignment), Status.INFEASIBLE, math.inf)
        problem = UnitProblem.of(gram, alignment, constraints)
        start = problem.project(np.zeros(n))
        if problem.residual(start) == 0:
            # Covers n = 0, which cvxpy cannot express, and K = 0 with b = 0, which has no scale.
            return Solution(torch.from_numpy(start * problem.unit), Status.OPTIMAL, 0.0)
        near = _without_far_bounds(problem.polyhedron)
        native, raw = self._compile(near).run(problem, near, self.backend)
        status = _STATUS.get(native, Status.FAILED)
        if status is Status.UNBOUNDED and math.isfinite(problem.polyhedron.radius):
            status = Status.FAILED
        if raw is None or not np.isfinite(raw).all():
            raw = start
            status = status if status in (Status.UNBOUNDED, Status.INFEASIBLE) else Status.FAILED
        weights = problem.project(raw)  # backends satisfy the constraints to their own tolerance only
        residual = problem.residual(weights)
        if status is Status.OPTIMAL and residual > self.tolerance:
            status = Status.INACCURATE
        return Solution(torch.from_numpy(weights * problem.unit), status, residual)

    def _compile(self, polyhedron: Polyhedron) -> _Compiled:
        key = (
            np.isfinite(polyhedron.lower).tobytes(),
            np.isfinite(polyhedron.upper).tobytes(),
            polyhedron.rows.shape,
            polyhedron.share,
        )
        if key not in self._compiled:
            self._compiled[key] = _Compiled(polyhedron)
            if len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]


def _without_far_bounds(polyhedron: Polyhedron) -> Polyhedron:
    """Bounds that are astronomical beside the weights' expected size only ruin the backend's scaling.

    Should the weights reach that far all the same, the projection puts the bounds back and the certificate tells.
    """
    return replace(
        polyhedron,
        lower=np.where(polyhedron.lower < -_FAR, -math.inf, polyhedron.lower),
        upper=np.where(polyhedron.upper > _FAR, math.inf, polyhedron.upper),
    )


_FAR = 1e8
"""At unit scale, where weights are expected to be of size 1."""

_CACHED = 16
"""Compiled problems kept per instance; the number of chosen candidates varies little from step to step."""

_STATUS = {
    "optimal": Status.OPTIMAL,
    "optimal_inaccurate": Status.INACCURATE,
    "user_limit": Status.INACCURATE,
    "infeasible": Status.INFEASIBLE,
    "unbounded": Status.UNBOUNDED,
}
"""cvxpy's status -> ours; "infeasible_inaccurate", "unbounded_inaccurate", "solver_error": nothing is known."""

_DEFAULT_BACKEND = "CLARABEL"
_OPTIONS: dict[str, dict[str, Any]] = {
    "CLARABEL": {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11},
    "OSQP": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 100_000},
    "SCS": {"eps_abs": 1e-8, "eps_rel": 1e-8},
}
"""Absolute tolerances make sense here because the problem is at unit scale; the defaults are looser than ours.

A backend that cannot reach them is asked again with its defaults.
"""


class _Compiled:
    """One parametrised cvxpy problem; the layout of the set is fixed, its numbers are parameters."""

    def __init__(self, polyhedron: Polyhedron) -> None:
        cp = _cvxpy()
        n, rows = polyhedron.lower.size, polyhedron.rows.shape[0]
        self._lower, self._upper = np.isfinite(polyhedron.lower), np.isfinite(polyhedron.upper)
        self._variable = cp.Variable(n)
        self._root, self._alignment = cp.Parameter((n, n)), cp.Parameter(n)
        constraints = []
        self._parameters = _Parameters(
            cp.Parameter(int(self._lower.sum())) if self._lower.any() else None,
            cp.Parameter(int(self._upper.sum())) if self._upper.any() else None,
            cp.Parameter((rows, n)) if rows else None,
            cp.Parameter(rows) if rows else None,
        )
        if self._parameters.lower is not None:
            constraints.append(self._variable[np.flatnonzero(self._lower)] >= self._parameters.lower)
        if self._parameters.upper is not None:
            constraints.append(self._variable[np.flatnonzero(self._upper)] <= self._parameters.upper)
        if self._parameters.rows is not None:
            constraints.append(self._parameters.rows @ self._variable == self._parameters.values)
        if math.isfinite(polyhedron.share):
            constraints.append(self._variable <= polyhedron.share * cp.sum(self._variable))
        objective = 0.5 * cp.sum_squares(self._root @ self._variable) - self._alignment @ self._variable
        self._problem = cp.Problem(cp.Minimize(objective), constraints)

    def run(self, problem: UnitProblem, polyhedron: Polyhedron, backend: str | None) -> tuple[str, Any]:
        """cvxpy's status, and its weights or None."""
        cp = _cvxpy()
        values, vectors = np.linalg.eigh(problem.gram)
        self._root.value = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
        self._alignment.value = problem.alignment
        parameters = self._parameters
        if parameters.lower is not None:
            parameters.lower.value = polyhedron.lower[self._lower]
        if parameters.upper is not None:
            parameters.upper.value = polyhedron.upper[self._upper]
        if parameters.rows is not None:
            parameters.rows.value, parameters.values.value = polyhedron.rows, polyhedron.values
        if backend is None and _DEFAULT_BACKEND in cp.installed_solvers():
            backend = _DEFAULT_BACKEND
        native = self._attempt(backend, _OPTIONS.get(backend or "", {}))
        if native not in ("optimal", "unbounded", "infeasible"):
            native = self._attempt(backend, {})
        # After an error the variable still holds the previous problem's weights.
        return native, None if native == "solver_error" else self._variable.value

    def _attempt(self, backend: str | None, options: dict[str, Any]) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may be inaccurate" is in the status
            try:
                self._problem.solve(solver=backend, warm_start=False, **options)
            except _cvxpy().error.SolverError:
                return "solver_error"
        return str(self._problem.status)


@dataclass(frozen=True)
class _Parameters:
    lower: Any
    upper: Any
    rows: Any
    values: Any


def _known_backend(backend: str) -> str:
    cp = _cvxpy()
    name, installed = backend.upper(), cp.installed_solvers()
    if name in installed:
        return name
    settings = importlib.import_module("cvxpy.reductions.solvers.defines")
    if name in settings.SOLVER_MAP_QP or name in settings.SOLVER_MAP_CONIC:
        raise MissingDependencyError(
            f"cvxpy's backend {name} is not installed; installed are {', '.join(sorted(installed))}; "
            f"install the package of {name}, or leave backend out."
        )
    raise ConfigurationError(
        f"cvxpy knows no backend {backend!r}; installed are {', '.join(sorted(installed))}; pass one of them."
    )


def _cvxpy() -> Any:
    try:
        return importlib.import_module("cvxpy")
    except ImportError as error:
        raise MissingDependencyError(
            "the solver 'qp' needs cvxpy, which is not installed; "
            "pip install 'filter-then-weight[qp]', or use the solver 'pgd'."
        ) from error
