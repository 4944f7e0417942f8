"""The step as a whole: weights 1 are plain training, the gradient written is the weighted one, nothing leaks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import (
    ConfigurationError,
    FilterError,
    NonFiniteError,
    RecordingError,
    SolverError,
    TargetError,
    UnsupportedOptimizerError,
)
from ftw.filters import All, Filter, Threshold, TopK
from ftw.optim_state import AdamW, Scalar
from ftw.solvers import Box, CappedSimplex, Free, NonNegative, Uniform
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean


def data(rows: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


def selector_for(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> ftw.Selector:
    defaults: dict[str, Any] = {"target": [data(5, 100), data(5, 101)], "loss_fn": loss_of, "warmup": 2}
    return ftw.Selector(model, optimizer, **{**defaults, **options})


def train(steps: int, make: Callable[[nn.Module], torch.optim.Optimizer] | None = None, **options: Any) -> nn.Module:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if make is None else make(model)
    selector = selector_for(model, optimizer, **options)
    for step in range(steps):
        with selector.record():
            loss_of(model, data(8, step)).backward()
        selector.apply()
        optimizer.step()
        optimizer.zero_grad()
    selector.close()
    return model


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
def test_weights_of_one_are_plain_training(make: Callable[[], nn.Module]) -> None:
    model = make()
    plain = copy.deepcopy(model)
    target = [batch_of(3, seed=9)]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (model, plain)]
    selector = ftw.Selector(
        model, optimizers[0], target=target, loss_fn=token_mean, budget=1.0, filter="all", solver="uniform"
    )
    for step in range(4):
        batch = batch_of(6, seed=step)
        share = label_tokens(batch).sum()
        for part in (slice(0, 2), slice(2, 6)):  # gradient accumulation, token-mean loss
            piece = {k: v[part] for k, v in batch.items()}
            for m in (model, plain):
                loss = token_mean(m, piece) * label_tokens(piece).sum() / share
                if m is model:
                    with selector.record(mass=label_tokens(piece)):
                        loss = token_mean(m, piece) * label_tokens(piece).sum() / share
                        loss.backward()
                else:
                    loss.backward()
        selection = selector.apply()
        assert torch.equal(selection.weights, torch.ones(6, dtype=torch.float64))
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gradients", ["auto", "full", "factorized"])
def test_apply_equals_an_explicit_weighted_second_backward(gradients: str) -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = ftw.Selector(
        model, optimizer, target=[batch_of(3, seed=9)], loss_fn=token_mean, budget=3, gradients=gradients
    )
    for step in range(3):
        batch = batch_of(8, seed=step)
        with selector.record(mass=label_tokens(batch)):
            token_mean(model, batch).backward()
        selection = selector.apply()
        assert 0 < len(selection.indices) <= 3
        total = label_tokens(batch).sum()
        weighted = torch.zeros((), dtype=torch.float64)
        for i in range(8):
            alone = {k: v[i : i + 1] for k, v in batch.items()}
            weighted = weighted + selection.weights[i] * token_mean(model, alone) * label_tokens(alone).sum() / total
        expected = torch.autograd.grad(weighted, list(model.parameters()))
        scale = max(float(g.abs().max()) for g in expected)
        for p, value in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, value, rtol=1e-10, atol=1e-13 * scale)
        optimizer.step()
        optimizer.zero_grad()


def dense(model: nn.Module, x: Tensor) -> Tensor:  # -> (n, P)
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss_of(model, x[i : i + 1]) / len(x), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("geometry", ["curvature", "update", "vanilla"])
def test_problem_and_prediction_against_dense_algebra(geometry: str) -> None:
    model, seen = MLP(), []

    class Spy(Filter):
        needs_gram = True

        def __call__(self, problem: ftw.SelectionProblem) -> Tensor:
            seen.append(problem)
            return TopK()(problem)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    target = data(5, 100)
    selector = selector_for(model, optimizer, target=[target], filter=Spy(), geometry=geometry, warmup=0, budget=3)
    for step in range(4):
        x = data(8, step)
        C, params = dense(model, x), list(model.parameters())
        g = flat(torch.autograd.grad(loss_of(model, target), params))
        with selector.record():
            loss_of(model, x).backward()
        selection = selector.select()
        pool = dict(zip(params, torch.autograd.grad(loss_of(model, x), params), strict=True))
        update = AdamW().linearise(optimizer, pool)
        M = flat(update.scale[p].values for p in params)  # type: ignore[attr-defined]
        o = flat(update.offset[p] for p in params)
        chosen = {"curvature": M, "update": M**2, "vanilla": torch.full_like(M, 0.01)}[geometry]
        K, b = C * chosen @ C.T, C @ (chosen * g)
        torch.testing.assert_close(seen[-1].full_gram, K, rtol=1e-9, atol=1e-12 * float(K.abs().max()))
        torch.testing.assert_close(seen[-1].alignment, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))
        moved = o + M * (selection.weights @ C)
        gain = update.gain[params[0]]
        first, curvature = float(g @ moved), float(moved @ (moved * gain / M)) / 2
        assert selection.diagnostics["first_order"] == pytest.approx(first, rel=1e-9)
        assert selection.diagnostics["curvature"] == pytest.approx(curvature, rel=1e-9)
        assert selection.predicted_drop == pytest.approx(first - curvature, rel=1e-8)
        assert float(selection.weights.sum()) == pytest.approx(8.0)
        selector.apply()
        optimizer.step()
        optimizer.zero_grad()


def test_utility_is_exact_for_a_quadratic_with_the_optimizers_own_curvature() -> None:
    """For plain SGD P = lr I; a target loss with Hessian 1/lr falls exactly as predicted."""
    lr = 0.05
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)

    def target_loss(model: nn.Module, centre: Tensor) -> Tensor:
        return (model.weight - centre).square().sum() / (2 * lr)  # type: ignore[operator]

    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=0.1)
    centre = torch.randn(1, 4, dtype=torch.float64)
    selector = ftw.Selector(
        model,
        optimizer,
        target=[centre],
        loss_fn=target_loss,
        budget=2,
        filter="greedy",
        objective="utility",
        total="at_most",
    )
    x = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(3):
        with selector.record():
            model(x).square().mean().backward()
        selection = selector.apply()
        before = float(target_loss(model, centre))
        optimizer.step()
        optimizer.zero_grad()
        assert selection.predicted_drop == pytest.approx(before - float(target_loss(model, centre)), rel=1e-10)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_loss_scale_changes_no_weight(make: Any) -> None:
    found = []
    for scale in (1.0, 65536.0):
        model = MLP()
        optimizer = make(model.parameters(), lr=0.01)
        selector = selector_for(model, optimizer, warmup=10, budget=4)
        with selector.record():
            (loss_of(model, data()) * scale).backward()
        found.append(selector.select().weights)
    assert torch.equal(*found)


# -- behaviour ---------------------------------------------------------------------------------------------------------


def test_budget_mass_and_cap_are_honoured() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer, budget=0.5, cap=1.5)
    mass = torch.arange(1, 9, dtype=torch.float64)
    for step in range(4):
        with selector.record(mass=mass):
            loss_of(model, data(8, step)).backward()
        selection = selector.apply()
        w = selection.weights
        assert (w >= 0).all()
        assert len(selection.indices) <= 4
        assert set(selection.indices.tolist()) == set(w.nonzero().flatten().tolist())
        assert float((mass / mass.sum() * 8) @ w) == pytest.approx(8.0)
        assert float(w.max()) <= 1.5 * float(w.sum()) / 4 + 1e-9 or len(selection.indices) < 4
        optimizer.step()
        optimizer.zero_grad()


def test_select_leaves_gradients_and_apply_may_follow() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer, lean=False)
    with selector.record():
        loss_of(model, data()).backward()
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    assert len(before) == len(list(model.parameters()))
    selection = selector.select()
    assert all(torch.equal(p.grad, before[p]) for p in model.parameters() if p.grad is not None)
    with pytest.raises(RecordingError, match="twice"):
        selector.select()
    assert selector.apply() is selection
    assert any(not torch.equal(p.grad, before[p]) for p in model.parameters() if p.grad is not None)
    with pytest.raises(RecordingError, match="nothing was recorded"):
        selector.apply()


def test_a_new_record_after_select_begins_a_new_window() -> None:
    model = MLP()
    selector = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for rows in (8, 3):
        with selector.record():
            loss_of(model, data(rows)).backward()
        assert len(selector.select().weights) == rows


def test_nothing_useful() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    against = {"target": [data()], "loss_fn": lambda m, x: -loss_of(m, x), "filter": "threshold"}
    for choice in ("zero", "skip"):
        selector = selector_for(model, optimizer, **against, nothing_useful=choice)
        with selector.record():  # one candidate, whose gradient the target opposes
            x = data(8)[:1]
            selector.target = ftw.Target([x], lambda m, x: -loss_of(m, x))
            loss_of(model, x).backward()
        selection = selector.apply()
        assert selection.status == "nothing_useful"
        assert not selection.weights.any()
        assert not len(selection.indices)
        for p in model.parameters():
            assert (p.grad is None) if choice == "skip" else (p.grad is not None and not p.grad.any())
            p.grad = None
        selector.close()


def test_faulty_candidate_is_quarantined() -> None:
    clean, faulty = MLP(), MLP()
    results = []
    for model, x in (
        (clean, data(7)),
        (faulty, torch.cat([data(7)[:3], torch.full((1, 6), torch.nan).double(), data(7)[3:]])),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = selector_for(model, optimizer, budget=3)
        with selector.record():
            ((model(x) - 1).square().mean(1).sum() / 7).backward()
        results.append((selector.apply(), [p.grad for p in model.parameters()]))
    (expected, grads), (found, same) = results
    assert found.diagnostics["quarantined"] == [3]
    assert found.weights[3] == 0
    torch.testing.assert_close(found.weights[[0, 1, 2, 4, 5, 6, 7]], expected.weights, rtol=1e-9, atol=1e-12)
    for a, b in zip(grads, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_wholly_faulty_pool_raises_and_changes_nothing() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer)
    before = selector.state_dict()
    with selector.record():
        loss_of(model, data() * torch.nan).backward()
    with pytest.raises(NonFiniteError, match="all 8 candidates"):
        selector.apply()
    assert all(p.grad is None for p in model.parameters())
    selector.discard()
    assert str(selector.state_dict()) == str(before)


def test_faulty_target_raises_and_changes_nothing() -> None:
    model = MLP()
    selector = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.1), target=[data() * torch.nan])
    with selector.record():
        loss_of(model, data()).backward()
    with pytest.raises(NonFiniteError, match="target gradient"):
        selector.apply()
    assert all(p.grad is None for p in model.parameters())


def test_residual_is_added_unweighted() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = selector_for(model, optimizer, residual="keep", filter="all", solver="uniform", budget=1.0)
    with selector.record():
        (loss_of(model, data()) + model.first.weight.square().sum()).backward()
    selector.apply()
    found = [p.grad for p in model.parameters()]
    total = loss_of(model, data()) + model.first.weight.square().sum()
    for grad, value in zip(found, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow: bool) -> None:
    model, twin = MLP(dtype=torch.float32), MLP(dtype=torch.float32)
    weights = []
    for m, scaler in ((twin, None), (model, torch.amp.GradScaler("cpu", init_scale=1024.0))):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.01)
        selector = selector_for(
            m, optimizer, target=[data(5, 1, torch.float32)], loss_fn=loss_of, warmup=1, check=False
        )
        for step in range(3):
            x = data(8, step, torch.float32)
            if overflow and step == 1 and scaler is not None:
                before, state = [p.clone() for p in m.parameters()], str(selector.state_dict())
                bad = x.clone()
                bad[2] = torch.inf
                with selector.record(scaler=scaler):
                    scaler.scale(loss_of(m, bad)).backward()
                assert selector.apply().status == "overflow"
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert scaler.get_scale() == 512.0
                assert str(selector.state_dict()) == state
                assert all(torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True))
            with selector.record(scaler=scaler):
                loss = loss_of(m, x)
                (loss if scaler is None else scaler.scale(loss)).backward()
            weights.append(selector.apply().weights)
            if scaler is None:
                nn.utils.clip_grad_norm_(m.parameters(), 0.1)
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(m.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    for a, b in zip(weights[:3], weights[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_seed_gives_the_same_run() -> None:
    for options in ({"filter": "random", "solver": "uniform"}, {}):
        first, second = (train(5, seed=7, **options) for _ in range(2))
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    other = train(5, seed=8, filter="random", solver="uniform")
    first = train(5, seed=7, filter="random", solver="uniform")
    assert not all(torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"refresh": 3, "ema": 0.5}, {"filter": "random"}, {"target_batches": 2}],
    ids=["plain", "refresh and ema", "random", "two batches"],
)
@pytest.mark.parametrize("kind", ["list", "walked"])
def test_stop_and_resume_is_bitwise_the_same_run(options: dict[str, Any], kind: str) -> None:
    class Walked:
        def __iter__(self) -> Iterator[Tensor]:
            return iter([data(5, 100), data(5, 101), data(5, 102)])

    target: Any = Walked() if kind == "walked" else list(Walked())
    runs = []
    for stop in (None, 4):
        model = MLP()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = selector_for(model, optimizer, target=target, **options)
        weights = []
        for step in range(8):
            if step == stop:
                file = io.BytesIO()
                torch.save([model.state_dict(), optimizer.state_dict(), selector.state_dict()], file)
                file.seek(0)
                states = torch.load(file, weights_only=True)
                model = MLP(seed=5)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
                selector = selector_for(model, optimizer, target=target, **options)
                for owner, state in zip((model, optimizer, selector), states, strict=True):
                    owner.load_state_dict(state)
            with selector.record():
                loss_of(model, data(8, step)).backward()
            weights.append(selector.apply().weights)
            optimizer.step()
            optimizer.zero_grad()
        runs.append((weights, list(model.parameters())))
    for a, b in zip(*(run[0] for run in runs), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(*(run[1] for run in runs), strict=True):
        assert torch.equal(p, q)


def test_state_in_the_middle_of_a_window_is_refused() -> None:
    model = MLP()
    selector = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with selector.record():
        loss_of(model, data()).backward()
    with pytest.raises(RecordingError, match="between steps"):
        selector.state_dict()
    selector.discard()
    state = selector.state_dict()
    with pytest.raises(ConfigurationError, match="version"):
        selector.load_state_dict({**state, "version": 99})


@pytest.mark.parametrize(
    "options",
    [{}, {"target": {"one": [data(5, 100)], "two": [data(5, 101)]}}, {"reference": "previous", "memory_cap": 10**6}],
    ids=["plain", "several", "capped"],
)
@pytest.mark.parametrize("batches", [list, lambda given: torch.utils.data.DataLoader(given, batch_size=None)])
def test_state_within_a_window_is_that_of_its_begin(options: dict[str, Any], batches: Any) -> None:
    options = {"ema": 0.5, **options}
    if "target" not in options:
        options["target"] = batches([data(5, 100), data(5, 101), data(5, 102)])

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, selector: ftw.Selector, seed: int) -> Tensor:
        with selector.record():
            loss_of(model, data(8, seed)).backward()
        weights = selector.apply().weights
        optimizer.step()
        optimizer.zero_grad()
        return weights

    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer, **options)
    for seed in range(2):
        step(model, optimizer, selector, seed)
    between = selector.state_dict()
    with selector.record():
        loss_of(model, data(8, 50)).backward()
    within = selector.state_dict(within_window=True)
    assert str(within) == str(between)

    twin = copy.deepcopy(model)
    again = torch.optim.SGD(twin.parameters(), lr=0.01)
    resumed = selector_for(twin, again, **options)
    resumed.load_state_dict(within)
    selector.discard()  # the state was taken without harm to the window or the run
    for seed in range(2, 5):
        assert torch.equal(step(model, optimizer, selector, seed), step(twin, again, resumed, seed))


def test_warmup_uses_vanilla_geometry_until_the_optimizer_has_history() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer, warmup=2)
    seen = []
    for step in range(4):
        with selector.record():
            loss_of(model, data(8, step)).backward()
        seen.append(selector.apply().diagnostics["geometry"])
        optimizer.step()
        optimizer.zero_grad()
    assert seen == ["vanilla", "vanilla", "curvature", "curvature"]
    sgd = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01), warmup=2)
    with sgd.record():
        loss_of(model, data()).backward()
    assert sgd.apply().diagnostics["geometry"] == "curvature"


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ({"maximize": True}, "SGD maximises in some parameter groups and minimises in others"),
        ({"dampening": 1.0}, "dampening=1.0 in parameter group 1"),
        ({"differentiable": True}, "differentiable=True in parameter group 1"),
    ],
)
def test_a_group_that_is_added_later_is_checked_like_the_first(late: dict[str, Any], said: str) -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.first.parameters(), lr=0.01, momentum=0.9)
    selector = selector_for(model, optimizer)
    with selector.record():
        loss_of(model, data()).backward()
    selector.apply()
    model.zero_grad()
    optimizer.add_param_group({"params": model.last.parameters(), **late})
    with pytest.raises(UnsupportedOptimizerError, match=said), selector.record():
        loss_of(model, data()).backward()
    optimizer.param_groups[1].update(maximize=False, dampening=0.0, differentiable=False)
    with selector.record():
        loss_of(model, data()).backward()
    assert selector.apply().status == ftw.Status.OPTIMAL


@pytest.mark.parametrize(
    "entry",
    [[1, 2], {"of": 3}, torch.ones(7), torch.ones(1), "name", None, 0.5],
    ids=lambda entry: type(entry).__name__,
)
def test_entries_of_the_state_that_are_someone_else_s_play_no_part(entry: Any) -> None:
    """A logger's notes, say, under keys of any kind."""
    weights = []
    for noted in (False, True):
        model = MLP()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = selector_for(model, optimizer, warmup=0)
        for step in range(2):
            with selector.record():
                loss_of(model, data(8, step)).backward()
            found = selector.apply()
            optimizer.step()
            optimizer.zero_grad()
            for p in model.parameters() if noted else ():
                optimizer.state[p].update({"note": entry, 3: entry})
        weights.append(found.weights)
    assert torch.equal(*weights)


