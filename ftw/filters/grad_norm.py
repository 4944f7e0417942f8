"""The samples that move the model most."""

from __future__ import annotations

from torch import Tensor

from ftw.filters.base import Filter
from ftw.filters.ranking import largest
from ftw.problem import SelectionProblem


class GradNorm(Filter):
    """The k candidates with the longest contributions, `sqrt(K_ii) = ||c_i||_M`, equal ones by their position.

    Source: Katharopoulos and Fleuret 2018, "Not all samples are created equal: deep learning with importance
    sampling", where candidates are drawn with odds proportional to (a bound on) the gradient's norm and weighted by
    its inverse; and the baseline GradNorm of GREATS (Wang et al. 2024). Deviations: the largest are taken,
    none are drawn, and weights are left to the solver; the norm is that of the geometry, so the one of the papers is
    had with `geometry="vanilla"`. The target plays no part.
    """

    needs_gram = True

    def __call__(self, problem: SelectionProblem) -> Tensor:
        return largest(problem.diagonal, problem.budget)
