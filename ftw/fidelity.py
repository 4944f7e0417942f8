"""Fidelity: what a step was predicted to do, against what it did. And the trust that follows from it.

Measured around the optimizer's own `step()`, by its hooks, so that clipping, a scaler and whatever else happens between
`apply()` and the step are in it. Two evaluations of the target batch that g came from; for the displacement, a copy of
the parameters as well. Made by the selector for the steps that are watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import ConfigurationError
from ftw.optim_state.base import direction
from ftw.optim_state.shards import local
from ftw.problem import Selection

Displacement = dict[Parameter, Tensor]

Total = Callable[[Sequence[float]], Sequence[float]]
"""Of a model that is spread over several processes: see `ftw.processes.spread.Spread.total`."""


@dataclass(frozen=True)
class Fidelity:
    """One watched step.

    Attributes:
        step: its number, as in `selection.diagnostics["step"]`.
        predicted_drop: of the target loss, in nats, for the gradient that the optimizer was given (clipped, if it was),
            the curvature divided by trust.
        first_order: the part of it that is linear in the displacement, in nats.
        realised_drop: loss before minus loss after on the same target batch, in nats. For an optimizer that maximises
            all drops are rises.
        applied: that gradient's norm over the norm that `apply()` wrote; below 1 where it was clipped.
        cosine: of the angle between predicted and real displacement of the recorded parameters; NaN if not asked for.
        displacement_error: `|predicted - real| / |real|`; NaN likewise.
    """

    step: int
    predicted_drop: float
    first_order: float
    realised_drop: float
    applied: float
    cosine: float
    displacement_error: float

    @property
    def ratio(self) -> float:
        """Realised over predicted drop; 1 is a perfect model."""
        return self.realised_drop / self.predicted_drop if self.predicted_drop else math.nan


@dataclass(frozen=True)
class TrustRegion:
    """The trust of the next step from the ratio of realised to predicted drop.

    The rule is Conn, Gould & Toint (2000), "Trust-region methods", Algorithm 6.1.1: below `low` the model promised too
    much and trust shrinks; above `high` it grows. Deviation: trust does not bound the step, it divides the curvature of
    the utility, so that a smaller one prefers smaller and less redundant steps; and where a fall was not even
    predicted, trust grows if the step did better than foreseen and shrinks otherwise.

    Args:
        initial: trust of the first step.
        low, high: where it shrinks and grows; 0 < low <= high.
        shrink, grow: factors, below and above 1.
        smallest, largest: bounds.
    """

    initial: float = 1.0
    low: float = 0.25
    high: float = 0.75
    shrink: float = 0.5
    grow: float = 1.5
    smallest: float = 1e-3
    largest: float = 1e3

    def __post_init__(self) -> None:
        fits = 0 < self.low <= self.high and 0 < self.shrink < 1 < self.grow
        if not (fits and 0 < self.smallest <= self.initial <= self.largest):
            raise ConfigurationError(
                f"{self} makes no sense: 0 < low <= high, 0 < shrink < 1 < grow and 0 < smallest <= initial <= largest "
                "are needed; TrustRegion() has tried values."
            )

    def next(self, trust: float, fidelity: Fidelity) -> float:
        """The trust after a step that was made with `trust`."""
        predicted, realised = fidelity.predicted_drop, fidelity.realised_drop
        if not (math.isfinite(predicted) and math.isfinite(realised)):
            return trust
        if realised < self.low * predicted or (predicted <= 0 and realised < predicted):
            trust *= self.shrink
        elif realised > self.high * predicted:
            trust *= self.grow
        return min(max(trust, self.smallest), self.largest)


@dataclass
class Expectation:
    """What is predicted of the coming step.

    Attributes:
        selection: of the step; its diagnostics hold the parts that depend on how much of the gradient is applied.
        trust: the utility's; its curvature is divided by it.
        norm: of the gradient that `apply()` wrote, AMP scale divided out.
        displacement: gradient -> predicted displacement; None: not asked for.
    """

    selection: Selection
    trust: float
    norm: float
    displacement: Callable[[Mapping[Parameter, Tensor]], Displacement] | None

    def predicted(self, applied: float) -> tuple[float, float]:
        """First-order and whole drop, in nats, if the gradient is scaled by `applied`."""
        numbers = self.selection.diagnostics
        first, curvature = numbers["first_order"], numbers["curvature"]
        if "curvature_parts" in numbers:
            constant, linear, quadratic = numbers["curvature_parts"]
            first = numbers["offset_drop"] + applied * (first - numbers["offset_drop"])
            curvature = constant + applied * linear + applied**2 * quadratic
        return first, first - curvature / self.trust


class Watcher:
    """Hooks on an optimizer that compare a step with what was expected of it.

    A step that is given a closure is measured once that has run: forward, backward and `apply()` may be in it, as in
    Lightning's automatic optimization. One that runs it several times is not measured.

    Args:
        optimizer: the one that steps.
        parameters: those that take part, in a fixed order.
        loss: the target's loss on the batch that g came from, without gradient.
        told: called with every result.
        total: sums over what this process holds of the parameters -> sums over all of it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Callable[[], Iterable[Parameter]],
        loss: Callable[[], float],
        told: Callable[[Fidelity], None],
        total: Total | None = None,
    ) -> None:
        self._parameters, self._loss, self._told, self._total = parameters, loss, told, total
        self._expected: Expectation | None = None
        self._closures = 0  # that ran within this step
        self._seen: tuple[float, float, dict[Parameter, Tensor], Displacement] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def expect(self, expected: Expectation) -> None:
        """The next step of the optimizer is the one that this is about."""
        self._expected = expected

    def forget(self) -> None:
        """No step is expected any more."""
        self._expected, self._seen = None, None

    def close(self) -> None:
        """Remove the hooks."""
        self.forget()
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._closures = 0
        place = next((i for i, given in enumerate(args) if given is not optimizer and callable(given)), None)
        closure = kwargs.get("closure") if place is None else args[place]
        if closure is None:
            self._measure(optimizer)
            return None

        def measured() -> Any:
            result = closure()
            self._closures += 1
            self._measure(optimizer)
            return result

        if place is None:
            return args, {**kwargs, "closure": measured}
        return (*args[:place], measured, *args[place + 1 :]), kwargs

    def _measure(self, optimizer: Optimizer) -> None:
        expected = self._expected
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer under a GradScaler steps in vain
        if expected is None or (found_inf is not None and bool(found_inf)):
            return
        scale = getattr(optimizer, "grad_scale", None)
        gradient = {p: local(p.grad.detach()) for p in self._parameters() if p.grad is not None}
        if scale is not None:
            gradient = {p: g / scale for p, g in gradient.items()}
        applied = total_norm(gradient.values(), self._total) / expected.norm if expected.norm else 1.0
        before: dict[Parameter, Tensor] = {}
        displacement: Displacement = {}
        if expected.displacement is not None:
            displacement = expected.displacement(gradient)
            before = {p: local(p.detach()).clone() for p in displacement}
        self._seen = self._loss(), applied, before, displacement

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        expected, seen = self._expected, self._seen
        if expected is None or seen is None:
            return
        self.forget()
        if self._closures > 1:  # parameters moved in between
            return
        loss, applied, before, predicted = seen
        first, drop = expected.predicted(applied)
        cosine = error = math.nan
        if before:
            real = {p: local(p.detach()) - old for p, old in before.items()}
            size, foreseen = total_norm(real.values(), self._total), total_norm(predicted.values(), self._total)
            inner = sum(float((predicted[p].double() * real[p].double()).sum()) for p in real)
            if self._total is not None:
                (inner,) = self._total([inner])
            cosine = inner / (size * foreseen) if size and foreseen else math.nan
            error = total_norm([predicted[p] - real[p] for p in real], self._total) / size if size else math.nan
        self._told(
            Fidelity(
                step=int(expected.selection.diagnostics["step"]),
                predicted_drop=drop,
                first_order=first,
                realised_drop=direction(optimizer.param_groups[0]) * (loss - self._loss()),
                applied=applied,
                cosine=cosine,
                displacement_error=error,
            )
        )


def total_norm(tensors: Iterable[Tensor], total: Total | None = None) -> float:
    """Euclidean norm of all numbers together, those that other processes hold included."""
    norm = float(torch.nn.utils.get_total_norm([local(tensor) for tensor in tensors]))
    return norm if total is None else math.sqrt(total([norm**2])[0])
