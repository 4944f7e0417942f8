"""The decision over the pool of all data-parallel processes: the same on each, and that of one process with it all.

    1 said       every process says what it recorded: sizes, masses, columns, faults
    2 summed     the reference gradient, so that M is the same everywhere
    3 gathered   alignments; the filter picks on every process those whose K is needed
    4 exchanged  their contributions: each process gets all of some parameters, and measures these
    5 added      the small numbers, in the order of ranks; every process solves the same problem

What travels in 4 are the pieces of the few candidates that a filter without K leaves, or of the whole pool for one
that reads K (`chain` puts a cheap one before it). Weighted gradients are summed once, when they are written. Called by
the selector, in place of `ftw.routes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.assembly import chosen_scale
from ftw.errors import ConfigurationError, NonFiniteError, RecordingError
from ftw.gradients.base import Contributions
from ftw.gradients.pieces import Dense, Piece, as_rows
from ftw.measurement import Measurement
from ftw.modes import all_finite
from ftw.problem import Selection
from ftw.processes.group import Group
from ftw.processes.travel import of_candidates, pack, unpack
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

    def own(self, rank: int) -> Tensor:  # (m,)
        """The numbers of a process's candidates."""
        first = sum(self.counts[:rank])
        return torch.arange(first, first + self.counts[rank])


def decide_together(step: Step, group: Group) -> Decided:
    """As `ftw.routes.decide_samples`, over all processes.

    Returns:
        The decision; `members` are this process's candidates, whose contributions it holds, and `total` and `residual`
        are those of all.

    Raises:
        RecordingError: another process failed; this one's numbers are as they were.
        ConfigurationError, NonFiniteError: as for one process, on every process.
    """
    recorder = step.recorder
    order = list(recorder.parameters)
    said: dict[str, Any] = {}
    with group.together("reading what it recorded"):
        contributions = recorder.contributions()
        total = contributions.combine()
        faulty: tuple[int, ...] = ()
        if not all_finite(total.values()):
            faulty = contributions.nonfinite_candidates()
            contributions = contributions.without(faulty)
            total = contributions.combine()
        said = {
            "count": recorder.count,
            "mass": step.mass.tolist(),
            "extras": _plain(step.extras),
            "faulty": faulty,
            "idle": (~contributions.reached()).nonzero().flatten().tolist(),
            "names": len(order),
            "reached": [i for i, p in enumerate(order) if p in recorder.window.touched],
            "residual": [i for i, p in enumerate(order) if p in step.residual],
            "geometry": step.geometry,
            "scale": [recorder.loss_scale, step.scaled] if recorder.count else None,
        }
    everybody = group.gather(said)
    pool = _pool(everybody, order)
    # Vanilla is what a parameter without history asks for, on whatever process it was reached.
    geometry = next((each["geometry"] for each in everybody if each["geometry"] == "vanilla"), step.geometry)
    own = pool.own(group.rank)
    if pool.faulty and any(each["scale"][1] for each in everybody if each["scale"] is not None):
        return Decided(step.policy.overflow(pool.count, geometry), recorder.contributions(), own)
    if len(pool.faulty) == pool.count:
        raise NonFiniteError(
            f"all {pool.count} candidates of the pool have NaN or infinite contributions; there is nothing to select; "
            "lower the learning rate or look at the loss."
        )
    residual = _summed(step.residual, pool.residual, group)
    step = replace(step, geometry=geometry, mass=pool.mass, extras=pool.extras, residual=residual)
    if step.reference == "target" or step.preconditioner.structure == "scalar":
        reference: dict[Parameter, Tensor] | None = None
    else:
        reference = _summed(total, pool.parameters, group)
    del total
    drawn, relinearised = step.generator.get_state(), False
    decision = _Decision(step, group, pool, contributions, reference)
    selection = decision.selection
    if step.relinearise and step.geometry != "vanilla" and len(selection.indices):
        used = _summed(contributions.combine(selection.weights[own]), pool.parameters, group)
        whole = reference or _summed(contributions.combine(), pool.parameters, group)
        reference = {p: torch.where(used[p] == 0, whole[p], used[p]) for p in used}
        step.generator.set_state(drawn)
        relinearised = True
        decision = _Decision(replace(step, reference="pool"), group, pool, contributions, reference)
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
        group: Group,
        pool: _Pool,
        contributions: Contributions,
        total: Mapping[Parameter, Tensor] | None,
    ) -> None:
        self._step, self._group, self._pool = step, group, pool
        self._contributions, self._total = contributions, total
        self.gradient: dict[Parameter, Tensor] | None = None  # the sum over processes, where it is known
        policy = step.policy
        absent = list(pool.faulty)
        # A candidate without gradient (all its labels masked) would take weight from the others for nothing.
        if policy.solver.needs_gram and len({*pool.faulty, *pool.idle}) < pool.count:
            absent = sorted({*pool.faulty, *pool.idle})
        with group.together("working out the alignments of its candidates"):
            numbers, offset_drop = self._first_order()
        # (3, n): what the filter goes by, b, and b under M, in nats
        ranking, alignment, true = torch.cat([n.view(3, -1) for n in group.gather_tensor(numbers.flatten())], 1)
        members, rest = policy.shortlist(ranking, step.mass, step.generator, absent, step.extras)
        if len(members) and (policy.filter.needs_gram or policy.solver.needs_gram):
            measurement = self._measure(members)
            self.selection = step.decide(measurement, rest, members=members, absent=absent)
        else:
            self.selection = self._equal(members, Scores(alignment, true, offset_drop), absent)
        self.selection.diagnostics["alignment"] = alignment

    def _first_order(self) -> tuple[Tensor, float]:  # (3, m) float64
        """This process's candidates: what the objective makes of them, b, and b under M; and g'o."""
        step, offset_drop = self._step, 0.0
        along: tuple[dict[Parameter, Tensor], ...] = {}, {}, {}
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
        known: dict[int, Tensor] = {}
        numbers = []
        for directions in along:  # where they are one and the same, they are read once
            key = hash(tuple(id(direction) for direction in directions.values()))
            if key not in known:
                known[key] = self._contributions.alignment(directions)
            numbers.append(known[key])
        return torch.stack(numbers), offset_drop

    def _measure(self, members: Tensor) -> Measurement:
        """b, K and the rest of the members, (m,): each process sums over its parameters, then all add up."""
        step, group, pool = self._step, self._group, self._pool
        order, keeper = pool.parameters, _keepers(pool.parameters, group.size)
        outgoing: list[Tensor] = []
        mine: list[tuple[int, Piece]] = []
        with group.together("packing the contributions of the chosen"):
            own = pool.own(group.rank)
            here = members[(members >= own[0]) & (members <= own[-1])] if len(own) else members[:0]
            first = int((members < (own[0] if len(own) else 0)).sum())
            chosen = (here - own[0]).tolist() if len(own) else []
            for rank in range(group.size):
                pieces = [
                    (i, piece)
                    for i, p in enumerate(order)
                    if keeper[i] == rank
                    for piece in of_candidates(self._contributions.pieces(p), chosen, first)
                ]
                if rank == group.rank:
                    mine = pieces
                outgoing.append(pack([] if rank == group.rank else pieces))
        incoming = group.exchange(outgoing)
        del outgoing
        with group.together("measuring the chosen"):
            gathered: dict[Parameter, list[Piece]] = {p: [] for i, p in enumerate(order) if keeper[i] == group.rank}
            devices = [p.device for p in order]
            for rank, raw in enumerate(incoming):
                for i, piece in mine if rank == group.rank else unpack(raw, devices):
                    gathered[order[i]].append(piece)
            for p, kept in gathered.items():
                if not kept:  # none of the chosen reaches it; its offset counts all the same
                    shape = tuple(as_rows(p).shape)
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    kept.append(Dense(0, shape, dtype, torch.zeros(0, *shape, dtype=dtype, device=p.device)))
            measured = step.measure(Contributions(gathered, len(members)), self._total)
        result: Measurement | None = None
        for numbers in group.gather_tensor(measured.flat()):
            part = measured.like(numbers)
            if result is None:
                result = part
            else:
                result.add(part)
        assert result is not None
        return result

    def _equal(self, members: Tensor, scores: Scores, absent: list[int]) -> Selection:
        """Equal weights, whose curvature is read from the gradient that they give."""
        step, own = self._step, self._pool.own(self._group.rank)
        selection = step.policy.share_equally(members, scores, step.geometry, step.mass, absent)
        combined = _summed(self._contributions.combine(selection.weights[own]), self._pool.parameters, self._group)
        parts = step.optimizer, step.preconditioner, step.target, step.residual, step.reference, self._total
        bends = curvature(combined, *parts)
        selection.diagnostics.update(curvature=sum(bends), curvature_parts=bends)
        self.gradient = combined
        return replace(selection, predicted_drop=selection.diagnostics["first_order"] - sum(bends))


