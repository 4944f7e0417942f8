"""Adam's floor, half-precision state, and the rounding of step counters."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lion_pytorch import Lion as LionPytorch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, OptimizerStateError
from ftw.optim_state import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Diagonal,
    Lion,
    NAdam,
    Preconditioner,
    RAdam,
    RMSprop,
)
from ftw.optim_state.base import state_of, state_rows
from tests.optimizers import stepped


class TestFloor:
    def test_no_entry_has_a_root_below_the_floor(self) -> None:
        p, optimizer = stepped(torch.optim.AdamW, 3, lr=0.1, betas=(0.9, 0.99), eps=0.0)
        state = optimizer.state[p]
        state["exp_avg_sq"][0] = 1e-20
        reference = {p: torch.full_like(p, 1e-12)}
        exact, floored = (AdamW(floor).linearise(optimizer, reference) for floor in (0.0, 0.1))
        rms = float((state["exp_avg_sq"].mean() / (1 - 0.99**3)).sqrt())
        largest = 0.1 * exact.gain[p] / (0.1 * rms)
        a, b = exact.scale[p], floored.scale[p]
        assert isinstance(a, Diagonal)
        assert isinstance(b, Diagonal)
        assert float(a.values.max()) > 1e6 * largest
        assert float(b.values.max()) == pytest.approx(largest, rel=1e-13)
        high = a.values < 0.5 * largest
        assert 0 < int(high.sum()) < p.numel()
        assert torch.equal(a.values[high], b.values[high])

    def test_it_does_not_depend_on_how_rows_are_cut(self) -> None:
        p, optimizer = stepped(torch.optim.AdamW, 3, lr=0.1)
        optimizer.state[p]["exp_avg_sq"][:2] *= 1e-12
        preconditioner, group, reference = AdamW(0.5), optimizer.param_groups[0], torch.ones_like(p)
        state = preconditioner.prepare(p.detach(), group, state_of(optimizer, p))
        whole = preconditioner.linearise(optimizer, {p: reference}).scale[p].apply(reference)
        for rows in (slice(0, 2), slice(2, 4), slice(3, 4)):
            part = preconditioner.linearise_tensor(p.detach()[rows], group, state_rows(state, p, rows), reference[rows])
            torch.testing.assert_close(part.scale.apply(reference[rows]), whole[rows], rtol=1e-14, atol=0)

    def test_an_unprepared_state_is_refused(self) -> None:
        p, optimizer = stepped(torch.optim.AdamW, 1)
        with pytest.raises(OptimizerStateError, match=r"prepare\(parameter, group, state\)"):
            AdamW(0.5).linearise_tensor(p.detach(), optimizer.param_groups[0], optimizer.state[p], None)

    def test_the_first_step_has_none(self) -> None:
        p, optimizer = stepped(torch.optim.AdamW, 0, lr=0.1)
        reference = {p: torch.full_like(p, 1e-5)}
        exact, floored = (AdamW(floor).linearise(optimizer, reference) for floor in (0.0, 0.9))
        assert torch.equal(exact.scale[p].apply(reference[p]), floored.scale[p].apply(reference[p]))

    @pytest.mark.parametrize("floor", [-0.1, float("nan"), float("inf")])
    def test_bad_floors_are_refused(self, floor: float) -> None:
        with pytest.raises(ConfigurationError, match="floor is"):
            Adam(floor)


class TestPrecision:
    @pytest.mark.parametrize(
        ("ours", "cls", "options"),
        [
            (SGD(), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
            (Adam(), torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
            (AdamW(), torch.optim.AdamW, {}),
            (AdamW(0.5), torch.optim.AdamW, {}),
            (NAdam(), torch.optim.NAdam, {"weight_decay": 0.1}),
            (RAdam(), torch.optim.RAdam, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
            (RAdam(), torch.optim.RAdam, {"betas": (0.8, 0.5), "weight_decay": 0.1}),
            (RMSprop(), torch.optim.RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
            (Adagrad(), torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
            (Lion(), LionPytorch, {"weight_decay": 0.1}),
        ],
    )
    def test_half_precision_state_is_worked_out_in_float32(
        self, ours: Preconditioner, cls: Callable[..., Optimizer], options: dict[str, Any]
    ) -> None:
        p, optimizer = stepped(cls, 7, dtype=torch.bfloat16, lr=0.1, **options)
        reference = torch.full_like(p, 0.37)
        update = ours.linearise(optimizer, {p: reference})
        assert update.offset[p].dtype == torch.float32
        wide = Parameter(p.detach().double())
        twin = cls([wide], lr=0.1, **options)
        for key, value in optimizer.state[p].items():
            alike = isinstance(value, Tensor) and value.shape == p.shape
            assert not alike or value.dtype == torch.bfloat16
            twin.state[wide][key] = value.double() if alike else copy.deepcopy(value)
        expected = ours.linearise(twin, {wide: reference.double()}).displacement({wide: reference.double()})[wide]
        torch.testing.assert_close(
            update.displacement({p: reference.float()})[p].double(), expected, rtol=2e-6, atol=1e-8
        )

    @pytest.mark.parametrize("steps", [0, 1, 3, 7])
    @pytest.mark.parametrize(
        ("ours", "cls", "options"),
        [
            (AdamW(), torch.optim.AdamW, {"foreach": False}),
            (NAdam(), torch.optim.NAdam, {"foreach": False}),
            (NAdam(), torch.optim.NAdam, {"foreach": True, "momentum_decay": 0.1}),
            (RAdam(), torch.optim.RAdam, {"foreach": False}),
            (RAdam(), torch.optim.RAdam, {"foreach": True, "betas": (0.9, 0.95)}),
            (RMSprop(), torch.optim.RMSprop, {"foreach": False, "momentum": 0.5}),
        ],
    )
    def test_capturable_state_rounds_as_torch_does(
        self,
        ours: Preconditioner,
        cls: Callable[..., Optimizer],
        options: dict[str, Any],
        steps: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # The capturable path needs an accelerator; its arithmetic does not, once the CPU is let in.
        module = importlib.import_module(f"torch.optim.{cls.__name__.lower().removesuffix('w')}")  # AdamW is in adam.py
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])
        p, optimizer = stepped(cls, steps, lr=1.0, capturable=True, **options)
        p.data.zero_()
        p.grad = torch.full_like(p, 0.7)
        update = ours.linearise(optimizer, {p: p.grad})
        optimizer.param_groups[0]["capturable"] = False
        rounded_otherwise = ours.linearise(optimizer, {p: p.grad}).displacement({p: p.grad})[p]
        optimizer.param_groups[0]["capturable"] = True
        optimizer.step()
        torch.testing.assert_close(update.displacement({p: p.grad})[p], p.detach(), rtol=3e-7, atol=0)
        if steps == 0 and cls in (torch.optim.AdamW, torch.optim.NAdam):  # the reason for following torch's rounding
            assert float((rounded_otherwise / p.detach() - 1).abs().max()) > 3e-6

    def test_a_step_counter_may_be_a_plain_number(self) -> None:
        p, optimizer = stepped(torch.optim.Adam, 3)
        expected = Adam().linearise(optimizer)
        optimizer.state[p]["step"] = 3
        assert torch.equal(Adam().linearise(optimizer).offset[p], expected.offset[p])
        assert Adam().age(optimizer.param_groups[0], optimizer.state[p]) == 3
