"""Weights by a general QP solver through cvxpy: an independent second opinion, and a door to its backends."""

from __future__ import annotations

import importlib
import math
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
from torch import Tensor

from ftw.errors import ConfigurationError, MissingDependencyError
from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver, infeasible, require_positive
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.polyhedron import Polyhedron
from ftw.solvers.scaling import UnitProblem


class CvxpyQP(WeightSolver):
    """`min 1/2 ||R v||^2 - b'v`, `K = R'R`, over any set, by a solver that cvxpy knows.

    cvxpy's verdict is never the last word: `optimal` needs both its own "optimal" and our certificate.
    A backend that stops short ("optimal_inaccurate") is `inaccurate`, whatever the certificate says.

    Args:
        backend: a solver that cvxpy knows, such as "CLARABEL", "OSQP" or "SCS"; by default CLARABEL, an
            interior-point method, if it is installed, else cvxpy's own choice.
        tolerance: largest `kkt_residual` called optimal; 1e-6 is what an interior-point method holds on singular
            problems.
        compiled: compile the problem with parameters once per size and shape of the set, and only set numbers then;
            False compiles each problem anew, with its numbers as constants, which is quicker for a size that does not
            come again.

    Raises:
        MissingDependencyError: cvxpy, or the backend, is not installed.
        ConfigurationError: cvxpy knows no such backend, or the tolerance is not positive.
    """

    def __init__(self, backend: str | None = None, tolerance: float = 1e-6, compiled: bool = True) -> None:
        require_positive(tolerance=tolerance)
        self.tolerance, self.compiled = tolerance, compiled
        self.backend = None if backend is None else _known_backend(backend)
        self._programs: OrderedDict[tuple[Any, ...], _Program] = OrderedDict()

    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        n = alignment.numel()
        if not constraints.feasible(n):
            return infeasible(alignment)
        problem = UnitProblem.of(gram, alignment, constraints)
        if problem.residual(problem.nearest) == 0:
            # Covers n = 0, which cvxpy cannot express, and K = 0 with b = 0, which has no scale.
            return problem.solution(problem.nearest, Status.OPTIMAL)
        near = problem.polyhedron.without_far_bounds()
        program = self._compile(near) if self.compiled else _Program(near, problem)
        native, raw = program.run(problem, near, self.backend)
        return judge(problem, raw, _STATUS.get(native, Status.FAILED), self.tolerance)

    def _compile(self, polyhedron: Polyhedron) -> _Program:
        key = (
            np.isfinite(polyhedron.lower).tobytes(),
            np.isfinite(polyhedron.upper).tobytes(),
            polyhedron.rows.shape,
            polyhedron.share,
            polyhedron.members.tobytes(),
            np.isfinite(polyhedron.least).tobytes(),
            np.isfinite(polyhedron.most).tobytes(),
        )
        if key not in self._programs:
            self._programs[key] = _Program(polyhedron)
            if len(self._programs) > _CACHED:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]


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


def judge(problem: UnitProblem, raw: Any, status: Status, tolerance: float) -> Solution:
    """The solution that a backend's weights, (n,) at unit scale or None, and its verdict amount to."""
    if status is Status.UNBOUNDED and math.isfinite(problem.polyhedron.radius):
        status = Status.FAILED
    if status is Status.INFEASIBLE:  # the set has a point, or the backend would not have been asked
        status = Status.FAILED
    if raw is None or not np.isfinite(raw).all():
        raw = problem.nearest
        status = status if status is Status.UNBOUNDED else Status.FAILED
    weights = problem.project(np.asarray(raw))  # backends satisfy the constraints to their own tolerance only
    if status is Status.OPTIMAL and problem.residual(weights) > tolerance:
        status = Status.INACCURATE
    return problem.solution(weights, status)


_DEFAULT_BACKEND = "CLARABEL"
_OPTIONS: dict[str, dict[str, Any]] = {
    "CLARABEL": {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11},
    "OSQP": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 100_000},
    "SCS": {"eps_abs": 1e-8, "eps_rel": 1e-8},
}
"""Absolute tolerances make sense here because the problem is at unit scale; the defaults are looser than ours.

A backend that cannot reach them is asked again with its defaults.
"""


class _Program:
    """A cvxpy problem. Its numbers are parameters, with the layout of the set fixed, or those of one problem."""

    def __init__(self, polyhedron: Polyhedron, problem: UnitProblem | None = None) -> None:
        cp = _cvxpy()
        n, numbers = polyhedron.lower.size, _numbers(polyhedron, problem)
        self._parameters: dict[str, Any] = {}
        if problem is None:
            self._parameters = {name: cp.Parameter(value.shape) for name, value in numbers.items()}
            self._parameters |= {"root": cp.Parameter((n, n)), "alignment": cp.Parameter(n)}
        given = self._parameters or numbers
        self._variable = v = cp.Variable(n)
        constraints = []
        for name, values, sign in (
            ("lower", v[np.flatnonzero(np.isfinite(polyhedron.lower))], 1),
            ("upper", v[np.flatnonzero(np.isfinite(polyhedron.upper))], -1),
        ):
            if name in given:
                constraints.append(sign * (values - given[name]) >= 0)
        if "rows" in given:
            constraints.append(given["rows"] @ v == given["values"])
        if "least" in given:
            constraints.append(given["least_rows"] @ v >= given["least"])
        if "most" in given:
            constraints.append(given["most_rows"] @ v <= given["most"])
        if math.isfinite(polyhedron.share):
            capped = v[np.flatnonzero(polyhedron.members)]
            constraints.append(capped <= polyhedron.share * cp.sum(capped))
        objective = 0.5 * cp.sum_squares(given["root"] @ v) - given["alignment"] @ v
        self._problem = cp.Problem(cp.Minimize(objective), constraints)

    def run(self, problem: UnitProblem, polyhedron: Polyhedron, backend: str | None) -> tuple[str, Any]:
        """cvxpy's status, and its weights or None."""
        if self._parameters:
            for name, value in _numbers(polyhedron, problem).items():
                self._parameters[name].value = value
        if backend is None and _DEFAULT_BACKEND in _cvxpy().installed_solvers():
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


def _numbers(polyhedron: Polyhedron, problem: UnitProblem | None) -> dict[str, Any]:
    """The numbers of a set, and of a problem over it, by name; what the set does not have is left out."""
    low, high = np.isfinite(polyhedron.lower), np.isfinite(polyhedron.upper)
    least, most = np.isfinite(polyhedron.least), np.isfinite(polyhedron.most)
    numbers = {
        "lower": polyhedron.lower[low],
        "upper": polyhedron.upper[high],
        "rows": polyhedron.rows,
        "values": polyhedron.values,
        "least_rows": polyhedron.sides[least],
        "least": polyhedron.least[least],
        "most_rows": polyhedron.sides[most],
        "most": polyhedron.most[most],
    }
    numbers = {name: value for name, value in numbers.items() if len(value)}
    if problem is not None:
        values, vectors = np.linalg.eigh(problem.quadratic.matrix)
        numbers["root"] = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
        numbers["alignment"] = problem.alignment
    return numbers


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
