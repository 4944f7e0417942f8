"""Survivors run again in several replays, together with what changes a forward or a gradient: the same numbers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import RecordingError
from tests.models import MLP, batch_of, tiny_llama, token_mean

POLICIES = [("topk", "uniform"), ("topk", "pgd"), ("greedy", "pgd")]


class Gated(nn.Module):
    """Linear layers behind a gate that no rule knows."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.rand(6, dtype=torch.float64))
        self.layer = nn.Linear(6, 4, dtype=torch.float64)
        self.last = nn.Linear(4, 2, dtype=torch.float64)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(torch.tanh(self.layer(x * self.gate)), self.rate, self.training)
        result: Tensor = self.last(hidden)
        return result


def data(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2]).square().mean()


def selector_for(model: nn.Module, cap: int | None, **options: Any) -> tuple[ftw.Selector, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"budget": 3, "reference": "target", "warmup": 1} | options
    return ftw.Selector(model, optimizer, target=[data(5, 9)], loss_fn=loss_of, memory_cap=cap, **options), optimizer


def train(
    model: nn.Module, cap: int | None, *, parts: int = 2, scale: float | None = None, **options: Any
) -> list[ftw.Selection]:
    """Three steps; the gradients of the last one stay."""
    selector, optimizer = selector_for(model, cap, **options)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    selections = []
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        for piece in data(6, step).chunk(parts):
            with selector.record(scaler=scaler):
                loss = loss_of(model, piece) / parts
                (loss if scaler is None else scaler.scale(loss)).backward()
        selections.append(selector.apply())
        for p in model.parameters():
            assert p.grad is not None
            p.grad.div_(1.0 if scale is None else scale)
        optimizer.step()
    return selections


