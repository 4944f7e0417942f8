"""How a selector stands among the processes of a run: alone, deciding alone, or together. Called by the selector."""

from __future__ import annotations

import sys
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
from ftw.fidelity import Total
from ftw.gradients.base import GradientExtractor
from ftw.gradients.company import ALONE, Company
from ftw.processes.group import Group
from ftw.processes.sharding import Shards, is_sharded_model
from ftw.processes.spread import Replicas, Spread

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
        pools: whether all processes decide together. spread: over which parameters are spread, if they do.
        shards: the same, where the model is sharded.
    """

    def __init__(self, model: nn.Module, pool: str, group: torch.distributed.ProcessGroup | None) -> None:
        one_of("pool", pool, POOLS)
        refuse_static_graph(model)
        self.wrapped = model
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.group = Group(group) if running and torch.distributed.get_world_size(group) > 1 else None
        self.pools = pool == "global" and self.group is not None
        self.shards: Shards | None = None
        if _is_flat(model):
            raise ConfigurationError(
                "the model is in a FullyShardedDataParallel (FSDP1), whose layers do not hold their own parameters; "
                "use fully_shard (FSDP2) or DistributedDataParallel."
            )
        if is_sharded_model(model):
            self.shards = self._shards(model)
        self.spread: Spread | None = None
        if self.group is not None and self.pools:
            self.spread = Replicas(self.group) if self.shards is None else self.shards

    def _shards(self, model: nn.Module) -> Shards:
        if self.group is None or not self.pools:
            given = "one process" if self.group is None else "pool='local'"
            raise ConfigurationError(
                f"the model's parameters are sharded (fully_shard), with {given}; the gradient of a shard is made by "
                "all processes together; choose pool='global', or leave fully_shard out where there is one process."
            )
        return Shards(model, self.group)

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
        if self.shards is not None:
            self._check_shards(given)
        for name, is_given in refused.items():
            if is_given:
                raise ConfigurationError(
                    f"{name} was given in a run of {self.group.size} processes; a pool of all of them cannot do that "
                    "yet; leave it out, or choose pool='local', with which each process decides alone."
                )

    def _check_shards(self, given: Mapping[str, Any]) -> None:
        for name, is_given in {"residual='keep'": given["residual"] == "keep", "lean=False": not given["lean"]}.items():
            if is_given:
                raise ConfigurationError(
                    f"{name} was given with a model that is sharded (fully_shard), which cannot do that yet; leave it "
                    "out, or use DistributedDataParallel."
                )
        for p in given["parameters"]:
            given["preconditioner"].require_whole(p)

    @property
    def total(self) -> Total | None:
        """What sums over held parameters become sums over all by; None: they are."""
        return None if self.shards is None else self.shards.total

    @property
    def company(self) -> Company:
        """Of the model's forwards."""
        return ALONE if self.shards is None else self.shards

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """As `Group.together`, where all processes decide together."""
        if self.group is None or not self.pools:
            yield
            return
        with self.group.together(doing):
            yield

    def mean(self, gradient: Mapping[Parameter, Tensor], rows: float) -> dict[Parameter, Tensor]:
        """The mean over the processes' samples, of which this one's gradient is the mean of `rows`.

        That of a sharded model is the mean of all already.
        """
        assert self.group is not None
        if self.shards is not None:
            return dict(gradient)
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

    def parts(self, unweighted: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """What `averaged` makes the step's gradient of, from that which this process's backward made and nothing
        weighs. FSDP has made it already."""
        return {} if self.shards is not None else {p: gradient / self.share for p, gradient in unweighted.items()}

    def averaged(self, gradients: Mapping[Parameter, Tensor | None], order: list[Parameter]) -> dict[Parameter, Any]:
        """The step's gradient from every process's part of it, for all parameters that it reaches anywhere.

        Args:
            gradients: this process's; None, or not there, where it has none. Of a sharded model, that of its shards.
            order: all that can have one, alike on every process.
        """
        assert self.group is not None
        shards = self.shards
        if shards is not None:
            return {p: None if gradient is None else shards.placed(p, gradient) for p, gradient in gradients.items()}
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


def refuse_static_graph(wrapper: nn.Module) -> None:
    """A static graph is learnt from a first backward that synchronises, and under selection none does.

    Raises:
        ConfigurationError: the wrapper is a DistributedDataParallel that expects one.
    """
    if isinstance(wrapper, DistributedDataParallel) and wrapper.static_graph:
        raise ConfigurationError(
            "the DistributedDataParallel has static_graph=True, which no backward without its own synchronisation can "
            "be made in; what is selected is synchronised instead; leave it out (activation checkpointing works "
            "without, and so do unused parameters)."
        )


def _is_flat(model: nn.Module) -> bool:
    """Whether FSDP1 holds the model, or a part of it; it is slow to import, and not there where it is not used."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FullyShardedDataParallel", None)
    return kind is not None and any(isinstance(each, kind) for each in model.modules())
