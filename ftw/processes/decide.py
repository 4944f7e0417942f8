"""The decision over the pool of all data-parallel processes: the same on each, and that of one process with it all.

    1 said       every process says what it recorded: sizes, masses, columns; then faults
    2 summed     the reference gradient, so that M is the same everywhere
    3 gathered   alignments; the filter picks on every process those whose K is needed
    4 exchanged  their contributions: each process gets all of some parameters, or some rows of all, and measures these
    5 added      the small numbers, in the order of ranks; every process solves the same problem

What travels in 4 are the pieces of the few candidates that a filter without K leaves, or of the whole pool for one
that reads K (`chain` puts a cheap one before it). Which process holds and measures what is the spread's to say.
Weighted gradients are summed once, when they are written. Called by the selector, in place of `ftw.routes`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.assembly import chosen_scale
from ftw.errors import ConfigurationError, NonFiniteError, RecordingError
from ftw.gradients.base import Contributions
from ftw.gradients.pieces import Piece
from ftw.measurement import Measurement
from ftw.problem import Selection
from ftw.processes.spread import Spread, no_candidates
from ftw.processes.travel import pack, unpack
from ftw.routes import Decided, Step
from ftw.scoring import Scores, curvature, updates


@dataclass(frozen=True)
class _Pool:
    """What all processes offer together; candidates are numbered process by process."""

    counts: list[int]  # of each process
    mass: Tensor  # (n,)
    extras: dict[str, list[Any]]
    faulty: list[int]  # quarantined, ascending
    idle: list[int]  # without any gradient
    parameters: list[Parameter]  # that any candidate reached, in the model's order
    residual: list[Parameter]  # with gradient that no candidate owns

    @property
    def count(self) -> int:
        return sum(self.counts)

    def numbered(self, own: Sequence[Sequence[int]]) -> list[int]:
        """Each process's candidates, counted from 0, by their numbers in the pool, ascending."""
        return [sum(self.counts[:rank]) + i for rank, each in enumerate(own) for i in each]

    def own(self, rank: int) -> Tensor:  # (m,)
        """The numbers of a process's candidates."""
        first = sum(self.counts[:rank])
        return torch.arange(first, first + self.counts[rank])


def decide_together(step: Step, spread: Spread) -> Decided:
    """As `ftw.routes.decide_samples`, over all processes.

    Args:
        step: of this process; its target is what the process holds of everybody's.

    Returns:
        The decision; `members` are this process's candidates, whose contributions it holds, and `total`, `gradient` and
        `residual` are those of all, as far as they are held here.

    Raises:
        RecordingError: another process failed; this one's numbers are as they were.
        ConfigurationError, NonFiniteError: as for one process, on every process.
    """
    recorder, group = step.recorder, spread.group
    order = list(recorder.parameters)
    said: dict[str, Any] = {}
    with group.together("reading what it recorded"):
        contributions = recorder.contributions()
        said = {
            "count": recorder.count,
            "mass": step.mass.tolist(),
            "extras": _plain(step.extras),
            "idle": (~contributions.reached()).nonzero().flatten().tolist(),
            "names": len(order),
            "reached": [i for i, p in enumerate(order) if p in recorder.window.touched],
            "residual": [i for i, p in enumerate(order) if p in step.residual],
            "geometry": step.geometry,
            "scale": [recorder.loss_scale, step.scaled] if recorder.count else None,
            "settings": _settings(step),
        }
    everybody = group.gather(said)
    pool = _pool(everybody, order)
    known = step.reference == "target" or step.preconditioner.structure == "scalar"  # M, without the pool's gradient
    contributions, faulty, reference = spread.look(contributions, pool.parameters, summed=not known)
    pool = replace(pool, faulty=pool.numbered(faulty))
    # Vanilla is what a parameter without history asks for, on whatever process it was reached.
    geometry = next((each["geometry"] for each in everybody if each["geometry"] == "vanilla"), step.geometry)
    own = pool.own(group.rank)
    if pool.faulty and any(each["scale"][1] for each in everybody if each["scale"] is not None):
        return Decided(step.policy.overflow(pool.count, geometry), None, own)
    if len(pool.faulty) == pool.count:
        raise NonFiniteError(
            f"all {pool.count} candidates of the pool have NaN or infinite contributions; there is nothing to select; "
            "lower the learning rate or look at the loss."
        )
    residual = group.sum({p: step.residual.get(p, torch.zeros_like(p)) for p in pool.residual})
    step = replace(step, geometry=geometry, mass=pool.mass, extras=pool.extras, residual=residual)
    drawn, relinearised = step.generator.get_state(), False
    decision = _Decision(step, spread, pool, contributions, reference)
    selection = decision.selection
    if step.relinearise and step.geometry != "vanilla" and len(selection.indices):
        used = spread.sum(contributions, pool.parameters, selection.weights[own])
        whole = reference or spread.sum(contributions, pool.parameters)
        reference = {p: torch.where(used[p] == 0, whole[p], used[p]) for p in used}
        step.generator.set_state(drawn)
        relinearised = True
        decision = _Decision(replace(step, reference="pool"), spread, pool, contributions, reference)
        selection = decision.selection
    selection.diagnostics.update(quarantined=pool.faulty, own=(int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0))
    if columns := {name: column for name, column in pool.extras.items() if name != "learning_rate"}:
        selection.diagnostics["columns"] = columns
    if step.names:
        drops = selection.diagnostics["predicted_drops"]
        selection.diagnostics["predicted_drops"] = dict(zip(step.names, drops, strict=True))
    return Decided(
        selection, contributions, own, reference, relinearised, gradient=decision.gradient, residual=step.residual
    )


