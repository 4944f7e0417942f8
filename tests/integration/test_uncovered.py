"""Parameters without a rule: refused, scaled by a weighted second backward, or left to the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import ConfigurationError, CoverageError, RecordingError


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


@pytest.mark.parametrize("policy", ["scale", "ignore"])
def test_coverage_lists_every_trainable_parameter(policy: str) -> None:
    model = Gated()
    model.last.bias.requires_grad_(False)
    selector, _ = selector_for(model, uncovered=policy)
    table = selector.coverage()
    assert [row.parameter for row in table] == ["gate", "layer.weight", "layer.bias", "last.weight"]
    assert [row.how for row in table] == [policy, "recorded", "recorded", "recorded"]
    for row in table:
        assert row.parameter in str(table)
    model.last.bias.requires_grad_(True)
    assert [row.how for row in selector.coverage()] == [policy, "recorded", "recorded", "recorded", "recorded"]
    selector.close()
    with pytest.raises(RecordingError, match="closed"):
        selector.coverage()
    model.last.bias.requires_grad_(False)
    held = torch.optim.AdamW([model.layer.weight], lr=1e-2)
    only = ftw.Selector(model, held, target=[data(5, 9)], loss_fn=loss_of)
    assert {row.parameter: row.how for row in only.coverage()} == {
        "gate": "not in the optimizer",
        "layer.weight": "recorded",
        "layer.bias": "not in the optimizer",
        "last.weight": "not in the optimizer",
    }


def test_a_penalty_on_an_uncovered_parameter_is_found() -> None:
    model = Gated()
    selector, _ = selector_for(model, uncovered="scale")
    with selector.record():
        (loss_of(model, data(8, 0)) + model.gate.square().sum()).backward()
    with pytest.raises(RecordingError, match="came out different"):
        selector.apply()


def test_a_loss_of_two_outputs_is_found() -> None:
    class Two(Gated):
        def forward(self, x: Tensor) -> Any:
            hidden = torch.tanh(self.layer(x * self.gate))
            return self.last(hidden), hidden

    model = Two()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out, hidden = model(x)
        return out.square().mean() + hidden.square().mean()

    selector = ftw.Selector(model, optimizer, target=[data(5, 9)], loss_fn=loss, budget=3, uncovered="scale")
    with selector.record():
        loss(model, data(8, 0)).backward()
    with pytest.raises(RecordingError, match="came out different"):
        selector.apply()


def test_functional_dropout_draws_the_same_masks_again() -> None:
    class Dropped(Gated):
        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.dropout(torch.tanh(self.layer(x * self.gate)), 0.5, self.training)
            result: Tensor = self.last(hidden)
            return result

    model = Dropped()
    selector, _ = selector_for(model, uncovered="scale", check=False)
    with selector.record():
        loss_of(model, data(8, 0)).backward()
    selector.apply()
    assert model.gate.grad is not None


@pytest.mark.parametrize("policy", ["scale", "ignore"])
def test_a_failed_block_leaves_the_gradient_as_it_was(policy: str) -> None:
    model = Gated()
    selector, _ = selector_for(model, uncovered=policy)
    with pytest.raises(ConfigurationError), selector.record(mass=torch.ones(3)):
        loss_of(model, data(8, 0)).backward()
    assert model.gate.grad is None


def test_a_stale_gradient_that_scaling_would_overwrite_is_refused() -> None:
    model = Gated()
    selector, _ = selector_for(model, uncovered="scale")
    model.gate.grad = torch.ones_like(model.gate)
    with pytest.raises(RecordingError, match="zero_grad"), selector.record():
        loss_of(model, data(8, 0)).backward()
    assert torch.equal(model.gate.grad, torch.ones_like(model.gate))
