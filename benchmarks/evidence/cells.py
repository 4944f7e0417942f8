"""A cell: material and model from its seed, its trials, and the figures. Called by `runner`, one process at a time."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftw.errors import ConfigurationError
from ftw.experiment import models

from . import material as materials
from .decoding import accuracy
from .material import Material
from .methods import METHODS, Method
from .settings import TARGETS, Cell, Setting, key_of
from .training import Trial, filling_for, mean_loss, restored, train


def versions() -> dict[str, str]:
    """What rounding depends on besides the code."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {**found, "machine": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability()}


def configuration(cell: Cell, folder: Path) -> dict[str, Any]:
    """All that the cell's figures depend on; its hash is the cell's key."""
    if cell.method not in METHODS:
        raise ConfigurationError(f"unknown method {cell.method!r}; available: {', '.join(METHODS)}; choose one.")
    digest = materials.digest(folder, TARGETS[cell.target])
    return cell.configuration(METHODS[cell.method].configuration(), digest, versions())


def run_cell(cell: Cell, folder: Path, cache: Path | None) -> dict[str, Any]:
    """The record of a cell: `figures` are the same every time, `clock` is not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what one thread computes is the same on any number of cores
    try:
        began = time.perf_counter()
        config = configuration(cell, folder)
        figures, clock = _figures(cell, folder, cache)
        clock["total"] = time.perf_counter() - began
        return {"key": key_of(config), "configuration": config, "figures": figures, "clock": clock}
    finally:
        torch.set_num_threads(threads)


def prepare(cell: Cell, folder: Path, cache: Path | None) -> None:
    """Has the pre-trained model of a cell made and kept, so that no two processes make it at once."""
    _pretrained(folder, cell.setting, cell.seed, cache)


def architecture(setting: Setting) -> dict[str, Any]:
    """The small Llama's numbers."""
    return {
        "hidden_size": setting.width,
        "intermediate_size": setting.width * 8 // 3,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "num_key_value_heads": max(1, setting.heads // 2),
        "max_position_embeddings": setting.max_length,
        "tie_word_embeddings": False,
    }


def _pretrained(folder: Path, setting: Setting, seed: int, cache: Path | None) -> nn.Module:
    pretraining = models.Pretraining(steps=setting.pretrain_steps, seed=seed)
    rows = _general(folder, setting)
    model, _ = models.tiny(list(rows), pretraining, cache, architecture=architecture(setting))
    return model


@lru_cache(maxsize=4)
def _general(folder: Path, setting: Setting) -> tuple[Any, ...]:
    return tuple(materials.general(folder, setting))


def _figures(cell: Cell, folder: Path, cache: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    setting, method, target = cell.setting, METHODS[cell.method], TARGETS[cell.target]
    found = materials.material(folder, cell, target)
    model = _pretrained(folder, setting, cell.seed, cache)
    if setting.tuning == "lora":
        model = models.add_lora(model, setting.lora_rank, cell.seed)
    elif setting.tuning != "full":
        raise ConfigurationError(f"tuning is {setting.tuning!r}; allowed are full and lora; choose one of them.")
    start = models.snapshot(model)
    before: list[tuple[dict[str, float], Trial]] = []
    if method.warm:
        before = _trials(model, METHODS["target_only"], found, setting, cell.seed)
        restored(model, _chosen(before)[1].best)
        trials = _trials(model, Method("select", method.preset), found, setting, cell.seed)
        for _, run in trials:
            run.curve.follow(_chosen(before)[1].curve)
    else:
        trials = _trials(model, method, found, setting, cell.seed)
    options, trial = _chosen(trials)
    curve, best = trial.curve, trial.curve.best

    def judged(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        restored(model, dict(state))
        figures: dict[str, Any] = {"loss": mean_loss(model, found.test)}
        if found.decoded:
            figures |= accuracy(model, found.decoded, target.source, target.decode)
        return figures

    final = judged(trial.final)
    at_best = final if best == len(curve.step) - 1 else judged(trial.best)
    figures = {
        "untrained": {"loss": mean_loss(restored(model, start), found.test)},
        "final": final,
        "best": {**at_best, "step": curve.step[best], "dev": curve.dev[best]},
        "curve": {name: getattr(curve, name) for name in ("step", "dev", "test", "trained", "passed")},
        "trial": options,
        "trials": [{**each, "dev": min(run.curve.dev)} for each, run in trials],
        "tuning": {
            "trained": sum(run.curve.trained[-1] - run.curve.trained[0] for _, run in (*before, *trials)),
            "passed": sum(run.curve.passed[-1] - run.curve.passed[0] for _, run in (*before, *trials)),
        },
        "weight": dict(sorted(trial.weight.items())),
        "pool_share": found.pool_share,
        "statuses": dict(sorted(trial.statuses.items())),
    }
    if before:
        earlier = _chosen(before)
        figures["before"] = {"trial": earlier[0], "step": earlier[1].curve.step[earlier[1].curve.best]}
    clock = {
        "wall": curve.wall,
        "processor": curve.processor,
        "processor_all_trials": sum(run.curve.processor[-1] - run.curve.processor[0] for _, run in (*before, *trials)),
    }
    return figures, clock


def _trials(
    model: nn.Module, method: Method, found: Material, setting: Setting, seed: int
) -> list[tuple[dict[str, float], Trial]]:
    """Every learning rate with every length, each from the model as it stands."""
    start, trials = models.snapshot(model), []
    for horizon in method.horizons:
        for factor in method.lr_factors:
            lr, steps = setting.lr * factor, max(1, round(horizon * setting.steps))
            restored(model, start)
            filling = filling_for(model, method, found, setting, seed, steps)
            trials.append(({"lr": lr, "steps": steps}, train(model, filling, found, setting, lr, steps)))
    return trials


def _chosen(trials: list[tuple[dict[str, float], Trial]]) -> tuple[dict[str, float], Trial]:
    """By dev alone; the first of equal ones."""
    return min(trials, key=lambda each: min(each[1].curve.dev))
