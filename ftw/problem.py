"""Plain data that travels between the parts: the small problem, the solution, the selection.

The selector assembles a `SelectionProblem` from contributions, optimizer state and target gradient; filters
and solvers see nothing else. All tensors here are float64 on the CPU and have the length of the pool, n.
"""

from __future__ import annotations

import enum
import math
import reprlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigurationError

GramSource = Callable[[Tensor | None], Tensor]
"""`index (m,) -> K[index][:, index] (m, m)`; `None` means all candidates."""


class Status(enum.StrEnum):
    """How a solve or a step ended. Compares equal to its plain name: `status == "optimal"`."""

    OPTIMAL = "optimal"
    INACCURATE = "inaccurate"
    INFEASIBLE = "infeasible"
    UNBOUNDED = "unbounded"
    FAILED = "failed"
    NOTHING_USEFUL = "nothing_useful"
    OVERFLOW = "overflow"

    @property
    def sentence(self) -> str:
        """What happened and what to do next."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.OPTIMAL: "The weights satisfy the optimality conditions.",
    Status.INACCURATE: "The solver stopped short of its tolerance: look at kkt_residual, allow more iterations "
    "or add ridge.",
    Status.INFEASIBLE: "No weights satisfy the constraints: raise the cap or lower the total.",
    Status.UNBOUNDED: "The objective has no minimum on this set because the Gram matrix is singular: add ridge "
    "or choose a bounded set.",
    Status.FAILED: "The solver returned nothing usable: try the solver 'pgd'.",
    Status.NOTHING_USEFUL: "No candidate moves the model towards the target, so the gradient is zero this step: "
    "look at the target set and the learning rate if this happens often.",
    Status.OVERFLOW: "A contribution overflowed under an enabled GradScaler: the gradient is left non-finite so "
    "that the scaler skips the step and lowers its scale.",
}


@dataclass(frozen=True)
class SelectionProblem:
    """Choose at most `budget` of n candidates and weigh them: `min 1/2 w'Kw - b'w` (DESIGN, section 2).

    Args:
        gram: K, (n, n), symmetric positive semidefinite; or a `GramSource` that forms blocks of it on demand;
            or None for filters that look at the alignment alone.
        alignment: b, (n,). With several targets the one that stands for them all.
        budget: k, the number of candidates that may keep a non-zero weight, `0 <= k <= n`.
        mass: mu, (n,), positive, rescaled to sum to n; equal by default.
        generator: source of randomness for filters that draw; owned by the caller.
        factor: F, (n, r), with `K = F F'`, instead of a gram: for many candidates and few directions (r < n).
        alignments: (n, m), one column for each of m targets; None: there is one, `alignment`.
        extras: what else is known of the candidates, name -> one entry each: numbers (n,), such as "loss" and
            "reference_loss", or labels (a list), such as "source". Filters that need one say which.

    Inputs of any floating dtype and device are converted to float64 on the CPU.

    Raises:
        ConfigurationError: shapes that do not fit, non-finite numbers, an asymmetric K, a budget out of range.
    """

    gram: Tensor | GramSource | None = None
    alignment: Tensor = field(default_factory=lambda: torch.zeros(0))
    budget: int = 0
    mass: Tensor | None = None
    generator: torch.Generator | None = None
    factor: Tensor | None = None
    alignments: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        alignment = as_vector("alignment", self.alignment)
        n = alignment.numel()
        object.__setattr__(self, "alignment", alignment)
        if not isinstance(self.budget, int) or isinstance(self.budget, bool) or not 0 <= self.budget <= n:
            raise ConfigurationError(
                f"budget is {self.budget!r}; allowed are integers from 0 to the pool's size {n}; "
                "pass the number of candidates to keep."
            )
        if self.gram is not None and not callable(self.gram):
            object.__setattr__(self, "gram", as_gram(self.gram, n))
        if self.mass is None:
            mass = torch.ones(n, dtype=torch.float64)
        else:
            mass = as_vector("mass", self.mass)
            if mass.numel() != n or bool((mass <= 0).any()):
                raise ConfigurationError(
                    f"mass has {mass.numel()} entries, smallest {float(mass.min()) if mass.numel() else None}; "
                    f"{n} positive numbers are needed, one per candidate; drop candidates without loss instead."
                )
            mass = mass * (n / mass.sum()) if n else mass
        object.__setattr__(self, "mass", mass)
        for name in ("factor", "alignments"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_columns(name, getattr(self, name), n))
        if self.factor is not None and self.gram is not None:
            raise ConfigurationError(
                "gram and factor were both given; they say the same, K = F F'; pass one of the two."
            )
        for name, column in self.extras.items():
            count = len(as_entries(f"extras[{name!r}]", column))
            if count != n:
                raise ConfigurationError(
                    f"extras[{name!r}] has {count} entries for {n} candidates; one each is needed; index it like "
                    "the candidates."
                )

    @property
    def size(self) -> int:
        """n, the number of candidates."""
        return self.alignment.numel()

    @cached_property
    def full_gram(self) -> Tensor:
        """K, (n, n). Formed at the first use if a `GramSource` or a factor was given."""
        if isinstance(self.gram, Tensor):
            return self.gram
        return self._form(None)

    def gram_block(self, index: Tensor) -> Tensor:
        """K[index][:, index], (m, m), without forming the rest where a `GramSource` or a factor was given."""
        if isinstance(self.gram, Tensor) or "full_gram" in self.__dict__:
            return self.full_gram[index][:, index]
        return self._form(index)

    def columns(self, index: Tensor) -> Tensor:
        """K[:, index], (n, m), without forming the rest where a factor was given."""
        if self.factor is not None and "full_gram" not in self.__dict__:
            return self.factor @ self.factor[index].T
        return self.full_gram[:, index]

    @cached_property
    def diagonal(self) -> Tensor:
        """K_ii, (n,): squared norms of the contributions under M."""
        if self.factor is not None and "full_gram" not in self.__dict__:
            return self.factor.square().sum(1)
        return self.full_gram.diagonal()

    @cached_property
    def row_sums(self) -> Tensor:
        """`sum_j K_ij`, (n,)."""
        if self.factor is not None and "full_gram" not in self.__dict__:
            return self.factor @ self.factor.sum(0)
        return self.full_gram.sum(1)

    def extra(self, name: str, who: str) -> Any:
        """The column `extras[name]` that the component `who` needs.

        Raises:
            ConfigurationError: it is not there.
        """
        if name not in self.extras:
            raise ConfigurationError(
                f"{who} needs the column {name!r} of each candidate, and the problem has "
                f"{sorted(self.extras) or 'no columns'}; pass it with record(extras={{{name!r}: ...}}), or in the "
                "problem's extras."
            )
        return self.extras[name]

    def _form(self, index: Tensor | None) -> Tensor:
        if self.factor is not None:
            rows = self.factor if index is None else self.factor[index]
            return as_gram(rows @ rows.T, len(rows))
        if self.gram is None or isinstance(self.gram, Tensor):
            raise ConfigurationError(
                "this problem has no Gram matrix (gram=None), but the component asked for it; "
                "pass gram=K, (n, n), or a callable that forms blocks of it."
            )
        return as_gram(self.gram(index), self.size if index is None else index.numel())


def as_numbers(name: str, value: Any) -> Tensor:
    """`value` as a float64 tensor on the CPU, or a `ConfigurationError` that names it. Not copied where it is one."""
    try:
        if isinstance(value, np.ndarray):
            value = np.asarray(value, order="C")  # torch knows no negative strides
        if isinstance(value, Tensor | np.ndarray) and ("complex" in str(value.dtype)):
            raise TypeError(f"its numbers are {value.dtype}")
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta):
            raise TypeError(f"its layout is {value.layout} on {value.device}")
        return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"{name} is {reprlib.repr(value)}, which cannot be read: {error}; real numbers in a tensor, an array or a "
            "list are needed; convert it."
        ) from error


def as_vector(name: str, value: Any) -> Tensor:  # -> (n,) float64
    """`value` as a finite float64 vector on the CPU, or a `ConfigurationError` that names it."""
    vector = as_numbers(name, value)
    if vector.dim() != 1:
        raise ConfigurationError(f"{name} has shape {tuple(vector.shape)}; one number per candidate is needed, (n,).")
    if not bool(torch.isfinite(vector).all()):
        bad = (~torch.isfinite(vector)).nonzero().flatten().tolist()
        raise ConfigurationError(
            f"{name} is not finite at {bad}; quarantine those candidates before the problem is posed."
        )
    return vector


def as_columns(name: str, value: Any, n: int) -> Tensor:  # -> (n, m) float64
    """`value` as a finite float64 matrix with a row for each candidate, or a `ConfigurationError` that names it."""
    matrix = as_numbers(name, value)
    if matrix.dim() != 2 or matrix.shape[0] != n:
        raise ConfigurationError(
            f"{name} has shape {tuple(matrix.shape)}; ({n}, m) is needed, a row for each candidate; transpose it, or "
            "add the missing rows."
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ConfigurationError(
            f"{name} is not finite; quarantine the candidates at fault before the problem is posed."
        )
    return matrix


def as_entries(name: str, value: Any) -> list[Any]:
    """The entries of a column of numbers or labels in their order, or a `ConfigurationError` that names it."""
    try:
        if isinstance(value, Mapping | Set):
            raise TypeError("its entries have no order")
        return list(value.detach().cpu().tolist() if isinstance(value, Tensor) else value)
    except TypeError as error:
        raise ConfigurationError(
            f"{name} is {reprlib.repr(value)}, which is no column: {error}; one entry for each candidate is needed, in "
            "their order; pass a list, a tensor or an array."
        ) from error


def as_gram(value: Any, n: int) -> Tensor:  # -> (n, n) float64
    """`value` as a finite symmetric float64 matrix on the CPU, or a `ConfigurationError`.

    Asymmetry up to 1e-6 of the largest entry is rounding and is averaged away.
    """
    gram = as_numbers("gram", value)
    if tuple(gram.shape) != (n, n):
        raise ConfigurationError(f"gram has shape {tuple(gram.shape)}; ({n}, {n}) is needed to fit the alignment.")
    if not bool(torch.isfinite(gram).all()):
        raise ConfigurationError("gram is not finite; quarantine the candidates at fault before the problem is posed.")
    if n and float((gram - gram.T).abs().max()) > 1e-6 * float(gram.abs().max()):
        raise ConfigurationError("gram is not symmetric; pass K = C'MC, symmetric positive semidefinite.")
    if n and float(gram.abs().max()) > _LARGEST:
        raise ConfigurationError(
            f"gram holds {float(gram.abs().max()):.1e}; sums of such numbers leave float64, whose largest is 1.8e308; "
            "bring the loss to a scale of the order of 1."
        )
    return (gram + gram.T) / 2


_LARGEST = 1e300


@dataclass(frozen=True)
class Solution:
    """What a weight solver returns: a value with status and statistics.

    The residuals are relative and scale-free; 0 is exact, NaN is not measured (`ftw.solvers.certify` defines them).

    Attributes:
        weights: (n,) float64, in the constraint set.
        status: `optimal`, `inaccurate`, `infeasible`, `unbounded` or `failed`; `status.sentence` explains.
        kkt_residual: distance from optimality, the one figure that `status` goes by.
        iterations: of the solver's own loop; 0 for direct methods.
        primal_residual: distance of the weights from the set.
        dual_residual: what the gradient lacks to balance the constraints' multipliers.
        complementarity: slack of the constraints, each times its multiplier.
    """

    weights: Tensor
    status: Status
    kkt_residual: float
    iterations: int = 0
    primal_residual: float = math.nan
    dual_residual: float = math.nan
    complementarity: float = math.nan

    @property
    def sentence(self) -> str:
        """How the solve ended, with its figures, and what to do next."""
        if math.isinf(self.kkt_residual):
            return self.status.sentence
        return f"{self.status.sentence} The KKT residual is {self.kkt_residual:.1e}."


@dataclass(frozen=True)
class Selection:
    """The decision of one step.

    Attributes:
        indices: LongTensor (m,), m <= k, ascending: candidates with a non-zero weight.
        weights: (n,) float64, one per candidate in the order recorded, 0 where dropped; plain training is 1.
        predicted_drop: predicted fall of the mean target loss through the coming optimizer step, in nats,
            offset (momentum, decay) included: first order minus curvature, both in `diagnostics`.
        status: `optimal`, `inaccurate`, `nothing_useful` or `overflow`; `status.sentence` explains.
        diagnostics: figures of the step, by name; see `docs/selector.md`.
    """

    indices: Tensor
    weights: Tensor
    predicted_drop: float
    status: Status
    diagnostics: dict[str, Any] = field(default_factory=dict)
