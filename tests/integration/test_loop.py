"""`attach`: a loop without a word of selection in it does what a loop with record() and apply() does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ftw_integrations.loop import attach, token_mean
from torch import Tensor, nn

import ftw
from ftw.errors import ConfigurationError, RecordingError, UnsupportedOptimizerError
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama

Pair = tuple[Tensor, Tensor]


def data(rows: int, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 2, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, batch: Pair) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


ARGUMENTS: dict[str, Any] = {"target": [data(5, 100), data(5, 101)], "loss_fn": loss_of, "budget": 3, "warmup": 2}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def untouched_loop(model: nn.Module, optimizer: Any, *, accumulation: int, steps: int = 6, clip: float | None = None):  # type: ignore[no-untyped-def]
    """What users write. It knows of no selection."""
    for step in range(steps):
        for part in range(accumulation):
            (loss_of(model, data(4, 10 * step + part)) / accumulation).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        loss_of(model, data(4, 999))  # an evaluation that forgot no_grad
        model.train()
        with torch.no_grad():
            loss_of(model, data(4, 999))


def explicit_loop(model: nn.Module, *, accumulation: int, clip: float | None = None) -> list[ftw.Selection]:
    optimizer = optimizer_of(model)
    selector = ftw.Selector(model, optimizer, **ARGUMENTS)
    made = []
    for step in range(6):
        for part in range(accumulation):
            with selector.record():
                (loss_of(model, data(4, 10 * step + part)) / accumulation).backward()
        made.append(selector.apply())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return made


def assert_same(first: nn.Module, second: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_attached_is_the_explicit_loop(accumulation: int, clip: float | None) -> None:
    model, twin = MLP(), MLP()
    optimizer = optimizer_of(model)
    told: list[ftw.Selection] = []
    with attach(model, optimizer, max_grad_norm=clip, told=told.append, **ARGUMENTS) as attached:
        untouched_loop(model, optimizer, accumulation=accumulation)
        assert attached.selection is told[-1]
    expected = explicit_loop(twin, accumulation=accumulation, clip=clip)
    assert [made.weights.tolist() for made in told] == [made.weights.tolist() for made in expected]
    assert all(len(made.weights) == 4 * accumulation for made in told)
    assert_same(model, twin)


def test_the_loops_own_clipping_has_no_effect() -> None:
    model, twin = MLP(), MLP()
    optimizer = optimizer_of(model)
    with attach(model, optimizer, **ARGUMENTS):
        untouched_loop(model, optimizer, accumulation=2, clip=1e-6)
    explicit_loop(twin, accumulation=2)
    assert_same(model, twin)


def test_a_detached_loop_trains_plainly() -> None:
    model, twin = MLP(), MLP()
    optimizer = optimizer_of(model)
    attached = attach(model, optimizer, **ARGUMENTS)
    loss_of(model, data(4, 1))  # in the middle of a window
    attached.detach()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    untouched_loop(model, optimizer, accumulation=2)
    untouched_loop(twin, optimizer_of(twin), accumulation=2)
    assert_same(model, twin)


def test_two_forwards_before_their_backwards() -> None:
    results = []
    for together in (False, True):
        model = MLP()
        optimizer = optimizer_of(model)
        with attach(model, optimizer, **ARGUMENTS) as attached:
            if together:
                sum(loss_of(model, data(4, part)) for part in range(2)).backward()  # type: ignore[union-attr]
            else:
                first, second = (loss_of(model, data(4, part)) for part in range(2))
                first.backward()
                second.backward()
            optimizer.step()
            assert attached.selection is not None
            results.append(attached.selection.weights)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert len(results[0]) == 8


@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_model(make: Callable[[], Any], checkpointing: bool) -> None:
    weights = []
    for attached_loop in (True, False):
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = optimizer_of(model)
        arguments: dict[str, Any] = {"target": [batch_of(3, seed=9)], "budget": 2, "warmup": 1}
        made: list[ftw.Selection] = []
        if attached_loop:
            attach(model, optimizer, mass=token_mean, told=made.append, **arguments)
        else:
            selector = ftw.Selector(model, optimizer, **arguments)
        for step in range(3):
            for part in range(2):
                batch = batch_of(4, seed=2 * step + part)
                if attached_loop:
                    model(**batch).loss.backward()
                else:
                    tokens = label_tokens(batch)
                    with selector.record(mass=tokens / tokens.sum()):
                        model(**batch).loss.backward()
            if not attached_loop:
                made.append(selector.apply())
            optimizer.step()
            optimizer.zero_grad()
        weights.append([selection.weights for selection in made])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_watched_step_is_the_selected_one() -> None:
    model = MLP()
    optimizer = optimizer_of(model)
    with attach(model, optimizer, watch=1, **ARGUMENTS) as attached:
        untouched_loop(model, optimizer, accumulation=2)
        fidelity = attached.selector.fidelity
        assert fidelity is not None
        assert fidelity.step == 6
        assert fidelity.applied == pytest.approx(1.0)
        assert fidelity.cosine > 0.9


@pytest.mark.parametrize("way", ["attach", "record"])
def test_accelerate(way: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="its loop is under test")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, twin = MLP(), MLP()
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    made: list[ftw.Selection] = []
    if way == "attach":
        attach(prepared, optimizer, told=made.append, **ARGUMENTS)
    else:
        selector = ftw.Selector(prepared, optimizer, **ARGUMENTS)
    for step in range(6):
        for part in range(2):
            batch = data(4, 10 * step + part)
            with accelerator.accumulate(prepared):
                if way == "attach":
                    accelerator.backward(loss_of(prepared, batch))
                else:
                    with selector.record(scaler=accelerator.scaler):
                        accelerator.backward(loss_of(prepared, batch))
                    if accelerator.sync_gradients:
                        made.append(selector.apply())
                optimizer.step()
                optimizer.zero_grad()
    expected = explicit_loop(twin, accumulation=2)
    assert [each.weights.tolist() for each in made] == [each.weights.tolist() for each in expected]
    assert_same(model, twin)


class TestBadUse:
    def test_arguments(self) -> None:
        model = MLP()
        optimizer = optimizer_of(model)
        with pytest.raises(ConfigurationError, match="lean=False"):
            attach(model, optimizer, lean=False, **ARGUMENTS)
        with pytest.raises(ConfigurationError, match="max_grad_norm is 0"):
            attach(model, optimizer, max_grad_norm=0, **ARGUMENTS)
        with pytest.raises(ConfigurationError, match="geometry"):
            attach(model, optimizer, geometry="round", **ARGUMENTS)
        with pytest.raises(UnsupportedOptimizerError):
            attach(model, object(), **ARGUMENTS)  # type: ignore[arg-type]
        assert not optimizer._optimizer_step_pre_hooks
        assert not model._forward_pre_hooks

    def test_a_step_without_a_backward(self) -> None:
        model = MLP()
        optimizer = optimizer_of(model)
        with attach(model, optimizer, **ARGUMENTS):
            with pytest.raises(RecordingError, match="nothing was recorded"):
                optimizer.step()
            loss_of(model, data(4, 1))
            with pytest.raises(RecordingError, match="got no backward"):
                optimizer.step()

    def test_a_closure(self) -> None:
        model = MLP()
        optimizer = optimizer_of(model)
        with attach(model, optimizer, **ARGUMENTS):
            loss_of(model, data(4, 1)).backward()
            with pytest.raises(ConfigurationError, match="closure"):
                optimizer.step(lambda: 0.0)

    def test_a_scaler_that_saw_no_gradient_refuses_the_step(self) -> None:
        model = MLP(dtype=torch.float32)
        optimizer = optimizer_of(model)
        scaler = torch.amp.GradScaler("cpu")
        batch = tuple(t.float() for t in data(4, 1))
        with attach(model, optimizer, **{**ARGUMENTS, "target": [batch]}):
            scaler.scale(loss_of(model, batch)).backward()  # type: ignore[arg-type]
            with pytest.raises(AssertionError, match="No inf checks"):
                scaler.step(optimizer)
