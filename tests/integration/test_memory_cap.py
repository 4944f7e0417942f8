"""Windows beyond `memory_cap`: alignments in the backward, survivors run again; the same numbers as without a cap.

What is said to be kept is checked against the tensors themselves: `Watched` looks at everything that windows hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import ConfigurationError, MemoryCapError, NonFiniteError, RecordingError
from ftw.gradients.share import Share
from ftw.gradients.window import Ledger, Window, tensors_of
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean
from tests.oracle.test_rules import route_in_own_precision, tiny_mixture

CAPS: dict[Any, int] = {tiny_llama: 64_000, lora_llama: 40_000}
"""Bytes: a quarter of a window and half of one; its output gradients are 20 kB of that."""


def run(model: nn.Module, steps: int = 5, parts: int = 1, **options: Any) -> list[ftw.Selection]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    options = {"budget": 3, "warmup": 2} | options
    selector = ftw.Selector(model, optimizer, target=[batch_of(4, seed=50)], loss_fn=token_mean, **options)
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


class Watched:
    """The most bytes that all windows held together, found by looking at their tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        self._windows: list[weakref.ref[Window]] = []
        for kind in (Window, Share):
            monkeypatch.setattr(kind, "__init__", self._noting(kind.__init__))
        added = Ledger.add

        def add(ledger: Ledger, tensors: Iterable[Tensor]) -> None:
            added(ledger, tensors)
            self.peak = max(self.peak, self.now())

        monkeypatch.setattr(Ledger, "add", add)

    def _noting(self, init: Any) -> Any:
        def noted(window: Window, *args: Any, **kwargs: Any) -> None:
            init(window, *args, **kwargs)
            self._windows.append(weakref.ref(window))

        return noted

    def now(self) -> int:
        alive = [window for window in (ref() for ref in self._windows) if window is not None]
        held = [t for window in alive for pieces in window.pieces.values() for each in pieces for t in tensors_of(each)]
        held += [t for window in alive for forward in window.forwards for t in forward.tensors]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


def assert_same_figures(capped: ftw.Selection, free: ftw.Selection, *, weights_only: bool = False) -> None:
    torch.testing.assert_close(capped.weights, free.weights, rtol=1e-10, atol=1e-12)
    assert capped.status == free.status
    if weights_only:
        return
    for name in ("first_order", "curvature", "offset_drop", "relative_residual", "effective_sample_size"):
        assert capped.diagnostics[name] == pytest.approx(free.diagnostics[name], rel=1e-9, abs=1e-15), name
    assert capped.predicted_drop == pytest.approx(free.predicted_drop, rel=1e-8, abs=1e-15)
    for name in ("alignment", "mass"):
        torch.testing.assert_close(capped.diagnostics[name], free.diagnostics[name], rtol=1e-9, atol=1e-15)


POLICIES = {
    "topk, uniform": {"filter": "topk", "solver": "uniform"},
    "topk, pgd": {"filter": "topk", "solver": "pgd"},
    "greedy, pgd": {"filter": "greedy", "solver": "pgd"},
}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("reference", ["previous", "target"])
@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_with_and_without_a_cap(policy: str, make: Any, reference: str, parts: int, watched: Watched) -> None:
    free, capped = make(), make()
    options: dict[str, Any] = {"parts": parts, "reference": reference, **POLICIES[policy]}
    first = run(free, **options)
    watched.peak = 0
    second = run(capped, memory_cap=CAPS[make], **options)
    for a, b in zip(first, second, strict=True):
        # A first step has no previous second moment, and under a cap another substitute for it: see `reference`.
        assert_same_figures(b, a, weights_only=reference == "previous" and a is first[0])
        replays = b.diagnostics["replays"]
        assert replays == 1 if "uniform" in policy else replays > 2
        assert b.diagnostics["kept_bytes"] <= CAPS[make]
    assert 0.8 * CAPS[make] < watched.peak <= CAPS[make]
    assert_same(free, capped)


