"""Faults: bad numbers, candidates without a loss, duplicates, steps that break off.

Each is contained, named, and leaves neither hooks nor memory nor changed state behind. `tests/unit` has the recorder's
own share: order of calls, modes and random state restored, masses of a failed block.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import ConfigurationError, FtwError, NonFiniteError, RecordingError
from tests.models import MLP, batch_of, label_tokens, tiny_llama, token_mean


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """What was imported before need not be walked by each `gc.collect()`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


EXTRACTORS = ["auto", "full", "factorized"]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def data(rows: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


def selector_for(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> ftw.Selector:
    defaults: dict[str, Any] = {"target": [data(5, 100), data(5, 101)], "loss_fn": loss_of, "warmup": 1, "budget": 3}
    return ftw.Selector(model, optimizer, **{**defaults, **options})


def one_step(selector: ftw.Selector, model: nn.Module, x: Tensor, **options: Any) -> ftw.Selection:
    with selector.record(**options):
        loss_of(model, x).backward()
    return selector.apply()


class Branching(nn.Module):
    """Two heads, one for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, 2, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        result: Tensor = self.heads[head](x)
        return result


def test_what_only_a_failed_block_reached_gets_no_gradient() -> None:
    """A gradient of zero would have momentum and decay move it."""
    model = Branching()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = selector_for(model, optimizer)
    one_step(selector, model, data())
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="broke off"), selector.record():
        (model(data(), head=1) - 1.0).square().mean().backward()
        raise RuntimeError("broke off")
    selection = one_step(selector, model, data(seed=1))
    assert selection.diagnostics["geometry"] == "curvature"
    assert model.heads[0].weight.grad is not None
    assert model.heads[1].weight.grad is None


def held(selector: ftw.Selector) -> list[weakref.ref[Tensor]]:
    """The tensors that the window keeps for the candidates."""
    pieces = [piece for kept in selector._recorder.window.pieces.values() for piece in kept]
    return [weakref.ref(t) for piece in pieces for t in vars(piece).values() if isinstance(t, Tensor)]


def assert_released(*groups: list[weakref.ref[Tensor]]) -> None:
    gc.collect()
    assert sum(len(group) for group in groups) > 0
    assert not any(ref() is not None for group in groups for ref in group)


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# -- bad numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_with_a_faulty_candidate_goes_on_as_if_it_had_not_been_there(
    kind: str, bad: float, extractor: str
) -> None:
    results = []
    for faulty in (False, True):
        model = MLP()
        optimizer = OPTIMIZERS[kind](model.parameters())
        selector = selector_for(model, optimizer, gradients=extractor)
        for step in range(4):
            x = data(6, step)
            if faulty and step in (0, 2):  # also in the audited step
                x = torch.cat([x[:2], x[:1], x[2:]])
                x[2, 1, 4] = bad
            with selector.record():
                ((model(x) - 1).square().mean((1, 2)).sum() / 6).backward()
            selection = selector.apply()
            assert selection.diagnostics["quarantined"] == ([2] if len(x) == 7 else [])
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("way", ["packed", "micro-batches"])
def test_a_faulty_candidate_spares_its_neighbours_in_row_and_window(way: str, extractor: str) -> None:
    model = MLP()
    selector = selector_for(
        model, OPTIMIZERS["sgd"](model.parameters()), gradients=extractor, filter="all", solver="uniform", budget=1.0
    )
    x = data(4)
    x[1, 2] = float("nan")
    owner = torch.tensor([[0, 0, 1], [1, 1, 2], [3, 3, 3], [4, 4, 4]])
    params = list(model.parameters())
    if way == "packed":
        with selector.record(candidates=owner):
            model(x).square().sum().backward()
        expected = torch.zeros((), dtype=torch.float64)
        finite = (owner != 2)[..., None].expand(4, 3, 6)
        expected = (model(x[finite].view(-1, 6))).square().sum()
        bad, n = [2], 5
    else:
        for part in (x[:2], x[2:]):
            with selector.record():
                model(part).square().sum().backward()
        expected = model(x[[0, 2, 3]]).square().sum()
        bad, n = [1], 4
    selection = selector.apply()
    assert selection.diagnostics["quarantined"] == bad
    assert selection.weights.tolist() == [0.0 if i in bad else 1.0 for i in range(n)]
    for p, value in zip(params, torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(p.grad, value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("where", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_faulty_optimizer_state_raises_and_changes_nothing(bad: float, where: str) -> None:
    model = MLP()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    selector = selector_for(model, optimizer)
    one_step(selector, model, data())
    optimizer.step()
    optimizer.zero_grad()
    healthy = copy.deepcopy(optimizer.state_dict())
    optimizer.state[model.last.weight][where][1, 2] = bad
    before, state = snapshot(model), str(selector.state_dict())
    with selector.record():
        loss_of(model, data(6, 1)).backward()
    refs = held(selector)
    with pytest.raises(FtwError, match="optimizer") as caught:
        selector.apply()
    assert isinstance(caught.value, NonFiniteError)
    del caught
    assert_untouched(model, before)
    selector.discard()
    assert str(selector.state_dict()) == state
    assert_released(refs)
    optimizer.load_state_dict(healthy)
    assert one_step(selector, model, data(6, 1)).status == "optimal"


def test_a_faulty_momentum_of_sgd_raises_and_changes_nothing() -> None:
    model = MLP()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    selector = selector_for(model, optimizer)
    one_step(selector, model, data())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[model.first.weight]["momentum_buffer"][0, 0] = float("nan")
    before, state = snapshot(model), str(selector.state_dict())
    with selector.record():
        loss_of(model, data(6, 1)).backward()
    with pytest.raises(NonFiniteError, match="optimizer"):
        selector.apply()
    assert_untouched(model, before)
    selector.discard()
    assert str(selector.state_dict()) == state


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_faulty_target_is_asked_again_after_it_was_mended(bad: float, extractor: str) -> None:
    """The batch that failed is not skipped: the retried step is the one that a healthy target would have given."""
    steps = []
    for faulty in (False, True):
        model = MLP()
        target = [data(5, 100), data(5, 101)]
        healthy = target[0].clone()
        selector = selector_for(model, OPTIMIZERS["adamw"](model.parameters()), target=target, gradients=extractor)
        if faulty:
            target[0][3] = bad
            state = str(selector.state_dict())
            with selector.record():
                loss_of(model, data()).backward()
            refs = held(selector)
            with pytest.raises(NonFiniteError, match="target gradient"):
                selector.apply()
            selector.discard()
            assert str(selector.state_dict()) == state
            assert_released(refs)
            target[0].copy_(healthy)
        steps.append(one_step(selector, model, data()).weights)
    assert torch.equal(*steps)


# -- candidates without a loss, few, many of one -----------------------------------------------------------------------


def masked(rows: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    batch = batch_of(5, seed=seed)
    batch["labels"][list(rows)] = -100
    return batch


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("rows", [(2,), (0, 4)])
def test_a_candidate_whose_tokens_are_all_masked_contributes_nothing(rows: tuple[int, ...], extractor: str) -> None:
    model = tiny_llama()
    selector = selector_for(
        model, OPTIMIZERS["adamw"](model.parameters()), target=[masked(())], loss_fn=token_mean, gradients=extractor
    )
    for seed in range(2):
        batch = masked(rows, seed)
        with selector.record():
            token_mean(model, batch).backward()
        contributions = selector._recorder.contributions()
        for p in contributions.parameters:
            assert not contributions.per_candidate(p)[list(rows)].any()
        selection = selector.apply()
        assert selection.status == "optimal"
        assert not selection.diagnostics["alignment"][list(rows)].any()
        assert not selection.weights[list(rows)].any()  # the greedy filter has no use for it
        model.zero_grad()


@pytest.mark.parametrize(
    ("filter", "solver"),
    [
        ("greedy", "pgd"),
        ("threshold", "pgd"),
        ("topk", "pgd"),
        pytest.param("all", "pgd"),
    ],
)
def test_a_masked_candidate_takes_no_weight_from_the_others(filter: str, solver: str) -> None:
    """The weight that it got would be missing from the step: the weights' total is fixed."""
    model = tiny_llama()
    selector = selector_for(
        model,
        OPTIMIZERS["sgd"](model.parameters()),
        target=[batch_of(3, seed=9)],
        loss_fn=token_mean,
        filter=filter,
        solver=solver,
        budget=1.0 if filter == "all" else 3,
    )
    for seed in range(3):
        with selector.record():
            token_mean(model, masked((2,), seed)).backward()
        selection = selector.apply()
        assert float(selection.weights[2]) == 0.0
        model.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_uniform_weights_over_everyone_with_a_masked_candidate_are_plain_training(kind: str) -> None:
    model = tiny_llama()
    selector = selector_for(
        model,
        OPTIMIZERS[kind](model.parameters()),
        target=[masked(())],
        loss_fn=token_mean,
        filter="all",
        solver="uniform",
        budget=1.0,
    )
    with selector.record():
        token_mean(model, masked((2,))).backward()
    selector.apply()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    token_mean(model, masked((2,))).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-10, atol=1e-14)


def test_a_mass_of_zero_is_refused_by_a_message_that_says_what_to_do() -> None:
    model, batch = tiny_llama(), masked((2,))
    selector = selector_for(
        model, OPTIMIZERS["adamw"](model.parameters()), target=[masked(())], loss_fn=token_mean, budget=3
    )
    with (
        pytest.raises(ConfigurationError, match="leave candidates without label tokens out"),
        selector.record(mass=label_tokens(batch)),
    ):
        token_mean(model, batch).backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RecordingError, match="nothing was recorded"):
        selector.apply()


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_a_masked_candidate_whose_own_mean_is_nan_is_quarantined(extractor: str) -> None:
    """Where the loss is a mean of the rows' own means, a row without label tokens is 0/0."""
    model, batch = tiny_llama(), masked((2,))
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(5)]
    selector = selector_for(
        model, OPTIMIZERS["sgd"](model.parameters()), target=rows[:1], loss_fn=token_mean, gradients=extractor
    )
    for _ in range(2):
        with selector.record():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            each = -logits.log_softmax(-1).gather(2, labels.clamp_min(0)[..., None])[..., 0]
            ((each * (labels != -100)).sum(1) / label_tokens(batch)).mean().backward()
        selection = selector.apply()
        assert selection.diagnostics["quarantined"] == [2]
        assert float(selection.weights[2]) == 0.0
        assert float(selection.weights.sum()) == pytest.approx(4.0)
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        model.zero_grad()


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_pool_without_any_gradient_is_nothing_useful(kind: str, extractor: str) -> None:
    model = MLP()
    selector = selector_for(model, OPTIMIZERS[kind](model.parameters()), gradients=extractor)
    for _ in range(2):
        with selector.record():
            (loss_of(model, data()) * 0.0).backward()
        selection = selector.apply()
        assert selection.status == "nothing_useful"
        assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
        model.zero_grad()


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("filter", ["greedy", "topk", "all"])
@pytest.mark.parametrize("objective", ["match", "utility"])
def test_a_pool_of_one_that_helps_is_plain_training(objective: str, filter: str, extractor: str) -> None:
    model, x = MLP(), data(1)
    selector = selector_for(
        model,
        OPTIMIZERS["adamw"](model.parameters()),
        gradients=extractor,
        filter=filter,
        objective=objective,
        target=[x],
        budget=0.25,
    )
    for _ in range(2):
        selection = one_step(selector, model, x)
        torch.testing.assert_close(selection.weights, torch.ones(1, dtype=torch.float64))
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        loss_of(model, x).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-13)
        model.zero_grad()


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("filter", ["greedy", "topk", "all"])
@pytest.mark.parametrize("solver", ["pgd", "uniform"])
def test_duplicates_make_the_step_that_their_total_makes(solver: str, filter: str, extractor: str) -> None:
    """K is singular; the status stays sound and the gradient is that of the weights."""
    model, distinct = MLP(), data(3)
    x = distinct[[0, 1, 0, 2, 0, 1]]
    selector = selector_for(
        model, OPTIMIZERS["adamw"](model.parameters()), gradients=extractor, filter=filter, solver=solver, budget=1.0
    )
    for _ in range(2):
        selection = one_step(selector, model, x)
        w = selection.weights
        assert selection.status == "optimal"
        assert bool((w >= 0).all())
        assert float(w.sum()) == pytest.approx(6.0)
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        ((model(x) - 1).square().mean((1, 2)) @ w / 6).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-13)
        model.zero_grad()


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_a_pool_of_one_sample_repeated_weighs_its_copies_alike(extractor: str) -> None:
    model, x = MLP(), data(1).expand(5, 3, 6)
    selector = selector_for(
        model,
        OPTIMIZERS["sgd"](model.parameters()),
        gradients=extractor,
        filter="all",
        target=[x[:1]],
        budget=1.0,
        check=False,
    )
    selection = one_step(selector, model, x)
    torch.testing.assert_close(selection.weights, torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=1e-8)


