"""How far weights are from optimal, independent of any solver and of every scale. Called by all solvers and tests."""

from __future__ import annotations

import math

from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import as_gram, as_vector
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.scaling import UnitProblem


def kkt_residual(
    gram: Tensor,  # K, (n, n)
    alignment: Tensor,  # b, (n,)
    constraints: ConstraintSet,
    weights: Tensor,  # w, (n,)
) -> float:
    """Relative distance of w from the optimum of `min 1/2 w'Kw - b'w` over the set; 0 at an exact optimum.

        r = ||w - P(w - s (Kw - b))|| / omega,
        omega = ||w|| + min(||b|| / ||K||_F, radius of the set),   gamma = ||K||_F ||w|| + ||b||,   s = omega / gamma

    P is the Euclidean projection onto the set, so that infeasible weights are measured too. The value is a
    normwise backward error: some weights within r omega of w, in the set, are exactly optimal for a b that is
    off by at most about 2 r gamma. On `Free` it is ||Kw - b|| / (||K|| ||w|| + ||b||), Rigal and Gaches' backward
    error of a linear system; on a cone s is the gradient step 1/||K||.

    Law: r does not change under (K, b) -> (a K, a b), nor under (b, w) -> (a b, a w) with the set scaled by a
    (which leaves a cone as it is). Powers of two change no bit of it.

    What it does not see: differences of b that are r times smaller than ||b||, such as those beside a large
    constant added to b on a simplex.

    Returns:
        r, between 0 and infinity; infinity if the set is empty or the weights are not finite.

    Raises:
        ConfigurationError: shapes that do not fit, or a K or b that is not finite.
    """
    b = as_vector("alignment", alignment)
    K = as_gram(gram, b.numel())
    w = weights.detach().to("cpu", b.dtype)
    if w.shape != b.shape:
        raise ConfigurationError(
            f"weights have shape {tuple(w.shape)}; ({b.numel()},) is needed to fit the alignment; "
            "pass one weight per candidate."
        )
    if not constraints.feasible(b.numel()):
        return math.inf
    problem = UnitProblem.of(K, b, constraints)
    return problem.residual(w.numpy() / problem.unit)