@pytest.mark.parametrize("cap", [100_000, 150_000])
def test_experts_over_micro_batches_beyond_the_cap(cap: int, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert of a parameter comes as a piece of its own: a share keeps those of all micro-batches, or none."""
    route_in_own_precision(monkeypatch)
    free, capped = tiny_mixture("Mixtral", "eager"), tiny_mixture("Mixtral", "eager")
    first = run(free, parts=2, reference="target")
    watched.peak = 0
    second = run(capped, parts=2, reference="target", memory_cap=cap)
    for a, b in zip(first, second, strict=True):
        assert_same_figures(b, a)
        assert b.diagnostics["replays"] > 2
    assert watched.peak <= cap
    assert_same(free, capped)


def test_top_k_runs_the_chosen_again_and_no_others() -> None:
    for selection in run(tiny_llama(), filter="topk", reference="previous", memory_cap=CAPS[tiny_llama]):
        best = selection.diagnostics["alignment"].topk(3).indices
        assert sorted(selection.diagnostics["replayed"]) == best.sort().values.tolist()


def test_a_filter_that_needs_the_gram_gets_a_shortlist() -> None:
    for selection in run(tiny_llama(), budget=2, reference="previous", memory_cap=CAPS[tiny_llama], filter="greedy"):
        best = selection.diagnostics["alignment"].topk(4).indices.tolist()
        assert set(selection.diagnostics["replayed"]) == set(best)
        assert set(selection.indices.tolist()) <= set(best)


@pytest.mark.parametrize("geometry", ["update", "vanilla"])
@pytest.mark.parametrize("policy", ["topk, uniform", "topk, pgd"])
def test_other_geometries(policy: str, geometry: str, watched: Watched) -> None:
    options: dict[str, Any] = {"reference": "target", "geometry": geometry, "warmup": 0, **POLICIES[policy]}
    free, capped = tiny_llama(), tiny_llama()
    for a, b in zip(run(free, **options), run(capped, memory_cap=64_000, **options), strict=True):
        assert_same_figures(b, a)
    assert watched.peak > 64_000  # of the run without a cap
    assert_same(free, capped)


@pytest.mark.parametrize("constraints", [ftw.solvers.Simplex(total=2.0), ftw.solvers.NonNegative()])
def test_equal_weights_are_those_of_the_set(constraints: Any) -> None:
    options = {"filter": "topk", "solver": "uniform", "reference": "target", "total": "at_most"}
    free, capped = tiny_llama(), tiny_llama()
    first = run(free, constraints=constraints, **options)
    second = run(capped, constraints=constraints, memory_cap=64_000, **options)
    for a, b in zip(first, second, strict=True):
        assert_same_figures(b, a)
    assert_same(free, capped)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_candidate_without_labels_takes_no_weight(policy: str) -> None:
    selections = []
    for cap in (None, 64_000):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        selector = ftw.Selector(
            model,
            optimizer,
            target=[batch_of(4, seed=50)],
            loss_fn=token_mean,
            budget=4,
            reference="target",
            memory_cap=cap,
            **POLICIES[policy],  # type: ignore[arg-type]
        )
        batch = batch_of(6, seed=1)
        batch["labels"][4] = -100
        with selector.record():
            token_mean(model, batch).backward()
        selections.append(selector.apply())
    assert_same_figures(selections[1], selections[0])
    assert "replays" in selections[1].diagnostics


def test_output_gradients_that_do_not_fit_are_an_error() -> None:
    model = tiny_llama()
    with pytest.raises(MemoryCapError, match=r"output gradients .* more than memory_cap=15000 .* larger cap"):
        run(model, filter="topk", reference="previous", memory_cap=15_000)
    assert all(p.grad is None for p in model.parameters())


def test_survivors_that_do_not_fit_even_one_parameter_at_a_time() -> None:
    """The error says what cap it takes, and with that cap it goes."""
    model = tiny_llama()
    with pytest.raises(MemoryCapError, match=r"3 candidates to lm_head.weight alone .* need no K") as error:
        run(model, filter="topk", reference="previous", memory_cap=25_000)
    assert all(p.grad is None for p in model.parameters())
    needed = int(str(error.value).split("at least ")[1].split()[0])
    with pytest.raises(MemoryCapError):
        run(model, steps=1, filter="topk", reference="previous", memory_cap=needed - 1)
    (selection,) = run(tiny_llama(), steps=1, filter="topk", reference="previous", memory_cap=needed)
    assert selection.diagnostics["kept_bytes"] == needed
    run(tiny_llama(), filter="topk", solver="uniform", reference="previous", memory_cap=25_000)


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
    run(free, filter="topk", reference="target")
    selections = run(capped, filter="topk", reference="target", memory_cap=CAPS[tiny_llama])
    assert all(selection.diagnostics["replays"] > 2 for selection in selections)
    assert_same(free, capped)


@pytest.mark.parametrize("parts", [1, 3])
def test_dropout_draws_the_same_masks_again(parts: int) -> None:
    free, capped = lora_llama(dropout=0.3), lora_llama(dropout=0.3)
    run(free, filter="topk", parts=parts, reference="target")
    selections = run(capped, filter="topk", parts=parts, reference="target", memory_cap=CAPS[lora_llama])
    assert all(selection.diagnostics["replays"] > 2 for selection in selections)
    assert_same(free, capped)


@pytest.mark.parametrize(("solver", "cap"), [("pgd", 500), ("pgd", 376), ("uniform", 500)])
def test_randomness_that_cannot_be_repeated_is_noticed(solver: str, cap: int) -> None:
    """In one replay, in several, and where only the sum is formed."""
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
        solver=solver,
        budget=2,
        reference="previous",
        memory_cap=cap,
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
        run(model, memory_cap=1000)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None


def test_only_what_a_replay_needs_is_kept_beyond_the_cap() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = ftw.Selector(
        model,
        optimizer,
        target=[batch_of(4)],
        loss_fn=token_mean,
        filter="topk",
        reference="previous",
        memory_cap=CAPS[tiny_llama],
    )
    batch = batch_of(6)
    with selector.record():
        token_mean(model, batch).backward()
    window = selector._recorder.window
    assert not window.pieces
    (forward,) = window.forwards
    assert forward.output_gradient is not None
    assert len(forward.output_gradient.values) == label_tokens(batch).sum()  # no prompt, no padding
    assert window.kept_bytes == sum(tensor.nbytes for tensor in forward.tensors)
    selector.discard()
    assert selector._recorder.window.alignment is None
    assert selector._recorder.window.kept_bytes == 0


def test_discard_delivers_the_same_target_batch_again() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = ftw.Selector(
        model,
        optimizer,
        target=[batch_of(4, seed=s) for s in range(3)],
        loss_fn=token_mean,
        reference="target",
        memory_cap=CAPS[tiny_llama],
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
        memory_cap=CAPS[tiny_llama],
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


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_nan_in_the_optimizer_s_state_is_not_blamed_on_candidates(key: str, scaled: bool) -> None:
    """Under a scaler it would be taken for an overflow at every step, and the scale would go to 0."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    options: dict[str, Any] = {"budget": 3, "warmup": 1, "reference": "previous", "memory_cap": CAPS[tiny_llama]}
    selector = ftw.Selector(model, optimizer, target=[batch_of(4, seed=50)], loss_fn=token_mean, **options)
    for step in range(2):
        if step:
            optimizer.state[next(model.parameters())][key][:] = torch.nan
        with selector.record(scaler=scaler):
            scaler.scale(token_mean(model, batch_of(6, seed=step))).backward()
        if not step:
            selector.apply()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    with pytest.raises(NonFiniteError, match=r"no candidate's contribution is to blame.*inspect optimizer.state"):
        selector.apply()


def small(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2]).square().mean()


