"""Accelerate's loop with selection, explicit and attached, is the plain loop with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ftw_integrations.loop import attach, token_mean

import ftw
from tests.models import batch_of, lora_llama


def windows(steps: int) -> list[list[Any]]:
    return [[batch_of(4, seed=2 * step + part) for part in range(2)] for step in range(steps)]


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def assert_same(first: Any, second: Any) -> None:
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate", reason="its loop is under test")
    module.state.AcceleratorState._reset_state(True)
    yield module
    module.state.AcceleratorState._reset_state(True)


def accelerated(
    accelerate: Any,
    way: str,
    *,
    precision: str = "no",
    steps: range = range(6),
    folder: Path | None = None,
    resume: bool = False,
) -> tuple[Any, list[ftw.Selection]]:
    """Accelerate's own loop: accumulation, clipping, saving after the third step."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = lora_llama(torch.float32)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    made: list[ftw.Selection] = []
    arguments: dict[str, Any] = {"target": [batch_of(3, seed=9)], "budget": 2, "warmup": 1, "ema": 0.5}
    selecting: Any
    if way == "attach":
        selecting = attach(prepared, optimizer, mass=token_mean, max_grad_norm=0.05, told=made.append, **arguments)
    else:
        selecting = ftw.Selector(prepared, optimizer, **arguments)
    accelerator.register_for_checkpointing(selecting)
    if resume:
        accelerator.load_state(folder)
    for step in steps:
        for batch in windows(6)[step]:
            with accelerator.accumulate(prepared):
                if way == "attach":
                    accelerator.backward(prepared(**batch).loss)
                else:
                    with selecting.record(mass=token_mean(batch), scaler=accelerator.scaler):
                        accelerator.backward(prepared(**batch).loss)
                    if accelerator.sync_gradients:
                        made.append(selecting.apply())
                        accelerator.clip_grad_norm_(prepared.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        if folder is not None and step == 2 and not resume:
            accelerator.save_state(folder)
    return model, made


def plain(precision: str) -> tuple[Any, list[ftw.Selection]]:
    """The same without accelerate."""
    model = lora_llama(torch.float32)
    optimizer = optimizer_of(model)
    made = []
    selector = ftw.Selector(model, optimizer, target=[batch_of(3, seed=9)], budget=2, warmup=1, ema=0.5)
    for window in windows(6):
        for batch in window:
            with selector.record(mass=token_mean(batch)):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(**batch).loss / 2
                loss.backward()
        made.append(selector.apply())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return model, made


@pytest.mark.parametrize("way", ["attach", "record"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(way: str, precision: str, accelerate: Any) -> None:
    model, made = accelerated(accelerate, way, precision=precision)
    twin, expected = plain(precision)
    assert [each.weights.tolist() for each in made] == [each.weights.tolist() for each in expected]
    assert all(len(each.weights) == 8 for each in made)
    assert_same(model, twin)


@pytest.mark.parametrize("way", ["attach", "record"])
def test_accelerate_resumes_bitwise(way: str, accelerate: Any, tmp_path: Path) -> None:
    model, expected = accelerated(accelerate, way, folder=tmp_path)
    resumed, found = accelerated(accelerate, way, folder=tmp_path, steps=range(3, 6), resume=True)
    assert [each.weights.tolist() for each in found] == [each.weights.tolist() for each in expected[3:]]
    assert_same(model, resumed)
