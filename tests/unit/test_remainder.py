"""How fast the error of the predicted drop falls with the learning rate: docs/theory.md, "The remainder". float64.

Slopes are fitted on log-log lines over real steps; the Hessian goes in by way of the curvature plug-in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.curvature import Curvature
from ftw.fidelity import Fidelity
from ftw.optim_state.operators import ScaleOperator
from tests.steps import random, step, weights_of

CANDIDATES = 6
WEIGHTS = weights_of(CANDIDATES, 5)
RATES = np.logspace(-4.5, -3.5, 7)
"""Small enough that the next order is a few per cent, large enough that rounding is."""

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.0, momentum=0.9, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.0, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.0, momentum=0.5),
}


@dataclass(frozen=True)
class Dense(ScaleOperator):
    """A matrix that acts on the flattened parameter."""

    matrix: Tensor  # (numel, numel), symmetric positive semidefinite
    structure: ClassVar[str] = "dense"

    def apply(self, tensor: Tensor) -> Tensor:
        return (tensor.flatten(-2) @ self.matrix).view_as(tensor)

    def power(self, exponent: float) -> Dense:
        values, vectors = torch.linalg.eigh(self.matrix)
        return Dense((vectors * values.clamp_min(0.0) ** exponent) @ vectors.T)

    def solve(self, tensor: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, tensor.flatten()).view_as(tensor)

    @property
    def mixes_rows(self) -> bool:
        return True


class Fixed(Curvature):
    """A Hessian that is given, parameter by parameter."""

    def __init__(self, blocks: Mapping[Parameter, Tensor]) -> None:
        self.blocks = blocks

    def observe(self, contributions: Any, names: Mapping[Parameter, str]) -> None:
        pass

    def operator(self, parameter: Parameter) -> ScaleOperator:
        return Dense(self.blocks[parameter])

    def snapshot(self) -> None:
        return None

    def restore(self, snapshot: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class LowRank(nn.Module):
    """A frozen matrix and a trained product of two: LoRA's coupling."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 3, bias=False).requires_grad_(False)
        self.a = nn.Linear(5, 2, bias=False)
        self.b = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.b(self.a(x))
        return result


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False) if kind == "matrix" else LowRank()
    return model.double()


def losses(model: nn.Module, x: Tensor) -> Tensor:  # -> (n,)
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none")


def target_loss(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(2.0 * x + 0.5), torch.arange(len(x)).flip(0) % 3)


def hessian(model: nn.Module, x: Tensor) -> dict[tuple[Parameter, Parameter], Tensor]:
    """Blocks of the target loss's Hessian, rows by the first parameter, entries of both flattened."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    g = torch.autograd.grad(target_loss(model, x), parameters, create_graph=True)
    blocks: dict[tuple[Parameter, Parameter], Tensor] = {}
    for p, along in zip(parameters, g, strict=True):
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in along.flatten()]
        for i, q in enumerate(parameters):
            blocks[p, q] = torch.stack([row[i].flatten() for row in rows])
    return blocks


def prepared(kind: str, name: str, lr: float) -> tuple[nn.Module, Optimizer, Tensor]:
    """A model and an optimizer with three steps of history at a rate of 0, so that all rates start alike."""
    model = build(kind)
    optimizer = OPTIMIZERS[name](p for p in model.parameters() if p.requires_grad)
    for seed in range(3):
        losses(model, random(4, 5, seed=seed)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = lr * (3.0 if name == "sgd" else 1.0)
    return model, optimizer, random(CANDIDATES, 5, seed=9)


def made(kind: str, name: str, lr: float, **options: Any) -> tuple[Fidelity, dict[Parameter, Tensor]]:
    """A step at this rate, and how far it moved each parameter (old minus new)."""
    model, optimizer, x = prepared(kind, name, lr)
    if "curvature" in options:
        blocks = hessian(model, x)
        scale = options["curvature"]
        options["curvature"] = Fixed({p: scale * block for (p, q), block in blocks.items() if p is q})
    before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    _, seen = step(model, optimizer, losses, x, WEIGHTS, target_loss, **options)
    return seen, {p: old - p.detach() for p, old in before.items()}


def slope(errors: list[float]) -> float:
    return float(np.polyfit(np.log(RATES), np.log(np.abs(errors)), 1)[0])


# -- the four cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_order_errs_to_second_order(name: str) -> None:
    seen = [made("matrix", name, lr)[0] for lr in RATES]
    assert slope([f.realised_drop - f.first_order for f in seen]) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_utility_with_the_true_hessian_errs_to_third_order(name: str) -> None:
    seen = [made("matrix", name, lr, curvature=1.0)[0] for lr in RATES]
    assert slope([f.realised_drop - f.predicted_drop for f in seen]) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fixed_model_that_is_not_the_hessian_errs_to_second_order(name: str) -> None:
    seen = [made("matrix", name, lr, curvature=1.5)[0] for lr in RATES]
    assert slope([f.realised_drop - f.predicted_drop for f in seen]) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_s_own_model_errs_to_first_order(name: str) -> None:
    """H = P^-1 grows as 1/lr while the step shrinks as lr."""
    seen = [made("matrix", name, lr)[0] for lr in RATES]
    assert slope([f.realised_drop - f.predicted_drop for f in seen]) == pytest.approx(1.0, abs=0.1)
    smallest = seen[0]
    curvature = smallest.first_order - smallest.predicted_drop
    assert smallest.realised_drop - smallest.predicted_drop == pytest.approx(curvature, rel=0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_right_trust_is_in_inverse_proportion_to_the_rate_and_gives_third_order(name: str) -> None:
    """`trust = d'P^-1 d / d'H d`, d the displacement: along it the model then has the loss's own curvature."""
    trusts, errors = [], []
    for lr in RATES:
        seen, d = made("matrix", name, lr)
        start, _, x = prepared("matrix", name, lr)
        own = 2.0 * (seen.first_order - seen.predicted_drop)
        (p,) = start.parameters()
        (moved,) = d.values()
        true = float(moved.flatten() @ hessian(start, x)[p, p] @ moved.flatten())
        trusts.append(own / true)
        again, _ = made("matrix", name, lr, objective="utility", trust=own / true)
        errors.append(again.realised_drop - again.predicted_drop)
    assert slope(trusts) == pytest.approx(-1.0, abs=0.02)
    assert slope(errors) == pytest.approx(3.0, abs=0.1)


