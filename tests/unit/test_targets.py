"""Several targets: the mean stands for them all, each one's drop is foreseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import ConfigurationError, NonFiniteError
from ftw.target import Target
from ftw.targets import Targets
from tests.models import MLP


def data(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


def other_loss(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) + 0.5).square().mean()
    return result


def two() -> dict[str, Any]:
    return {"up": Target([data(5, 100), data(4, 101)], loss_of), "down": Target([data(6, 102)], other_loss)}


def run(steps: int, selector: ftw.Selector, model: nn.Module, optimizer: Any, first: int = 0) -> list[ftw.Selection]:
    made = []
    for step in range(first, first + steps):
        with selector.record():
            loss_of(model, data(8, step)).backward()
        made.append(selector.apply())
        optimizer.step()
        optimizer.zero_grad()
    return made


@pytest.mark.parametrize("geometry", ["curvature", "update", "vanilla"])
@pytest.mark.parametrize("gradients", ["full", "factorized", "projection"])
def test_predicted_drops_are_those_of_each_target_alone(geometry: str, gradients: str) -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"geometry": geometry, "gradients": gradients, "warmup": 0}
    selector = ftw.Selector(model, optimizer, target=two(), target_weights={"up": 3.0, "down": 1.0}, **options)
    for step in range(3):
        with selector.record():
            loss_of(model, data(8, step)).backward()
        several = selector.select()
        drops = several.diagnostics["predicted_drops"]
        mean = 0.75 * drops["up"] + 0.25 * drops["down"]
        assert several.predicted_drop == pytest.approx(mean, rel=1e-9)
        contributions = selector._recorder.contributions()
        reference = contributions.combine()
        update = selector.preconditioner.linearise(optimizer, reference)
        moved = update.displacement(contributions.combine(several.weights))
        curvature = several.diagnostics["curvature"]
        for name, loss in (("up", loss_of), ("down", other_loss)):
            batch = data(6, 102) if name == "down" else data(5, 100) if step % 2 == 0 else data(4, 101)
            g = torch.autograd.grad(loss(model, batch), list(model.parameters()))
            first = -sum(float((each * moved[p]).sum()) for each, p in zip(g, model.parameters(), strict=True))
            assert drops[name] == pytest.approx(first - curvature, rel=1e-8, abs=1e-12)
        selector.apply()
        optimizer.step()
        optimizer.zero_grad()


def test_one_named_target_is_that_target() -> None:
    weights = []
    for target in ([data(5, 100)], {"only": [data(5, 100)]}):
        model = MLP()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = ftw.Selector(model, optimizer, target=target, loss_fn=loss_of)
        weights.append([selection.weights for selection in run(4, selector, model, optimizer)])
    for first, second in zip(*weights, strict=True):
        assert torch.equal(first, second)


def test_stop_and_resume_and_watch() -> None:
    def make() -> tuple[nn.Module, Any, ftw.Selector]:
        model = MLP()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, ftw.Selector(model, optimizer, target=two(), watch=1)

    through, optimizer, selector = make()
    run(6, selector, through, optimizer)
    assert selector.fidelity is not None
    model, optimizer, selector = make()
    run(3, selector, model, optimizer)
    other, other_optimizer, resumed = make()
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(selector.state_dict())
    run(3, resumed, other, other_optimizer, first=3)
    for p, q in zip(through.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_does_not_fit() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    plain: dict[str, Any] = {"target": [data(3, 1)], "loss_fn": loss_of}
    with pytest.raises(ConfigurationError, match="given with a single target"):
        ftw.Selector(model, optimizer, **plain, target_weights={"a": 1.0})
    with pytest.raises(ConfigurationError, match="one positive number for each"):
        ftw.Selector(model, optimizer, target=two(), target_weights={"up": 1.0})
    with pytest.raises(ConfigurationError, match="one positive number for each"):
        ftw.Selector(model, optimizer, target=two(), target_weights={"up": 1.0, "down": 0.0})
    for other in ({"granularity": "token"}, {"memory_cap": 10**6}):
        with pytest.raises(ConfigurationError, match="several targets were given together with"):
            ftw.Selector(model, optimizer, target=two(), **other)
    with pytest.raises(ConfigurationError, match="empty mapping"):
        Targets({})
    bad = {"fine": [data(3, 1)], "broken": [torch.full((3, 6), torch.nan, dtype=torch.float64)]}
    selector = ftw.Selector(model, optimizer, target=bad, loss_fn=loss_of)
    with selector.record():
        loss_of(model, data(8, 1)).backward()
    with pytest.raises(NonFiniteError, match="target 'broken'"):
        selector.apply()
    state = selector.target.state_dict()
    assert state["fine"]["position"] == 0
    with pytest.raises(ConfigurationError, match="the state is that of targets"):
        Targets({"else": [data(3, 1)]}).load_state_dict(state)


@pytest.mark.parametrize("solver", ["pgd", "qp"])
def test_worst_case_and_no_harm(solver: str) -> None:
    """The worst served gains most under "worst", nobody loses under "no_harm", and under the mean somebody does."""
    if solver == "qp":
        pytest.importorskip("cvxpy")

    def higher(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = -model(x).mean()
        return result

    def lower(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = model(x).mean()
        return result

    found: dict[str, Tensor] = {}
    problems: dict[str, Any] = {}
    for how in ("mean", "worst", "no_harm"):
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        selector = ftw.Selector(
            model,
            optimizer,
            target={"up": Target([data(5, 100)], higher), "down": Target([data(6, 102)], lower)},
            targets=how,
            filter="all",
            solver=solver,
            ridge=0.0,
            target_weights={"up": 5.0, "down": 1.0},
        )
        with selector.record():
            output = model(data(8, 0)).mean(1)  # half of the pool pulls up, half pulls down
            ((output[4:].sum() - output[:4].sum()) / 8).backward()
        selector.select()
        step = selector._coming_step()
        numbers = step.measure(selector._recorder.contributions())
        problems[how] = numbers.chosen
        w = selector.apply().weights
        found[how] = w / w.sum()
    B, K = problems["mean"].alignments, problems["mean"].gram
    gains = {how: w @ B for how, w in found.items()}
    assert float(gains["mean"].min()) < 0 < float(gains["mean"].max())  # the targets do conflict
    assert float(gains["no_harm"].min()) >= -1e-6 * float(B.abs().max())

    def utility(w: Tensor) -> float:
        """The best over all scalings of w."""
        return float((w @ B).min().clamp_min(0) ** 2 / (2 * w @ K @ w))

    generator = torch.Generator().manual_seed(0)
    best = utility(found["worst"])
    for _ in range(300):
        w = torch.rand(8, dtype=torch.float64, generator=generator) * torch.randint(0, 2, (8,), generator=generator)
        if float(w.sum()) and float(w.max()) <= 4 * float(w.mean()):
            assert utility(w) <= best + 1e-5 * abs(best) + 1e-12


def test_several_targets_need_a_solver_that_minimises() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ConfigurationError, match="whose weights follow a rule of their own"):
        ftw.Selector(model, optimizer, target=two(), targets="worst", solver="uniform")
    with pytest.raises(ConfigurationError, match="targets is 'best'"):
        ftw.Selector(model, optimizer, target=two(), targets="best")
    with pytest.raises(ConfigurationError, match="given with a single target"):
        ftw.Selector(model, optimizer, target=[data(3, 1)], loss_fn=loss_of, targets="worst")


def test_quotas_bound_the_share_of_a_source() -> None:
    shares = {}
    sources = ["a", "b"] * 4
    for name, quota in (("free", None), ("quota", ftw.WeightQuota(at_most={"a": 0.3}))):
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        selector = ftw.Selector(model, optimizer, target=[data(5, 1)], loss_fn=loss_of, filter="all", constraints=quota)
        mass = torch.arange(1.0, 9.0)
        x = data(8, 0)
        with selector.record(mass=mass, extras={"source": sources}):
            ((model(x) - 1.0).square().mean(1) @ mass.double() / mass.sum()).backward()
        selection = selector.apply()
        given = selection.weights * selection.diagnostics["mass"]
        shares[name] = float(given[::2].sum() / given.sum())
    assert shares["free"] > 0.35
    assert shares["quota"] == pytest.approx(0.3, abs=1e-6)
    with pytest.raises(ConfigurationError, match="share of the total"):
        ftw.WeightQuota(at_most={"a": 1.5})


# -- columns -----------------------------------------------------------------------------------------------------------


def test_columns_of_all_blocks_reach_the_filter() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = ftw.Selector(model, optimizer, target=[data(3, 1)], loss_fn=loss_of, budget=2, preset="max_loss")
    for seed, column in ((0, torch.tensor([0.0, 3.0, 1.0])), (1, [5.0, 2.0])):
        with selector.record(extras={"loss": column}):
            loss_of(model, data(len(column), seed)).backward()
    assert selector.apply().indices.tolist() == [1, 3]


@pytest.mark.parametrize("reference", ["pool", "previous"])
def test_columns_reach_the_filter_beyond_a_memory_cap(reference: str) -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cap = None if reference == "pool" else 2000
    selector = ftw.Selector(
        model,
        optimizer,
        target=[data(3, 1)],
        loss_fn=loss_of,
        budget=2,
        preset="max_loss",
        reference=reference,
        memory_cap=cap,
    )
    with selector.record(extras={"loss": torch.arange(8.0)}):
        loss_of(model, data(8, 0)).backward()
    selection = selector.apply()
    assert selection.indices.tolist() == [6, 7]
    assert ("replayed" in selection.diagnostics) == (cap is not None)


def test_columns_that_do_not_fit() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = ftw.Selector(model, optimizer, target=[data(3, 1)], loss_fn=loss_of, preset="max_loss")
    with pytest.raises(ConfigurationError, match="for 4 recorded candidates"), selector.record(extras={"loss": [1.0]}):
        loss_of(model, data(4, 0)).backward()
    with selector.record(extras={"loss": torch.ones(4)}):
        loss_of(model, data(4, 0)).backward()
    for no_column in (1.0, torch.tensor(1.0), {0.1, 0.2, 0.3, 0.4}, dict.fromkeys(range(4), 1.0)):
        block = selector.record(extras={"loss": no_column})
        with pytest.raises(ConfigurationError, match=r"extras\['loss'\] is .*which is no column"), block:
            loss_of(model, data(4, 0)).backward()
    more = {"loss": torch.ones(4), "source": ["a"] * 4}
    with pytest.raises(ConfigurationError, match="in an earlier block"), selector.record(extras=more):
        loss_of(model, data(4, 0)).backward()
    assert len(selector.apply().weights) == 4
    optimizer.zero_grad()
    with pytest.raises(ConfigurationError, match="loss"), selector.record():
        raise AssertionError("the block must not be entered")
