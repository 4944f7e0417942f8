"""Tokens as candidates: alignments, filtering and weights per position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ftw
from ftw.errors import CandidateLayoutError, ConfigurationError, NonFiniteError, SolverError
from ftw.gradients import Recorder
from ftw.solvers import Box, CappedSimplex, Simplex
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean


def selector_for(model: Any, optimizer: Any, **options: Any) -> ftw.Selector:
    return ftw.Selector(
        model, optimizer, target=[batch_of(4, seed=50)], loss_fn=token_mean, granularity="token", warmup=1, **options
    )


@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
def test_tokens_add_up_to_their_sample(make: Any) -> None:
    model, batch = make(), batch_of(4)
    whole, parts = Recorder(model), Recorder(model, granularity="token")
    for recorder in (whole, parts):
        for _ in range(2):
            recorder.clear()
            with recorder.record():
                token_mean(model, batch).backward()
    samples, tokens = whole.contributions(), parts.contributions()
    assert tokens.count == 4 * 11
    for p in samples.parameters:
        found = tokens.per_candidate(p).unflatten(0, (4, 11)).sum(1)
        torch.testing.assert_close(found, samples.per_candidate(p), rtol=1e-10, atol=1e-14)
    direction = {p: torch.randn_like(p) for p in samples.parameters}
    found = tokens.alignment(direction).view(4, 11)
    torch.testing.assert_close(found.sum(1), samples.alignment(direction), rtol=1e-10, atol=1e-12)
    padding = batch["attention_mask"] == 0
    assert not found[padding].any()


def test_scores_and_equal_weights_without_a_gram() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = selector_for(model, optimizer, filter="topk", solver="uniform", budget=0.5)
    for step in range(3):
        batch = batch_of(6, seed=step)
        with selector.record():
            token_mean(model, batch).backward()
        selection = selector.apply()
        live = int((selection.diagnostics["token_alignment"] != 0).sum())
        assert selection.diagnostics["token_alignment"].shape == (6, 11)
        assert len(selection.indices) == round(live / 2)
        chosen = selection.weights[selection.indices]
        torch.testing.assert_close(chosen, torch.full_like(chosen, live / len(chosen)))
        worst_in = selection.diagnostics["alignment"][selection.indices].min()
        rest = selection.diagnostics["alignment"].clone()
        rest[selection.indices] = -torch.inf
        rest[rest == 0] = -torch.inf  # padding is not on offer
        assert worst_in >= rest.max()
        optimizer.step()
        optimizer.zero_grad()


def test_without_a_gram_the_prediction_is_that_of_the_gram() -> None:
    """The same tokens with equal weights, once by the n x n numbers and once without them."""
    reports = []
    for solver in ("uniform", EqualByGram()):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        selector = selector_for(model, optimizer, filter="topk", solver=solver, budget=9, ridge=0.0)
        for step in range(3):
            with selector.record():
                token_mean(model, batch_of(6, seed=step)).backward()
            selection = selector.apply()
            optimizer.step()
            optimizer.zero_grad()
        reports.append(selection)
    assert torch.equal(reports[0].indices, reports[1].indices)
    for name in ("first_order", "curvature", "offset_drop", "curvature_parts"):
        assert reports[0].diagnostics[name] == pytest.approx(reports[1].diagnostics[name], rel=1e-9)


def test_a_watched_step_is_predicted_for_the_clipped_gradient() -> None:
    """First order and curvature of the displacement that was really made, of SGD, from scratch."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    selector = selector_for(model, optimizer, filter="topk", solver="uniform", budget=9, watch=1)
    for step in range(3):
        with selector.record():
            token_mean(model, batch_of(6, seed=step)).backward()
        selector.apply()
        parameters = list(model.parameters())
        g = torch.autograd.grad(token_mean(model, batch_of(4, seed=50)), parameters)
        old = [p.detach().clone() for p in parameters]
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        moved = [before - p.detach() for before, p in zip(old, parameters, strict=True)]
        first = sum(float((a * b).sum()) for a, b in zip(g, moved, strict=True))
        found = selector.fidelity
        assert found is not None
        assert found.applied < 0.9
        assert found.first_order == pytest.approx(first, rel=1e-5)  # torch clips with an epsilon
        curvature = sum(float(d.square().sum()) for d in moved) / 0.01 / 2
        assert found.predicted_drop == pytest.approx(first - curvature, rel=1e-5)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_nan_in_the_optimizer_s_state_is_not_blamed_on_tokens(key: str) -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = selector_for(model, optimizer, filter="topk", solver="uniform", budget=9)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(2):
        with selector.record(scaler=scaler):
            scaler.scale(token_mean(model, batch_of(6, seed=step))).backward()
        if not step:
            selector.apply()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.state[next(model.parameters())][key][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"no candidate's contribution is to blame.*inspect optimizer.state"):
        selector.apply()


