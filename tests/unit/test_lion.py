"""Lion: the sign, linearised at a reference."""

from __future__ import annotations

import pytest
import torch
from lion_pytorch import Lion as LionPytorch

from ftw.errors import ConfigurationError, OptimizerStateError, UnsupportedOptimizerError
from ftw.optim_state import (
    Diagonal,
    Lion,
)
from tests.optimizers import F64, stepped


class TestLion:
    def test_at_the_reference_every_entry_moves_by_lr(self) -> None:
        p, optimizer = stepped(LionPytorch, 4, lr=0.25)
        reference = torch.randn((4, 3), generator=torch.Generator().manual_seed(3), dtype=F64)
        u = 0.9 * optimizer.state[p]["exp_avg"] + 0.1 * reference
        for floor in (0.0, 0.3, 10.0):
            predicted = Lion(floor).linearise(optimizer, {p: reference}).displacement({p: reference})[p]
            torch.testing.assert_close(predicted, -0.25 * u.sign(), rtol=1e-12, atol=0)

    def test_between_two_gradients_it_follows_the_secant(self) -> None:
        p, optimizer = stepped(LionPytorch, 4, lr=0.25)
        m = optimizer.state[p]["exp_avg"]
        one, other = (torch.randn((4, 3), generator=torch.Generator().manual_seed(i), dtype=F64) for i in (3, 4))
        at, to = (0.9 * m + 0.1 * g for g in (one, other))
        predicted = Lion(0.0).linearise(optimizer, {p: one}).displacement({p: other})[p]
        torch.testing.assert_close(predicted, -0.25 * to / at.abs(), rtol=1e-12, atol=1e-15)

    def test_the_floor_bounds_the_slope_and_spares_the_rest(self) -> None:
        p, optimizer = stepped(LionPytorch, 4, lr=0.25)
        m = optimizer.state[p]["exp_avg"]
        reference = torch.randn((4, 3), generator=torch.Generator().manual_seed(3), dtype=F64)
        reference[0] = -9 * m[0]  # u = 0
        sharp, flat = (Lion(floor).linearise(optimizer, {p: reference}).scale[p] for floor in (0.0, 0.5))
        assert isinstance(sharp, Diagonal)
        assert isinstance(flat, Diagonal)
        steepest = 0.25 * 0.1 / (0.5 * float(m.abs().mean()))
        assert float(sharp.values[0].min()) > 1e3 * steepest
        torch.testing.assert_close(flat.values[0], torch.full_like(m[0], steepest), rtol=1e-12, atol=0)
        below = sharp.values < steepest
        assert 0 < int(below.sum()) < p.numel()
        assert torch.equal(sharp.values[below], flat.values[below])

    def test_entries_that_have_seen_nothing_get_a_finite_scale(self) -> None:
        p, optimizer = stepped(LionPytorch, 0, lr=0.25, weight_decay=0.1)
        update = Lion().linearise(optimizer, {p: torch.zeros_like(p)})
        assert bool(torch.isfinite(update.scale[p].solve(update.offset[p])).all())
        assert torch.equal(update.displacement({p: torch.zeros_like(p)})[p], -0.25 * 0.1 * p)

    def test_only_whether_there_was_a_step_is_known(self) -> None:
        p, optimizer = stepped(LionPytorch, 1)
        assert Lion().age(optimizer.param_groups[0], optimizer.state[p]) is None

    def test_an_unprepared_state_is_refused(self) -> None:
        p, optimizer = stepped(LionPytorch, 1)
        with pytest.raises(OptimizerStateError, match=r"prepare\(parameter, group, state\)"):
            Lion().linearise_tensor(p.detach(), optimizer.param_groups[0], optimizer.state[p], None)

    def test_decay_out_of_the_groups_sight_is_refused(self) -> None:
        _, optimizer = stepped(LionPytorch, 0, lr=0.25, weight_decay=0.1, decoupled_weight_decay=True)
        with pytest.raises(
            UnsupportedOptimizerError, match=r"decoupled_weight_decay=True.* weight_decay divided by lr"
        ):
            Lion().linearise(optimizer)

    def test_a_gradient_that_is_shut_out(self) -> None:
        _, optimizer = stepped(LionPytorch, 0, betas=(1.0, 0.9))
        with pytest.raises(UnsupportedOptimizerError, match=r"a first beta below 1 is modelled"):
            Lion().linearise(optimizer)

    @pytest.mark.parametrize("floor", [-0.1, float("nan"), float("inf")])
    def test_bad_floors_are_refused(self, floor: float) -> None:
        with pytest.raises(ConfigurationError, match="floor is"):
            Lion(floor)
