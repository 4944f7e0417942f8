"""The torch optimizer inside what trainers wrap around it. Called by the selector and by look-ups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from ftw.errors import UnsupportedOptimizerError

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer.ZeroRedundancyOptimizer"

SEEN_THROUGH: Mapping[str, str] = {
    "accelerate.optimizer.AcceleratedOptimizer": "optimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer": "_optimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer": "_optimizer",
    "lightning.fabric.wrappers._FabricOptimizer": "_optimizer",
    "lightning_fabric.wrappers._FabricOptimizer": "_optimizer",
    _ZERO: "optim",
}
"""Wrappers whose step is that of the optimizer inside -> the attribute that holds it. Named, so that none is
imported."""


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose state is read: what accelerate, Lightning or ZeRO-1 wrap, or the one given.

    Only wrappers in `SEEN_THROUGH` are opened, and only if the `step` that runs is theirs: one that does something
    else around the inner step (sharpness-aware steps, Lookahead, averaging over processes) is returned as it is, and
    no preconditioner knows its class.

    Of torch's `ZeroRedundancyOptimizer` it is the local one, which holds the parameters of this process's shard. A
    scheduler changes the hyper-parameters of the wrapper, which hands them on at its next step; they are handed on
    here, so that those of the moment are read. Call `unwrapped` whenever they are.

    Raises:
        UnsupportedOptimizerError: not an optimizer at all; a wrapper with something else than a torch optimizer
            inside; ZeRO-1 that steps inside the backward.
    """
    inner: Any = optimizer
    while (name := SEEN_THROUGH.get(_owner_of_step(inner))) is not None:
        wrapper, inner = inner, vars(inner).get(name)
        if _owner_of_step(wrapper) == _ZERO:
            _hand_on(wrapper, inner)
        if not isinstance(inner, Optimizer):
            raise UnsupportedOptimizerError(
                f"optimizer is a {type(wrapper).__qualname__} around a {type(inner).__qualname__}; allowed inside a "
                "wrapper is a torch.optim.Optimizer; wrap one."
            )
    if not isinstance(inner, Optimizer):
        raise UnsupportedOptimizerError(
            f"optimizer is a {type(optimizer).__qualname__}, neither a torch.optim.Optimizer nor a wrapper of one; "
            "pass the optimizer whose step() updates the model."
        )
    return inner


def _owner_of_step(optimizer: Any) -> str:
    """The class that defines the `step` which runs, "module.Class". Lightning makes a subclass for every wrapper."""
    step = getattr(type(optimizer), "step", None)
    return f"{getattr(step, '__module__', '')}.{getattr(step, '__qualname__', '')}".removesuffix(".step")


def _hand_on(wrapper: Any, inner: Any) -> None:
    """Copy the hyper-parameters of ZeRO-1's groups to the local optimizer, as its step does first."""
    if vars(wrapper).get("_overlap_with_ddp"):
        raise UnsupportedOptimizerError(
            "ZeroRedundancyOptimizer has overlap_with_ddp=True, which steps while gradients are still being made; "
            "only overlap_with_ddp=False is modelled; set it to False."
        )
    for ours, local in zip(wrapper.param_groups, inner.param_groups, strict=True):
        local.update({key: value for key, value in ours.items() if key != "params"})
