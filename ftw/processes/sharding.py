"""Sharded models (FSDP2, `fully_shard`): every process holds some rows of each parameter, and measures these.

The parameters are whole where a layer runs, and there its candidates are recorded as in any model. Everything after
is of rows: sums go to the process that holds them, its optimizer state says M there, directions are gathered layer by
layer for the alignments, and the chosen candidates' factors travel to all. Made by the setting, in place of
`Replicas`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.errors import ConfigurationError, RecordingError, TargetError
from ftw.gradients.base import Contributions
from ftw.gradients.company import Company, Forward
from ftw.gradients.pieces import as_rows
from ftw.modes import all_finite, quiet
from ftw.optim_state.shards import is_dtensor, local
from ftw.processes.group import Group, buckets
from ftw.processes.spread import Direction, Spread

_END = object()


class Shards(Spread, Company):
    """A model under `fully_shard`, on a mesh of one dimension that is the group's, cut along first dimensions.

    Raises:
        ConfigurationError: it is sharded in another way.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        super().__init__(group)
        self._units = _units(model)
        self.end_forwards()
        _check(model, self._units, group)

    # -- rows ------------------------------------------------------------------------------------------------------

    def rows(self, parameter: Parameter, rank: int) -> slice:
        """Which of a parameter's rows (`as_rows`) a process holds: of n entries in the first dimension ceil(n / size),
        the last ones fewer or none. Not collective."""
        first = parameter.shape[0]
        each, inner = -(-first // self.group.size), parameter.shape[1:-1].numel()
        return slice(min(rank * each, first) * inner, min((rank + 1) * each, first) * inner)

    def placed(self, parameter: Parameter, held: Tensor) -> Tensor:
        """This process's rows as a part of the whole, for `p.grad`. Not collective."""
        if is_dtensor(held):
            return held
        from torch.distributed.tensor import DTensor

        assert is_dtensor(parameter)
        mesh, placements = parameter.device_mesh, parameter.placements
        layout: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(held.contiguous(), mesh, placements, run_check=False, **layout)

    # -- as a spread -----------------------------------------------------------------------------------------------

    def sum(
        self, contributions: Contributions, parameters: Sequence[Parameter], weights: Tensor | None = None
    ) -> dict[Parameter, Tensor]:
        return self._sum(contributions, parameters, weights, send=True)[0]

    def look(
        self, contributions: Contributions, parameters: Sequence[Parameter], *, summed: bool
    ) -> tuple[Contributions, list[tuple[int, ...]], dict[Parameter, Tensor] | None]:
        # The sum is made on trust; only where it shows a fault anywhere are the culprits sought, and it is made anew.
        total, finite = self._sum(contributions, parameters, None, send=summed)
        faulty: tuple[int, ...] = ()
        everybody: list[tuple[int, ...]] = [()] * self.group.size
        if not all(self.group.gather(finite)):
            with self.group.together("looking for NaN and infinity in its contributions"):
                faulty = () if finite else contributions.nonfinite_candidates()
                contributions = contributions.without(faulty)
            everybody = [tuple(each) for each in self.group.gather(faulty)]
            total = self.sum(contributions, parameters) if summed else {}
        return contributions, everybody, total if summed else None

    def _sum(
        self, contributions: Contributions, parameters: Sequence[Parameter], weights: Tensor | None, *, send: bool
    ) -> tuple[dict[Parameter, Tensor], bool]:
        """The sum of this process's rows, and whether its own candidates' part of the whole was finite."""
        result: dict[Parameter, Tensor] = {}
        finite = True
        for bucket in _buckets(parameters):
            own = contributions.combine(weights, bucket)
            finite = finite and all_finite(own.values())
            if not send:
                continue
            outgoing = []
            for rank in range(self.group.size):
                parts = [as_rows(own[p])[self.rows(p, rank)] if p in own else self._nothing(p, rank) for p in bucket]
                outgoing.append(torch.cat([part.flatten() for part in parts]).view(torch.uint8))
            device, dtype = bucket[0].device, bucket[0].dtype
            wide = torch.promote_types(dtype, torch.float32)
            # In the order of ranks, so that the sum is one and the same for whoever makes it.
            total: Tensor | None = None
            for raw in self.group.exchange(outgoing):
                part = raw.to(device).view(dtype).to(wide)
                total = part if total is None else total + part
            assert total is not None
            sizes = [local(p).numel() for p in bucket]
            for p, part in zip(bucket, total.to(dtype).split(sizes), strict=True):
                result[p] = part.view(local(p).shape)
        return result, finite

    def alignment(self, contributions: Contributions, directions: Sequence[Direction]) -> list[Tensor]:
        result = []
        for direction in directions:
            found = torch.zeros(contributions.count, dtype=torch.float64)
            for bucket in _buckets(direction):
                found += contributions.alignment(self._gathered(direction, bucket))
            result.append(found)
        return result

    def _gathered(self, direction: Direction, bucket: Sequence[Parameter]) -> dict[Parameter, Tensor]:
        """Whole directions from every process's rows."""
        own = torch.cat([direction[p].flatten() for p in bucket])
        everybody = [
            raw.to(own.device).view(own.dtype).split([self._nothing(p, rank).numel() for p in bucket])
            for rank, raw in enumerate(self.group.exchange([own.view(torch.uint8)] * self.group.size))
        ]
        return {
            p: torch.cat(parts).view(p.shape) for p, parts in zip(bucket, zip(*everybody, strict=True), strict=True)
        }

    def _nothing(self, parameter: Parameter, rank: int) -> Tensor:
        """Zeros for a process's rows, that take no memory."""
        rows = self.rows(parameter, rank)
        columns = parameter.shape[-1:] if parameter.dim() > 1 else ()
        zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        return zero.expand(rows.stop - rows.start, *columns)

    def total(self, numbers: Sequence[float]) -> list[float]:
        return [sum(each) for each in zip(*self.group.gather(list(numbers)), strict=True)]

    def measured(self, parameters: Sequence[Parameter], rank: int) -> list[tuple[int, slice | None]]:
        """All of them, its rows, where it has any."""
        rows = [self.rows(p, rank) for p in parameters]
        return [(i, each) for i, each in enumerate(rows) if each.stop > each.start]

    def gradient(
        self, measured: Contributions, parameters: Sequence[Parameter], weights: Tensor
    ) -> dict[Parameter, Tensor] | None:
        found = measured.combine(weights)
        return {p: found[p] if p in found else torch.zeros_like(local(p)) for p in parameters}

    # -- as company ------------------------------------------------------------------------------------------------

    @contextmanager
    def in_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Forward]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.group.gather([True, None])
            return model(*args, **kwargs)

        failure: Exception | None = None
        try:
            yield forward
        except Exception as error:
            failure = error
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        said = self.group.gather([False, text])
        # As quiet as the others' are: dropout drawn here would shift the run's own.
        while any(runs for runs, _ in said):
            with quiet(model):
                model(*args, **kwargs)
            said = self.group.gather([False, text])
        self.end_forwards()
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(said):
            if reason is not None:
                raise RecordingError(
                    f"process {rank} failed in the audit of its batch, and so the block is dropped on all "
                    f"{self.group.size}; it said: {reason}"
                )

    def all(self, fact: bool) -> bool:
        return all(self.group.gather(fact))

    def any(self, fact: bool) -> bool:
        return any(self.group.gather(fact))

    def weighted(self, batches: Iterable[Any], rows: Callable[[Any], float]) -> Iterator[tuple[Any, float, float]]:
        """FSDP makes the mean of the processes' gradients: each one's loss gets its batch's share of the rows."""
        self._require_sums()
        remaining = iter(batches)
        while True:
            with self.group.together("fetching a batch of its target"):
                batch = next(remaining, _END)
                own = None if batch is _END else float(rows(batch))
            said = self.group.gather(own)
            if all(each is None for each in said):
                return
            if any(each is None for each in said):
                raise TargetError(
                    f"some processes have fewer target batches than others; of a sharded model every process runs each "
                    f"forward, so all {self.group.size} need as many; give each as many batches, of any size."
                )
            whole = sum(said)
            yield batch, whole, (own or 0.0) * self.group.size / whole

    def end_forwards(self) -> None:
        """FSDP keeps some parameters whole until the backward: where none follows, the next step would not reach them.
        Not collective."""
        for unit in self._units:
            unit.reshard()

    def _require_sums(self) -> None:
        for part in _groups(self._units):
            if not part.reduce_grads:
                raise ConfigurationError(
                    "set_requires_gradient_sync(False) is in force; the target's gradient is the mean over processes "
                    "that FSDP makes; leave it on: in record() FSDP has nothing to sum."
                )
            if part.gradient_divide_factor is not None:
                raise ConfigurationError(
                    f"gradients are divided by {part.gradient_divide_factor} (set_gradient_divide_factor); with a "
                    "global pool they have to be means over processes; leave it as it was."
                )


