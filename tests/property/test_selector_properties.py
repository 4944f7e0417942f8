"""What holds for every step, whatever the pool, the masses and the components."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ftw
from ftw.registry import available
from tests.models import MLP

NON_NEGATIVE_SOLVERS = ("pgd", "qp", "uniform")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


@st.composite
def pools(draw: st.DrawFn) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches with masses: ordinary, duplicate, zero and badly scaled rows."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    parts = []
    for rows in draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)):
        x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        kind = draw(st.sampled_from(["ordinary", "duplicate", "zero", "huge", "tiny"]))
        if kind == "duplicate":
            x[:] = x[0]
        elif kind == "zero":
            x[0] = 0
        elif kind in ("huge", "tiny"):
            x[0] *= 1e4 if kind == "huge" else 1e-4
        parts.append((x, torch.rand(rows, generator=generator, dtype=torch.float64) + 0.05))
    return parts


@pytest.mark.parametrize("solver", NON_NEGATIVE_SOLVERS)
@settings(max_examples=25, deadline=None)
@given(
    parts=pools(),
    fraction=st.floats(0.05, 1.0),
    name=st.sampled_from(sorted(set(available("filters")) - {"cosine"})),
    steps=st.integers(0, 2),
    objective=st.sampled_from(["match", "utility"]),
)
def test_invariants_of_a_step(
    solver: str, parts: list[tuple[Tensor, Tensor]], fraction: float, name: str, steps: int, objective: str
) -> None:
    if solver == "qp":
        pytest.importorskip("cvxpy")
    model = MLP()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.01)
    target = [torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    for _ in range(steps):  # some history for the optimizer
        loss_of(model, target[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    selector = ftw.Selector(
        model,
        optimizer,
        target=target,
        loss_fn=loss_of,
        budget=fraction,
        filter=name,
        solver=solver,
        warmup=1,
        objective=objective,
    )
    total = sum(float(mass.sum()) for _, mass in parts)
    for x, mass in parts:
        extras = {column: torch.rand(len(x)) for column in selector.policy.filter.columns}
        with selector.record(mass=mass, extras=extras):
            ((model(x) - 1.0).square().mean(1) @ mass / total).backward()
    selection = selector.apply()

    w, n = selection.weights, sum(len(x) for x, _ in parts)
    mu = torch.cat([mass for _, mass in parts]) * n / total
    assert w.shape == (n,)
    assert torch.isfinite(w).all()
    assert (w >= 0).all()
    assert torch.equal(selection.indices, w.nonzero().flatten())
    if name != "all":
        assert len(selection.indices) <= max(1, int(fraction * n + 0.5))
    if selection.status == "nothing_useful":
        assert not w.any()
    else:
        assert float(mu @ w) == pytest.approx(n, rel=1e-9)
    weighted = torch.zeros((), dtype=torch.float64)
    for (x, mass), part in zip(parts, w.split([len(x) for x, _ in parts]), strict=True):
        weighted = weighted + (model(x) - 1.0).square().mean(1) @ (mass * part) / total
    scale = max(float(p.grad.abs().max()) for p in params if p.grad is not None)
    for p, value in zip(params, torch.autograd.grad(weighted, params), strict=True):
        torch.testing.assert_close(p.grad, value, rtol=1e-9, atol=1e-12 * scale)
