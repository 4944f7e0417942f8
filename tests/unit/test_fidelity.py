"""What a step was predicted to do against what it did; trust that follows from it; weights decided twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ftw
from ftw.assembly import measure
from ftw.errors import ConfigurationError, TargetError
from ftw.fidelity import Fidelity, TrustRegion
from ftw.target import Target
from tests.models import MLP

TARGET = 100


def data(rows: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


class Run:
    """A model, an optimizer and a selector; `step` makes one step."""

    def __init__(self, kind: str = "adamw", lr: float = 0.01, **options: Any) -> None:
        self.model = MLP()
        makers: dict[str, Any] = {
            "adamw": lambda ps: torch.optim.AdamW(ps, lr=lr, weight_decay=0.1),
            "sgd": lambda ps: torch.optim.SGD(ps, lr=lr, momentum=0.9, weight_decay=0.1),
        }
        self.optimizer = makers[kind](self.model.parameters())
        defaults: dict[str, Any] = {"target": [data(5, TARGET), data(7, TARGET + 1)], "loss_fn": loss_of, "warmup": 2}
        self.selector = ftw.Selector(self.model, self.optimizer, **{**defaults, **options})
        self.now = 0

    def record(self) -> None:
        with self.selector.record():
            loss_of(self.model, data(8, self.now)).backward()

    def step(self, clip: float = math.inf) -> ftw.Selection:
        self.record()
        selection = self.selector.apply()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.now += 1
        return selection


@pytest.mark.parametrize("clip", [math.inf, 0.05])
@pytest.mark.parametrize("reference", ["pool", "target", "previous"])
def test_sgd_does_exactly_what_was_predicted(clip: float, reference: str) -> None:
    run = Run("sgd", watch=1, reference=reference)
    for step in range(4):
        batch = data(5, TARGET) if step % 2 == 0 else data(7, TARGET + 1)
        run.record()
        selection = run.selector.apply()
        norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), clip))
        with torch.no_grad():
            before = float(loss_of(run.model, batch))
            run.optimizer.step()
            after = float(loss_of(run.model, batch))
        run.optimizer.zero_grad()
        run.now += 1
        found = run.selector.fidelity
        assert found is not None
        assert found.step == step + 1
        assert found.displacement_error < 1e-12
        assert found.cosine == pytest.approx(1.0, abs=1e-12)
        assert found.realised_drop == pytest.approx(before - after, rel=1e-12)
        assert found.applied == pytest.approx(min(1.0, clip / norm), rel=1e-5)  # torch clips with an epsilon
        if clip == math.inf:
            assert found.predicted_drop == pytest.approx(selection.predicted_drop, rel=1e-10)


def test_the_prediction_is_that_of_the_clipped_gradient() -> None:
    """First order and curvature of the displacement that was really made, from scratch."""
    run = Run("sgd", watch=1, filter="all", solver="uniform", budget=1.0)
    for _ in range(3):
        batch = data(5, TARGET) if run.now % 2 == 0 else data(7, TARGET + 1)
        loss_of(run.model, batch).backward()
        g = {p: p.grad.clone() for p in run.model.parameters() if p.grad is not None}
        run.optimizer.zero_grad()
        old = {p: p.detach().clone() for p in g}
        gain = 1.0  # of SGD without dampening
        run.step(clip=0.05)
        d = {p: p.detach() - old[p] for p in g}
        first = -sum(float((g[p] * d[p]).sum()) for p in g)
        curvature = sum(gain * float(d[p].square().sum()) / 0.01 / 2 for p in g)
        found = run.selector.fidelity
        assert found is not None
        assert found.first_order == pytest.approx(first, rel=1e-6)
        assert found.predicted_drop == pytest.approx(first - curvature, rel=1e-6)


def test_adamw_with_all_weights_one_is_predicted_exactly() -> None:
    run = Run(watch=1, filter="all", solver="uniform", budget=1.0)
    for _ in range(4):
        run.step()
        found = run.selector.fidelity
        assert found is not None
        assert found.displacement_error < 1e-11


def test_an_optimizer_that_maximises_raises_the_target() -> None:
    minimised, maximised = Run("sgd", watch=1), Run("sgd", watch=1)
    maximised.optimizer.param_groups[0]["maximize"] = True
    maximised.selector.target.loss_fn = lambda model, x: -loss_of(model, x)
    for _ in range(3):
        first = minimised.step()
        with maximised.selector.record():
            (-loss_of(maximised.model, data(8, maximised.now))).backward()
        second = maximised.selector.apply()
        maximised.optimizer.step()
        maximised.optimizer.zero_grad()
        maximised.now += 1
        torch.testing.assert_close(first.weights, second.weights, rtol=1e-9, atol=1e-12)
        assert second.predicted_drop == pytest.approx(first.predicted_drop, rel=1e-9)
        one, other = minimised.selector.fidelity, maximised.selector.fidelity
        assert one is not None
        assert other is not None
        assert other.realised_drop == pytest.approx(one.realised_drop, rel=1e-9)
        assert other.displacement_error < 1e-11


def test_every_other_step_is_watched_and_nothing_stays_behind() -> None:
    run = Run(watch=2)
    seen = []
    for _ in range(6):
        run.step()
        seen.append(None if run.selector.fidelity is None else run.selector.fidelity.step)
    assert seen == [None, 2, 2, 4, 4, 6]
    run.selector.close()
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks


def test_watching_changes_nothing() -> None:
    plain, watched = Run(), Run(watch=1)
    for _ in range(5):
        first, second = plain.step(), watched.step()
        assert torch.equal(first.weights, second.weights)
    for p, q in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert watched.model.training


def test_a_step_that_a_scaler_skips_is_not_measured() -> None:
    run = Run("sgd", watch=1)
    run.step()
    before = run.selector.fidelity
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for bad in (True, False):
        x = data(8, 50)
        with run.selector.record(scaler=scaler):
            loss = loss_of(run.model, x * (math.inf if bad else 1.0))
            scaler.scale(loss).backward()
        run.selector.apply()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        found = run.selector.fidelity
        assert found is not None
        if bad:
            assert found is before
        else:
            assert found is not before
            assert found.displacement_error < 1e-11
            assert found.applied == pytest.approx(1.0)


def test_uncovered_steps_and_forgotten_ones() -> None:
    """A step of the optimizer that no apply() announced, and one whose state was loaded in between."""
    run = Run(watch=1)
    run.step()
    before = run.selector.fidelity
    loss_of(run.model, data()).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    assert run.selector.fidelity is before
    state = run.selector.state_dict()
    run.record()
    run.selector.apply()
    run.selector.load_state_dict(state)
    run.optimizer.step()
    assert run.selector.fidelity is before


@pytest.mark.parametrize("where", ["inside", "inside, by name", "outside"])
def test_a_step_with_a_closure_is_measured_after_it_has_run(where: str) -> None:
    """Within the closure the selection may be made and clipped; outside of it, the closure just looks at the loss."""
    plain, closed = (Run("sgd", watch=1, objective="utility", trust="adaptive") for _ in range(2))
    for _ in range(3):
        plain.step(clip=0.05)

        def closure() -> float:
            closed.record()
            closed.selector.apply()
            nn.utils.clip_grad_norm_(closed.model.parameters(), 0.05)
            return 1.0

        if where == "outside":
            closure()
            result = closed.optimizer.step(lambda: 1.0)
        elif where == "inside":
            result = closed.optimizer.step(closure)
        else:
            result = closed.optimizer.step(closure=closure)
        closed.optimizer.zero_grad()
        closed.now += 1
        assert result == 1.0
        assert closed.selector.fidelity == plain.selector.fidelity
    assert closed.selector.policy.trust == plain.selector.policy.trust != 1.0
    for p, q in zip(plain.model.parameters(), closed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_runs_its_closure_twice_is_not_measured() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    model = MLP()
    optimizer = Twice(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"target": [data(5, TARGET)], "loss_fn": loss_of, "preconditioner": "sgd", "watch": 1}
    selector = ftw.Selector(model, optimizer, **options)

    def closure() -> float:
        optimizer.zero_grad()
        with selector.record():
            loss_of(model, data()).backward()
        selector.apply()
        return 1.0

    optimizer.step(closure)
    assert selector.fidelity is None


@pytest.mark.parametrize("several", [False, True])
def test_of_a_step_at_a_rate_of_zero_nothing_is_predicted_and_nothing_learned(several: bool) -> None:
    target: Any = {"one": [data(5, 1)], "other": [data(5, 2)]} if several else [data(5, 1)]
    run = Run(objective="utility", trust="adaptive", watch=1, target=target)
    run.step()
    trust = run.selector.policy.trust
    run.optimizer.param_groups[0]["lr"] = 0.0
    selection, found = run.step(), run.selector.fidelity
    assert found is not None
    assert (found.step, found.predicted_drop, found.first_order, found.realised_drop) == (2, 0.0, 0.0, 0.0)
    assert selection.diagnostics["curvature_parts"] == (0.0, 0.0, 0.0)
    assert selection.diagnostics.get("predicted_drops", {}) == ({"one": 0.0, "other": 0.0} if several else {})
    assert run.selector.policy.trust == trust


# -- trust -------------------------------------------------------------------------------------------------------------


def fidelity(predicted: float, realised: float) -> Fidelity:
    return Fidelity(1, predicted, predicted, realised, 1.0, math.nan, math.nan)


@given(
    trust=st.floats(1e-3, 1e3),
    predicted=st.floats(-1e3, 1e3, allow_subnormal=False),
    realised=st.floats(-1e3, 1e3, allow_subnormal=False),
)
def test_the_rule(trust: float, predicted: float, realised: float) -> None:
    rule = TrustRegion()
    after = rule.next(trust, fidelity(predicted, realised))
    assert rule.smallest <= after <= rule.largest
    if predicted > 0:
        ratio = realised / predicted
        assert (after < trust or trust == rule.smallest) if ratio < 0.24 else True
        assert (after > trust or trust == rule.largest) if ratio > 0.76 else True
        assert after == trust if 0.26 < ratio < 0.74 else True
    # A better step never leads to less trust.
    assert rule.next(trust, fidelity(predicted, realised + 1.0)) >= after
    assert rule.next(trust, fidelity(math.nan, realised)) == trust


def test_ratio() -> None:
    assert fidelity(2.0, 1.0).ratio == 0.5
    assert math.isnan(fidelity(0.0, 1.0).ratio)


def test_trust_follows_the_ratio() -> None:
    run = Run("sgd", objective="utility", trust="adaptive")
    rule = TrustRegion()
    trust = 1.0
    assert run.selector.policy.trust == 1.0
    changed = False
    for _ in range(8):
        run.step()
        found = run.selector.fidelity
        assert found is not None
        assert math.isnan(found.cosine)  # nobody asked for copies of the parameters
        trust = rule.next(trust, found)
        assert run.selector.policy.trust == trust
        changed |= trust != 1.0
    assert changed


def test_trust_divides_the_curvature_of_the_prediction() -> None:
    run = Run("sgd", objective="utility", trust=TrustRegion(initial=4.0, low=1e-9, high=1e9))
    selection = run.step()
    found = run.selector.fidelity
    assert found is not None
    expected = selection.diagnostics["first_order"] - selection.diagnostics["curvature"] / 4.0
    assert found.predicted_drop == pytest.approx(expected, rel=1e-12)


class Once:
    """An iterable that can only be walked, anew each time."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([data(5, TARGET), data(7, TARGET + 1), data(3, TARGET + 2)])


