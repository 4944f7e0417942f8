"""Preconditioners against real optimizers: exact displacement, old mistakes, refusals, look-up."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lion_pytorch import Lion as LionPytorch
from lion_pytorch.foreach import Lion as LionForeach
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw import registry
from ftw.errors import ConfigurationError, OptimizerStateError, UnsupportedOptimizerError
from ftw.optim_state import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AffineUpdate,
    Diagonal,
    Identity,
    Lion,
    NAdam,
    Preconditioner,
    RAdam,
    RMSprop,
    TensorUpdate,
    preconditioner_for,
)
from ftw.optim_state.lookup import BUILT_IN
from ftw.testing import check_preconditioner
from tests.optimizers import F64, LION_OPTIONS, TORCH, Parameters, first_of, stepped, two_groups

CASES: dict[str, tuple[Preconditioner, Callable[[Parameters], Optimizer]]] = {
    "identity": (Identity(), two_groups(torch.optim.SGD, {"lr": 0.3}, lr=0.05)),
    "identity, maximize": (Identity(), two_groups(torch.optim.SGD, {"lr": 0.3}, lr=0.05, maximize=True)),
    **{
        f"{ours.__name__.lower()}, {name}": (ours(), two_groups(cls, first_of(ours), **{"lr": 0.05, **options}))
        for ours, cls, table in TORCH
        for name, options in table.items()
    },
    **{
        f"lion, {name}, {where}floor {floor}": (
            Lion(floor),
            two_groups(cls, first_of(Lion), **{"lr": 0.05, **options}),
        )
        for where, cls in (("", LionPytorch), ("foreach, ", LionForeach))
        for name, options in LION_OPTIONS.items()
        for floor in (0.0, 1.0)
    },
    "adam, decoupled": (
        Adam(),
        two_groups(torch.optim.Adam, {"lr": 0.3, "decoupled_weight_decay": True}, lr=0.05, weight_decay=0.2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_displacement_is_that_of_the_real_step(case: str) -> None:
    preconditioner, make_optimizer = CASES[case]
    check_preconditioner(preconditioner, make_optimizer, steps=8, tolerance=1e-12)


def test_every_registered_preconditioner_is_checked() -> None:
    names = [name for name, by in registry.available("optim_state").items() if by == ["filter-then-weight"]]
    builtin = {registry.load("optim_state", name) for name in names}
    quantized = importlib.import_module("tests.unit.test_quantized_state")
    checked = {type(preconditioner) for preconditioner, _ in (*CASES.values(), *quantized.CASES.values())}
    # There, each has a class of tests that bears its name.
    structured = importlib.import_module("tests.unit.test_structured_optimizers")
    assert builtin == checked | {cls for cls in builtin if hasattr(structured, f"Test{cls.__name__}")}
    assert set(BUILT_IN) == builtin - {Identity}


class TestTheCheckFindsKnownMistakes:
    """Each is a mistake of public code (DESIGN, section 7); the shipped check must not pass it."""

    class EpsilonInside(Adam):
        def linearise_tensor(
            self,
            parameter: Tensor,
            group: Mapping[str, Any],
            state: Mapping[str, Any],
            reference: Tensor | None,
        ) -> TensorUpdate:
            update = super().linearise_tensor(parameter, {**group, "eps": 0.0}, state, reference)
            assert isinstance(update.scale, Diagonal)
            root = group["lr"] * update.gain / update.scale.values
            inside = (root**2 + group["eps"]).sqrt()
            shrink = root / inside
            return TensorUpdate(Diagonal(update.scale.values * shrink), update.offset * shrink, update.gain)

    class WithoutOffset(Adam):
        def linearise_tensor(self, *args: Any) -> TensorUpdate:
            update = super().linearise_tensor(*args)
            return TensorUpdate(update.scale, torch.zeros_like(update.offset), update.gain)

    class HardCodedBetas(Adam):
        def linearise_tensor(self, parameter: Tensor, group: Mapping[str, Any], *rest: Any) -> TensorUpdate:
            return super().linearise_tensor(parameter, {**group, "betas": (0.9, 0.999)}, *rest)

    class WithoutBiasCorrection(Adam):
        def linearise_tensor(
            self,
            parameter: Tensor,
            group: Mapping[str, Any],
            state: Mapping[str, Any],
            reference: Tensor | None,
        ) -> TensorUpdate:
            late = {**state, "step": 10_000} if state else state
            return super().linearise_tensor(parameter, group, late, reference)

    class LastSecondMoment(Adam):
        def linearise_tensor(
            self,
            parameter: Tensor,
            group: Mapping[str, Any],
            state: Mapping[str, Any],
            reference: Tensor | None,
        ) -> TensorUpdate:
            return super().linearise_tensor(parameter, group, state, None if state else reference)

    class CreatesState(Adam):
        def linearise(self, optimizer: Optimizer, reference: Any = None) -> AffineUpdate:
            update = super().linearise(optimizer, reference)
            for p in update.scale:
                optimizer.state[p]  # a defaultdict makes the entry
            return update

    class OneScaleForTheWholeTensor(Adam):
        def linearise_tensor(self, *args: Any) -> TensorUpdate:
            update = super().linearise_tensor(*args)
            return TensorUpdate(update.scale, update.offset * update.offset.numel(), update.gain)

    @pytest.mark.parametrize(
        ("mistake", "said"),
        [
            (EpsilonInside, "predicted displacement"),
            (WithoutOffset, "step 1: the predicted displacement"),
            (HardCodedBetas, "predicted displacement"),
            (WithoutBiasCorrection, "step 1: the predicted displacement"),
            (LastSecondMoment, "step 1: the predicted displacement"),
            (CreatesState, "step 0: linearise wrote to"),
            (OneScaleForTheWholeTensor, "of rows is not that of the whole"),
        ],
    )
    def test_it_is_found(self, mistake: type[Adam], said: str) -> None:
        make_optimizer = two_groups(torch.optim.Adam, {"lr": 0.1}, lr=0.2, betas=(0.8, 0.9), eps=1e-4)
        check_preconditioner(Adam(), make_optimizer)
        with pytest.raises(AssertionError, match=said):
            check_preconditioner(mistake(), make_optimizer)


class TestRefusals:
    @pytest.mark.parametrize(("ours", "cls"), [(ours, cls) for ours, cls, _ in TORCH])
    def test_options_that_are_not_modelled(self, ours: type[Preconditioner], cls: type[Optimizer]) -> None:
        _, optimizer = stepped(cls, 0, F64, lr=0.1, differentiable=True)
        with pytest.raises(
            UnsupportedOptimizerError, match=r"differentiable=True in parameter group 0; .* set it to False"
        ):
            ours().linearise(optimizer)

    @pytest.mark.parametrize(("ours", "cls"), [(ours, cls) for ours, cls, _ in TORCH])
    def test_groups_of_opposite_sense(self, ours: type[Preconditioner], cls: type[Optimizer]) -> None:
        optimizer = two_groups(cls, {"maximize": True}, lr=0.1)([Parameter(torch.ones(2)), Parameter(torch.ones(3))])
        with pytest.raises(UnsupportedOptimizerError, match="maximises in some parameter groups and minimises in"):
            ours().linearise(optimizer)

    def test_identity_needs_a_learning_rate(self) -> None:
        _, optimizer = stepped(torch.optim.RMSprop, 0)
        del optimizer.param_groups[0]["lr"]
        with pytest.raises(UnsupportedOptimizerError, match="has no 'lr' in parameter group 0"):
            Identity().linearise(optimizer)

    def test_identity_needs_one_that_the_optimizer_does_not_make_itself(self) -> None:
        hf = pytest.importorskip("transformers.optimization")
        optimizer = hf.Adafactor([Parameter(torch.ones(2, 2))])  # relative_step: lr=None
        with pytest.raises(UnsupportedOptimizerError, match=r"Adafactor has lr=None .* geometry='vanilla'"):
            Identity().linearise(optimizer)

    def test_dampening_that_shuts_the_gradient_out(self) -> None:
        _, optimizer = stepped(torch.optim.SGD, 0, momentum=0.9, dampening=1.0)
        with pytest.raises(UnsupportedOptimizerError, match=r"dampening=1.0 .* below 1"):
            SGD().linearise(optimizer)

    @pytest.mark.parametrize("ours", [Identity, Lion, *(ours for ours, _, _ in TORCH)])
    def test_complex_parameters_and_sparse_gradients(self, ours: type[Preconditioner]) -> None:
        group = torch.optim.AdamW([Parameter(torch.ones(2))]).param_groups[0]
        values = torch.ones(2, 2)
        with pytest.raises(UnsupportedOptimizerError, match=r"is complex .*view_as_real"):
            ours().linearise_tensor(values.to(torch.complex64), group, {}, values)
        with pytest.raises(UnsupportedOptimizerError, match=r"is sparse .*sparse=False"):
            ours().linearise_tensor(values, group, {}, values.to_sparse())

    @pytest.mark.parametrize(
        ("ours", "cls", "options", "lacking"),
        [
            (Adam, torch.optim.Adam, {"amsgrad": True}, "max_exp_avg_sq"),
            (NAdam, torch.optim.NAdam, {}, "mu_product"),
            (RAdam, torch.optim.RAdam, {}, "exp_avg_sq"),
            (RMSprop, torch.optim.RMSprop, {"momentum": 0.9}, "momentum_buffer"),
            (RMSprop, torch.optim.RMSprop, {"centered": True}, "grad_avg"),
            (Adagrad, torch.optim.Adagrad, {}, "sum"),
            (Lion, LionPytorch, {}, "exp_avg"),
        ],
    )
    def test_a_state_that_lacks_an_entry(
        self, ours: type[Preconditioner], cls: Callable[..., Optimizer], options: dict[str, Any], lacking: str
    ) -> None:
        p, optimizer = stepped(cls, 2, **options)
        optimizer.state[p]["strange"] = optimizer.state[p].pop(lacking)
        with pytest.raises(OptimizerStateError, match=rf"lacks \['{lacking}'\]"):
            ours().linearise(optimizer, {p: torch.ones_like(p)})

    @pytest.mark.parametrize(
        ("ours", "cls", "options", "key", "shape"),
        [
            (SGD, torch.optim.SGD, {"momentum": 0.9}, "momentum_buffer", (3, 4)),
            (Adam, torch.optim.Adam, {}, "exp_avg", (3,)),
            (AdamW, torch.optim.AdamW, {"amsgrad": True}, "max_exp_avg_sq", (4, 3, 2)),
            (NAdam, torch.optim.NAdam, {}, "exp_avg", (12,)),
            (RAdam, torch.optim.RAdam, {}, "exp_avg_sq", (3, 4)),
            (RMSprop, torch.optim.RMSprop, {"momentum": 0.9}, "momentum_buffer", (3,)),
            (Adagrad, torch.optim.Adagrad, {}, "sum", (3,)),
            (Lion, LionPytorch, {}, "exp_avg", (3,)),
            (Adafactor, torch.optim.Adafactor, {}, "row_var", (1, 3)),
        ],
    )
    def test_a_state_of_another_parameter(
        self,
        ours: type[Preconditioner],
        cls: Callable[..., Optimizer],
        options: dict[str, Any],
        key: str,
        shape: tuple[int, ...],
    ) -> None:
        """`load_state_dict` goes by position and looks at no shape; some of these would broadcast without a word."""
        p, optimizer = stepped(cls, 2, **options)
        optimizer.state[p][key] = torch.ones(shape, dtype=F64)
        with pytest.raises(
            OptimizerStateError, match=rf"{key} of shape .*; .* needed; load a state that was saved with"
        ):
            ours().linearise(optimizer, {p: torch.ones_like(p)})

    def test_an_optimizer_of_another_class(self) -> None:
        _, optimizer = stepped(torch.optim.RMSprop, 0)
        with pytest.raises(
            UnsupportedOptimizerError, match=r"was given the optimizer RMSprop; it models torch.optim.adamw.AdamW; "
        ):
            AdamW().linearise(optimizer)

    def test_a_displacement_of_a_parameter_that_was_not_linearised(self) -> None:
        p, optimizer = stepped(torch.optim.SGD, 0)
        update = SGD().linearise(optimizer)
        with pytest.raises(ConfigurationError, match=r"shape \[\(2,\)\] that this update does not hold"):
            update.displacement({p: torch.ones_like(p), Parameter(torch.ones(2)): torch.ones(2)})


class TestLookup:
    @pytest.mark.parametrize(
        ("cls", "ours"), [*((cls, ours) for ours, cls, _ in TORCH), (LionPytorch, Lion), (LionForeach, Lion)]
    )
    def test_the_class_decides(self, cls: type[Optimizer], ours: type[Preconditioner]) -> None:
        _, optimizer = stepped(cls, 0)
        assert type(preconditioner_for(optimizer)) is ours

    @pytest.mark.parametrize("cls", [torch.optim.Adadelta, torch.optim.LBFGS, torch.optim.Rprop])
    def test_an_unknown_optimizer_is_told_the_ways_on(self, cls: type[Optimizer]) -> None:
        _, optimizer = stepped(cls, 0)
        with pytest.raises(UnsupportedOptimizerError) as caught:
            preconditioner_for(optimizer)
        for part in (
            f"torch.optim.{cls.__name__.lower()}.{cls.__name__};",
            *(known.__name__ for _, known, _ in TORCH),
            "lion_pytorch.lion_pytorch.Lion",
            "AdamW8bit",
            "preconditioner='identity'",
            "entry-point group 'ftw.optim_state'",
        ):
            assert part in str(caught.value)

    def test_a_subclass_may_step_otherwise_unless_it_is_vouched_for(self) -> None:
        class Noisy(torch.optim.AdamW):
            pass

        p, optimizer = stepped(Noisy, 0, lr=0.1)
        said = r"Noisy; .* if its step is that of AdamW, pass preconditioner=ftw.optim_state.AdamW; else use"
        with pytest.raises(UnsupportedOptimizerError, match=said):
            preconditioner_for(optimizer)
        assert list(AdamW().linearise(optimizer, {p: torch.ones_like(p)}).scale) == [p]

    def test_options_are_refused_at_look_up_already(self) -> None:
        _, optimizer = stepped(torch.optim.Adam, 0, differentiable=True)
        with pytest.raises(UnsupportedOptimizerError, match="differentiable=True"):
            preconditioner_for(optimizer)


def test_without_a_reference_frozen_parameters_are_left_out() -> None:
    free, frozen = Parameter(torch.ones(2)), Parameter(torch.ones(2), requires_grad=False)
    optimizer = torch.optim.SGD([free, frozen], lr=0.1)
    assert list(SGD().linearise(optimizer).scale) == [free]


def test_identity_is_lr_times_the_gradient_for_any_optimizer() -> None:
    p, optimizer = stepped(torch.optim.RMSprop, 2, lr=0.125, momentum=0.9)
    gradient = torch.randn((4, 3), generator=torch.Generator().manual_seed(3), dtype=F64)
    update = Identity().linearise(optimizer)
    assert torch.equal(update.displacement({p: gradient})[p], -0.125 * gradient)
    assert update.gain[p] == 1.0
    assert Identity().age(optimizer.param_groups[0], optimizer.state[p]) is None