# -- coupled factors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_without_cross_curvature_misses_exactly_that_of_coupled_factors(name: str) -> None:
    """Blocks of the true Hessian, the best that one operator a parameter can be, leave `d_A' H_AB d_B`."""
    errors, rest = [], []
    for lr in RATES:
        seen, d = made("factors", name, lr, curvature=1.0)
        start, _, x = prepared("factors", name, lr)
        a, b = (p for p in start.parameters() if p.requires_grad)
        first, second = (moved.flatten() for moved in d.values())
        crossed = float(first @ hessian(start, x)[a, b] @ second)
        errors.append(seen.realised_drop - seen.predicted_drop)
        rest.append(errors[-1] + crossed)
    assert slope(errors) == pytest.approx(2.0, abs=0.1)
    assert slope(rest) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(
    ("b", "y", "together", "apart", "diagonal"),
    [(1.0, 1.0, 4.0, 0.0, 2.0), (1.0, 0.0, 6.0, -2.0, 2.0), (1.0, 2.0, 2.0, 2.0, 2.0), (0.0, 1.0, -1.0, 3.0, 1.0)],
)
def test_the_smallest_pair_of_factors(b: float, y: float, together: float, apart: float, diagonal: float) -> None:
    """The table of docs/theory.md: `1/2 (ab - y)^2` at a = 1, `v'Hv` along (1, 1) and (1, -1), and by H's diagonal."""

    def loss(v: Tensor) -> Tensor:
        return (v[0] * v[1] - y).square() / 2

    exact = torch.autograd.functional.hessian(loss, torch.tensor([1.0, b], dtype=torch.float64))
    for direction, expected in (((1.0, 1.0), together), ((1.0, -1.0), apart)):
        v = torch.tensor(direction, dtype=torch.float64)
        assert float(v @ exact @ v) == expected
        assert float(v @ exact.diag().diag() @ v) == diagonal


def test_the_cross_term_has_a_part_of_curvature_and_a_part_of_slope() -> None:
    """`d_A' H_AB d_B = <B d_A, F (d_B A)> + <G, d_B d_A>`, G and F slope and curvature in the product W = BA.

    Where B is 0, as LoRA begins, H_AA is 0 as well: all that A feels is the part of slope.
    """
    for scale in (1.0, 0.0):
        model, _, x = prepared("factors", "adamw", 1e-3)
        assert isinstance(model, LowRank)
        a, b = model.a.weight, model.b.weight
        with torch.no_grad():
            b.mul_(scale)
        d_a, d_b = random(*a.shape, seed=1), random(*b.shape, seed=2)
        blocks = hessian(model, x)
        w = model.base.weight.requires_grad_()  # the loss sees W0 + W
        (slope_w,) = torch.autograd.grad(target_loss(model, x), w, create_graph=True)
        (bent,) = torch.autograd.grad((slope_w * (d_b @ a)).sum(), w, retain_graph=True)
        curved, sloped = (b @ d_a * bent).sum(), (slope_w * (d_b @ d_a)).sum()
        crossed = d_a.flatten() @ blocks[a, b] @ d_b.flatten()
        torch.testing.assert_close(crossed, curved + sloped, rtol=1e-10, atol=1e-12)
        assert sloped.abs() > 0.01
        assert bool(blocks[a, a].any()) == bool(scale)
        assert bool(curved) == bool(scale)