class _Decision:
    """Steps 3 to 5 of the module's list."""

    def __init__(
        self,
        step: Step,
        spread: Spread,
        pool: _Pool,
        contributions: Contributions,
        total: Mapping[Parameter, Tensor] | None,
    ) -> None:
        self._step, self._spread, self._group, self._pool = step, spread, spread.group, pool
        self._contributions, self._total = contributions, total
        # The weighted gradient of all, as far as it is held here, where it is known.
        self.gradient: Mapping[Parameter, Tensor] | None = None
        policy = step.policy
        absent = list(pool.faulty)
        # A candidate without gradient (all its labels masked) would take weight from the others for nothing.
        if policy.solver.needs_gram and len({*pool.faulty, *pool.idle}) < pool.count:
            absent = sorted({*pool.faulty, *pool.idle})
        numbers, offset_drop = self._first_order()
        # (3, n): what the filter goes by, b, and b under M, in nats
        gathered = self._group.gather_tensor(numbers.flatten())
        ranking, alignment, true = torch.cat([n.view(3, -1) for n in gathered], 1)
        members, rest = policy.shortlist(ranking, step.mass, step.generator, absent, step.extras)
        if len(members) and (policy.filter.needs_gram or policy.solver.needs_gram):
            measured, measurement = self._measure(members)
            self.selection = step.decide(measurement, rest, members=members, absent=absent)
            self.gradient = spread.gradient(measured, pool.parameters, self.selection.weights[members])
        else:
            self.selection = self._equal(members, Scores(alignment, true, offset_drop), absent)
        self.selection.diagnostics["alignment"] = alignment

    def _first_order(self) -> tuple[Tensor, float]:  # (3, m) float64
        """This process's candidates: what the objective makes of them, b, and b under M; and g'o."""
        step, offset_drop = self._step, 0.0
        along: tuple[dict[Parameter, Tensor], ...] = {}, {}, {}
        with self._group.together("working out M g"):
            parts = step.optimizer, step.preconditioner, step.target, step.reference, self._total, step.residual
            for p, group, update in updates(self._pool.parameters, *parts):
                g = step.target[p]
                true = update.scale.apply(g)
                chosen = true
                if step.geometry != "curvature":
                    chosen = chosen_scale(step.geometry, update.scale, group).apply(g)
                bent = chosen
                if step.policy.objective == "utility" and step.geometry != "vanilla":
                    bent = chosen - update.gain / step.policy.trust * update.offset
                for into, direction in zip(along, (bent, chosen, true), strict=True):
                    into[p] = direction
                offset_drop += float((g * update.offset).sum(dtype=torch.float64))
        # Where they are one and the same, they are read once.
        marks = [tuple(id(direction) for direction in directions.values()) for directions in along]
        distinct = dict(zip(marks, along, strict=True))
        found = dict(zip(distinct, self._spread.alignment(self._contributions, list(distinct.values())), strict=True))
        return torch.stack([found[mark] for mark in marks]), self._spread.total([offset_drop])[0]

    def _measure(self, members: Tensor) -> tuple[Contributions, Measurement]:
        """b, K and the rest of the members, (m,): each process sums over what it measures, then all add up. And the
        members' contributions as far as they are measured here."""
        step, group, pool, spread = self._step, self._group, self._pool, self._spread
        order = pool.parameters
        outgoing: list[Tensor] = []
        mine: list[tuple[int, Piece]] = []
        with group.together("packing the contributions of the chosen"):
            own = pool.own(group.rank)
            here = members[(members >= own[0]) & (members <= own[-1])] if len(own) else members[:0]
            first = int((members < (own[0] if len(own) else 0)).sum())
            chosen = (here - own[0]).tolist() if len(own) else []
            for rank in range(group.size):
                pieces = spread.share(self._contributions, order, chosen, first, rank)
                if rank == group.rank:
                    mine = pieces
                outgoing.append(pack([] if rank == group.rank else pieces))
        incoming = group.exchange(outgoing)
        del outgoing
        with group.together("measuring the chosen"):
            gathered: dict[Parameter, list[Piece]] = {order[i]: [] for i, _ in spread.measured(order, group.rank)}
            devices = [p.device for p in order]
            for rank, raw in enumerate(incoming):
                for i, piece in mine if rank == group.rank else unpack(raw, devices):
                    gathered[order[i]].append(piece)
            for p, kept in gathered.items():
                if not kept:  # none of the chosen reaches it; its offset counts all the same
                    kept.append(no_candidates(p))
            contributions = Contributions(gathered, len(members))
            measured = step.measure(contributions, self._total)
        result: Measurement | None = None
        for numbers in group.gather_tensor(measured.flat()):
            part = measured.like(numbers)
            if result is None:
                result = part
            else:
                result.add(part)
        assert result is not None
        return contributions, result

    def _equal(self, members: Tensor, scores: Scores, absent: list[int]) -> Selection:
        """Equal weights, whose curvature is read from the gradient that they give."""
        step, own = self._step, self._pool.own(self._group.rank)
        selection = step.policy.share_equally(members, scores, step.geometry, step.mass, absent)
        combined = self._spread.sum(self._contributions, self._pool.parameters, selection.weights[own])
        parts = step.optimizer, step.preconditioner, step.target, step.residual, step.reference, self._total
        bends = tuple(self._spread.total(curvature(combined, *parts)))
        selection.diagnostics.update(curvature=sum(bends), curvature_parts=bends)
        self.gradient = combined
        return replace(selection, predicted_drop=selection.diagnostics["first_order"] - sum(bends))


