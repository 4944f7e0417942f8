"""From a recorded window to a decision: the three ways, by what of the window was kept and what is chosen.

    decide_samples      everything was kept: b and K of all candidates, filter, solver
    decide_beyond_cap   alignments alone were kept: the best candidates are run again and measured on their own
    decide_tokens       tokens are the candidates: alignments, and K of the few that a solver needs it for

Called by the selector, which owns the run's state; a route changes nothing but the curvature model and the generator,
and the selector undoes that where a step fails or overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.assembly import UNEXPLAINED, measure
from ftw.curvature.base import Curvature
from ftw.decision import Policy
from ftw.errors import ConfigurationError, NonFiniteError, RecordingError
from ftw.filters.all import All
from ftw.gradients.base import Contributions
from ftw.gradients.recorder import Recorder
from ftw.measurement import Measurement
from ftw.modes import all_finite
from ftw.optim_state.base import Preconditioner
from ftw.problem import Selection, Status
from ftw.scoring import Scores, curvature, score, updates
from ftw.survivors import along, read_survivors, sum_survivors, weigh_survivors

TOKEN_GRAM = 1024
"""Most tokens for which a Gram is formed: its cost grows with the square of their number."""


class Decided(NamedTuple):
    """A step that is decided and not yet written."""

    selection: Selection
    contributions: Contributions | None  # None: lost to an overflow beyond the memory cap
    members: Tensor | None = None  # (m,) whose contributions they are; None: everybody's
    total: Mapping[Parameter, Tensor] | None = None  # reference gradient, where it is not the sum of `contributions`
    relinearised: bool = False
    gradient: Mapping[Parameter, Tensor] | None = None  # sum_i w_i c_i, where a second backward has formed it
    residual: Mapping[Parameter, Tensor] | None = None  # of all processes, where there are several


@dataclass(frozen=True)
class Step:
    """What a decision is made from.

    Attributes:
        recorder: holds the window.
        optimizer, preconditioner: of the coming step.
        policy: how to choose.
        target: g. further: g_j of several targets, names: theirs.
        geometry: the one that selects in this step. reference: see `Selector`.
        mass: (n,). extras: columns, name -> (n,).
        generator: for filters that draw.
        curvature: model of the target's Hessian; None: the optimizer's own.
        relinearise: decide twice.
        scaled: a GradScaler is on, so that overflow is routine.
        early: whether g was known before the backward.
        uncovered: parameters whose gradient a rerun will form; proved: that it can be trusted.
        residual: gradient that no candidate owns.
    """

    recorder: Recorder
    optimizer: Optimizer
    preconditioner: Preconditioner
    policy: Policy
    target: Mapping[Parameter, Tensor]
    further: Sequence[Mapping[Parameter, Tensor]]
    names: Sequence[str]
    geometry: str
    reference: str
    mass: Tensor
    extras: Mapping[str, Sequence[Any]]
    generator: torch.Generator
    curvature: Curvature | None
    relinearise: bool
    scaled: bool
    early: bool
    uncovered: list[Parameter]
    proved: bool
    residual: Mapping[Parameter, Tensor]

    def measure(
        self,
        contributions: Contributions,
        total: Mapping[Parameter, Tensor] | None = None,
        reference: str | None = None,
    ) -> Measurement:
        """b, K and the rest of some candidates; see `ftw.assembly.measure`."""
        parts = self.optimizer, self.preconditioner, self.target, self.residual
        reference = reference or self.reference
        return measure(contributions, *parts, self.geometry, reference, total, self.curvature, self.further)

    def decide(self, measurement: Measurement, policy: Policy | None = None, **which: Any) -> Selection:
        """Filter and solver on what was measured; see `Policy.decide`."""
        policy = self.policy if policy is None else policy
        return policy.decide(measurement, self.geometry, self.mass, self.generator, extras=self.extras, **which)

    def choose(self, alignment: Tensor, absent: Sequence[int]) -> Tensor:
        """The filter on alignments alone; see `Policy.choose`."""
        return self.policy.choose(alignment, self.mass, self.generator, absent, self.extras)

    def nothing(self) -> Selection:
        """Of a process that offers no candidate."""
        none = torch.zeros(0, dtype=torch.float64)
        diagnostics = {"candidates": 0, "geometry": self.geometry, "quarantined": [], "alignment": none, "mass": none}
        return Selection(none.long(), none, 0.0, Status.NOTHING_USEFUL, diagnostics)

    def overflow(self, contributions: Contributions | None) -> Decided:
        """The scaler must see what overflowed, skip the step and back off."""
        return Decided(self.policy.overflow(self.recorder.count, self.geometry), contributions)


def decide_samples(step: Step, absent: Sequence[int] = ()) -> Decided:
    """The usual way: everything was kept, and b and K are measured on all candidates."""
    contributions = step.recorder.contributions()
    if step.curvature is not None:
        step.curvature.observe(contributions, step.recorder.parameters)
    try:
        measurement = step.measure(contributions)
    except NonFiniteError:
        # Under a GradScaler overflow is routine: the scaler must see it, skip the step and back off.
        if not (step.scaled and _overflows(step, contributions)):
            raise
        return step.overflow(contributions)
    if step.scaled and measurement.excluded:
        return step.overflow(contributions)
    contributions = contributions.without(measurement.excluded)
    step.recorder.window.faulty = measurement.excluded
    if step.policy.solver.needs_gram:
        # A candidate without gradient (all its labels masked) would take weight from the others for nothing.
        idle = (measurement.true.gram.diagonal() == 0).nonzero().flatten().tolist()
        if len(idle) + len(measurement.excluded) < contributions.count:
            absent = sorted({*absent, *idle} - {*measurement.excluded})
    drawn = step.generator.get_state()
    selection = step.decide(measurement, absent=absent)
    total = None
    if step.relinearise and step.geometry != "vanilla" and len(selection.indices):
        # Where the chosen have no gradient the pool's stands in: nothing known there would mean an enormous M.
        used, pool = contributions.combine(selection.weights), contributions.combine()
        total = {p: torch.where(used[p] == 0, pool[p], used[p]) for p in used}
        again = step.measure(contributions, total, "pool")
        again.excluded = measurement.excluded
        step.generator.set_state(drawn)
        selection = step.decide(again, absent=absent)
    if step.names:
        drops = selection.diagnostics["predicted_drops"]
        selection.diagnostics["predicted_drops"] = dict(zip(step.names, drops, strict=True))
    if contributions.error is not None:
        selection.diagnostics["sketch_error"] = contributions.error
    return Decided(selection, contributions, total=total, relinearised=total is not None)


def decide_beyond_cap(step: Step) -> Decided:
    """Alignments are all that is left of the pool: the best are run again, and measured on their own."""
    window = step.recorder.window
    alignment = window.alignments()
    faulty = (~torch.isfinite(alignment)).nonzero().flatten().tolist()
    if faulty and not all_finite((step.recorder.direction or {}).values()):
        raise NonFiniteError(UNEXPLAINED)
    if faulty and (step.scaled or len(faulty) == len(alignment)):
        if not step.scaled:
            raise NonFiniteError(
                f"all {len(alignment)} candidates of the pool have NaN or infinite contributions; there is nothing "
                "to select; lower the learning rate or look at the loss."
            )
        return step.overflow(None)
    window.faulty = faulty
    # As in `decide_samples`: without gradient, a candidate would take weight from the others.
    absent = sorted({*faulty, *(window.unreached() if step.policy.solver.needs_gram else ())})
    absent = faulty if len(absent) == len(alignment) else absent
    members = step.choose(alignment, absent).sort().values
    if len(members):
        decided = _decide_survivors(step, members, alignment, absent)
    else:
        scores = Scores(alignment, alignment, float("nan"))
        decided = Decided(step.policy.share_equally(members, scores, step.geometry, step.mass, absent), None, members)
    decided.selection.diagnostics.update(
        alignment=alignment,
        quarantined=faulty,
        replayed=members.tolist(),
        geometry=step.geometry,
        kept_bytes=window.ledger.peak,
    )
    return decided


def _decide_survivors(step: Step, members: Tensor, alignment: Tensor, absent: Sequence[int]) -> Decided:
    """Weights of the members, which are run again, and their gradient where contributions cannot be kept."""
    recorder, policy = step.recorder, step.policy
    if not step.uncovered or step.proved:  # else all rows are needed once more, for the proof
        recorder.window.keep_outputs_of(members)

    def measured(contributions: Contributions) -> Measurement:
        # At a parameter's first step the direction was made with g as reference; so is this.
        return step.measure(contributions, step.target if step.early else None)

    if policy.filter.needs_gram or policy.solver.needs_gram:
        survivors = read_survivors(recorder, members, measured)
        _check_replay(recorder, survivors.alignment, alignment[members])
    else:
        survivors = sum_survivors(recorder, members, measured, step.uncovered)
        known = alignment[members]
        _check_replay(recorder, survivors.alignment, known.sum()[None], float(known.abs().sum()))
    policy = policy if policy.filter.needs_gram else replace(policy, filter=All())
    selection = step.decide(survivors.measurement, policy, members=members, absent=absent)
    selection.diagnostics["replays"] = survivors.replays
    if survivors.error is not None:
        selection.diagnostics["sketch_error"] = survivors.error
    if survivors.contributions is not None:
        return Decided(selection, survivors.contributions, members)
    weights, total = selection.weights[members], survivors.total
    if total is not None:
        selection.diagnostics["kkt_residual"] = float("nan")  # of an objective that has no K
        if bool((weights == weights[0]).all()):
            gradient = {p: each.mul_(float(weights[0])) for p, each in total.items()}
            return Decided(selection, None, members, gradient=gradient)
    gradient = weigh_survivors(recorder, selection.weights, step.uncovered)
    shares = weights * alignment[members]
    found = along(recorder, {p: each for p, each in gradient.items() if p in recorder.parameters})
    _check_replay(recorder, torch.tensor([found], dtype=torch.float64), shares.sum()[None], float(shares.abs().sum()))
    selection.diagnostics["replays"] += 1
    return Decided(selection, None, members, gradient=gradient)


def decide_tokens(step: Step) -> Decided:
    """Tokens are scored by alignment; K is formed only for those that a solver needs it for."""
    contributions = step.recorder.contributions()
    parts = step.optimizer, step.preconditioner, step.target, step.residual
    scores = score(contributions, *parts, step.geometry, step.reference)
    total = scores.total if step.reference == "pool" else None
    finite = torch.isfinite(scores.alignment)
    if not (bool(finite.all()) and math.isfinite(scores.offset_drop)):
        # The sum tells without a look at each of very many tokens.
        faulty = not all_finite([*contributions.combine().values(), *step.residual.values()])
        if not faulty:
            raise NonFiniteError(UNEXPLAINED)
        if step.scaled:
            return step.overflow(contributions)
        raise NonFiniteError(
            f"{int((~finite).sum())} tokens have NaN or infinite contributions, and through attention they are in "
            "every gradient of their rows; discard() the step, or use granularity='sample', which drops the row."
        )
    # Padding, and tokens behind the last label, carry no gradient: they are not on offer.
    absent = (~contributions.reached()).nonzero().flatten().tolist()
    if len(absent) == len(finite):
        absent = []
    if step.policy.filter.needs_gram:
        _refuse_large_gram(len(finite) - len(absent), f"filter {type(step.policy.filter).__name__}")
        decided = decide_samples(step, absent)
    else:
        chosen = step.choose(scores.alignment, absent)
        if step.policy.solver.needs_gram and len(chosen):
            _refuse_large_gram(len(chosen), f"solver {type(step.policy.solver).__name__}")
            members = contributions.only(chosen)
            measurement = step.measure(members, total)
            policy = replace(step.policy, filter=All())
            selection = step.decide(measurement, policy, members=chosen, absent=absent)
            selection.diagnostics["alignment"] = scores.alignment
            decided = Decided(selection, contributions)
        else:
            selection = step.policy.share_equally(chosen, scores, step.geometry, step.mass, absent, step.extras)
            combined = contributions.combine(selection.weights)
            bends = curvature(combined, *parts, step.reference, total)
            selection.diagnostics.update(curvature=sum(bends), curvature_parts=bends)
            drop = selection.diagnostics["first_order"] - sum(bends)
            decided = Decided(replace(selection, predicted_drop=drop), contributions)
    shapes = {tuple(f.layout.owner.shape) for f in step.recorder.window.forwards if f.layout.owner is not None}
    if len({shape[1] for shape in shapes}) == 1:
        decided.selection.diagnostics["token_alignment"] = scores.alignment.view(-1, shapes.pop()[1])
    return decided


def displacement_of(step: Step, decided: Decided) -> Callable[[Mapping[Parameter, Tensor]], dict[Parameter, Tensor]]:
    """Gradient -> displacement, under the M that the decision was made with."""
    reference, total = "pool" if decided.relinearised else step.reference, decided.total
    if total is not None:
        pass
    elif decided.members is not None:
        total = step.target if step.early else None
    elif reference != "target" and decided.contributions is not None:
        total = decided.contributions.combine()
    if total is not None:
        rest = step.residual if decided.residual is None else decided.residual
        total = {**rest, **{p: known + rest[p] if p in rest else known for p, known in total.items()}}

    def predict(gradient: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        known = [p for p in gradient if total is None or p in total]
        coming = updates(known, step.optimizer, step.preconditioner, step.target, reference, total)
        return {p: -update.sign * (update.offset + update.scale.apply(gradient[p])) for p, _, update in coming}

    return predict


def _check_replay(recorder: Recorder, found: Tensor, expected: Tensor, size: float | None = None) -> None:
    """What was run again must be what was recorded: dropout, aux losses and the like would show here."""
    gap, size = float((found - expected).abs().max()), float(expected.abs().max()) if size is None else size
    if not gap <= min(1e4 * recorder.precision, 0.05) * size:
        raise RecordingError(
            f"the chosen candidates were run again and came out different: alignments differ by {gap:.3g} of "
            f"{size:.3g}; the forward must be a function of its inputs and of torch's random state, and the loss "
            "of the model's logits alone; raise memory_cap so that nothing is run again, or use LoRA."
        )


def _overflows(step: Step, contributions: Contributions) -> bool:
    return bool(contributions.nonfinite_candidates()) or not all_finite(step.residual.values())


def _refuse_large_gram(count: int, who: str) -> None:
    if count > TOKEN_GRAM:
        raise ConfigurationError(
            f"{who} needs the Gram of {count} tokens; up to {TOKEN_GRAM} are formed with granularity='token'; use "
            "filter='topk' and solver='uniform', which need alignments alone, or a smaller budget."
        )
