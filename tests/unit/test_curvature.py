"""Curvature models: what K-FAC and EK-FAC estimate, and that the small problem is made with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.assembly import measure
from ftw.curvature import EKFAC, KFAC, Curvature
from ftw.errors import ConfigurationError
from ftw.gradients import Factorized
from ftw.gradients.recorder import Recorder
from ftw.optim_state import SGD, AdamW
from tests.models import MLP, batch_of, lora_llama, tiny_llama, token_mean

F64 = torch.float64


def contributions_of(model: nn.Module, run: Any) -> tuple[Recorder, Any]:
    recorder = Recorder(model, lambda: [p for p in model.parameters() if p.requires_grad], Factorized())
    with recorder.record():
        run(model).backward()
    return recorder, recorder.contributions()


def linear_loss(x: Tensor) -> Any:
    return lambda model: (model(x) - 1.0).square().sum(-1).mean()


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {p: name for name, p in model.named_parameters()}


def test_one_token_is_its_own_fisher_matrix() -> None:
    model = nn.Linear(3, 2, bias=False, dtype=F64)
    x = torch.randn(1, 3, dtype=F64)
    _, contributions = contributions_of(model, linear_loss(x))
    gradient = contributions.per_candidate(model.weight)[0]
    for kind in (KFAC, EKFAC):
        curvature = kind(damping=1e-14)
        curvature.observe(contributions, names_of(model))
        operator = curvature.operator(model.weight)
        assert operator is not None
        X = torch.randn(2, 3, dtype=F64)
        torch.testing.assert_close(operator.apply(X), gradient * (gradient * X).sum(), rtol=1e-5, atol=1e-6)


def test_the_trace_is_that_of_the_empirical_fisher() -> None:
    """For one layer and one token a sample both factorisations keep E|b|^2 E|a|^2, EK-FAC E|b|^2|a|^2."""
    model = nn.Linear(3, 2, bias=False, dtype=F64)
    x = torch.randn(9, 3, dtype=F64)
    _, contributions = contributions_of(model, linear_loss(x))
    each = contributions.per_candidate(model.weight) * 9  # of the sample's own loss
    curvature = EKFAC(damping=1e-12, decay=0.0)
    curvature.observe(contributions, names_of(model))
    operator: Any = curvature.operator(model.weight)
    trace = sum(float(operator.apply(E.view(2, 3)).flatten() @ E) for E in torch.eye(6, dtype=F64))
    assert trace == pytest.approx(float(each.flatten(1).square().sum(1).mean()), rel=1e-6)
    # and each diagonal entry in the eigenbasis is the second moment there
    left, right = operator.left, operator.right
    second = (left.T @ each @ right).square().mean(0)
    torch.testing.assert_close(operator.inner.values, second, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_the_pool_twice_is_the_same_curvature(kind: type[KFAC]) -> None:
    model = MLP()
    x = torch.randn(5, 6, dtype=F64)
    found = []
    for pool in (x, torch.cat([x, x])):
        curvature = kind(decay=0.0)
        recorder, contributions = contributions_of(model, linear_loss(pool))
        curvature.observe(contributions, names_of(model))
        recorder.close()
        found.append(curvature)
    for p in model.parameters():
        first, second = (curvature.operator(p) for curvature in found)
        if p.dim() < 2:
            assert first is None
            assert second is None
            continue
        assert first is not None
        assert second is not None
        X = torch.randn(p.shape, dtype=F64)
        torch.testing.assert_close(first.apply(X), second.apply(X), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
@pytest.mark.parametrize("optimizer_kind", ["sgd", "adamw"])
def test_the_small_problem_against_dense_algebra(kind: type[KFAC], make: Any, optimizer_kind: str) -> None:
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if optimizer_kind == "sgd":
        optimizer, preconditioner = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1), SGD()
    else:
        optimizer, preconditioner = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1), AdamW()
    for seed in (1, 2):
        token_mean(model, batch_of(4, seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    token_mean(model, batch_of(3, seed=9)).backward()
    g = {p: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in trained}
    optimizer.zero_grad()
    recorder, contributions = contributions_of(model, lambda m: token_mean(m, batch_of(5, seed=3)))
    curvature = kind()
    curvature.observe(contributions, recorder_names(model))
    found = measure(contributions, optimizer, preconditioner, g, {}, "curvature", "pool", None, curvature)
    update = preconditioner.linearise(optimizer, contributions.combine())
    gained, coupling = torch.zeros(5, 5, dtype=F64), torch.zeros(5, dtype=F64)
    offset = 0.0
    seen = 0
    for p in contributions.parameters:
        C, scale = contributions.per_candidate(p), update.scale[p]
        H = curvature.operator(p)
        MC = scale.apply(C)
        if H is None:
            bent, curved = update.gain[p] * C, update.gain[p] * scale.solve(update.offset[p])
        else:
            seen += 1
            bent, curved = H.apply(MC), H.apply(update.offset[p])
        gained += MC.flatten(1) @ bent.flatten(1).T
        coupling += MC.flatten(1) @ curved.flatten()
        offset += float(update.offset[p].flatten() @ curved.flatten()) / 2
    assert seen
    torch.testing.assert_close(found.gained, gained, rtol=1e-9, atol=1e-12 * float(gained.abs().max()))
    torch.testing.assert_close(found.coupling, coupling, rtol=1e-9, atol=1e-10 * float(coupling.abs().max()))
    assert float(found.offset_curvature) == pytest.approx(offset, rel=1e-9)
    plain = measure(contributions, optimizer, preconditioner, g, {}, "curvature")
    torch.testing.assert_close(found.true.gram, plain.true.gram, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.true.alignment, plain.true.alignment, rtol=1e-9, atol=1e-12)
    recorder.close()


def recorder_names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {p: name for name, p in model.named_parameters() if p.requires_grad}


def train(steps: int, curvature: Any, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = MLP() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    target = [torch.randn(5, 6, generator=torch.Generator().manual_seed(77), dtype=F64)]
    selector = ftw.Selector(
        model,
        optimizer,
        target=target,
        loss_fn=lambda m, x: (m(x) - 1.0).square().mean(),
        objective="utility",
        curvature=curvature,
        warmup=1,
        **options,
    )
    go_on(steps, 0, model, optimizer, selector)
    return model, optimizer, selector


def go_on(steps: int, first: int, model: nn.Module, optimizer: Any, selector: ftw.Selector, bad: int = -1) -> None:
    for step in range(first, first + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=F64)
        if step == bad:
            x[2] = float("nan")
        with selector.record():
            (model(x) - 1.0).square().mean().backward()
        selector.apply()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_stop_and_resume(name: str) -> None:
    through, _, _ = train(14, name)
    model, optimizer, selector = train(6, name)
    other, other_optimizer, other_selector = train(0, name)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    other_selector.load_state_dict(selector.state_dict())
    go_on(8, 6, other, other_optimizer, other_selector)
    for p, q in zip(through.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_curvature_decides() -> None:
    """The plug-in changes the weights: it is not accepted and ignored."""
    first = train(6, "optimizer")[0]
    second = train(6, "kfac")[0]
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_faulty_candidate_does_not_reach_the_estimate(kind: type[KFAC]) -> None:
    model, optimizer, selector = train(2, kind())
    go_on(2, 2, model, optimizer, selector, bad=2)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    state = selector.state_dict()["curvature"]["estimates"]
    assert state
    assert all(bool(torch.isfinite(e["inputs"]).all()) for e in state.values())


def test_a_failed_step_is_undone() -> None:
    model, _, selector = train(3, "ekfac")
    before = selector.curvature.snapshot()
    with selector.record():
        (model(torch.full((4, 6), float("nan"), dtype=F64)) - 1.0).square().mean().backward()
    with pytest.raises(ftw.errors.NonFiniteError):
        selector.apply()
    assert selector.curvature.snapshot()[:2] == before[:2]


def test_what_cannot_work_is_refused() -> None:
    for bad in ({"damping": 0.0}, {"decay": 1.0}, {"refresh": 0}, {"refresh": 2.5}, {"largest": 0}):
        with pytest.raises(ConfigurationError):
            KFAC(**bad)
    with pytest.raises(ConfigurationError, match="no matrix whose gradients are kept as factors"):
        train(1, "kfac", gradients="full")
    with pytest.raises(ftw.errors.UnknownComponentError, match="unknown curvature model 'kfacc'; did you mean 'kfac'"):
        train(0, "kfacc")
    _, _, selector = train(1, "kfac")
    _, _, plain = train(1, "optimizer")
    with pytest.raises(ConfigurationError, match="with a curvature model"):
        plain.load_state_dict(selector.state_dict())
    assert issubclass(EKFAC, Curvature)