class EqualByGram(ftw.solvers.Uniform):
    needs_gram = True


def test_weighted_tokens_make_the_weighted_gradient() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = selector_for(model, optimizer, filter="topk", budget=12)
    recorder = Recorder(tiny_llama(), granularity="token")
    twin = recorder.model
    batch = batch_of(5)
    with selector.record():
        token_mean(model, batch).backward()
    selection = selector.apply()
    with recorder.record():
        token_mean(twin, batch).backward()
    expected = recorder.contributions()
    assert len(selection.weights[selection.indices].unique()) > 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        value = torch.tensordot(selection.weights, expected.per_candidate(q), dims=1)
        torch.testing.assert_close(p.grad, value, rtol=1e-9, atol=1e-13)


def test_greedy_on_few_tokens() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = selector_for(model, optimizer, budget=5)
    batch = batch_of(5)
    with selector.record():
        token_mean(model, batch).backward()
    selection = selector.apply()
    assert 0 < len(selection.indices) <= 5
    live = int((batch["attention_mask"]).sum())
    assert float(selection.diagnostics["mass"].sum()) <= live


def test_a_gram_of_too_many_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftw.routes.TOKEN_GRAM", 10)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = selector_for(model, optimizer, budget=0.5)
    with selector.record():
        token_mean(model, batch_of(5)).backward()
    with pytest.raises(ConfigurationError, match="filter='topk' and solver='uniform'"):
        selector.apply()


def test_rows_without_tokens_are_refused() -> None:
    recorder = Recorder(MLP(), granularity="token", check=False)
    with pytest.raises(CandidateLayoutError), recorder.record():
        recorder.model(torch.randn(4, 6, dtype=torch.float64)).square().mean().backward()


def test_maps_do_not_go_with_tokens() -> None:
    recorder = Recorder(tiny_llama(), granularity="token")
    with pytest.raises(ConfigurationError, match="granularity"), recorder.record(candidates=torch.arange(4)):
        pass


def test_mass_of_tokens_is_theirs() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = selector_for(model, optimizer, filter="topk", solver="uniform")
    batch = batch_of(4)
    with pytest.raises(ConfigurationError, match="mass"), selector.record(mass=label_tokens(batch)):
        token_mean(model, batch).backward()


def test_all_tokens_with_equal_weights_are_plain_training() -> None:
    """Also where their alignment is 0: ids that the target lacks move nothing that the target sees."""

    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(16, 3, dtype=torch.float64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.table(ids)
            return result

    def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(ids).sum(-1).square().mean()

    model = Bag()
    selector = ftw.Selector(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        target=[torch.tensor([[0, 1, 2, 3]])],
        loss_fn=loss,
        granularity="token",
        filter="all",
        solver="uniform",
    )
    ids = torch.arange(16).view(4, 4)
    (plain,) = torch.autograd.grad(loss(model, ids), [model.table.weight])
    with selector.record():
        loss(model, ids).backward()
    selector.apply()
    torch.testing.assert_close(model.table.weight.grad, plain)


def test_micro_batches_of_which_one_has_no_chosen_token() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = ftw.Selector(model, optimizer, target=[batch_of(4, seed=50)], loss_fn=token_mean, budget=1, check=False)
    for seed in range(2):
        batch = batch_of(2, seed=seed)
        owner = torch.tensor([[0] * 4 + [1] * 7, [2] * 11])
        with selector.record(candidates=owner):
            (token_mean(model, batch) / 2).backward()
    assert len(selector.apply().indices) == 1


@pytest.mark.parametrize("constraints", [CappedSimplex(1.0, 1e-3), Box(2.0, 3.0), ftw.WeightQuota({"a": 0.1})])
def test_a_set_that_does_not_hold_equal_weights_is_no_set_for_tokens_either(constraints: Any) -> None:
    """Equal weights need no K; the set of weights holds for them all the same."""
    model, batch = tiny_llama(), batch_of(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = selector_for(model, optimizer, filter="topk", solver="uniform", budget=0.5, constraints=constraints)
    with selector.record(extras={"source": ["a"] * 44}):
        token_mean(model, batch).backward()
    with pytest.raises(SolverError, match="Uniform: infeasible"):
        selector.select()
    selector = selector_for(model, optimizer, filter="topk", solver="uniform", budget=0.5, constraints=Simplex(44.0))
    with selector.record():
        token_mean(model, batch).backward()
    kept = selector.select().weights
    assert len(set(kept[kept > 0].tolist())) == 1
