"""Weight solvers, constraint sets and the certificate that judges the former on the latter."""

from ftw.solvers.active_set import ActiveSet
from ftw.solvers.base import WeightSolver
from ftw.solvers.certificate import Certificate, certify, kkt_residual
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
from ftw.solvers.daqp_qp import DAQP
from ftw.solvers.entropic import Entropic
from ftw.solvers.gram import LowRank
from ftw.solvers.linear_sets import Linear, NoHarm, Quota
from ftw.solvers.polyhedron import Polyhedron
from ftw.solvers.projected_gradient import ProjectedGradient
from ftw.solvers.ridge import ridge_towards
from ftw.solvers.softmax import Softmax
from ftw.solvers.uniform import Uniform
from ftw.solvers.worst_case import WorstCase, solve_worst_case

__all__ = [
    "DAQP",
    "ActiveSet",
    "Box",
    "CappedCone",
    "CappedSimplex",
    "Certificate",
    "ClosedForm",
    "ConstraintSet",
    "CvxpyQP",
    "Entropic",
    "Free",
    "Linear",
    "LowRank",
    "NoHarm",
    "NonNegative",
    "Polyhedron",
    "ProjectedGradient",
    "Quota",
    "Simplex",
    "Softmax",
    "Uniform",
    "WeightSolver",
    "WorstCase",
    "certify",
    "kkt_residual",
    "ridge_towards",
    "solve_worst_case",
]
