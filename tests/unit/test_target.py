"""The target gradient: its value, its schedule, and that computing it leaves the model alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw import Target
from ftw.errors import NonFiniteError, TargetError
from tests.models import MLP


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x).square().mean()
    return result


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (4, 4, 2)]


def expected(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(model, x), list(model.parameters())))


def check(found: dict[nn.Parameter, Tensor], model: nn.Module, values: list[Tensor]) -> None:
    for p, value in zip(model.parameters(), values, strict=True):
        torch.testing.assert_close(found[p], value, rtol=1e-12, atol=1e-15)


def test_a_batch_without_labels_is_no_target() -> None:
    """Its mean is NaN, and the gradient of that is zero: nothing would ever seem useful."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        labels = torch.full((len(x),), -100 if len(x) == 2 else 1)
        return nn.functional.cross_entropy(model(x), labels)

    model = MLP()
    names = dict(model.named_parameters())
    Target(batches()[:2], loss, batches_per_refresh="all").gradient(model, names)
    with pytest.raises(NonFiniteError, match=r"the target's loss is \S+, \S+, nan"):
        Target(batches(), loss, batches_per_refresh="all").gradient(model, names)


@pytest.mark.parametrize("kind", ["list", "iterable"])
def test_batches_come_in_turn_and_begin_again(kind: str) -> None:
    model, data = MLP(), batches()
    source: Any = data if kind == "list" else type("Walk", (), {"__iter__": lambda self: iter(data)})()
    target = Target(source, loss_of)
    for step in range(7):
        check(target.gradient(model, dict(model.named_parameters())), model, expected(model, data[step % 3]))


def test_all_batches_are_weighted_by_their_rows() -> None:
    model, data = MLP(), batches()
    target = Target(data, loss_of, batches_per_refresh="all")
    for _ in range(2):
        check(target.gradient(model, dict(model.named_parameters())), model, expected(model, torch.cat(data)))
    two = Target(data, loss_of, batches_per_refresh=2)
    two.gradient(model, dict(model.named_parameters()))
    weighted = [(2 * a + 4 * b) / 6 for a, b in zip(expected(model, data[2]), expected(model, data[0]), strict=True)]
    check(two.gradient(model, dict(model.named_parameters())), model, weighted)


def test_refresh_and_ema() -> None:
    model, data = MLP(), batches()
    target = Target(data, loss_of, refresh=2, ema=0.75)
    names = dict(model.named_parameters())
    first = expected(model, data[0])
    for _ in range(2):
        check(target.gradient(model, names), model, first)
    mixed = [0.75 * a + 0.25 * b for a, b in zip(first, expected(model, data[1]), strict=True)]
    check(target.gradient(model, names), model, mixed)


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    model[2].eval()
    seen = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append([m.training for m in model.modules()])
        return loss_of(model, x)

    before = [m.training for m in model.modules()]
    torch.manual_seed(0)
    Target(batches(), loss).gradient(model, dict(model.named_parameters()))
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(()))
    assert not any(seen[0])
    assert before == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(TargetError):
        Target(batches(), lambda model, x: None).gradient(model, dict(model.named_parameters()))  # type: ignore[arg-type, return-value]
    assert before == [m.training for m in model.modules()]


def test_parameters_that_the_loss_does_not_reach_get_zero() -> None:
    model = MLP()
    target = Target(batches(), lambda model, x: model.first(x).square().mean())
    found = target.gradient(model, dict(model.named_parameters()))
    assert found[model.first.weight].any()
    assert not found[model.last.weight].any()


def test_default_loss_is_the_models_own() -> None:
    class WithLoss(MLP):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            return SimpleNamespace(loss=(super().forward(x) - y).square().mean())

    model, x = WithLoss(), batches()[0]
    y = torch.ones(4, 2, dtype=torch.float64)
    found = Target([{"x": x, "y": y}]).gradient(model, dict(model.named_parameters()))
    check(found, model, list(torch.autograd.grad(model(x, y).loss, list(model.parameters()))))


def test_a_changed_set_of_parameters_is_noticed() -> None:
    model, data = MLP(), batches()
    target = Target(data, loss_of, refresh=10)
    names = dict(model.named_parameters())
    target.gradient(model, {"first.weight": names["first.weight"]})
    assert set(target.gradient(model, names)) == set(names.values())


def test_an_exhausted_generator_is_an_error() -> None:
    model = MLP()
    target = Target((x for x in batches()[:1]), loss_of)
    target.gradient(model, dict(model.named_parameters()))
    with pytest.raises(TargetError, match="no more batches after 1"):
        target.gradient(model, dict(model.named_parameters()))
    empty: list[Tensor] = []
    with pytest.raises(TargetError, match="no more batches"):
        Target(iter(empty), loss_of, batches_per_refresh="all").gradient(model, dict(model.named_parameters()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_get_their_gradient(reentrant: bool) -> None:
    class Checkpointed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            hidden = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=reentrant)
            return self.last(self.root(torch.tanh(self.norm(hidden))))  # type: ignore[no-any-return]

    model, data = Checkpointed(), batches()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {p: p.grad for p in model.parameters()}
    found = Target(data, loss_of).gradient(model, dict(model.named_parameters()))
    assert all(p.grad is before[p] for p in model.parameters())
    check(found, model, expected(MLP(), data[0].detach()))


def test_an_undone_step_gets_its_batches_again() -> None:
    model, names = MLP(), dict(MLP().named_parameters())
    names, seen = dict(model.named_parameters()), []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(len(x))
        return loss_of(model, x)

    data = [torch.randn(rows, 6, dtype=torch.float64) for rows in (1, 2, 3, 4)]
    walked: list[int] = []

    def walk() -> Any:
        for x in data:
            walked.append(len(x))
            yield x

    target = Target(walk(), loss)
    target.gradient(model, names)
    for _ in range(2):
        snapshot = target.snapshot()
        target.gradient(model, names)
        target.restore(snapshot)
    target.gradient(model, names)
    target.gradient(model, names)
    assert seen == [1, 2, 2, 2, 3]
    assert walked == [1, 2, 3]


def test_resuming_walks_no_whole_rounds() -> None:
    class Walked:
        begun = 0

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            self.begun += 1
            return iter(batches())

    model, source = MLP(), Walked()
    target = Target(source, loss_of)
    target.load_state_dict({"position": 3001, "age": 1, "gradient": None})
    check(target.gradient(model, dict(model.named_parameters())), model, expected(model, batches()[1]))
    assert source.begun == 1


def test_an_iterable_that_ends_for_good_is_an_error() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = iter(batches()[:2])

        def __iter__(self) -> Any:
            yield from self.left

    model = MLP()
    target = Target(Once(), loss_of)
    for _ in range(2):
        target.gradient(model, dict(model.named_parameters()))
    with pytest.raises(TargetError, match="no more batches after 2"):
        target.gradient(model, dict(model.named_parameters()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_stays_on_and_dropout_off(reentrant: bool) -> None:
    from tests.models import batch_of, lora_llama, token_mean

    model = lora_llama(dropout=0.5)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = Target([batch_of(3)], token_mean).gradient(model, params)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    calls = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            original = module._gradient_checkpointing_func

            def counted(*args: object, original: object = original, **kwargs: object) -> object:
                calls.append(1)
                return original(*args, **kwargs)  # type: ignore[operator]

            module._gradient_checkpointing_func = counted  # type: ignore[assignment]
    found = Target([batch_of(3)], token_mean).gradient(model, params)
    assert calls
    for p in params.values():
        torch.testing.assert_close(found[p], expected[p], rtol=1e-10, atol=1e-14)
    assert all(module.training for module in model.modules())
