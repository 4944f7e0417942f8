"""Windows beyond `memory_cap`: alignments in the backward, survivors run again; the same numbers as without a cap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import ConfigurationError, MemoryCapError, RecordingError
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean

CAP = 1000  # bytes: less than any window


def run(model: nn.Module, steps: int = 5, parts: int = 1, **options: Any) -> list[ftw.Selection]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    selector = ftw.Selector(
        model, optimizer, target=[batch_of(4, seed=50)], loss_fn=token_mean, budget=3, warmup=2, **options
    )
    selections = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = batch_of(6, seed=step)
        total = label_tokens(batch).sum()
        for i in range(parts):
            piece = {k: v[i * 6 // parts : (i + 1) * 6 // parts] for k, v in batch.items()}
            with selector.record(mass=label_tokens(piece)):
                (token_mean(model, piece) * label_tokens(piece).sum() / total).backward()
        selections.append(selector.apply())
        optimizer.step()
        optimizer.zero_grad()
    return selections


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("reference", ["previous", "target"])
@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
def test_top_k_is_the_same_with_and_without_a_cap(make: Any, reference: str, parts: int) -> None:
    free, capped = make(), make()
    first = run(free, parts=parts, filter="topk", reference=reference)
    second = run(capped, parts=parts, filter="topk", reference=reference, memory_cap=CAP)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b.weights, a.weights, rtol=1e-8, atol=1e-10)
        assert sorted(b.diagnostics["replayed"]) == a.diagnostics["alignment"].topk(3).indices.sort().values.tolist()
    assert_same(free, capped)


def test_a_filter_that_needs_the_gram_gets_a_shortlist() -> None:
    selections = run(tiny_llama(), reference="previous", memory_cap=CAP, filter="greedy")
    for selection in selections:
        best = selection.diagnostics["alignment"].topk(6).indices.tolist()
        assert set(selection.diagnostics["replayed"]) == set(best)
        assert set(selection.indices.tolist()) <= set(best)


def test_a_cap_that_is_not_reached_changes_nothing() -> None:
    free, capped = tiny_llama(), tiny_llama()
    run(free, reference="previous")
    selections = run(capped, reference="previous", memory_cap=1 << 40)
    assert all("replayed" not in selection.diagnostics for selection in selections)
    assert_same(free, capped)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    free, capped = tiny_llama(), tiny_llama()
    for model in (free, capped):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    run(free, filter="topk", reference="previous")
    run(capped, filter="topk", reference="previous", memory_cap=CAP)
    assert_same(free, capped)


def test_dropout_draws_the_same_masks_again() -> None:
    free, capped = lora_llama(dropout=0.3), lora_llama(dropout=0.3)
    run(free, filter="topk", reference="previous")
    run(capped, filter="topk", reference="previous", memory_cap=CAP)
    assert_same(free, capped)


def test_randomness_that_cannot_be_repeated_is_noticed() -> None:
    elsewhere = torch.Generator().manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x * (1 + torch.rand(len(x), 1, dtype=torch.float64, generator=elsewhere)))
            return result

    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(6, 4, dtype=torch.float64)
    selector = ftw.Selector(
        model,
        optimizer,
        target=[data],
        loss_fn=lambda m, x: m(x).square().mean(),
        filter="topk",
        budget=2,
        reference="previous",
        memory_cap=1,
        check=False,
    )
    with selector.record():
        model(data).square().mean().backward()
    with pytest.raises(RecordingError, match="came out different"):
        selector.apply()
    assert model.layer.weight.grad is None


def test_the_pool_as_reference_needs_the_window() -> None:
    model = tiny_llama()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(MemoryCapError, match="reference='previous'"):
        run(model, memory_cap=CAP)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None


def test_nothing_is_kept_beyond_the_cap() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = ftw.Selector(
        model,
        optimizer,
        target=[batch_of(4)],
        loss_fn=token_mean,
        filter="topk",
        reference="previous",
        memory_cap=CAP,
    )
    with selector.record():
        token_mean(model, batch_of(6)).backward()
    window = selector._recorder.window
    assert not window.pieces
    assert window.kept_bytes == 0
    selector.discard()
    assert selector._recorder.window.alignment is None


def test_discard_delivers_the_same_target_batch_again() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = ftw.Selector(
        model,
        optimizer,
        target=[batch_of(4, seed=s) for s in range(3)],
        loss_fn=token_mean,
        reference="target",
        memory_cap=CAP,
    )
    before = selector.target.state_dict()["position"]
    with selector.record():
        token_mean(model, batch_of(6)).backward()
    selector.discard()
    assert selector.target.state_dict()["position"] == before


def test_a_faulty_candidate_beyond_the_cap_is_quarantined() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = ftw.Selector(
        model,
        optimizer,
        target=[batch_of(4)],
        loss_fn=token_mean,
        filter="topk",
        reference="previous",
        memory_cap=CAP,
        check=False,
    )
    batch = batch_of(6)
    with selector.record():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        poison = torch.ones(6, 1, 1, dtype=torch.float64)
        poison[2] = float("nan")
        (logits * poison).square().mean().backward()
    selection = selector.apply()
    assert selection.diagnostics["quarantined"] == [2]
    assert selection.weights[2] == 0
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def small(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2]).square().mean()


def small_selector(model: nn.Module, **options: Any) -> tuple[ftw.Selector, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = {"budget": 2, "filter": "topk", "reference": "target", "memory_cap": 1, "warmup": 0} | options
    target = [small(5, 90), small(5, 91), small(5, 92)]
    return ftw.Selector(model, optimizer, target=target, loss_fn=small_loss, **options), optimizer


def test_nobody_worth_choosing_beyond_the_cap() -> None:
    model = MLP()
    selector, _ = small_selector(model, filter=ftw.filters.Threshold(1e9))
    with selector.record():
        small_loss(model, small(6, 0)).backward()
    selection = selector.apply()
    assert selection.status == ftw.Status.NOTHING_USEFUL
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_failed_first_block_gives_the_target_batch_back() -> None:
    model = MLP()
    selector, _ = small_selector(model)
    with pytest.raises(ZeroDivisionError), selector.record():
        raise ZeroDivisionError
    assert selector.target.state_dict()["position"] == 0
    assert selector._recorder.direction is None
    with selector.record():
        small_loss(model, small(6, 0)).backward()
    selector.apply()
    assert selector.target.state_dict()["position"] == 1


def test_a_decision_that_fails_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP()
    selector, _ = small_selector(model)
    with selector.record():
        small_loss(model, small(6, 0)).backward()
    with monkeypatch.context() as patch:
        patch.setattr("ftw.selector.replay_contributions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            selector.apply()
    selector.apply()
    assert selector.target.state_dict()["position"] == 1


def test_thawing_in_mid_run() -> None:
    model = MLP()
    model.last.weight.requires_grad_(False)
    selector, optimizer = small_selector(model)
    optimizer.add_param_group({"params": [model.last.weight]})
    for step in range(3):
        model.last.weight.requires_grad_(step > 0)
        with selector.record():
            small_loss(model, small(6, step)).backward()
        selector.apply()
        assert (model.last.weight.grad is not None) == (step > 0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("residual", ["error", "keep"])
def test_without_lean_mode_a_later_block_crosses_the_cap(residual: str) -> None:
    gradients = []
    for cap in (None, 3000):
        model = MLP()
        selector, _ = small_selector(model, lean=False, memory_cap=cap, residual=residual, check=False)
        for block in range(2):
            with selector.record():
                (small_loss(model, small(6, block)) / 2).backward()
        assert (selector._recorder.window.alignment is not None) == (cap is not None)
        selector.apply()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("granularity", ["token"])
def test_what_runs_rows_again_does_not_go_with_tokens(granularity: str) -> None:
    with pytest.raises(ConfigurationError, match="memory_cap"):
        small_selector(MLP(), granularity=granularity)
    with pytest.raises(ConfigurationError, match="utility"):
        small_selector(MLP(), objective="utility")


@pytest.mark.parametrize("cap", [None, 1])
def test_a_buffer_that_is_used_again_for_the_next_batch(cap: int | None) -> None:
    gradients = []
    for reuse in (True, False):
        model = MLP()
        selector, _ = small_selector(model, memory_cap=cap)
        buffer = torch.empty(6, 6, dtype=torch.float64)
        for block in range(2):
            x = buffer.copy_(small(6, block)) if reuse else small(6, block)
            with selector.record():
                (small_loss(model, x) / 2).backward()
        selector.apply()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
