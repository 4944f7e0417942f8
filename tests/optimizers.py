"""Real optimizers and their options, for the tests of preconditioners: one table, and helpers to make and step them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.optim_state import SGD, Adagrad, Adam, AdamW, NAdam, Preconditioner, RAdam, RMSprop

F64 = torch.float64
Parameters = list[Parameter]
Options = dict[str, dict[str, Any]]


def two_groups(cls: Callable[..., Optimizer], first: dict[str, Any], **rest: Any) -> Callable[[Parameters], Optimizer]:
    """An optimizer whose first parameter has hyper-parameters of its own."""
    return lambda ps: cls([{"params": ps[:1], **first}, {"params": ps[1:]}], **rest)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


SGD_OPTIONS: Options = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "decay tensor": {"weight_decay": f64(0.3)},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
    "dampening without momentum": {"dampening": 0.4},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    "maximize": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    "foreach": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "foreach": True, "maximize": True},
    "fused": {"momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1, "fused": True, "maximize": True},
    "lr tensor": {"lr": f64(0.02), "momentum": 0.9},
}
ADAM_OPTIONS: Options = {
    "default": {},
    "betas": {"betas": (0.3, 0.6), "eps": 1e-3},
    "no averaging": {"betas": (0.0, 0.0)},
    "decay": {"weight_decay": 0.3, "betas": (0.7, 0.8)},
    "amsgrad": {"amsgrad": True, "betas": (0.7, 0.5), "weight_decay": 0.1},
    "maximize": {"amsgrad": True, "betas": (0.7, 0.5), "weight_decay": 0.1, "maximize": True},
    "foreach": {"foreach": True, "weight_decay": 0.1, "amsgrad": True, "betas": (0.7, 0.5), "maximize": True},
    "fused": {"fused": True, "weight_decay": 0.1, "amsgrad": True, "betas": (0.7, 0.5), "maximize": True},
    "lr tensor": {"lr": f64(0.02)},
    "beta tensors": {"betas": (f64(0.8), f64(0.9))},
}
NADAM_OPTIONS: Options = {
    "default": {},
    "betas": {"betas": (0.3, 0.6), "eps": 1e-3},
    "no averaging": {"betas": (0.0, 0.0)},
    "momentum decay": {"momentum_decay": 0.3, "betas": (0.8, 0.9)},
    "decay": {"weight_decay": 0.3, "betas": (0.7, 0.8)},
    "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "maximize": {"weight_decay": 0.3, "maximize": True},
    "maximize, decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
    "foreach": {"weight_decay": 0.1, "betas": (0.7, 0.5), "momentum_decay": 0.1, "foreach": True, "maximize": True},
    "foreach, decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "foreach": True},
    "lr tensor": {"lr": f64(0.02), "weight_decay": 0.1},
}
RADAM_OPTIONS: Options = {
    "default": {},
    "rectified early": {"betas": (0.3, 0.9), "eps": 1e-3},
    "never rectified": {"betas": (0.3, 0.6)},
    "no averaging": {"betas": (0.0, 0.0)},
    "decay": {"weight_decay": 0.3, "betas": (0.7, 0.95)},
    "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "maximize": {"weight_decay": 0.3, "maximize": True},
    "maximize, decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
    "foreach": {"weight_decay": 0.1, "betas": (0.7, 0.9), "foreach": True, "maximize": True},
    "foreach, decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "foreach": True},
    "lr tensor": {"lr": f64(0.02), "weight_decay": 0.1},
}
RMSPROP_OPTIONS: Options = {
    "default": {},
    "alpha": {"alpha": 0.5, "eps": 1e-3},
    "no averaging": {"alpha": 0.0},
    "decay": {"weight_decay": 0.3},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "centered": {"centered": True, "alpha": 0.8},
    "centered, momentum": {"centered": True, "momentum": 0.9, "weight_decay": 0.1},
    "maximize": {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    "foreach": {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True, "foreach": True},
    "lr tensor": {"lr": f64(0.02), "momentum": 0.5},
}
ADAGRAD_OPTIONS: Options = {
    "default": {},
    "lr decay": {"lr_decay": 0.3, "eps": 1e-3},
    "initial accumulator": {"initial_accumulator_value": 0.2, "weight_decay": 0.1},
    "maximize": {"lr_decay": 0.1, "weight_decay": 0.1, "maximize": True},
    "foreach": {"lr_decay": 0.1, "weight_decay": 0.1, "maximize": True, "foreach": True},
    "fused": {"lr_decay": 0.1, "weight_decay": 0.1, "maximize": True, "fused": True},
    "lr tensor": {"lr": f64(0.02), "lr_decay": 0.1},
}
LION_OPTIONS: Options = {
    "default": {},
    "betas": {"betas": (0.5, 0.7)},
    "no averaging": {"betas": (0.0, 0.0)},
    "decay": {"weight_decay": 0.3},
}

TORCH: tuple[tuple[type[Preconditioner], Callable[..., Optimizer], Options], ...] = (
    (SGD, torch.optim.SGD, SGD_OPTIONS),
    (Adam, torch.optim.Adam, ADAM_OPTIONS),
    (AdamW, torch.optim.AdamW, ADAM_OPTIONS),
    (NAdam, torch.optim.NAdam, NADAM_OPTIONS),
    (RAdam, torch.optim.RAdam, RADAM_OPTIONS),
    (RMSprop, torch.optim.RMSprop, RMSPROP_OPTIONS),
    (Adagrad, torch.optim.Adagrad, ADAGRAD_OPTIONS),
)
FIRST: dict[type[Preconditioner], dict[str, Any]] = {SGD: {"lr": 0.3}}  # the first parameter's own


def first_of(ours: type[Preconditioner]) -> dict[str, Any]:
    return FIRST.get(ours, {"lr": 0.3, "weight_decay": 0.2})


def stepped(
    cls: Callable[..., Optimizer], steps: int, dtype: torch.dtype = F64, **options: Any
) -> tuple[Parameter, Optimizer]:
    generator = torch.Generator().manual_seed(1)
    p = Parameter(torch.randn((4, 3), generator=generator, dtype=F64).to(dtype))
    optimizer = cls([p], **options)
    for _ in range(steps):
        p.grad = torch.randn((4, 3), generator=generator, dtype=F64).to(dtype)
        optimizer.step()
    return p, optimizer


COUNTED = tuple((ours, cls) for ours, cls, _ in TORCH if ours in (Adam, AdamW, NAdam, RAdam, RMSprop))
"""Those with a step counter that may be a tensor for graphs to capture (`capturable`)."""


def let_capturable_onto_the_cpu(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """torch steps with `capturable` on accelerators only; what it computes is the same here."""
    for module in ("adam", "nadam", "radam", "rmsprop"):
        found = importlib.import_module(f"torch.optim.{module}")
        patch(found, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
