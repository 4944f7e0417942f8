"""How parameters are spread over the processes that decide together: whole on each, or some rows on each.

What a process *holds* of a parameter is all of it (`Replicas`), or its rows (`ftw.processes.sharding.Shards`): sums
over processes, the target's gradient and M are of what it holds. Called by `ftw.processes.decide` and the selector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.gradients.base import Contributions
from ftw.gradients.pieces import Dense, Piece, as_rows
from ftw.modes import all_finite
from ftw.optim_state.shards import local
from ftw.processes.group import Group
from ftw.processes.travel import of_candidates

Direction = Mapping[Parameter, Tensor]


class Spread(ABC):
    """Every method is collective, unless it says otherwise.

    Contributions are always those of this process's own candidates, to whole parameters.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    @abstractmethod
    def sum(
        self, contributions: Contributions, parameters: Sequence[Parameter], weights: Tensor | None = None
    ) -> dict[Parameter, Tensor]:
        """`sum_i w_i c_i` over all processes, of what this one holds of these parameters."""

    @abstractmethod
    def look(
        self, contributions: Contributions, parameters: Sequence[Parameter], *, summed: bool
    ) -> tuple[Contributions, list[tuple[int, ...]], dict[Parameter, Tensor] | None]:
        """Candidates with NaN or infinity put into quarantine, those of every process, and `sum` of the others.

        Args:
            summed: whether the sum is wanted.
        """

    @abstractmethod
    def alignment(self, contributions: Contributions, directions: Sequence[Direction]) -> list[Tensor]:
        """This process's candidates along directions of which each process has what it holds, (m,) float64 each."""

    @abstractmethod
    def total(self, numbers: Sequence[float]) -> list[float]:
        """Numbers that were summed over what is held, as sums over whole parameters."""

    @abstractmethod
    def measured(self, parameters: Sequence[Parameter], rank: int) -> list[tuple[int, slice | None]]:
        """Which of the parameters a process measures, and which rows of each (None: all). Not collective."""

    @abstractmethod
    def gradient(
        self, measured: Contributions, parameters: Sequence[Parameter], weights: Tensor
    ) -> dict[Parameter, Tensor] | None:
        """The weighted gradient of these parameters as far as it is held, from the contributions that were measured
        here, if these tell. Not collective."""

    def share(
        self,
        contributions: Contributions,
        parameters: Sequence[Parameter],
        chosen: Sequence[int],
        first: int,
        rank: int,
    ) -> list[tuple[int, Piece]]:
        """The pieces that a process measures, of own candidates, `chosen` ascending and numbered anew from `first`;
        each with its parameter's number. Not collective."""
        result = []
        for i, rows in self.measured(parameters, rank):
            for piece in of_candidates(contributions.pieces(parameters[i]), chosen, first):
                part = piece if rows is None else piece.cut(rows)
                result.append((i, part if rank == self.group.rank else smaller(part)))
        return result


class Replicas(Spread):
    """Every process has the whole model (DistributedDataParallel): in measuring each takes some parameters."""

    def sum(
        self, contributions: Contributions, parameters: Sequence[Parameter], weights: Tensor | None = None
    ) -> dict[Parameter, Tensor]:
        with self.group.together("adding up its contributions"):
            own = contributions.combine(weights)
        return self._summed(own, parameters)

    def look(
        self, contributions: Contributions, parameters: Sequence[Parameter], *, summed: bool
    ) -> tuple[Contributions, list[tuple[int, ...]], dict[Parameter, Tensor] | None]:
        faulty: tuple[int, ...] = ()
        with self.group.together("adding up its contributions"):
            own = contributions.combine()
            if not all_finite(own.values()):
                faulty = contributions.nonfinite_candidates()
                contributions = contributions.without(faulty)
                own = contributions.combine()
        everybody = [tuple(each) for each in self.group.gather(faulty)]
        return contributions, everybody, self._summed(own, parameters) if summed else None

    def alignment(self, contributions: Contributions, directions: Sequence[Direction]) -> list[Tensor]:
        with self.group.together("working out the alignments of its candidates"):
            return [contributions.alignment(direction) for direction in directions]

    def total(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def measured(self, parameters: Sequence[Parameter], rank: int) -> list[tuple[int, slice | None]]:
        """The largest first, each to the process that has least."""
        load, mine = [0] * self.group.size, []
        for i in sorted(range(len(parameters)), key=lambda i: (-parameters[i].numel(), i)):
            least = load.index(min(load))
            load[least] += parameters[i].numel()
            if least == rank:
                mine.append(i)
        return [(i, None) for i in sorted(mine)]

    def gradient(
        self, measured: Contributions, parameters: Sequence[Parameter], weights: Tensor
    ) -> dict[Parameter, Tensor] | None:
        return None

    def _summed(self, own: Direction, parameters: Sequence[Parameter]) -> dict[Parameter, Tensor]:
        return self.group.sum({p: own[p] if p in own else torch.zeros_like(p) for p in parameters})


def no_candidates(parameter: Parameter) -> Dense:
    """A piece of nobody's to what this process holds of a parameter."""
    shape, dtype = tuple(as_rows(local(parameter)).shape), torch.promote_types(parameter.dtype, torch.float32)
    return Dense(0, shape, dtype, torch.zeros(0, *shape, dtype=dtype, device=parameter.device))


def smaller(piece: Piece) -> Piece:
    """Written out, where that takes fewer bytes: cut to some rows, factors have their inputs whole all the same."""
    written_out = piece.count * prod(piece.shape) * piece.dtype.itemsize
    return piece.dense() if written_out < piece.nbytes else piece
