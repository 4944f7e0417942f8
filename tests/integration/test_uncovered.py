"""Parameters without a rule: refused, scaled by a weighted second backward, or left to the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import CoverageError


class Gated(nn.Module):
    """A linear layer behind a gate that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.rand(6, dtype=torch.float64))
        self.layer = nn.Linear(6, 4, dtype=torch.float64)
        self.last = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.layer(x * self.gate)))
        return result


def data(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2]).square().mean()


def selector_for(model: nn.Module, **options: Any) -> tuple[ftw.Selector, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return ftw.Selector(model, optimizer, target=[data(5, 9)], loss_fn=loss_of, budget=3, **options), optimizer


def test_an_error_names_the_parameter_and_the_ways_out() -> None:
    with pytest.raises(CoverageError, match=r"gate \(Gated\).*uncovered='scale'"):
        selector_for(Gated())


@pytest.mark.parametrize("parts", [1, 2])
def test_scale_gives_the_weighted_gradient(parts: int) -> None:
    model = Gated()
    selector, optimizer = selector_for(model, uncovered="scale")
    for step in range(3):
        x = data(8, step)
        for i in range(parts):
            piece = x[i * 8 // parts : (i + 1) * 8 // parts]
            with selector.record():
                (loss_of(model, piece) / parts).backward()
        selection = selector.apply()
        each = [torch.autograd.grad(loss_of(model, x[i : i + 1]) / 8, list(model.parameters())) for i in range(8)]
        for j, p in enumerate(model.parameters()):
            expected = sum(w * grads[j] for w, grads in zip(selection.weights, each, strict=True))
            torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-14)
        optimizer.step()
        optimizer.zero_grad()


def test_ignore_leaves_the_trainers_gradient() -> None:
    model = Gated()
    selector, optimizer = selector_for(model, uncovered="ignore")
    for step in range(2):
        x = data(8, step)
        with selector.record():
            loss_of(model, x).backward()
        selector.apply()
        (plain,) = torch.autograd.grad(loss_of(model, x), [model.gate])
        torch.testing.assert_close(model.gate.grad, plain)
        optimizer.step()
        optimizer.zero_grad()


def test_scale_with_a_loss_scale() -> None:
    gradients = []
    for scale in (1.0, 1024.0):
        model = Gated()
        selector, _ = selector_for(model, uncovered="scale")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with selector.record(scaler=scaler):
            scaler.scale(loss_of(model, data(8, 0))).backward()
        selector.apply()
        assert model.gate.grad is not None
        gradients.append(model.gate.grad / scale)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_model_without_any_covered_parameter_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.rand(6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate

    with pytest.raises(CoverageError, match="no trainable parameter"):
        selector_for(Bare(), uncovered="scale")