# -- steps that break off ----------------------------------------------------------------------------------------------


class ExplosionError(RuntimeError):
    pass


class _Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise ExplosionError("in the middle of the backward")


class Fragile(MLP):
    """Breaks between its layers when told to."""

    breaks = "no"

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        if self.breaks == "forward":
            raise ExplosionError("in the middle of the forward")
        if self.breaks == "backward":
            hidden = _Explodes.apply(hidden)  # type: ignore[no-untyped-call]
        result: Tensor = self.last(self.root(hidden))
        return result


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["audited", "later"])
@pytest.mark.parametrize("how", ["forward", "backward", "no backward"])
def test_a_block_that_breaks_off_leaves_nothing_behind(how: str, first: bool, lean: bool, extractor: str) -> None:
    model, twin = Fragile(), Fragile()
    weights = []
    for m in (twin, model):
        optimizer = OPTIMIZERS["adamw"](m.parameters())
        selector = selector_for(m, optimizer, gradients=extractor, lean=lean)
        count = hooks(m)
        for step in range(2):
            if m is model and step == (0 if first else 1):
                before, state, inside = snapshot(m), str(selector.state_dict()), []
                m.breaks = how
                with pytest.raises((ExplosionError, RecordingError)), selector.record():
                    loss = loss_of(m, data(6, step))
                    if how == "backward":
                        try:
                            loss.backward()
                        finally:
                            inside += held(selector)  # layers above the break have handed in their pieces
                loss = None
                m.breaks = "no"
                if how == "backward":
                    assert_released(inside)
                assert_untouched(m, before)
                assert hooks(m) == count
                assert str(selector.state_dict()) == state
                with pytest.raises(RecordingError, match="nothing was recorded"):
                    selector.apply()
            weights.append(one_step(selector, m, data(6, step)).weights)
            optimizer.step()
            optimizer.zero_grad()
        selector.close()
        assert hooks(m) == 0
    assert torch.equal(torch.stack(weights[:2]), torch.stack(weights[2:]))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_a_micro_batch_that_breaks_off_leaves_the_earlier_ones_of_the_window(extractor: str) -> None:
    model = Fragile()
    selector = selector_for(
        model, OPTIMIZERS["sgd"](model.parameters()), gradients=extractor, filter="all", solver="uniform", budget=1.0
    )
    one_step(selector, model, data())
    model.zero_grad()
    with selector.record():
        loss_of(model, data(4, 1)).backward()
    model.breaks = "backward"
    with pytest.raises(ExplosionError), selector.record():
        loss_of(model, data(5, 2)).backward()
    model.breaks = "no"
    with selector.record():
        loss_of(model, data(2, 3)).backward()
    assert len(selector.apply().weights) == 6
    found = [p.grad for p in model.parameters()]
    expected = torch.autograd.grad(loss_of(model, data(4, 1)) + loss_of(model, data(2, 3)), list(model.parameters()))
    for grad, value in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-10, atol=1e-13)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("end", ["apply", "select and apply", "select and record", "discard", "close", "load"])