def assert_same(free: nn.Module, capped: nn.Module, first: list[ftw.Selection], second: list[ftw.Selection]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b.weights, a.weights, rtol=1e-10, atol=1e-12)
        assert b.predicted_drop == pytest.approx(a.predicted_drop, rel=1e-8)
    for p, q in zip(free.parameters(), capped.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize(("filter", "solver"), POLICIES)
def test_uncovered_parameters(filter: str, solver: str, rate: float) -> None:
    free, capped = Gated(rate), Gated(rate)
    options: dict[str, Any] = {"filter": filter, "solver": solver, "uncovered": "scale", "check": rate == 0}
    cap = 1000 if filter == "greedy" else 780
    first, second = train(free, None, **options), train(capped, cap, **options)
    assert_same(free, capped, first, second)
    assert all((b.diagnostics["replays"] == 1) == (solver == "uniform") for b in second)
    assert all(b.diagnostics["kept_bytes"] <= cap for b in second)


def test_a_penalty_on_an_uncovered_parameter_is_found_beyond_the_cap() -> None:
    model = Gated()
    selector, _ = selector_for(model, 900, uncovered="scale", filter="topk")
    with selector.record():
        (loss_of(model, data(6, 0)) + model.gate.square().sum()).backward()
    assert selector._recorder.window.alignment is not None
    with pytest.raises(RecordingError, match="came out different"):
        selector.apply()


@pytest.mark.parametrize(("filter", "solver"), POLICIES)
def test_a_loss_scale(filter: str, solver: str) -> None:
    free, capped = MLP(), MLP()
    options: dict[str, Any] = {"filter": filter, "solver": solver}
    first, second = train(free, None, **options), train(capped, 1000, scale=1024.0, **options)
    assert_same(free, capped, first, second)
    assert all((b.diagnostics["replays"] == 1) == (solver == "uniform") for b in second)


@pytest.mark.parametrize("solver", ["uniform", "pgd"])
def test_an_overflow_is_left_to_the_scaler(solver: str) -> None:
    model = MLP()
    selector, _ = selector_for(model, 900, filter="topk", solver=solver)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with selector.record(scaler=scaler):
        poison = torch.ones(6, 1, dtype=torch.float64)
        poison[2] = float("inf")
        scaler.scale((model(data(6, 0)) * poison).square().mean()).backward()
    assert selector.apply().status == ftw.Status.OVERFLOW
    assert all(p.grad is not None and not torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("lean", [False, True])
def test_without_lean_mode(lean: bool) -> None:
    free, capped = MLP(), MLP()
    first, second = train(free, None, filter="topk"), train(capped, 900, filter="topk", lean=lean)
    assert_same(free, capped, first, second)
    assert all(b.diagnostics["replays"] > 2 for b in second)


@pytest.mark.parametrize(("extractor", "cap"), [("full", 1150), ("factorized", 900), ("projection", 900)])
def test_extractors(extractor: str, cap: int) -> None:
    """Parameters this small pass a projection exactly."""
    free, capped = MLP(), MLP()
    first = train(free, None, filter="topk", gradients=extractor)
    second = train(capped, cap, filter="topk", gradients=extractor)
    assert_same(free, capped, first, second)
    for a, b in zip(first, second, strict=True):
        assert b.diagnostics["replays"] > 2
        assert a.diagnostics.get("sketch_error") == b.diagnostics.get("sketch_error")


@pytest.mark.parametrize("solver", ["uniform", "pgd"])
@pytest.mark.parametrize("tokens", [False, True])
def test_candidates_of_several_rows_and_of_tokens(tokens: bool, solver: str) -> None:
    """Pairs of rows, and rows said token by token."""
    gradients, weights = [], []
    for cap in (None, 64_000):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        selector = ftw.Selector(
            model,
            optimizer,
            target=[batch_of(4, seed=50)],
            loss_fn=token_mean,
            budget=2,
            filter="topk",
            solver=solver,
            reference="target",
            memory_cap=cap,
        )
        batch = batch_of(6, seed=1)
        rows = torch.tensor([0, 1, 2, 0, 1, 2])
        owner = rows[:, None].expand(batch["input_ids"].shape).clone() if tokens else rows
        with selector.record(candidates=owner):
            token_mean(model, batch).backward()
        selection = selector.apply()
        weights.append(selection.weights)
        gradients.append([p.grad for p in model.parameters()])
    assert (selection.diagnostics["replays"] == 1) == (solver == "uniform")
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-10, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_the_first_target_gradient_is_of_the_forwards_autocast(lower: bool, inside: bool) -> None:
    """Whichever of `autocast` and `record` is entered first, and only where the loop has one."""
    model = MLP(dtype=torch.float32)
    seen: list[bool] = []

    def target_loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss_of(model, x)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selector = ftw.Selector(
        model, optimizer, target=[data(5, 9).float()], loss_fn=target_loss, reference="target", memory_cap=900
    )

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if lower else nullcontext()

    for step in range(2):
        with nullcontext() if inside else autocast(), selector.record():
            with autocast() if inside else nullcontext():
                loss = loss_of(model, data(6, step).float())
            loss.backward()
        assert selector._recorder.window.alignment is not None
        selector.apply()
        optimizer.zero_grad()
    assert seen == [lower, lower]


def test_a_compiled_model() -> None:
    free, capped = MLP(), MLP()
    capped.compile(backend="aot_eager")
    first, second = train(free, None, filter="topk"), train(capped, 900, filter="topk")
    assert_same(free, capped, first, second)
    assert all(b.diagnostics["replays"] > 2 for b in second)


def test_a_target_that_fails_in_the_first_forward_can_be_tried_again() -> None:
    model = MLP()
    selector, _ = selector_for(model, 1000)
    good = selector.target.loss_fn
    selector.target.loss_fn = lambda *_: 1 / 0  # type: ignore[return-value]
    with pytest.raises(ZeroDivisionError), selector.record():
        loss_of(model, data(6, 0)).backward()
    assert selector.target.state_dict()["position"] == 0
    assert selector._recorder._prepare is None
    selector.target.loss_fn = good
    with selector.record():
        loss_of(model, data(6, 0)).backward()
    assert selector.apply().diagnostics["replays"] > 2
    assert selector.target.state_dict()["position"] == 1
