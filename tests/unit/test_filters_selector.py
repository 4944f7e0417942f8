"""Every filter by its name in a real step, and GREATS in the units of a real optimizer."""

import pytest
import torch

import ftw
from ftw import registry
from ftw.errors import ConfigurationError
from ftw.filters import Greats
from tests.models import MLP

NAMES = [name for name, owners in registry.available("filters").items() if "filter-then-weight" in owners]


def data(rows, seed):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model, x):
    return (model(x) - 1.0).square().mean()


def columns(n):
    numbers = torch.rand(4, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.1
    named = dict(zip(("loss", "reference_loss", "loss_with_prompt", "loss_without_prompt"), numbers, strict=True))
    return named | {"source": [("web", "code")[i % 2] for i in range(n)]}


@pytest.mark.parametrize("name", NAMES)
def test_every_filter_serves_by_its_name(name):
    runs = []
    for _ in range(2):
        model = MLP()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = ftw.Selector(
            model, optimizer, target=[data(5, 100)], loss_fn=loss_of, filter=name, budget=4, warmup=1, seed=3
        )
        chosen = []
        for step in range(3):
            for part in (0, 1):
                with selector.record(extras=columns(5)):
                    loss_of(model, data(5, 2 * step + part)).backward()
            selection = selector.apply()
            assert len(selection.indices) <= (4 if selector.policy.filter.honours_budget else 10)
            chosen.append(selection.indices.tolist())
            optimizer.step()
            optimizer.zero_grad()
        selector.close()
        runs.append(chosen)
    assert runs[0] == runs[1]
    assert any(runs[0])


def test_a_missing_column_is_named_with_what_to_pass():
    model = MLP()
    selector = ftw.Selector(
        model, torch.optim.SGD(model.parameters(), lr=0.1), target=[data(5, 9)], loss_fn=loss_of, filter="rho_loss"
    )
    with pytest.raises(ConfigurationError, match=r"reference_loss.*record\(extras="):
        with selector.record(extras={"loss": [1.0] * 5}):
            loss_of(model, data(5, 0)).backward()
        selector.apply()
    selector.close()


@pytest.mark.parametrize("rate", [1e-3, 5.0])
def test_greats_sees_the_papers_units_with_the_vanilla_geometry(rate):
    """U(z | S) = lr grad_z . g - lr^2 sum_S grad_z . grad_j from per-sample gradients taken one by one."""
    model, x, target = MLP(), data(8, 0), data(5, 100)
    parameters = list(model.parameters())

    def gradient(rows):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, rows), parameters)])

    grads, g = torch.stack([gradient(x[i : i + 1]) for i in range(8)]), gradient(target)
    expected = []
    for _ in range(4):
        gains = rate * grads @ g - rate**2 * grads @ grads[expected].sum(0)
        gains[expected] = -torch.inf
        expected.append(int(gains.argmax()))
    for filter in ("greats", Greats(rate)):
        selector = ftw.Selector(
            model,
            torch.optim.SGD(parameters, lr=rate),
            target=[target],
            loss_fn=loss_of,
            filter=filter,
            solver="uniform",
            geometry="vanilla",
            budget=4,
        )
        with selector.record():
            loss_of(model, x).backward()
        selection = selector.select()
        selector.close()
        assert selection.indices.tolist() == sorted(expected)
        assert selection.weights[selection.indices].tolist() == [2.0] * 4
