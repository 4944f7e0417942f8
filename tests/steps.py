"""Single steps with given weights, as the selector foresees them and an optimizer makes them. For tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

import ftw
from ftw.fidelity import Fidelity
from ftw.problem import Solution, Status
from ftw.solvers.base import WeightSolver
from ftw.solvers.constraints import ConstraintSet

Loss = Callable[[nn.Module, Tensor], Tensor]


class Given(WeightSolver):
    """Weights that the test chose."""

    tolerance = math.inf

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        return Solution(self.weights.clone(), Status.OPTIMAL, 0.0)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(count: int, seed: int) -> Tensor:
    """Positive, of mean 1."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return drawn * (count / drawn.sum())


def gradient(model: nn.Module, loss: Tensor) -> dict[Parameter, Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))


def step(
    model: nn.Module,
    optimizer: Optimizer,
    losses: Loss,  # -> (n,)
    x: Tensor,
    weights: Tensor,
    target: Loss,  # -> ()
    **options: Any,
) -> tuple[ftw.Selection, Fidelity]:
    """What a step on the mean loss with these weights was predicted to do, linearised at its own gradient, and did."""
    selector = ftw.Selector(
        model,
        optimizer,
        target=[x],
        loss_fn=target,
        filter="all",
        budget=1.0,
        solver=Given(weights),
        relinearise=True,
        warmup=0,
        watch=1,
        **options,
    )
    with selector.record():
        losses(model, x).mean().backward()
    selection = selector.apply()
    optimizer.step()
    optimizer.zero_grad()
    selector.close()
    assert selector.fidelity is not None
    assert torch.equal(selection.weights, weights)
    return selection, selector.fidelity