def _pool(said: Sequence[Mapping[str, Any]], order: list[Parameter]) -> _Pool:
    if len({each["names"] for each in said}) > 1:
        raise RecordingError(
            f"the processes record {[each['names'] for each in said]} parameters; each must train the same model; make "
            "the selectors of all processes alike."
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
    starts = [sum(each["count"] for each in said[:rank]) for rank in range(len(said))]

    def numbered(name: str) -> list[int]:
        return [start + i for start, each in zip(starts, said, strict=True) for i in each[name]]

    def named(name: str) -> list[Parameter]:
        return [order[i] for i in sorted({i for each in said for i in each[name]})]

    return _Pool(
        counts=[each["count"] for each in said],
        mass=torch.tensor([mass for each in said for mass in each["mass"]], dtype=torch.float64),
        extras={name: [entry for each in said for entry in each["extras"].get(name, [])] for name in columns[0]},
        faulty=numbered("faulty"),
        idle=numbered("idle"),
        parameters=named("reached"),
        residual=named("residual"),
    )


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


def _summed(own: Mapping[Parameter, Tensor], parameters: list[Parameter], group: Group) -> dict[Parameter, Tensor]:
    """The sum over processes for these parameters, zero where a process has nothing."""
    return group.sum({p: own[p] if p in own else torch.zeros_like(p) for p in parameters})


def _keepers(parameters: Sequence[Parameter], size: int) -> list[int]:
    """Which process measures each parameter: the largest first, each to the one that has least."""
    load, keeper = [0] * size, [0] * len(parameters)
    for i in sorted(range(len(parameters)), key=lambda i: (-parameters[i].numel(), i)):
        keeper[i] = load.index(min(load))
        load[keeper[i]] += parameters[i].numel()
    return keeper