def test_a_window_is_released_when_it_ends(end: str, extractor: str) -> None:
    model = MLP()
    selector = selector_for(model, OPTIMIZERS["adamw"](model.parameters()), gradients=extractor)
    one_step(selector, model, data())
    model.zero_grad()
    state = selector.state_dict()
    groups = []
    for micro in range(2):
        x = data(6, micro)
        with selector.record():
            loss_of(model, x).backward()
        groups.append(held(selector))
    gc.collect()
    assert all(ref() is not None for group in groups for ref in group)
    if end == "apply":
        selection = selector.apply()
    elif end == "select and apply":
        selection = selector.select()
        selection = selector.apply()
    elif end == "select and record":
        selection = selector.select()
        with selector.record():
            loss_of(model, data(2, 9)).backward()
    elif end == "discard":
        selection = None
        selector.discard()
    elif end == "close":
        selection = None
        selector.close()
    else:
        selection = None
        selector.load_state_dict(state)
    assert_released(*groups)
    assert selection is None or len(selection.weights) == 12  # what was decided outlives the window


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_a_closed_selector_lets_go_of_model_and_hooks(extractor: str) -> None:
    model = MLP()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    assert hooks(model) == 0
    selector = selector_for(model, optimizer, gradients=extractor)
    assert hooks(model) > 0
    with selector.record():
        loss_of(model, data()).backward()
    selector.close()
    selector.close()  # twice does no harm
    assert hooks(model) == 0
    with pytest.raises(RecordingError, match="closed"), selector.record():
        loss_of(model, data()).backward()
    reference = weakref.ref(model)
    del selector, optimizer, model
    gc.collect()
    assert reference() is None


def test_a_forward_without_backward_keeps_no_activations() -> None:
    model = MLP()
    selector = selector_for(model, OPTIMIZERS["sgd"](model.parameters()))
    refs = []
    with pytest.raises(RecordingError, match="no backward"), selector.record():
        output = model(data())
        refs.append(weakref.ref(output))
    output = None
    assert_released(refs)
