"""How far weights are from optimal, independent of any solver and of every scale. Called by all solvers and tests."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import as_gram, as_numbers, as_vector
from ftw.solvers.constraints import ConstraintSet, require_set
from ftw.solvers.gram import LowRank
from ftw.solvers.scaling import Certificate, UnitProblem


def kkt_residual(
    gram: Tensor | LowRank,  # K, (n, n)
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
    return certify(gram, alignment, constraints, weights).kkt_residual


def certify(
    gram: Tensor | LowRank,  # K, (n, n)
    alignment: Tensor,  # b, (n,)
    constraints: ConstraintSet,
    weights: Tensor,  # w, (n,)
) -> Certificate:
    """The residuals of w; all of them infinite if the set is empty or the weights are not finite, or astronomical.

    With p = P(w - s g), g = Kw - b, and s, omega, gamma of `kkt_residual`, the multipliers that w implies are
    `v = (w - p) / s - g`: the sum of all constraints' gradients, each times its multiplier, which is normal to the set
    at p. Then

        primal = ||w - P(w)|| / omega,   dual = ||g + v|| / gamma,   complementarity = |v'(w - p)| / (omega gamma)

    The dual residual is the KKT residual's other face, `||w - p|| / omega`: s makes the two equal. v'(p - w) sums
    multiplier times slack over all constraints, since p meets with equality all that have a multiplier.

    Law, for w in the set and any w* that is optimal (f is the objective): `f(w) - f(w*) <= complementarity * omega *
    gamma + dual * gamma * ||w - w*||`.

    Args, Raises:
        As for `kkt_residual`.
    """
    require_set(constraints)
    b = as_vector("alignment", alignment)
    K = gram if isinstance(gram, LowRank) else as_gram(gram, b.numel())
    w = as_numbers("weights", weights)
    if w.shape != b.shape or (isinstance(K, LowRank) and len(K.factor) != len(b)):
        raise ConfigurationError(
            f"weights have shape {tuple(w.shape)}; ({b.numel()},) is needed to fit the alignment; "
            "pass one weight per candidate."
        )
    if not constraints.feasible(b.numel()) or not np.isfinite(w.numpy()).all():
        return Certificate(math.inf, math.inf, math.inf, math.inf)
    problem = UnitProblem.of(K, b, constraints)
    scaled = w.numpy() / problem.unit
    if float(np.abs(scaled).max(initial=0.0)) > _BEYOND:
        return Certificate(math.inf, math.inf, math.inf, math.inf)
    return problem.certify(scaled)


_BEYOND = 1e140
"""Size of weights, beside that of b / K, from which their squares leave float64; they are as wrong as infinite ones."""


__all__ = ["Certificate", "certify", "kkt_residual"]
