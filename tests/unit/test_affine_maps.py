"""What the maps of the elementwise preconditioners are made of: kappa, stale moments, direction, warm-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lion_pytorch import Lion as LionPytorch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import OptimizerStateError, UnsupportedOptimizerError
from ftw.optim_state import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Diagonal,
    Identity,
    Lion,
    NAdam,
    Preconditioner,
    RAdam,
    RMSprop,
    Scalar,
)
from ftw.optim_state.base import state_of
from ftw.testing import check_preconditioner
from tests.optimizers import (
    COUNTED,
    F64,
    TORCH,
    first_of,
    let_capturable_onto_the_cpu,
    stepped,
    two_groups,
)

EPSILON = torch.finfo(torch.float32).eps


def _unmoved(state: Mapping[str, Any], beta: float) -> Tensor:
    """h with `(beta*v + (1-beta)*h^2) / (1 - beta^(t+1)) == v / (1 - beta^t)`."""
    t = int(state["step"])
    grown = (1 - beta ** (t + 1)) / (1 - beta**t)
    root: Tensor = (state["exp_avg_sq"] * (grown - beta) / (1 - beta)).sqrt()
    return root


class TestGain:
    @pytest.mark.parametrize(
        ("steps", "options", "gain"),
        [
            (0, {}, 1.0),
            (3, {}, 1.0),
            (0, {"momentum": 0.9, "dampening": 0.4}, 1.0),
            (1, {"momentum": 0.9, "dampening": 0.4}, 0.6),
            (0, {"momentum": 0.9, "nesterov": True}, 1.9),
            (2, {"momentum": 0.9, "nesterov": True}, 1.9),
            (2, {"dampening": 0.4}, 1.0),
        ],
    )
    def test_of_sgd_relates_m_to_lr(self, steps: int, options: dict[str, Any], gain: float) -> None:
        p, optimizer = stepped(torch.optim.SGD, steps, lr=0.25, **options)
        update = SGD().linearise(optimizer)
        assert update.gain[p] == pytest.approx(gain, rel=1e-15)
        assert update.scale[p] == Scalar(0.25 * update.gain[p])

    @pytest.mark.parametrize("steps", [1, 2, 7])
    def test_of_adam_relates_m_to_p(self, steps: int) -> None:
        p, optimizer = stepped(torch.optim.AdamW, steps - 1, lr=0.25, betas=(0.8, 0.9), eps=1e-3)
        reference = torch.full_like(p, 0.7)
        update = AdamW().linearise(optimizer, {p: reference})
        second = 0.1 * reference**2 + 0.9 * optimizer.state[p]["exp_avg_sq"] if steps > 1 else 0.1 * reference**2
        inverse_curvature = 0.25 / ((second / (1 - 0.9**steps)).sqrt() + 1e-3)
        assert update.gain[p] == pytest.approx(0.2 / (1 - 0.8**steps), rel=1e-14)
        scale = update.scale[p]
        assert isinstance(scale, Diagonal)
        torch.testing.assert_close(scale.values / update.gain[p], inverse_curvature, rtol=1e-13, atol=0)


CAPTURABLE = {
    f"{ours.__name__}, {name}": (ours, cls, options)
    for ours, cls, table in TORCH
    if (ours, cls) in COUNTED
    for name, options in table.items()
    if name != "fused"
}


class TestCapturable:
    @pytest.mark.parametrize("case", CAPTURABLE)
    def test_it_is_worked_out_in_the_counters_float32(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch's own step, let onto the CPU. Its order of float32 operations differs from ours."""
        ours, cls, options = CAPTURABLE[case]
        let_capturable_onto_the_cpu(monkeypatch.setattr)
        check_preconditioner(
            ours(), two_groups(cls, first_of(ours), capturable=True, **options), steps=9, tolerance=4 * EPSILON
        )

    def test_else_the_first_step_would_be_a_hundred_times_as_far_off(self) -> None:
        """b2 = .999 in float32: what `capturable` adds to the correction is no rounding of float64."""
        p, optimizer = stepped(torch.optim.AdamW, 0, lr=0.1)
        plain = AdamW().linearise(optimizer, {p: torch.ones_like(p)}).displacement({p: torch.ones_like(p)})[p]
        optimizer.param_groups[0]["capturable"] = True
        counted = AdamW().linearise(optimizer, {p: torch.ones_like(p)}).displacement({p: torch.ones_like(p)})[p]
        assert float(((plain - counted) / plain).abs().max()) > 20 * EPSILON


