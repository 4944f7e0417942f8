"""Weight solvers, constraint sets and the certificate that judges the former on the latter."""

from ftw.solvers.base import WeightSolver
from ftw.solvers.certificate import kkt_residual
from ftw.solvers.closed_form import ClosedForm
from ftw.solvers.constraints import (
    Box,
    CappedCone,
    CappedSimplex,
    ConstraintSet,
    Free,
    NonNegative,
    Simplex,
)
from ftw.solvers.cvxpy_qp import CvxpyQP
from ftw.solvers.polyhedron import Polyhedron
from ftw.solvers.projected_gradient import ProjectedGradient
from ftw.solvers.uniform import Uniform

__all__ = [
    "Box",
    "CappedCone",
    "CappedSimplex",
    "ClosedForm",
    "ConstraintSet",
    "CvxpyQP",
    "Free",
    "NonNegative",
    "Polyhedron",
    "ProjectedGradient",
    "Simplex",
    "Uniform",
    "WeightSolver",
    "kkt_residual",
]
