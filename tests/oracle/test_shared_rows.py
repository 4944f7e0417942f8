"""What all rows share (positions, latent queries) where there are as many of it as rows, or fewer, or more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ftw.errors import CandidateLayoutError
from ftw.gradients import Recorder
from ftw.gradients.rules import rules_for

LENGTH = 5


class Positioned(nn.Module):
    """Adds to each token a vector that belongs to its position."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.token = nn.Embedding(13, 6)
        self.position = nn.Embedding(LENGTH, 6)
        self.inside = nn.Linear(6, 6)
        self.last = nn.Linear(6, 13)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = checkpoint(self.begin, ids, use_reentrant=False) if self.how == "checkpointed" else self.begin(ids)
        result: Tensor = self.last(hidden)
        return result

    def begin(self, ids: Tensor) -> Tensor:
        positions = torch.arange(LENGTH)
        if self.how == "flat tokens":
            positions = positions.repeat(len(ids))
            return torch.tanh(self.inside(self.token(ids.flatten()) + self.position(positions))).view(*ids.shape, 6)
        if self.how == "latents":
            each = self.inside(self.position.weight.detach())
        else:
            each = self.position(positions[None] if self.how in ("(1, T)", "repeated") else positions)
        if self.how == "expanded":
            each = each[None].expand(len(ids), -1, -1)
        if self.how == "repeated":  # as peft's prompt tuning does
            each = each.repeat(len(ids), 1, 1)
        return torch.tanh(self.inside(self.token(ids) + each))


def ids_of(rows: int, seed: int) -> Tensor:
    return torch.randint(0, 13, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses(model: nn.Module, ids: Tensor) -> Tensor:  # (rows, T)
    return F.cross_entropy(model(ids).transpose(1, 2), ids.flip(1), reduction="none")


def worst_error(how: str, numbers: list[int], *, tokens: bool = False, granularity: str = "sample") -> float:
    """Over windows of so many rows, the first of them audited."""
    model = Positioned(how)
    recorder, worst = Recorder(model, granularity=granularity), 0.0
    for seed, rows in enumerate(numbers):
        ids = ids_of(rows, seed)
        with recorder.record(candidates=torch.arange(rows)[:, None].expand(rows, LENGTH) if tokens else None):
            losses(model, ids).sum().backward()
        found = recorder.contributions()
        if granularity == "sample":
            parameters = [p for p in model.parameters() if p.requires_grad]
            for i in range(rows):
                alone = torch.autograd.grad(losses(model, ids[i : i + 1]).sum(), parameters)
                for p, value in zip(parameters, alone, strict=True):
                    worst = max(worst, float((found.per_candidate(p)[i] - value).norm() / value.norm()))
        else:  # a token's look-up is its own
            table = found.per_candidate(model.position.weight).view(rows, LENGTH, LENGTH, 6)
            assert not table[:, ~torch.eye(LENGTH, dtype=torch.bool)].any()
        recorder.clear()
    return worst


@pytest.mark.parametrize("how", ["(T,)", "(1, T)", "checkpointed"])
def test_positions_are_looked_up_for_each_row_however_many_rows_there_are(how: str) -> None:
    assert worst_error(how, [LENGTH - 1, LENGTH, 1, LENGTH + 1, LENGTH]) < 1e-12


def test_a_batch_of_as_many_rows_as_positions_may_be_audited_after_others() -> None:
    assert worst_error("(T,)", [1, LENGTH]) < 1e-12  # a single row is not audited


def test_positions_of_tokens_however_many_rows_there_are() -> None:
    worst_error("(T,)", [LENGTH, LENGTH - 1, 1], granularity="token")


def test_flattened_tokens_with_a_map_are_nobodys_positions() -> None:
    assert worst_error("flat tokens", [LENGTH, 3, LENGTH], tokens=True) < 1e-12


@pytest.mark.parametrize(("how", "layer"), [("(T,)", "position"), ("latents", "inside")])
def test_as_many_shared_rows_as_the_first_batch_has_are_refused(how: str, layer: str) -> None:
    """Were they taken for the candidates', nothing would add up wrongly."""
    with pytest.raises(CandidateLayoutError, match=rf"{layer} .* gets 5 rows, .* in a smaller batch too"):
        worst_error(how, [LENGTH])


@pytest.mark.parametrize("how", ["expanded", "repeated"])
def test_a_model_that_cannot_take_positions_of_each_row_is_told_why(how: str) -> None:
    with pytest.raises(RuntimeError, match=r"expand|must match") as caught:
        worst_error(how, [LENGTH - 1])
    (note,) = caught.value.__notes__
    assert "position looked up for each row" in note
    assert "functional=" in note


def test_a_model_that_repeats_virtual_tokens_itself_is_worked_out_as_a_whole() -> None:
    model, ids = Positioned("repeated"), ids_of(3, 0)
    recorder = Recorder(model, rules=rules_for([Positioned]))
    for _ in range(2):
        recorder.clear()
        with recorder.record():
            losses(model, ids).sum().backward()
    found = recorder.contributions()
    for i in range(3):
        alone = torch.autograd.grad(losses(model, ids[i : i + 1]).sum(), list(model.parameters()))
        for p, value in zip(model.parameters(), alone, strict=True):
            torch.testing.assert_close(found.per_candidate(p)[i], value, rtol=1e-12, atol=1e-15)