def _settings(step: Step) -> dict[str, Any]:
    """What every process must have alike, or each would decide something else, and take other turns in between."""
    policy = step.policy
    return {
        **{name: type(getattr(policy, name)).__name__ for name in ("filter", "solver", "constraints")},
        **{name: getattr(policy, name) for name in ("budget", "objective", "total", "targets")},
        "reference": step.reference,
        "relinearise": step.relinearise,
        "seed": zlib.crc32(step.generator.get_state().numpy().tobytes()),  # of its present state
    }


def _pool(said: Sequence[Mapping[str, Any]], order: list[Parameter]) -> _Pool:
    if len({each["names"] for each in said}) > 1:
        raise RecordingError(
            f"the processes record {[each['names'] for each in said]} parameters; each must train the same model; make "
            "the selectors of all processes alike."
        )
    settings = [each["settings"] for each in said]
    if differ := [name for name in settings[0] if any(each[name] != settings[0][name] for each in settings)]:
        raise ConfigurationError(
            f"the selectors of the processes differ in {', '.join(differ)}: "
            f"{[{name: each[name] for name in differ} for each in settings]}; all must make the same decision; give "
            "them the same arguments, or choose pool='local', with which each process decides alone."
        )
    scales = {tuple(each["scale"]) for each in said if each["scale"] is not None}
    if len(scales) != 1:
        raise RecordingError(
            "nothing was recorded on any process since the last step; record() before apply() or select()."
            if not scales
            else f"the loss scales of the processes differ: {sorted(scales)}; give all the same GradScaler settings, "
            "and scaler= to record() on all of them or on none."
        )
    columns = [set(each["extras"]) for each in said if each["count"]]
    if any(names != columns[0] for names in columns):
        raise ConfigurationError(
            f"extras are {[sorted(names) for names in columns]} on the processes; filters need them of all "
            "candidates; pass the same names on each."
        )

    def named(name: str) -> list[Parameter]:
        return [order[i] for i in sorted({i for each in said for i in each[name]})]

    pool = _Pool(
        counts=[each["count"] for each in said],
        mass=torch.tensor([mass for each in said for mass in each["mass"]], dtype=torch.float64),
        extras={name: [entry for each in said for entry in each["extras"].get(name, [])] for name in columns[0]},
        idle=[],
        faulty=[],
        parameters=named("reached"),
        residual=named("residual"),
    )
    return replace(pool, idle=pool.numbered([each["idle"] for each in said]))


def _plain(extras: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    columns = {name: list(column) for name, column in extras.items()}
    try:
        json.dumps(columns)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"extras hold something that cannot be sent to the other processes ({error}); allowed are numbers, "
            "strings, booleans and None."
        ) from error
    return columns
