"""Loops that stay as they are in two processes, and accelerate's: the same as `record()` and `apply()` in the loop.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ftw_integrations.loop import attach
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ftw
from tests.gloo import needs_gloo, run, serve
from tests.models import MLP

pytest.importorskip("accelerate", reason="its loop is one of those tested")

pytestmark = needs_gloo

STEPS, MICRO = 4, 2
CHOSEN: dict[str, Any] = {"budget": 3, "warmup": 1, "target_batches": "all"}


def rows_of(seed: int, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, size, generator=generator).double() for name, size in (("x", 6), ("y", 2))}


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def batch_of(step: int, micro: int, rank: int) -> dict[str, Tensor]:
    return rows_of(100 * step + 10 * micro + rank)


def numbers_of(model: nn.Module) -> list[float]:
    return [number for p in model.parameters() for number in p.detach().flatten().tolist()]


def explicit(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(MLP())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selector = ftw.Selector(model, optimizer, target=[rows_of(7 + rank)], loss_fn=squares, **CHOSEN)
    weights = []
    for step in range(STEPS):
        for micro in range(MICRO):
            with selector.record():
                (squares(model, batch_of(step, micro, rank)) / MICRO).backward()
        weights.append(selector.apply().weights.tolist())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights, "parameters": numbers_of(model)}


def attached(rank: int) -> dict[str, Any]:
    """The loop of DDP's own documentation: all micro-batches but the last are not synchronised."""
    model = DistributedDataParallel(MLP())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weights: list[list[float]] = []
    handle = attach(
        model,
        optimizer,
        target=[rows_of(7 + rank)],
        loss_fn=squares,
        max_grad_norm=0.1,
        told=lambda selection: weights.append(selection.weights.tolist()),
        **CHOSEN,
    )
    for step in range(STEPS):
        with model.no_sync():
            (squares(model, batch_of(step, 0, rank)) / MICRO).backward()
        (squares(model, batch_of(step, 1, rank)) / MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.detach()
    # What was attached is gone without a trace: plain training is synchronised again.
    squares(model, batch_of(9, 0, rank)).backward()
    mine = [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]
    return {"weights": weights, "parameters": numbers_of(model), "after": mine}


def accelerated(rank: int) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    inner = MLP()
    model, optimizer = accelerator.prepare(inner, torch.optim.AdamW(inner.parameters(), lr=1e-2))
    assert isinstance(model, DistributedDataParallel)
    selector = ftw.Selector(model, optimizer, target=[rows_of(7 + rank)], loss_fn=squares, **CHOSEN)
    weights = []
    for step in range(STEPS):
        for micro in range(MICRO):
            with accelerator.accumulate(model):
                with selector.record(scaler=accelerator.scaler):
                    accelerator.backward(squares(model, batch_of(step, micro, rank)))
                if accelerator.sync_gradients:
                    weights.append(selector.apply().weights.tolist())
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    return {"weights": weights, "parameters": numbers_of(model)}


def loops(rank: int) -> dict[str, Any]:
    assert dist.get_world_size() == 2
    return {each.__name__: each(rank) for each in (explicit, attached, accelerated)}


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {"loops": loops}


@pytest.mark.slow
def test_loops_in_two_processes(tmp_path: Path) -> None:
    first, second = run(__file__, "loops", tmp_path)
    for name in ("explicit", "attached", "accelerated"):
        assert first[name] == second[name], name
        assert first[name]["weights"] == first["explicit"]["weights"], name
        assert first[name]["parameters"] == pytest.approx(first["explicit"]["parameters"], abs=1e-14), name
    assert [len(weights) for weights in first["explicit"]["weights"]] == [16] * STEPS
    assert any(number for each in first["attached"]["after"] for number in each)


if __name__ == "__main__":
    serve(SCENARIOS)