def small_selector(model: nn.Module, **options: Any) -> tuple[ftw.Selector, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = {"budget": 2, "filter": "topk", "reference": "target", "memory_cap": 1500, "warmup": 0} | options
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


@pytest.mark.parametrize("after_forward", [False, True])
def test_a_failed_first_block_gives_the_target_batch_back(after_forward: bool) -> None:
    model = MLP()
    selector, optimizer = small_selector(model)
    for step in range(2):
        with pytest.raises(ZeroDivisionError), selector.record():
            if after_forward:  # where g is known by then
                small_loss(model, small(6, 1))
            raise ZeroDivisionError
        assert selector.target.state_dict()["position"] == step
        assert selector._recorder.direction is None
        with selector.record():
            small_loss(model, small(6, 0)).backward()
        selector.apply()
        assert selector.target.state_dict()["position"] == step + 1
        optimizer.zero_grad()


@pytest.mark.parametrize("broken", ["routes.read_survivors", "routes.weigh_survivors", "writing.all_finite"])
def test_a_decision_that_fails_can_be_tried_again(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the survivors are read, before their gradient is formed, and before it is written."""
    model, other = MLP(), MLP()
    selector, _ = small_selector(model, memory_cap=700)
    undisturbed, _ = small_selector(other, memory_cap=None)
    with undisturbed.record():
        small_loss(other, small(6, 0)).backward()
    undisturbed.apply()
    with selector.record():
        small_loss(model, small(6, 0)).backward()
    with monkeypatch.context() as patch:
        patch.setattr(f"ftw.{broken}", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            selector.apply()
        assert all(p.grad is None for p in model.parameters())
    assert selector.apply().diagnostics["replays"] > 2
    assert selector.target.state_dict()["position"] == 1
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


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


@pytest.mark.parametrize("cap", [None, 1500])
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
