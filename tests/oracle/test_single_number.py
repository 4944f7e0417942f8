"""A parameter that is a single number, beside one of stacked matrices whose gradient torch.func returns transposed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.assembly import measure
from ftw.optim_state import preconditioner_for

F64 = torch.float64


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.stacked = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        apart = torch.einsum("nki,koi->nko", x.view(-1, 3, 4), self.stacked)
        return torch.tanh(self.gate) * x + apart.reshape(-1, 12)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


@pytest.mark.parametrize("geometry", ["curvature", "update", "vanilla"])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "adafactor"])
def test_the_small_problem(kind: str, geometry: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), Gate(), nn.Linear(12, 2)).to(F64)
    makers: dict[str, Any] = {
        "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
        "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01, weight_decay=0.1),
    }
    optimizer = makers[kind](model.parameters())
    selector = ftw.Selector(
        model,
        optimizer,
        target=[torch.randn(3, 12, dtype=F64)],
        loss_fn=loss_of,
        functional=[Gate],
        geometry=geometry,
        warmup=0,
    )
    for _ in range(3):
        x = torch.randn(6, 12, dtype=F64)
        with selector.record():
            loss_of(model, x).backward()
        selector.select()
        contributions = selector._recorder.contributions()
        g = selector._target()
        found = measure(contributions, optimizer, selector.preconditioner, g, {}, geometry)
        update = preconditioner_for(optimizer).linearise(optimizer, contributions.combine())
        rows = (model(x) - 1.0).square().mean(1) / 6
        names = list(model.parameters())
        C = [torch.autograd.grad(row, names, retain_graph=True) for row in rows]
        K, b = torch.zeros(6, 6, dtype=F64), torch.zeros(6, dtype=F64)
        for at, p in enumerate(names):
            own = torch.stack([c[at] for c in C])
            scale = (
                update.scale[p] if geometry != "vanilla" else ftw.optim_state.Scalar(optimizer.param_groups[0]["lr"])
            )
            MC = scale.apply(scale.apply(own)) if geometry == "update" else scale.apply(own)
            K += own.reshape(6, -1) @ MC.reshape(6, -1).T
            b += MC.reshape(6, -1) @ g[p].flatten()
        torch.testing.assert_close(found.chosen.gram, K, rtol=1e-10, atol=1e-12 * float(K.abs().max()))
        torch.testing.assert_close(found.chosen.alignment, b, rtol=1e-10, atol=1e-12 * float(b.abs().max()))
        selection = selector.apply()
        for p, expected in zip(names, torch.autograd.grad(rows @ selection.weights, names), strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-14)
        optimizer.step()
        optimizer.zero_grad()
    selector.close()