def _buckets(parameters: Iterable[Parameter]) -> Iterable[list[Parameter]]:
    """The same on every process: by the size of whole parameters."""
    return buckets({p: p for p in parameters})


def is_sharded_model(model: nn.Module) -> bool:
    """Whether parameters are, or will be between forwards, DTensors."""
    return bool(_units(model)) or any(map(is_dtensor, model.parameters()))


def _units(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    module = sys.modules.get("torch.distributed.fsdp")  # slow to import, and not there where it is not used
    kind = getattr(module, "FSDPModule", None)
    return [] if kind is None else [each for each in model.modules() if isinstance(each, kind)]


def _groups(units: Sequence[Any]) -> list[Any]:
    """torch's own books on each unit's parameters: what was asked of `fully_shard` can be read nowhere else."""
    states = [unit._get_fsdp_state() for unit in units]
    if all(hasattr(state, "_fsdp_param_groups") for state in states):
        return [part for state in states for part in state._fsdp_param_groups]
    return [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]  # before torch 2.11


def _check(model: nn.Module, units: Sequence[Any], group: Group) -> None:
    parts = _groups(units)
    known = {each.sharded_param for part in parts for each in part.fsdp_params}
    given: str | None = None
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p not in known:
            given = f"{name} is trained and not sharded by fully_shard"
            break
        assert is_dtensor(p)
        mesh, placement = p.device_mesh, p.placements[0]
        if mesh.ndim != 1 or mesh.size() != group.size or mesh.get_local_rank() != group.rank:
            given = f"{name} is spread over a mesh of shape {tuple(mesh.shape)}"
            break
        if not placement.is_shard(0) or type(placement).__name__ != "Shard":
            given = f"{name} is cut by {placement}"
            break
    offloaded = [part.offload_policy for part in parts if type(part.offload_policy).__name__ != "OffloadPolicy"]
    if offloaded:
        given = f"fully_shard was given {offloaded[0]}"
    if given is not None:
        raise ConfigurationError(
            f"{given}; of sharded models those can be selected for whose trained parameters are all cut along their "
            f"first dimension over a mesh of one dimension, that of the {group.size} processes, without offloading; "
            "shard it so, or use DistributedDataParallel."
        )
