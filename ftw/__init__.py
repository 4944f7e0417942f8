"""Filter-then-Weight: picks and reweights the training samples of every step of a fine-tuning run."""

from ftw import errors, filters, gradients, optim_state, registry, solvers
from ftw.errors import FtwError
from ftw.gradients.layout import packed_candidates
from ftw.problem import Selection, SelectionProblem, Solution, Status
from ftw.quotas import WeightQuota
from ftw.ridges import RidgeTowards
from ftw.selector import Selector
from ftw.target import Target
from ftw.watching import DecisionLog

__all__ = [
    "DecisionLog",
    "FtwError",
    "RidgeTowards",
    "Selection",
    "SelectionProblem",
    "Selector",
    "Solution",
    "Status",
    "Target",
    "WeightQuota",
    "errors",
    "filters",
    "gradients",
    "optim_state",
    "packed_candidates",
    "registry",
    "solvers",
]
