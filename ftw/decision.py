"""The decision of one step: small problem -> filter -> solver -> weights -> `Selection`.

Sees n-dimensional numbers only; called by the selector with what the assembly measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ftw.arguments import at_least, one_of
from ftw.assembly import OBJECTIVES
from ftw.errors import ConfigurationError, FilterError, MissingDependencyError, SolverError
from ftw.filters.all import All
from ftw.filters.base import Filter
from ftw.measurement import Measurement
from ftw.problem import Selection, SelectionProblem, Solution, Status
from ftw.quotas import WeightQuota
from ftw.ridges import RidgeTowards
from ftw.scoring import Scores
from ftw.solvers.base import WeightSolver
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.gram import LowRank
from ftw.solvers.linear_sets import NoHarm
from ftw.solvers.worst_case import solve_worst_case

ConstraintMaker = Callable[[Tensor, int], ConstraintSet]
"""`(mass of the chosen candidates (m,), n) -> set of weights`: for sets that depend on the pool."""

TOTALS = ("preserve", "at_most")

SEVERAL = ("mean", "worst", "no_harm")
"""What several targets are to be; see `Selector`."""


@dataclass(frozen=True)
class Policy:
    """How a step is decided; the fields are the `Selector` arguments of the same names, components resolved.

    Raises:
        ConfigurationError: a value is not allowed, or two do not go together.
    """

    filter: Filter
    solver: WeightSolver
    constraints: ConstraintSet | ConstraintMaker | WeightQuota
    budget: float
    ridge: float | RidgeTowards
    objective: str
    trust: float
    total: str
    targets: str = "mean"

    def __post_init__(self) -> None:
        one_of("objective", self.objective, OBJECTIVES)
        if isinstance(self.constraints, type) or not (
            isinstance(self.constraints, ConstraintSet) or callable(self.constraints)
        ):
            raise ConfigurationError(
                f"constraints is {self.constraints!r}; allowed are a set of weights, such as ftw.solvers.Free(), or a "
                "function of (mass of the chosen, n) that returns one; make an instance."
            )
        one_of("total", self.total, TOTALS)
        one_of("targets", self.targets, SEVERAL)
        if self.targets != "mean" and math.isinf(self.solver.tolerance):
            raise ConfigurationError(
                f"targets={self.targets!r} was given with {type(self.solver).__name__}, whose weights follow a rule of "
                "their own; choose a solver that minimises, such as 'pgd', or targets='mean'."
            )
        check_budget(self.budget)
        if not isinstance(self.ridge, RidgeTowards):
            at_least("ridge", self.ridge, 0.0)
        elif math.isinf(self.solver.tolerance):
            raise ConfigurationError(
                f"ridge={self.ridge!r} was given with {type(self.solver).__name__}, whose weights follow a rule of "
                "their own; choose a solver that minimises, such as 'pgd', or leave the ridge out."
            )
        number = isinstance(self.trust, int | float) and not isinstance(self.trust, bool)
        if not (number and 0 < self.trust < math.inf):
            raise ConfigurationError(
                f"trust is {self.trust!r}; it must be a positive, finite number; 1 is the optimizer's own curvature."
            )
        if self.objective == "match" and self.trust != 1.0:
            raise ConfigurationError(
                f"trust={self.trust} is given with objective='match'; it acts on objective='utility' only."
            )

    def require_honoured(self) -> None:
        """Lets the solver try the set on two candidates, so that one that it cannot honour is refused before a run.

        Sets that are made for a pool, or have an entry for each of its candidates, are left to the first step.

        Raises:
            ConfigurationError: the solver refuses the set.
            MissingDependencyError: what it is built on is not installed.
        """
        if not isinstance(self.constraints, ConstraintSet):
            return
        try:
            self.constraints.polyhedron(2)
        except ConfigurationError:
            return
        K = torch.eye(2, dtype=torch.float64)
        try:
            self.solver.solve(K, K.diagonal(), self.constraints, throw=False)
        except (ConfigurationError, MissingDependencyError):
            raise
        except Exception:  # a solver's own trouble is no refusal, and the first step will show it
            return

    def require_columns(self, given: Collection[str]) -> None:
        """Checks before a step is run that filter, quota and ridge will find the columns that they read.

        Raises:
            ConfigurationError: one is missing.
        """
        self.filter.require_columns(given)
        for part in self.constraints, self.ridge:
            name = part.column if isinstance(part, WeightQuota | RidgeTowards) else None
            if name is not None and name not in given:
                raise ConfigurationError(
                    f"{type(part).__name__} needs the column {name!r} of each candidate, and it is missing; pass it "
                    f"with record(extras={{{name!r}: one entry for each candidate}})."
                )

    def decide(
        self,
        measurement: Measurement,
        geometry: str,
        mass: Tensor,
        generator: torch.Generator,
        *,
        members: Tensor | None = None,
        absent: Sequence[int] = (),
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> Selection:
        """Indices, weights and diagnostics of a step.

        Args:
            measurement: of the whole pool, quarantined candidates included (they keep weight 0), or of `members`.
            geometry: the one that the measurement's `chosen` numbers were made with.
            mass: (n,), of the whole pool, on any positive scale.
            generator: for filters that draw.
            members: (m,) the candidates that were measured, where they are not the whole pool.
            absent: candidates of the pool that are not on offer, and count for nothing.
            extras: columns of the whole pool, name -> one entry for each candidate.

        Raises:
            SolverError: the solver found no usable weights.
        """
        n = len(mass)
        members = torch.arange(n) if members is None else members
        gone = {*absent, *members[list(measurement.excluded)].tolist()}
        full_mass = _normalised(mass, gone)
        present = torch.tensor([i for i, each in enumerate(members.tolist()) if each not in gone], dtype=torch.long)
        gram, alignment, alignments = self._objective(measurement, geometry)
        here = members[present].tolist()
        problem = SelectionProblem(
            gram=gram[present][:, present],
            alignment=alignment[present],
            budget=min(_budget(self.budget, n - len(gone)), len(present)),
            mass=full_mass[members[present]],
            generator=generator,
            alignments=alignments[present] if alignments.shape[1] else None,
            extras={name: [column[i] for i in here] for name, column in (extras or {}).items()},
        )
        chosen = _check_indices(self.filter(problem), problem, self.filter)
        raw = torch.zeros(len(members), dtype=torch.float64)
        solution = None
        if len(chosen):
            assert problem.mass is not None
            allowed = self._allowed(problem.mass[chosen], members[present[chosen]], extras or {}, n, n - len(gone))
            solution = self._weigh(problem, chosen, allowed)
        if solution is not None:
            raw[present[chosen]] = solution.weights
        local, status = self._rescale(raw, full_mass[members], n - len(gone), solution)
        weights = torch.zeros(n, dtype=torch.float64)
        weights[members] = local
        parts = measurement.curvature(local)
        target = float(measurement.chosen.target)
        # ||C w - g||^2 / ||g||^2 for the solver's own weights, before they are rescaled.
        gap = float(raw @ measurement.chosen.gram @ raw - 2 * measurement.chosen.alignment @ raw) + target
        everyone = torch.zeros(n, dtype=torch.float64)
        everyone[members] = measurement.chosen.alignment
        several = {}
        if alignments.shape[1]:
            several["predicted_drops"] = (measurement.first_orders(local) - sum(parts)).tolist()
        return _report(
            weights,
            status,
            first_order=measurement.first_order(local),
            curvature=sum(parts),
            curvature_parts=parts,
            geometry=geometry,
            offset_drop=float(measurement.offset_drop),
            relative_residual=max(gap, 0.0) ** 0.5 / target**0.5 if target > 0 else float("nan"),
            kkt_residual=solution.kkt_residual if solution is not None else float("nan"),
            iterations=solution.iterations if solution is not None else 0,
            quarantined=sorted(gone - set(absent)),
            alignment=everyone,
            mass=full_mass,
            **several,
        )

    def choose(
        self,
        alignment: Tensor,
        mass: Tensor,
        generator: torch.Generator,
        absent: Sequence[int] = (),
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Indices (m,) that the filter picks by alignment alone; one that needs K gets a shortlist instead.

        The shortlist holds the `2 k` candidates of the largest alignment.

        Args:
            alignment: (n,) of the whole pool.
            mass, generator, absent, extras: as for `decide`.
        """
        present, problem = self._without_gram(alignment, mass, generator, absent, extras)
        if self.filter.needs_gram:
            order = torch.argsort(alignment[present], descending=True, stable=True)
            return present[order[: 2 * problem.budget]].sort().values
        return present[_check_indices(self.filter(problem), problem, self.filter)]

    def shortlist(
        self,
        alignment: Tensor,
        mass: Tensor,
        generator: torch.Generator,
        absent: Sequence[int] = (),
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[Tensor, Policy]:
        """Indices (m,) of those whose K decides, ascending, and the policy that decides among them: exact.

        Args: as for `choose`.
        """
        present, problem = self._without_gram(alignment, mass, generator, absent, extras)
        index, rest = self.filter.shortlist(problem)
        if rest is None:
            index = _check_indices(index, problem, self.filter)
        return present[index].sort().values, replace(self, filter=All() if rest is None else rest)

    def _without_gram(
        self,
        alignment: Tensor,
        mass: Tensor,
        generator: torch.Generator,
        absent: Sequence[int],
        extras: Mapping[str, Sequence[Any]] | None,
    ) -> tuple[Tensor, SelectionProblem]:
        """Who is on offer, (m,), and their problem without K."""
        gone = set(absent)
        present = torch.tensor([i for i in range(len(mass)) if i not in gone], dtype=torch.long)
        problem = SelectionProblem(
            gram=None,
            alignment=alignment[present],
            budget=min(_budget(self.budget, len(present)), len(present)),
            mass=_normalised(mass, gone)[present],
            generator=generator,
            extras={name: [column[i] for i in present.tolist()] for name, column in (extras or {}).items()},
        )
        return present, problem

    def share_equally(
        self,
        chosen: Tensor,
        scores: Scores,
        geometry: str,
        mass: Tensor,
        absent: Sequence[int] = (),
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> Selection:
        """Equal weights on the chosen candidates, without K: `curvature` is left to the caller (NaN).

        Raises:
            SolverError: the set of weights does not hold them.
        """
        n, count, m = len(mass), len(mass) - len(set(absent)), len(chosen)
        full_mass = _normalised(mass, set(absent))
        raw, solution = torch.zeros(n, dtype=torch.float64), None
        if m:
            nothing = torch.zeros(m, 0, dtype=torch.float64)
            allowed = self._allowed(full_mass[chosen], chosen, extras or {}, n, count)
            solution = self.solver.solve(LowRank(nothing), nothing.sum(1), allowed)
            raw[chosen] = solution.weights
        weights, status = self._rescale(raw, full_mass, count, solution)
        return _report(
            weights,
            status,
            first_order=scores.offset_drop + float(scores.true @ weights),
            curvature=float("nan"),
            geometry=geometry,
            offset_drop=scores.offset_drop,
            relative_residual=float("nan"),
            kkt_residual=float("nan"),
            iterations=0,
            quarantined=[],
            alignment=scores.alignment.clone(),
            mass=full_mass,
        )

    def _rescale(self, raw: Tensor, mass: Tensor, count: int, solution: Solution | None) -> tuple[Tensor, Status]:
        """Weights with `mu'w = n`, n the candidates on offer, and the status of the step."""
        total = float(mass @ raw)
        if solution is None or not total > 0:
            return torch.zeros_like(raw), Status.NOTHING_USEFUL
        scale = count / total
        # The masses' rounding must not keep weights of 1 from being plain training to the bit.
        scale = 1.0 if abs(scale - 1.0) < 1e-12 else scale
        return raw * (min(scale, 1.0) if self.total == "at_most" else scale), solution.status

    def _objective(self, measurement: Measurement, geometry: str) -> tuple[Tensor, Tensor, Tensor]:
        """K, b and the b of several targets, of the problem under the chosen objective (DESIGN, section 2)."""
        chosen = measurement.chosen
        if self.objective == "match":
            return chosen.gram, chosen.alignment, chosen.alignments
        if geometry == "vanilla":  # gradient descent: no offset, kappa = 1
            return chosen.gram / self.trust, chosen.alignment, chosen.alignments
        bend = measurement.coupling / self.trust
        return measurement.gained / self.trust, chosen.alignment - bend, chosen.alignments - bend[:, None]

    def _weigh(self, problem: SelectionProblem, chosen: Tensor, allowed: ConstraintSet) -> Solution:
        gram, alignment, m = problem.gram_block(chosen), problem.alignment[chosen], len(chosen)
        several = None if problem.alignments is None else problem.alignments[chosen]
        unit, pull = float(gram.trace() / m), torch.zeros_like(alignment)
        if isinstance(self.ridge, RidgeTowards):
            strength = self.ridge.strength * unit
            pull = strength * self.ridge.reference(problem, chosen, gram, allowed)
        else:
            strength = self.ridge * unit
        gram = gram + strength * torch.eye(m, dtype=gram.dtype)
        solution: Solution
        if several is not None and self.targets == "worst":
            solution = solve_worst_case(gram, several + pull[:, None], allowed, self.solver)
        else:
            if several is not None and self.targets == "no_harm":
                allowed = NoHarm(allowed, several)
            solution = self.solver.solve(gram, alignment + pull, allowed)
        if solution.weights.shape != (m,) or not bool(torch.isfinite(solution.weights).all()):
            raise SolverError(
                f"{type(self.solver).__name__} returned weights of shape {tuple(solution.weights.shape)}, finite or "
                f"not, for {m} candidates, with status {solution.status}; ({m},) finite numbers are needed; "
                "report it to the solver's author, or use 'pgd'."
            )
        return solution

    def _allowed(
        self, mass: Tensor, places: Tensor, extras: Mapping[str, Sequence[Any]], n: int, count: int
    ) -> ConstraintSet:
        """The set of weights of the chosen, (m,), which stand at `places` of a pool of n with `count` on offer."""
        if isinstance(self.constraints, ConstraintSet):
            self.constraints.polyhedron(n)  # refuses bounds and the like of another number of candidates
            return self.constraints.restricted(places)
        if isinstance(self.constraints, WeightQuota):
            labels = extras[self.constraints.column]
            return self.constraints(mass, count, [labels[i] for i in places.tolist()])
        return self.constraints(mass, count)

    def overflow(self, n: int, geometry: str) -> Selection:
        """The selection of a step whose contributions overflow under a GradScaler: all weights 1.

        The combination then holds what overflowed, and the scaler sees it.
        """
        weights = torch.ones(n, dtype=torch.float64)
        nothing = float("nan")
        names = (
            "first_order",
            "curvature",
            "offset_drop",
            "relative_residual",
            "effective_sample_size",
            "kkt_residual",
        )
        diagnostics: dict[str, Any] = {"candidates": n, "geometry": geometry, **dict.fromkeys(names, nothing)}
        diagnostics |= {
            "curvature_parts": (nothing,) * 3,
            "iterations": 0,
            "quarantined": [],
            "alignment": weights * nothing,
            "mass": weights * nothing,
        }
        return Selection(torch.arange(n), weights, nothing, Status.OVERFLOW, diagnostics)


def _report(weights: Tensor, status: Status, *, first_order: float, curvature: float, **numbers: Any) -> Selection:
    squares = float(weights.square().sum())
    diagnostics = {
        "candidates": len(weights),
        "first_order": first_order,
        "curvature": curvature,
        "effective_sample_size": float(weights.sum()) ** 2 / squares if squares else 0.0,
        **numbers,
    }
    return Selection(
        indices=weights.nonzero().flatten(),
        weights=weights,
        predicted_drop=first_order - curvature,
        status=status,
        diagnostics=diagnostics,
    )


def _normalised(mass: Tensor, gone: set[int]) -> Tensor:
    """Masses that sum to the number of candidates on offer; 0 for the others."""
    here = torch.ones(len(mass), dtype=torch.bool)
    here[list(gone)] = False
    kept = torch.where(here, mass, 0.0)
    return kept * (int(here.sum()) / kept.sum())


def _check_indices(chosen: Tensor, problem: SelectionProblem, filter: Filter) -> Tensor:
    k = problem.budget if filter.honours_budget else problem.size
    fits = isinstance(chosen, Tensor) and chosen.dtype == torch.long and chosen.dim() == 1
    if (
        not fits
        or len(chosen) > k
        or len(chosen.unique()) < len(chosen)
        or bool(((chosen < 0) | (chosen >= problem.size)).any())
    ):
        raise FilterError(
            f"{type(filter).__name__} returned {chosen!r} for {problem.size} candidates and a budget of "
            f"{problem.budget}; at most {k} distinct indices below {problem.size} are needed, as a "
            f"LongTensor; report it to the filter's author."
        )
    return chosen


def _budget(budget: float, n: int) -> int:
    return int(budget) if isinstance(budget, Integral) else max(1, int(budget * n + 0.5))


def check_budget(budget: Any) -> None:
    """Raise `ConfigurationError` unless the budget is an int of at least 1 or a float in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, Real) or not float(budget) > 0:
        raise ConfigurationError(
            f"budget is {budget!r}; allowed are an int of at least 1 or a float in (0, 1]; a quarter of the "
            "pool is 0.25."
        )
    if not isinstance(budget, Integral) and float(budget) > 1:
        raise ConfigurationError(
            f"budget is {budget!r}; a float is a fraction of the pool and lies in (0, 1]; pass an int for a count."
        )
