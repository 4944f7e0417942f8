"""Rows that a replay runs for the batch's shape alone, and arguments that are no rows although there are as many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw

ROWS = 6

WAYS: dict[str, dict[str, Any]] = {
    "scale": {"uncovered": "scale"},
    "cap": {"memory_cap": 6_000, "reference": "target"},
    "cap without K": {"memory_cap": 6_000, "reference": "target", "filter": "topk", "solver": "uniform"},
    "both": {"uncovered": "scale", "memory_cap": 6_000, "reference": "target", "filter": "topk", "solver": "uniform"},
}


class Model(nn.Module):
    def __init__(self, *, gated: bool, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, 6)
        self.gate = nn.Parameter(torch.rand(8)) if gated else 1.0
        self.double()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is not None:
            x = x + positions[:, None]  # (rows, T, d) + (T, 1)
        result: Tensor = self.last(self.dropout(torch.tanh(self.first(x))) * self.gate)
        return result


def data(seed: int) -> Tensor:
    return torch.randn(ROWS, ROWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def losses(model: nn.Module, x: Tensor, *more: Tensor) -> Tensor:  # (rows,)
    return (model(x, *more) - 1).square().mean((1, 2)) / ROWS


def check_steps(model: nn.Module, way: str, faulty: float | None, *more: Tensor) -> None:
    """Gradients are those of the candidates' own losses, times the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"budget": 3, "warmup": 0, **WAYS[way]}
    selector = ftw.Selector(
        model, optimizer, target=[data(9)], loss_fn=lambda m, x: losses(m, x, *more).mean(), **options
    )
    for step in range(3):
        x = data(step)
        if faulty is not None and step != 1:
            x[2, 1] = faulty
        parameters = list(model.parameters())
        torch.manual_seed(step)
        finite = losses(model, torch.where(x.isfinite(), x, 0.0), *more)
        each = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in finite]
        torch.manual_seed(step)
        with selector.record():
            losses(model, x, *more).sum().backward()
        selection = selector.apply()
        assert selection.diagnostics["quarantined"] == ([2] if faulty is not None and step != 1 else [])
        assert ("replays" in selection.diagnostics) == ("memory_cap" in WAYS[way])
        for j, p in enumerate(parameters):
            expected = sum(float(selection.weights[i]) * each[i][j] for i in selection.indices.tolist())
            torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-14)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("faulty", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_faulty_candidate_spares_the_others_of_a_micro_batch_with_dropout(way: str, faulty: float) -> None:
    """All its rows are run again, for the masks are drawn by the shape of the batch."""
    check_steps(Model(gated="memory_cap" not in WAYS[way] or way == "both", dropout=0.3), way, faulty)


@pytest.mark.parametrize("way", WAYS)
def test_a_vector_as_long_as_the_batch_by_chance_is_not_cut(way: str) -> None:
    positions = torch.arange(ROWS, dtype=torch.float64) / 10
    check_steps(Model(gated="memory_cap" not in WAYS[way] or way == "both"), way, None, positions)
