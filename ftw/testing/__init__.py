"""Contract checks that a plug-in's author runs: one call each, an `AssertionError` that says what broke.

    from ftw.testing import check_solver

    def test_mine():
        check_solver(MySolver())

The checks assert the laws in the interfaces' docstrings on deliberately ugly problems: singular, duplicate,
conflicting, empty, scaled by 1e-16 and 1e16. Imports torch, numpy and the standard library only, so that it
needs no test framework; `problems` alone needs hypothesis. One file per interface.
"""

from ftw.testing.extractors import check_extractor
from ftw.testing.filters import check_filter
from ftw.testing.preconditioners import check_preconditioner
from ftw.testing.sets import check_constraint_set, constraint_sets
from ftw.testing.solvers import check_solver
from ftw.testing.ugly import SHAPES, UglyProblem, problems, ugly_problem, ugly_problems

__all__ = [
    "SHAPES",
    "UglyProblem",
    "check_constraint_set",
    "check_extractor",
    "check_filter",
    "check_preconditioner",
    "check_solver",
    "constraint_sets",
    "problems",
    "ugly_problem",
    "ugly_problems",
]
