"""How a selector stands among the processes of a run: alone, deciding alone, or together. Called by the selector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from ftw import registry
from ftw.arguments import one_of
from ftw.errors import ConfigurationError
from ftw.gradients.base import GradientExtractor
from ftw.optim_state.shards import is_sharded
from ftw.processes.group import Group

POOLS = ("global", "local")


class Setting:
    """The processes, where there are several, and the model itself, out of what replicates it.

    Args:
        model: as the training loop calls it.
        pool: "global" or "local"; see `Selector`.
        group: of `torch.distributed`; None: all processes.

    Attributes:
        group: None where this process is alone.
        wrapped: the model as it was given; model: the module that is recorded.
        pools: whether all processes decide together.
    """

    def __init__(self, model: nn.Module, pool: str, group: torch.distributed.ProcessGroup | None) -> None:
        one_of("pool", pool, POOLS)
        self.wrapped = model
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.group = Group(group) if running and torch.distributed.get_world_size(group) > 1 else None
        if self.group is not None and (_is_fsdp(model) or any(map(is_sharded, model.parameters()))):
            raise ConfigurationError(
                f"the model's parameters are sharded over {self.group.size} processes (FSDP); each must hold a replica "
                "of the model; use DistributedDataParallel."
            )
        self.pools = pool == "global" and self.group is not None

    @property
    def share(self) -> int:
        """What a process's own gradient is divided by, to be a part of the step's: the number of those that pool."""
        return self.group.size if self.group is not None and self.pools else 1

    def check(self, *, extractor: Any, watched: bool, **given: Any) -> None:
        """Raise `ConfigurationError` for what several processes cannot do."""
        if self.group is None:
            return
        if not self.pools:
            if watched:
                raise ConfigurationError(
                    "watch or an adaptive trust was given with pool='local'; what a step does is the work of all "
                    f"{self.group.size} processes, and each predicts its own part alone; choose pool='global'."
                )
            return
        kind = registry.resolve("gradients", extractor)
        refused = {
            f"gradients={extractor!r}": type(kind).contributions is not GradientExtractor.contributions,
            f"curvature={given['curvature']!r}": given["curvature"] != "optimizer",
            "granularity='token'": given["granularity"] == "token",
            f"memory_cap={given['memory_cap']}": given["memory_cap"] is not None,
            "uncovered='scale'": given["uncovered"] == "scale",
        }
        for name, is_given in refused.items():
            if is_given:
                raise ConfigurationError(
                    f"{name} was given in a run of {self.group.size} processes; a pool of all of them cannot do that "
                    "yet; leave it out, or choose pool='local', with which each process decides alone."
                )

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """As `Group.together`, where all processes decide together."""
        if self.group is None or not self.pools:
            yield
            return
        with self.group.together(doing):
            yield

    def mean(self, gradient: Mapping[Parameter, Tensor], rows: float) -> dict[Parameter, Tensor]:
        """The mean over the processes' samples, of which this one's gradient is the mean of `rows`."""
        assert self.group is not None
        share = rows / sum(self.group.gather(rows))
        return self.group.sum({p: g * share for p, g in gradient.items()})

    def mean_number(self, number: float, rows: float) -> float:
        """As `mean`."""
        assert self.group is not None
        said = self.group.gather([number, rows])
        return float(sum(each * count for each, count in said)) / sum(count for _, count in said)

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """The wrapper sums no gradients inside: what is selected is summed instead, once."""
        if not isinstance(self.wrapped, DistributedDataParallel):
            yield
            return
        with self.wrapped.no_sync():
            yield

    def averaged(self, gradients: Mapping[Parameter, Tensor | None], order: list[Parameter]) -> dict[Parameter, Any]:
        """The step's gradient from every process's part of it, for all parameters that it reaches anywhere.

        Args:
            gradients: this process's; None, or not there, where it has none.
            order: all that can have one, alike on every process.
        """
        assert self.group is not None
        here = [i for i, p in enumerate(order) if gradients.get(p) is not None]
        reached = {i for each in self.group.gather(here) for i in each}
        parts: dict[Parameter, Tensor] = {}
        for i in sorted(reached):
            own = gradients.get(order[i])
            parts[order[i]] = torch.zeros_like(order[i]) if own is None else own
        summed = self.group.sum(parts)
        if not self.pools:
            for gradient in summed.values():
                gradient.div_(self.group.size)
        return {**gradients, **summed}


def _is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP holds the model together; its modules are slow to import, and are not where it is not used."""
    return any(kind.__module__.startswith("torch.distributed.fsdp") for kind in type(model).__mro__)