class TestStaleSecondMoment:
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_v_is_the_last_steps_and_the_rest_the_coming_steps(self, amsgrad: bool) -> None:
        p, optimizer = stepped(torch.optim.Adam, 5, lr=0.1, betas=(0.8, 0.5), eps=1e-3, amsgrad=amsgrad)
        update = Adam().linearise(optimizer, None)
        state, scale = optimizer.state[p], update.scale[p]
        assert isinstance(scale, Diagonal)
        second = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        for at in ((0, 0), (3, 2), (1, 1)):
            denominator = (float(second[at]) / (1 - 0.5**5)) ** 0.5 + 1e-3
            m = 0.1 * 0.2 / (1 - 0.8**6) / denominator
            o = 0.1 * 0.8 * float(state["exp_avg"][at]) / (1 - 0.8**6) / denominator
            assert float(scale.values[at]) == pytest.approx(m, rel=1e-13)
            assert float(update.offset[p][at]) == pytest.approx(o, rel=1e-13)

    def test_it_is_the_exact_one_where_v_no_longer_moves(self) -> None:
        p, optimizer = stepped(torch.optim.Adam, 0, lr=0.1)
        gradient = torch.full_like(p, 0.3)
        for _ in range(4):
            p.grad = gradient.clone()
            optimizer.step()
        stale, fresh = Adam().linearise(optimizer), Adam().linearise(optimizer, {p: gradient})
        torch.testing.assert_close(
            stale.displacement({p: gradient})[p], fresh.displacement({p: gradient})[p], rtol=1e-12, atol=0
        )

    @pytest.mark.parametrize(
        ("ours", "cls", "options", "as_left"),
        [
            # A reference after which the second moment stands where the last step left it.
            (NAdam, torch.optim.NAdam, {"betas": (0.8, 0.9)}, lambda s: _unmoved(s, 0.9)),
            (RMSprop, torch.optim.RMSprop, {"momentum": 0.5, "alpha": 0.9}, lambda s: s["square_avg"].sqrt()),
            (Adagrad, torch.optim.Adagrad, {"lr_decay": 0.1}, lambda s: torch.zeros_like(s["sum"])),
        ],
    )
    def test_it_is_that_of_a_reference_which_leaves_v_alone(
        self, ours: type[Preconditioner], cls: Callable[..., Optimizer], options: dict[str, Any], as_left: Any
    ) -> None:
        p, optimizer = stepped(cls, 7, lr=0.1, **options)
        gradient = {p: torch.randn((4, 3), generator=torch.Generator().manual_seed(5), dtype=F64)}
        stale = ours().linearise(optimizer).displacement(gradient)[p]
        fresh = ours().linearise(optimizer, {p: as_left(optimizer.state[p])}).displacement(gradient)[p]
        torch.testing.assert_close(stale, fresh, rtol=1e-12, atol=0)

    def test_of_radam_takes_v_as_it_stands_and_rectifies_for_the_coming_step(self) -> None:
        p, optimizer = stepped(torch.optim.RAdam, 7, lr=0.1, betas=(0.8, 0.9), eps=1e-3)
        scale = RAdam().linearise(optimizer).scale[p]
        assert isinstance(scale, Diagonal)
        longest = 2 / 0.1 - 1
        length = longest - 2 * 8 * 0.9**8 / (1 - 0.9**8)
        squared = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        root = optimizer.state[p]["exp_avg_sq"].sqrt() + 1e-3
        expected = 0.1 * squared**0.5 * (1 - 0.9**7) ** 0.5 / root * 0.2 / (1 - 0.8**8)
        torch.testing.assert_close(scale.values, expected, rtol=1e-12, atol=0)

    def test_of_centered_rmsprop_takes_both_averages_as_they_stand(self) -> None:
        p, optimizer = stepped(torch.optim.RMSprop, 7, lr=0.1, alpha=0.9, centered=True, eps=1e-3)
        scale, state = RMSprop().linearise(optimizer).scale[p], optimizer.state[p]
        assert isinstance(scale, Diagonal)
        expected = 0.1 / ((state["square_avg"] - state["grad_avg"] ** 2).sqrt() + 1e-3)
        torch.testing.assert_close(scale.values, expected, rtol=1e-12, atol=0)

    def test_of_lion_is_the_map_at_the_momentum(self) -> None:
        p, optimizer = stepped(LionPytorch, 3, lr=0.1)
        momentum = optimizer.state[p]["exp_avg"]
        stale, at_momentum = Lion().linearise(optimizer), Lion().linearise(optimizer, {p: momentum})
        torch.testing.assert_close(stale.offset[p], at_momentum.offset[p], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(stale.scale[p].apply(momentum), at_momentum.scale[p].apply(momentum))

    @pytest.mark.parametrize(
        ("ours", "cls"),
        [
            (AdamW, torch.optim.AdamW),
            (NAdam, torch.optim.NAdam),
            (RMSprop, torch.optim.RMSprop),
            (Adagrad, torch.optim.Adagrad),
            (Lion, LionPytorch),
        ],
    )
    def test_before_the_first_step_there_is_none(
        self, ours: type[Preconditioner], cls: Callable[..., Optimizer]
    ) -> None:
        p, optimizer = stepped(cls, 0)
        with pytest.raises(OptimizerStateError, match=r"taken no step yet .* pass a reference gradient"):
            ours().linearise(optimizer)
        assert ours().age(optimizer.param_groups[0], state_of(optimizer, p)) == 0

    def test_a_state_of_zeros_made_in_advance_is_no_step(self) -> None:
        p, optimizer = stepped(torch.optim.AdamW, 0, lr=0.1)
        fresh = AdamW().linearise(optimizer, {p: torch.ones_like(p)})
        zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
        with pytest.raises(OptimizerStateError, match="taken no step yet"):
            AdamW().linearise(optimizer)
        made = AdamW().linearise(optimizer, {p: torch.ones_like(p)})
        assert torch.equal(made.offset[p], fresh.offset[p])
        assert torch.equal(made.scale[p].apply(torch.ones_like(p)), fresh.scale[p].apply(torch.ones_like(p)))


class TestMaximize:
    @pytest.mark.parametrize(
        ("ours", "cls", "options"),
        [
            (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
            (Adam, torch.optim.Adam, {"weight_decay": 0.1}),
            (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
            (NAdam, torch.optim.NAdam, {"weight_decay": 0.1}),
            (RAdam, torch.optim.RAdam, {"weight_decay": 0.1, "betas": (0.9, 0.95)}),
            (RMSprop, torch.optim.RMSprop, {"weight_decay": 0.1, "centered": True, "momentum": 0.9}),
            (Adagrad, torch.optim.Adagrad, {"weight_decay": 0.1}),
        ],
    )
    def test_is_minimising_the_negated_loss(
        self, ours: type[Preconditioner], cls: Callable[..., Optimizer], options: dict[str, Any]
    ) -> None:
        parameters = [Parameter(torch.linspace(-1, 1, 12, dtype=F64).view(4, 3)) for _ in range(2)]
        up, down = cls(parameters[:1], lr=0.1, maximize=True, **options), cls(parameters[1:], lr=0.1, **options)
        generator = torch.Generator().manual_seed(2)
        for _ in range(8):
            gradient = torch.randn((4, 3), generator=generator, dtype=F64)
            rise, fall = (
                ours().linearise(optimizer, {p: g})
                for optimizer, p, g in zip((up, down), parameters, (gradient, -gradient), strict=True)
            )
            a, b = parameters
            assert (rise.sign[a], fall.sign[b]) == (-1.0, 1.0)
            assert torch.equal(rise.scale[a].apply(gradient), fall.scale[b].apply(gradient))
            assert torch.equal(rise.offset[a], -fall.offset[b])
            assert torch.equal(rise.displacement({a: gradient})[a], fall.displacement({b: -gradient})[b])
            a.grad, b.grad = gradient.clone(), -gradient
            up.step()
            down.step()
            assert torch.equal(a, b)

    def test_of_identity_climbs(self) -> None:
        p, optimizer = stepped(torch.optim.RMSprop, 2, lr=0.125, maximize=True)
        assert torch.equal(Identity().linearise(optimizer).displacement({p: torch.ones_like(p)})[p], p * 0 + 0.125)


class TestRAdam:
    @pytest.mark.parametrize(("beta2", "unadapted"), [(0.999, 5), (0.9, 5), (0.8, 6), (0.7, 9), (0.6, 40)])
    def test_steps_are_plain_momentum_until_the_variance_is_tractable(self, beta2: float, unadapted: int) -> None:
        p, optimizer = stepped(torch.optim.RAdam, 0, lr=0.1, betas=(0.5, beta2))
        for step in range(40):
            reference = {p: torch.randn_like(p)}
            scale = RAdam().linearise(optimizer, reference).scale[p]
            age = RAdam().age(optimizer.param_groups[0], state_of(optimizer, p))
            if step < unadapted:
                assert isinstance(scale, Scalar)
                assert scale.value == pytest.approx(0.1 * 0.5 / (1 - 0.5 ** (step + 1)), rel=1e-15)
                assert RAdam().linearise(optimizer).scale[p] == scale  # no reference needed
                assert age is None
            else:
                assert isinstance(scale, Diagonal)
                assert age == step
            p.grad = reference[p]
            optimizer.step()


class TestAdagrad:
    def test_a_group_that_was_added_later_has_no_state_yet(self) -> None:
        p, optimizer = stepped(torch.optim.Adagrad, 2, lr=0.1, initial_accumulator_value=0.3)
        late = Parameter(torch.ones(2, 2, dtype=F64))
        optimizer.add_param_group({"params": [late]})
        gradient = {late: torch.full_like(late, 0.7)}
        predicted = Adagrad().linearise(optimizer, gradient).displacement(gradient)[late]
        p.grad, late.grad = None, gradient[late].clone()
        optimizer.step()
        torch.testing.assert_close(late.detach() - 1, predicted, rtol=1e-12, atol=0)

    def test_an_initial_value_that_torch_would_ignore_is_refused(self) -> None:
        _, optimizer = stepped(torch.optim.Adagrad, 2)
        late = Parameter(torch.ones(2))
        optimizer.add_param_group({"params": [late], "initial_accumulator_value": 0.5})
        with pytest.raises(UnsupportedOptimizerError, match=r"group 1 has initial_accumulator_value=0.5 and no state"):
            Adagrad().linearise(optimizer)
        late.grad = torch.ones_like(late)
        optimizer.step()
        assert list(Adagrad().linearise(optimizer, {late: late.grad}).scale) == [late]

    def test_zeros_made_in_advance_are_no_state(self) -> None:
        p, optimizer = stepped(torch.optim.Adagrad, 0)
        group = optimizer.param_groups[0]
        assert state_of(optimizer, p).keys() == {"step", "sum"}
        assert Adagrad().prepare(p.detach(), group, state_of(optimizer, p)) == {}
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert Adagrad().prepare(p.detach(), group, state_of(optimizer, p)) is optimizer.state[p]

    def test_what_was_accumulated_in_advance_is_a_second_moment(self) -> None:
        p, optimizer = stepped(torch.optim.Adagrad, 0, lr=0.1, initial_accumulator_value=0.25, eps=0.0)
        scale = Adagrad().linearise(optimizer).scale[p]
        assert torch.equal(scale.apply(torch.ones_like(p)), torch.full_like(p, 0.1 / 0.5))
