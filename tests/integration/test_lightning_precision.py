"""Lightning with selection under its precision plugins, activation checkpointing and compilation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ftw
from tests.models import lora_llama, tiny_llama

pytest.importorskip("lightning", reason="the integration is for its Trainer")

from ftw_integrations.lightning import SelectionCallback, token_mean
from lightning.pytorch.plugins import MixedPrecision

from tests.lightning_runs import (
    ACCUMULATION,
    CHOOSING,
    EVERYTHING,
    TARGET,
    Module,
    assert_same,
    fit,
    loader,
    plain_loop,
    single,
    stream,
    trainer,
)


def test_bf16(tmp_path: Path) -> None:
    data, told = stream(24), []
    runs = []
    for arguments in (None, EVERYTHING, CHOOSING):
        module = Module(single(tiny_llama))
        given = [] if arguments is None else [SelectionCallback(TARGET, mass=token_mean, told=told.append, **arguments)]
        fit(tmp_path, module, data, *given, max_steps=6, precision="bf16-mixed")
        runs.append(module.losses)
    assert runs[0] == pytest.approx(runs[1], abs=2e-3)

    _, expected = plain_loop(single(tiny_llama)(), data, 6, dtype=torch.bfloat16)
    assert [selection.weights.tolist() for selection in expected] == [each.weights.tolist() for each in told[6:]]


@pytest.mark.parametrize("init_scale", [2.0**7, 2.0**40], ids=["fits", "overflows at first"])
def test_a_gradient_scaler(init_scale: float, tmp_path: Path) -> None:
    """As under 16-mixed, which Lightning replaces by bf16 on a CPU."""
    told: list[ftw.Selection] = []
    runs, data = [], stream(24 * ACCUMULATION)
    for given in (None, EVERYTHING, CHOOSING):
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
        callback = None if given is None else SelectionCallback(TARGET, mass=token_mean, told=told.append, **given)
        module = Module(single(tiny_llama))
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        fit(tmp_path, module, data, *([] if callback is None else [callback]), plugins=plugins, max_steps=24)
        runs.append((module, scaler.get_scale(), callback))
    (plain, before, _), (ours, after, callback), (chosen, scale, _) = runs
    # A sum over tokens may overflow in half precision where no candidate's share of it does.
    assert after in (before, 2 * before, 4 * before)
    if after == before:
        assert plain.losses == pytest.approx(ours.losses, abs=2e-2)
    overflows = [selection.status == "overflow" for selection in told[:24]]
    assert overflows[0] == (init_scale == 2.0**40)
    assert not overflows[-1]
    assert callback is not None
    assert callback.state_dict()["step"] == overflows.count(False)

    model = single(tiny_llama)()
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    _, expected = plain_loop(model, data, 24, scaler=scaler, dtype=torch.float16)
    assert [selection.weights.tolist() for selection in expected] == [each.weights.tolist() for each in told[24:]]
    assert scaler.get_scale() == scale
    assert_same(model, chosen.model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    told: list[list[float]] = [[], []]
    modules = []
    for checkpointing in (False, True):
        module = Module(single(lora_llama))
        if checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            module.model.enable_input_require_grads()
        callback = SelectionCallback(
            TARGET,
            mass=token_mean,
            told=lambda made, seen=told[checkpointing]: seen.extend(made.weights.tolist()),
            **CHOOSING,
        )
        fit(tmp_path, module, stream(16), callback, max_steps=4)
        modules.append(module)
    assert told[0] == pytest.approx(told[1], abs=1e-6)
    assert_same(*modules, 1e-6)


class Silent(Module):
    """Lightning 2.6's own `log` cannot be compiled by torch 2.13."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        return None


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["the module", "its model"])
def test_a_compiled_module_chooses_the_same(compiled: str, tmp_path: Path, fresh_dynamo: None) -> None:
    from torch._dynamo.utils import counters

    told: list[list[ftw.Selection]] = [[], []]
    modules = []
    for compiling in (False, True):
        module: Any = Silent(single(tiny_llama)) if compiled == "the module" else Module(single(tiny_llama))
        modules.append(module)
        if compiling and compiled == "its model":
            module.model = torch.compile(module.model, backend="aot_eager")
        elif compiling:
            module = torch.compile(module, backend="aot_eager")
        callback = SelectionCallback(TARGET, mass=token_mean, told=told[compiling].append, **CHOOSING)
        made = trainer(tmp_path, callback, max_steps=4)
        made.fit(module, loader(stream(16)), loader(stream(1, 500)))  # the sanity check traces first
    assert counters["stats"]["unique_graphs"] > 0
    for a, b in zip(*told, strict=True):
        assert a.indices.tolist() == b.indices.tolist()
        torch.testing.assert_close(a.weights, b.weights, rtol=1e-3, atol=1e-3)
    assert modules[0].losses == pytest.approx(modules[1].losses, abs=1e-4)