@pytest.mark.parametrize("batches", [1, 2, "all"])
@pytest.mark.parametrize("walked", [False, True])
def test_stop_and_resume_with_adaptive_trust_and_a_cached_gradient(batches: Any, walked: bool) -> None:
    target: Any = Once() if walked else list(Once())
    options: dict[str, Any] = {"objective": "utility", "trust": "adaptive", "target": target, "refresh": 3}
    options["target_batches"] = batches
    through = Run(**options)
    for _ in range(9):
        through.step()
    first = Run(**options)
    for _ in range(4):
        first.step()
    second = Run(**options)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.selector.load_state_dict(first.selector.state_dict())
    second.now = first.now
    for _ in range(5):
        second.step()
    assert second.selector.policy.trust == through.selector.policy.trust
    for p, q in zip(through.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_targets_loss_is_that_of_the_batches_of_its_gradient() -> None:
    model = MLP()
    target = Target([data(5, 1), data(7, 2), data(3, 3)], loss_of, refresh=2, batches_per_refresh=2)
    with pytest.raises(TargetError, match="before there was a target gradient"):
        target.loss(model)
    parameters = dict(model.named_parameters())
    for step in range(4):
        target.gradient(model, parameters)
        pair = [(5, 1), (7, 2)] if step < 2 else [(3, 3), (5, 1)]
        with torch.no_grad():
            expected = sum(n * float(loss_of(model, data(n, seed))) for n, seed in pair) / sum(n for n, _ in pair)
        assert target.loss(model) == pytest.approx(expected, rel=1e-12)


# -- deciding again ----------------------------------------------------------------------------------------------------


def test_relinearising_decides_with_the_gradient_of_the_first_weights() -> None:
    run, again = Run(warmup=0), Run(warmup=0, relinearise=True)
    for step in range(3):
        for each in (run, again):
            each.record()
        first = run.selector.select()
        contributions = run.selector._recorder.contributions()
        used, pool = contributions.combine(first.weights), contributions.combine()
        used = {p: torch.where(used[p] == 0, pool[p], used[p]) for p in used}
        parts = run.selector.preconditioner, run.selector._target(), {}
        measured = measure(contributions, run.optimizer, *parts, "curvature", "pool", used)
        expected = run.selector.policy.decide(
            measured, "curvature", torch.ones(8, dtype=torch.float64), torch.Generator()
        )
        found = again.selector.apply()
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-12)
        assert found.predicted_drop == pytest.approx(expected.predicted_drop, rel=1e-9)
        assert again.selector._step == step + 1
        run.selector.discard()
        run.model.load_state_dict(again.model.state_dict())
        for each in (run, again):  # both steps alike
            for p, q in zip(each.model.parameters(), again.model.parameters(), strict=True):
                p.grad = q.grad if each is again or q.grad is None else q.grad.clone()
        for each in (run, again):
            each.optimizer.step()
            each.optimizer.zero_grad()
            each.now += 1