def test_small_parameters_side_by_side_where_only_one_has_a_buffer() -> None:
    """torch has saved `momentum_buffer: None` for parameters that were not stepped: no buffer of zeros."""
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, dampening=0.5)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = None
    optimizer.state[model.first.bias]["momentum_buffer"] = torch.ones_like(model.first.bias)
    g = torch.autograd.grad(loss_of(model, data(5, 100)), list(model.parameters()))
    selector = selector_for(model, optimizer)
    with selector.record():
        loss_of(model, data()).backward()
    foreseen = selector.apply().diagnostics["first_order"]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = [old - p.detach() for old, p in zip(before, model.parameters(), strict=True)]
    assert foreseen == pytest.approx(sum(float((a * b).sum()) for a, b in zip(g, moved, strict=True)), rel=1e-10)


class Headed(MLP):
    """A model with a layer that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"reference": "target", "memory_cap": 10**6}], ids=["after", "before"])
def test_warmup_waits_for_what_is_trained_and_not_for_what_is_never_reached(options: dict[str, Any]) -> None:
    """The geometry is needed after the backward, or, where a cap may force contributions to be dropped, before it."""
    runs = []
    for stop in (None, 4):
        model = Headed()
        model.last.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = selector_for(model, optimizer, warmup=2, **options)
        seen = []
        for step in range(9):
            if step == stop:
                state = selector.state_dict()
                selector.close()
                selector = selector_for(model, optimizer, warmup=2, **options)
                selector.load_state_dict(state)
            if step == 6:
                model.last.requires_grad_(True)
            with selector.record():
                loss_of(model, data(8, step)).backward()
            seen.append(selector.apply().diagnostics["geometry"])
            optimizer.step()
            optimizer.zero_grad()
        assert model.unused.weight not in optimizer.state
        runs.append(seen)
    early = ["vanilla"] * 2 + ["curvature"] * 4
    assert runs[0] == [*early, "vanilla", "vanilla", "curvature"]
    assert runs[1] == runs[0]


def test_components_by_name_class_and_instance() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights = []
    for spec in ("topk", TopK, TopK()):
        selector = selector_for(model, optimizer, filter=spec, solver=Uniform(), preconditioner=AdamW)
        with selector.record():
            loss_of(model, data()).backward()
        weights.append(selector.select().weights)
        selector.close()
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_constraint_sets_and_makers() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for constraints, solver in (
        (NonNegative(), "pgd"),
        (lambda mass, n: CappedSimplex(total=n, cap=4.0, mass=mass), "pgd"),
        (Free(), "closed_form"),
    ):
        selector = selector_for(model, optimizer, constraints=constraints, solver=solver, filter="topk", budget=4)
        with selector.record():
            loss_of(model, data()).backward()
        selection = selector.select()
        assert selection.status == "optimal"
        assert float(selection.weights.sum()) == pytest.approx(8.0)
        selector.close()


@pytest.mark.parametrize(
    "given",
    [
        {"solver": "closed_form"},
        {"solver": "entropic", "constraints": Free()},
        {"memory_cap": 0, "reference": "previous"},
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(given: dict[str, Any]) -> None:
    model = MLP()
    with pytest.raises(ConfigurationError):
        selector_for(model, torch.optim.AdamW(model.parameters(), lr=0.01), **given)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_set_with_entries_for_a_pool_is_left_to_the_first_step() -> None:
    model = MLP()
    bounds = Box(0.0, torch.linspace(1.0, 2.0, 8))
    selector_for(model, torch.optim.AdamW(model.parameters(), lr=0.01), constraints=bounds).close()


def test_at_most_lets_a_harmful_pool_shrink_the_step() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    totals = {}
    for total in ("preserve", "at_most"):
        selector = selector_for(
            model,
            optimizer,
            target=[data(8)[:2]],
            loss_fn=lambda m, x: 0.01 * loss_of(m, x),
            total=total,
            filter="all",
            constraints=NonNegative(),
        )
        with selector.record():
            loss_of(model, data(8)).backward()
        totals[total] = float(selector.select().weights.sum())
        selector.close()
    assert totals["preserve"] == pytest.approx(8.0)
    assert totals["at_most"] < 8.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": -1}, "budget"),
        ({"budget": 1.5}, "fraction"),
        ({"budget": True}, "budget"),
        ({"geometry": "round"}, "geometry"),
        ({"objective": "win"}, "objective"),
        ({"objective": "utility", "geometry": "update"}, "no meaning"),
        ({"trust": 2.0}, "utility"),
        ({"trust": -1.0, "objective": "utility"}, "trust"),
        ({"total": "all"}, "total"),
        ({"nothing_useful": "cry"}, "nothing_useful"),
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": float("nan")}, "ridge"),
        ({"warmup": -1}, "warmup"),
        ({"refresh": 0}, "refresh"),
        ({"target_batches": 0}, "target_batches"),
        ({"ema": 1.0}, "ema"),
        ({"cap": 0.5}, "cap"),
        ({"target": torch.zeros(3)}, "wrap a single batch"),
        ({"target": ftw.Target([1]), "refresh": 2}, "has its own"),
        ({"filter": Scalar(1.0)}, "filter"),
        ({"solver": All}, "solver"),
        ({"constraints": NonNegative}, "make an instance"),
        ({"constraints": "CappedCone"}, "make an instance"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = MLP()
    if isinstance(options.get("target"), ftw.Target):
        options = {**options, "loss_fn": None}
    with pytest.raises(ConfigurationError, match=message):
        selector_for(model, torch.optim.AdamW(model.parameters()), **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_targets_and_optimizers() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TargetError, match="no batch"):
        selector_for(model, optimizer, target=[])
    with pytest.raises(UnsupportedOptimizerError, match="Rprop"):
        selector_for(model, torch.optim.Rprop(model.parameters()))
    bad: list[tuple[Any, Any, str]] = [
        ([data()], None, "mapping"),
        ([{"x": data()}], None, "no loss"),
        ([data()], lambda m, x: m(x), "shape"),
        ([data()], lambda m, x: 1.0, "float"),
        ([data()], lambda m, x: loss_of(m, x).detach(), "without gradient"),
        (iter([]), loss_of, "no more batches"),
        ([data()], lambda m, x: torch.ones((), requires_grad=True) * 2, "does not depend"),
    ]
    for target, loss_fn, message in bad:
        selector = selector_for(model, optimizer, target=target, loss_fn=loss_fn)
        with selector.record():
            loss_of(model, data()).backward()
        with pytest.raises(TargetError, match=message):
            selector.apply()
        assert all(p.grad is None for p in model.parameters())
        selector.close()


@pytest.mark.parametrize("mass", [[1.0] * 7, [1.0] * 7 + [0.0], [1.0] * 7 + [float("nan")]])
def test_bad_mass(mass: list[float]) -> None:
    model = MLP()
    selector = selector_for(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ConfigurationError, match="mass"), selector.record(mass=mass):
        loss_of(model, data()).backward()
    with pytest.raises(RecordingError, match="nothing was recorded"):
        selector.apply()
    with selector.record(mass=[1.0] * 8):
        loss_of(model, data()).backward()
    with pytest.raises(ConfigurationError, match="for all or for none"), selector.record():
        loss_of(model, data()).backward()
    assert len(selector.apply().weights) == 8


def test_threshold_keeps_helpful_candidates_only() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer, filter=Threshold(), solver="uniform", budget=1.0)
    with selector.record():
        loss_of(model, data()).backward()
    selection = selector.apply()
    helpful = selection.diagnostics["alignment"] > 0
    assert torch.equal(selection.weights > 0, helpful)


def test_pool_smaller_than_the_budget_and_pool_of_one() -> None:
    model = MLP()
    selector = selector_for(
        model, torch.optim.SGD(model.parameters(), lr=0.01), budget=4, filter="topk", solver="uniform"
    )
    for rows in (2, 1):
        with selector.record():
            loss_of(model, data(rows)).backward()
        assert torch.equal(selector.select().weights, torch.ones(rows, dtype=torch.float64))


# -- what a review found -----------------------------------------------------------------------------------------------


class Spy(Filter):
    """Keeps the problems it saw."""

    needs_gram = True

    def __init__(self) -> None:
        self.seen: list[ftw.SelectionProblem] = []

    def __call__(self, problem: ftw.SelectionProblem) -> Tensor:
        self.seen.append(problem)
        return TopK()(problem)


def test_masses_of_a_failed_block_are_forgotten() -> None:
    model = MLP()
    selector = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with pytest.raises(RecordingError, match="no backward"), selector.record(mass=[1000.0, 1000.0, 1.0, 1.0]):
        loss_of(model, data(4))
    with selector.record(mass=[1.0] * 4):
        loss_of(model, data(4)).backward()
    assert torch.equal(selector.apply().diagnostics["mass"], torch.ones(4, dtype=torch.float64))


def test_quarantine_takes_the_candidates_own_mass_out() -> None:
    model = MLP()
    selector = selector_for(
        model, torch.optim.SGD(model.parameters(), lr=0.01), filter="all", solver="uniform", budget=1.0
    )
    x, mass = data(4), torch.tensor([7.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    x[0] = torch.nan
    with selector.record(mass=mass):
        ((model(x) - 1).square().mean(1) @ mass / mass.sum()).backward()
    selection = selector.apply()
    assert selection.diagnostics["quarantined"] == [0]
    torch.testing.assert_close(selection.diagnostics["mass"], torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64))
    assert selection.weights.tolist() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("geometry", ["curvature", "vanilla"])
def test_problem_of_the_utility_objective(geometry: str) -> None:
    """K and b as DESIGN, section 2: `(b - kappa C'o)'w - kappa/2 w'Kw`, curvature over trust; vanilla: no offset."""
    model, spy, trust = MLP(), Spy(), 4.0
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.3)
    target = data(5, 100)
    selector = selector_for(
        model, optimizer, target=[target], filter=spy, objective="utility", trust=trust, geometry=geometry, warmup=0
    )
    for step in range(3):
        x = data(8, step)
        C = dense(model, x)
        g = flat(torch.autograd.grad(loss_of(model, target), params))
        pool = dict(zip(params, torch.autograd.grad(loss_of(model, x), params), strict=True))
        update = AdamW().linearise(optimizer, pool)
        M = flat(update.scale[p].values for p in params)  # type: ignore[attr-defined]
        o, kappa = flat(update.offset[p] for p in params), update.gain[params[0]]
        if geometry == "vanilla":
            M, o, kappa = torch.full_like(M, 0.01), torch.zeros_like(o), 1.0
        with selector.record():
            loss_of(model, x).backward()
        selector.apply()
        K, b = kappa / trust * (C * M @ C.T), C @ (M * g) - kappa / trust * (C @ o)
        torch.testing.assert_close(spy.seen[-1].full_gram, K, rtol=1e-9, atol=1e-12 * float(K.abs().max()))
        torch.testing.assert_close(spy.seen[-1].alignment, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))
        optimizer.step()
        optimizer.zero_grad()


def test_weights_solve_the_ridged_problem_and_the_residual_is_theirs() -> None:
    model, spy = MLP(), Spy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    selector = selector_for(
        model, optimizer, filter=spy, constraints=Free(), solver="closed_form", ridge=0.5, total="at_most", budget=3
    )
    with selector.record():
        loss_of(model, data()).backward()
    selection = selector.select()
    problem = spy.seen[0]
    index = TopK()(problem)
    K, b = problem.gram_block(index), problem.alignment[index]
    w = torch.linalg.solve(K + 0.5 * K.trace() / 3 * torch.eye(3, dtype=torch.float64), b)
    torch.testing.assert_close(selection.weights[index], w * min(1.0, 8.0 / float(w.sum())))
    C = dense(model, data())
    g = flat(torch.autograd.grad(loss_of(model, data(5, 100)), list(model.parameters())))
    expected = (w @ C[index] - g).norm() / g.norm()
    assert selection.diagnostics["relative_residual"] == pytest.approx(float(expected), rel=1e-9)


def test_a_residual_joins_reference_and_offset() -> None:
    model = MLP()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.01)
    spy = Spy()
    selector = selector_for(model, optimizer, filter=spy, residual="keep", warmup=0)
    for step in range(3):
        x = data(8, step)
        whole = torch.autograd.grad(loss_of(model, x) + model.first.weight.square().sum(), params)
        update = AdamW().linearise(optimizer, dict(zip(params, whole, strict=True)))
        M = flat(update.scale[p].values for p in params)  # type: ignore[attr-defined]
        rest = flat(2 * p.detach() if p is model.first.weight else torch.zeros_like(p) for p in params)
        o = flat(update.offset[p] for p in params) + M * rest
        C = dense(model, x)
        g = flat(torch.autograd.grad(loss_of(model, data(5, 100 + step % 2)), params))
        with selector.record():
            (loss_of(model, x) + model.first.weight.square().sum()).backward()
        selection = selector.apply()
        K = C * M @ C.T
        torch.testing.assert_close(spy.seen[-1].full_gram, K, rtol=1e-9, atol=1e-12 * float(K.abs().max()))
        first = float(g @ (o + M * (selection.weights @ C)))
        assert selection.diagnostics["first_order"] == pytest.approx(first, rel=1e-9)
        torch.testing.assert_close(flat(p.grad for p in params), selection.weights @ C + rest, rtol=1e-9, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()


def test_a_failed_step_is_undone() -> None:
    class Broken(Uniform):
        fail = True

        def _solve(self, *args: Any) -> Any:
            if self.fail:
                raise RuntimeError("broken")
            return super()._solve(*args)

    solver, weights = Broken(), []
    for chosen in (solver, Uniform()):
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        selector = selector_for(model, optimizer, filter="random", solver=chosen, seed=3)
        with selector.record():
            loss_of(model, data()).backward()
        if chosen is solver:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="broken"):
                    selector.apply()
            solver.fail = False
        weights.append(selector.apply().weights)
    assert torch.equal(*weights)


def test_loss_scale_may_not_change_within_a_window() -> None:
    model = MLP(dtype=torch.float32)
    selector = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01), target=[data(5, 1, torch.float32)])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with selector.record(scaler=scaler):
        scaler.scale(loss_of(model, data(dtype=torch.float32))).backward()
    with pytest.raises(RecordingError, match="loss scale changed"), selector.record():
        loss_of(model, data(dtype=torch.float32)).backward()


def test_faulty_components_are_caught() -> None:
    class Repeats(Filter):
        def __call__(self, problem: ftw.SelectionProblem) -> Tensor:
            return torch.tensor([0, 0])

    class TooMany(Filter):
        def __call__(self, problem: ftw.SelectionProblem) -> Tensor:
            return torch.arange(problem.size)

    class Nothing(Uniform):
        def _solve(self, gram: Tensor, alignment: Tensor, constraints: Any) -> ftw.Solution:
            return ftw.Solution(alignment * torch.nan, ftw.Status.OPTIMAL, 0.0)

    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for options, error in (
        ({"filter": Repeats()}, FilterError),
        ({"filter": TooMany()}, FilterError),
        ({"solver": Nothing()}, SolverError),
    ):
        selector = selector_for(model, optimizer, **options)
        with selector.record():
            loss_of(model, data()).backward()
        with pytest.raises(error, match="author"):
            selector.apply()
        selector.close()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_learning_rate_of_zero_still_feeds_the_optimizer(kind: str) -> None:
    """The first step of a linear warm-up: the weights are those of any other rate."""
    found = []
    for lr in (0.0, 0.01):
        model = MLP()
        make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
        optimizer = make(model.parameters(), lr=lr)
        selector = selector_for(model, optimizer, warmup=0)
        with selector.record():
            loss_of(model, data()).backward()
        found.append(selector.apply())
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert found[0].predicted_drop == 0.0
    torch.testing.assert_close(found[0].weights, found[1].weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_learning_rate_of_zero_keeps_the_ratio_of_the_groups(kind: str) -> None:
    """Of the rates that the warm-up goes to, which the scheduler has noted."""
    found = []
    for factor in (0.0, 0.5):
        model = MLP()
        make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
        rest = [p for name, p in model.named_parameters() if not name.startswith("first")]
        groups = [{"params": model.first.parameters(), "lr": 1e-6}, {"params": rest}]
        optimizer = make(groups, lr=0.01)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)  # type: ignore[misc]
        selector = selector_for(model, optimizer, warmup=0)
        with selector.record():
            loss_of(model, data()).backward()
        found.append(selector.apply())
    assert found[0].predicted_drop == 0.0
    torch.testing.assert_close(found[0].weights, found[1].weights, rtol=1e-6, atol=1e-9)


def test_parameter_groups_may_differ_and_change() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(
        [{"params": model.first.parameters(), "lr": 0.0}, {"params": model.norm.parameters()}], lr=0.1
    )
    selector = selector_for(model, optimizer)
    with selector.record():
        loss_of(model, data()).backward()
    selector.apply()
    assert model.last.weight.grad is not None  # the optimizer does not hold it: plain autograd, untouched
    assert model.first.weight.grad is not None
    model.zero_grad()
    optimizer.add_param_group({"params": list(model.last.parameters()), "lr": 0.2})
    with selector.record():
        loss_of(model, data()).backward()
    selection = selector.apply()
    C, place = dense(model, data()), 0
    for p in model.parameters():
        part = (selection.weights @ C[:, place : place + p.numel()]).view_as(p)
        place += p.numel()
        if p not in set(model.root.parameters()):
            torch.testing.assert_close(p.grad, part, rtol=1e-10, atol=1e-13)
    model.zero_grad()
    with selector.record():
        loss_of(model, data()).backward()
    del optimizer.param_groups[-1]
    with pytest.raises(RecordingError, match="lost parameters"):
        selector.apply()


def test_the_targets_schedule_does_not_depend_on_which_layers_ran() -> None:
    class Branching(MLP):
        short = False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(hidden if self.short else self.root(torch.tanh(self.norm(hidden))))  # type: ignore[no-any-return]

    model, counted = Branching(), []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        counted.append(1)
        return loss_of(model, x)

    selector = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01), loss_fn=loss, refresh=4)
    for step in range(8):
        model.short = bool(step % 2)
        with selector.record():
            loss_of(model, data(8, step)).backward()
        selector.apply()
        model.zero_grad()
    assert len(counted) == 2


def test_apply_inside_record_is_refused() -> None:
    model = MLP()
    selector = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with pytest.raises(RecordingError, match="inside record"), selector.record():
        loss_of(model, data()).backward()
        selector.apply()


def test_overflow_has_the_usual_diagnostics() -> None:
    model = MLP(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer, target=[data(5, 1, torch.float32)], residual="keep")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with selector.record(scaler=scaler):
        scaler.scale(loss_of(model, data(dtype=torch.float32))).backward()
    usual = selector.apply().diagnostics.keys()
    model.zero_grad()
    for x, extra in ((data(dtype=torch.float32) * torch.inf, 0.0), (data(dtype=torch.float32), torch.inf)):
        with selector.record(scaler=scaler):
            scaler.scale(loss_of(model, x) + extra * model.first.weight.sum()).backward()
        selection = selector.apply()
        assert selection.status == "overflow"
        assert usual - selection.diagnostics.keys() <= {"step"}
        assert not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        model.zero_grad()


def test_loading_a_broken_state_changes_nothing() -> None:
    model = MLP()
    selector = selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01))
    before = selector.state_dict()
    with pytest.raises(RuntimeError):
        selector.load_state_dict({**before, "step": 77, "generator": torch.zeros(3, dtype=torch.uint8)})
    assert str(selector.state_dict()) == str(before)


def test_cap_goes_with_the_default_constraints() -> None:
    model = MLP()
    with pytest.raises(ConfigurationError, match="cap=2"):
        selector_for(model, torch.optim.SGD(model.parameters(), lr=0.01), cap=2.0, constraints=NonNegative())


def test_target_under_the_forwards_autocast() -> None:
    model = MLP(dtype=torch.float32)
    model.first.to(torch.bfloat16)
    model.last.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer, target=[data(5, 1, torch.float32)])
    for step in range(3):
        with selector.record():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, data(8, step, torch.float32))
            loss.backward()
        assert selector.apply().status == "optimal"
        optimizer.step()
        optimizer.zero_grad()
