"""A ridge towards weights that one would like to stay near, such as those of the last step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import as_gram, as_numbers, as_vector
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.gram import LowRank


def ridge_towards(
    gram: Tensor | LowRank,  # K, (n, n)
    alignment: Tensor,  # b, (n,)
    reference: Tensor | float,  # w0, (n,), or the same for all
    strength: float,  # rho, in the units of K
) -> tuple[Tensor | LowRank, Tensor]:  # K + rho I, b + rho w0
    """The K and b whose objective is `1/2 w'Kw - b'w + 1/2 rho ||w - w0||^2`, but for a constant.

    Weights that follow the steps smoothly have the last step's weights for w0; equal weights for w0 shrink towards
    plain training; 0 is the plain ridge. A strength of `r * trace(K) / n` is relative to the mean squared norm of
    the contributions.

    Raises:
        ConfigurationError: shapes that do not fit, or a strength that is no finite number of at least 0.
    """
    if not 0 <= strength < math.inf:
        raise ConfigurationError(
            f"strength is {strength!r}; a finite number of at least 0 is needed; relative ones are r * trace(K) / n."
        )
    b = as_vector("alignment", alignment)
    n = b.numel()
    given = as_numbers("reference", reference)
    w0 = as_vector("reference", given.expand(n) if given.dim() == 0 else given)
    if w0.numel() != n:
        raise ConfigurationError(
            f"reference has {w0.numel()} entries for {n} candidates; one each, or one number for all, is needed; "
            "index it like the candidates."
        )
    shifted = b + strength * w0
    if isinstance(gram, LowRank):
        return LowRank(gram.factor, gram.ridge + strength), shifted
    return as_gram(gram, n) + strength * torch.eye(n, dtype=b.dtype), shifted


def fitting_scale(
    gram: Tensor,  # K, (n, n)
    alignment: Tensor,  # b, (n,)
    constraints: ConstraintSet,
    shape: Tensor,  # v, (n,)
) -> float:
    """s, with which `s v` is the reference that relative weights v stand for.

    Where the set has one positive total T, `mass'w = T`, s is `T / mass'v`. Elsewhere s minimises the objective along
    v, `max(b'v, 0) / v'Kv`, and is 0 where v brings nothing or does not move the model. So s follows every change of
    scale of K, b and v as the weights themselves do.
    """
    polyhedron = constraints.polyhedron(len(shape))
    if len(polyhedron.rows) == 1 and bool((polyhedron.rows > 0).all()):
        size = float(polyhedron.rows[0] @ shape.numpy())
        return float(polyhedron.values[0]) / size if size > 0 else 0.0
    gain, bend = float(alignment @ shape), float(shape @ gram @ shape)
    return gain / bend if gain > 0 and bend > 0 else 0.0