def test_relinearising_uses_one_target_gradient_a_step() -> None:
    run = Run(warmup=0, relinearise=True, watch=1)
    for _ in range(3):
        run.step()
    assert run.selector.target.state_dict()["position"] == 3


@pytest.mark.parametrize("filter", ["random", "greedy"])
def test_relinearising_is_reproducible(filter: str) -> None:
    runs = [Run(warmup=0, relinearise=True, filter=filter, seed=3) for _ in range(2)]
    for _ in range(3):
        assert torch.equal(runs[0].step().weights, runs[1].step().weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust": "often"}, "trust is 'often'"),
        ({"trust": "adaptive"}, "objective='utility' only"),
        ({"trust": TrustRegion()}, "objective='utility' only"),
        *(({"trust": bad, "objective": "utility"}, f"trust is {bad}") for bad in (0.0, math.inf, math.nan, None, True)),
        ({"seed": "a"}, "seed is 'a'; an integer"),
        ({"watch": -1}, "watch is -1"),
        ({"watch": 1.5}, "watch is 1.5; an integer"),
        ({"warmup": 2.5}, "warmup is 2.5; an integer"),
        ({"relinearise": True, "granularity": "token"}, "relinearise=True was given together with granularity"),
        ({"relinearise": True, "memory_cap": 100}, "relinearise=True was given together with memory_cap"),
        ({"curvature": "kfac", "memory_cap": 100}, "curvature='kfac' was given together with memory_cap"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Run(**options)


def test_a_senseless_trust_region_is_refused() -> None:
    for bad in ({"shrink": 1.5}, {"low": 0.9}, {"initial": 0.0}, {"grow": 1.0}, {"smallest": 2.0}):
        with pytest.raises(ConfigurationError, match="makes no sense"):
            replace(TrustRegion(), **bad)
