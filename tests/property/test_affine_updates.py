"""Affine updates over drawn hyper-parameters, shapes and depths, against the real step in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lion_pytorch import Lion as LionPytorch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.optim_state import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    Diagonal,
    HFAdafactor,
    Lion,
    Muon,
    NAdam,
    Preconditioner,
    RAdam,
    RMSprop,
    Scalar,
)
from ftw.testing import check_preconditioner
from tests.muon import iterate_in_own_precision

TOLERANCE = 1e-12

rates = st.floats(1e-4, 1.0)
decays = st.one_of(st.just(0.0), st.floats(1e-4, 0.5))
shapes = st.lists(
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    min_size=2,
    max_size=3,
)
run = st.fixed_dictionaries({"shapes": shapes, "steps": st.integers(1, 8), "seed": st.integers(0, 2**31)})
senses = st.booleans()  # maximize: one for all groups
# Not 0 < beta1 << 1: there torch's own `lerp` has rounded beta1 * m away.
averaging = st.one_of(st.just(0.0), st.floats(0.01, 0.99))
tiny = st.floats(1e-10, 1e-2)  # eps


@st.composite
def sgd_group(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.one_of(st.just(0.0), st.floats(0.05, 0.99)))
    nesterov = momentum > 0 and draw(st.booleans())
    dampening = 0.0 if nesterov else draw(st.floats(0.0, 0.9))
    return {
        "lr": draw(rates),
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": dampening,
        "weight_decay": draw(decays),
    }


adam_group = st.fixed_dictionaries(
    {
        "lr": rates,
        "betas": st.tuples(averaging, st.floats(0.0, 0.9999)),
        "eps": tiny,
        "weight_decay": decays,
        "amsgrad": st.booleans(),
    }
)
nadam_group = st.fixed_dictionaries(
    {
        "lr": rates,
        "betas": st.tuples(averaging, st.floats(0.0, 0.9999)),
        "eps": tiny,
        "weight_decay": decays,
        "momentum_decay": st.floats(0.0, 0.5),
        "decoupled_weight_decay": st.booleans(),
    }
)
radam_group = st.fixed_dictionaries(
    {
        "lr": rates,
        "betas": st.tuples(averaging, st.floats(0.0, 0.9999)),
        "eps": tiny,
        "weight_decay": decays,
        "decoupled_weight_decay": st.booleans(),
    }
)


@st.composite
def rmsprop_group(draw: st.DrawFn) -> dict[str, Any]:
    centered = draw(st.booleans())
    return {
        "lr": draw(rates),
        # Centred with alpha = 0, the variance is 0 but for rounding; where that is negative, torch itself makes NaN.
        "alpha": draw(st.floats(0.05, 0.99) if centered else averaging),
        "eps": draw(tiny),
        "weight_decay": draw(decays),
        "momentum": draw(st.one_of(st.just(0.0), st.floats(0.05, 0.99))),
        "centered": centered,
    }


adagrad_group = st.fixed_dictionaries(
    {"lr": rates, "lr_decay": st.floats(0.0, 2.0), "eps": tiny, "weight_decay": decays}
)
lion_group = st.fixed_dictionaries({"lr": rates, "betas": st.tuples(averaging, averaging), "weight_decay": decays})


def groups(parameters: list[Parameter], first: dict[str, Any], rest: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": parameters[:1], **first}, {"params": parameters[1:], **rest}]


def check(
    ours: Preconditioner,
    cls: Callable[..., Optimizer],
    first: dict[str, Any],
    rest: dict[str, Any],
    run: dict[str, Any],
    **options: Any,
) -> None:
    check_preconditioner(ours, lambda ps: cls(groups(ps, first, rest), **options), tolerance=TOLERANCE, **run)


@settings(deadline=None, max_examples=60)
@given(first=sgd_group(), rest=sgd_group(), run=run, maximize=senses)
def test_sgd(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], maximize: bool) -> None:
    check(SGD(), torch.optim.SGD, first, rest, run, lr=1.0, maximize=maximize)


@settings(deadline=None, max_examples=60)
@given(first=adam_group, rest=adam_group, run=run, maximize=senses)
def test_adam(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], maximize: bool) -> None:
    check(Adam(), torch.optim.Adam, first, rest, run, maximize=maximize)


@settings(deadline=None, max_examples=60)
@given(first=adam_group, rest=adam_group, run=run, maximize=senses)
def test_adamw(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], maximize: bool) -> None:
    check(AdamW(), torch.optim.AdamW, first, rest, run, maximize=maximize)


@settings(deadline=None, max_examples=60)
@given(first=nadam_group, rest=nadam_group, run=run, maximize=senses)
def test_nadam(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], maximize: bool) -> None:
    check(NAdam(), torch.optim.NAdam, first, rest, run, maximize=maximize)


@settings(deadline=None, max_examples=60)
@given(first=radam_group, rest=radam_group, run=run, maximize=senses)
def test_radam(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], maximize: bool) -> None:
    check(RAdam(), torch.optim.RAdam, first, rest, run, maximize=maximize)


@settings(deadline=None, max_examples=60)
@given(first=rmsprop_group(), rest=rmsprop_group(), run=run, maximize=senses)
def test_rmsprop(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], maximize: bool) -> None:
    check(RMSprop(), torch.optim.RMSprop, first, rest, run, maximize=maximize)


@settings(deadline=None, max_examples=60)
@given(first=adagrad_group, rest=adagrad_group, run=run, maximize=senses, initial=st.one_of(st.just(0.0), rates))
def test_adagrad(
    first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], maximize: bool, initial: float
) -> None:
    options = {"maximize": maximize, "initial_accumulator_value": initial}
    check(Adagrad(), torch.optim.Adagrad, first, rest, run, **options)


@settings(deadline=None, max_examples=60)
@given(first=lion_group, rest=lion_group, run=run, floor=st.floats(0.0, 10.0))
def test_lion(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], floor: float) -> None:
    check(Lion(floor), LionPytorch, first, rest, run)


adafactor_group = st.fixed_dictionaries(
    {
        "lr": rates,
        "beta2_decay": st.floats(-1.0, 0.0),
        "eps": st.tuples(st.one_of(st.none(), st.floats(1e-12, 1.0)), tiny),
        "d": st.floats(0.1, 10.0),
        "weight_decay": decays,
    }
)


@settings(deadline=None, max_examples=60)
@given(first=adafactor_group, rest=adafactor_group, run=run, maximize=senses)
def test_adafactor(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], maximize: bool) -> None:
    check(Adafactor(), torch.optim.Adafactor, first, rest, run, maximize=maximize)


@st.composite
def hf_adafactor_group(draw: st.DrawFn) -> dict[str, Any]:
    relative = draw(st.booleans())
    return {
        "lr": None if relative else draw(rates),
        "relative_step": relative,
        "warmup_init": relative and draw(st.booleans()),
        "scale_parameter": draw(st.booleans()),
        "eps": (draw(st.one_of(st.just(1e-30), tiny)), draw(tiny)),
        "clip_threshold": draw(st.floats(0.1, 10.0)),
        "decay_rate": draw(st.floats(-1.0, -0.1)),
        "beta1": draw(st.one_of(st.none(), averaging)),
        "weight_decay": draw(decays),
    }


@settings(deadline=None, max_examples=60)
@given(first=hf_adafactor_group(), rest=hf_adafactor_group(), run=run)
def test_hf_adafactor(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any]) -> None:
    module: Any = pytest.importorskip("transformers.optimization")
    check(HFAdafactor(), module.Adafactor, first, rest, run)


@st.composite
def muon_group(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(averaging)
    return {
        "lr": draw(rates),
        "momentum": momentum,
        "nesterov": momentum > 0 and draw(st.booleans()),
        "weight_decay": draw(decays),
        "ns_steps": draw(st.integers(0, 5)),
        "eps": draw(tiny),
        "adjust_lr_fn": draw(st.sampled_from([None, "original", "match_rms_adamw"])),
    }


matrices = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=3)


@settings(deadline=None, max_examples=60)
@given(first=muon_group(), rest=muon_group(), run=run, shapes=matrices, floor=st.floats(0.0, 10.0))
def test_muon_that_iterates_in_float64(
    first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any], shapes: list[tuple[int, int]], floor: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        iterate_in_own_precision(patch)
        make = torch.optim.Muon
        check_preconditioner(
            Muon(floor), lambda ps: make(groups(ps, first, rest)), tolerance=1e-10, **{**run, "shapes": shapes}
        )


@st.composite
def scale_and_vector(draw: st.DrawFn) -> tuple[Scalar | Diagonal, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    vector = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        return Scalar(draw(st.floats(1e-6, 1e6))), vector
    spread = 10.0 ** (4 * torch.randn(shape, generator=generator, dtype=torch.float64))
    return Diagonal(spread), vector


@given(drawn=scale_and_vector(), exponent=st.floats(-2.0, 2.0))
def test_powers_add_up(drawn: tuple[Scalar | Diagonal, Tensor], exponent: float) -> None:
    scale, x = drawn
    for power in (0.5, exponent):
        twice = scale.power(power).apply(scale.power(1.0 - power).apply(x))
        torch.testing.assert_close(twice, scale.apply(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("ours", "cls", "options"),
    [
        (AdamW, torch.optim.AdamW, {}),
        (AdamW, torch.optim.AdamW, {"amsgrad": True}),
        (NAdam, torch.optim.NAdam, {}),
        (RAdam, torch.optim.RAdam, {}),
        (RMSprop, torch.optim.RMSprop, {"momentum": 0.9}),
        (Adagrad, torch.optim.Adagrad, {}),
    ],
)
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 8))
def test_a_larger_reference_never_enlarges_m(
    ours: type[Preconditioner], cls: Callable[..., Optimizer], options: dict[str, Any], seed: int, steps: int
) -> None:
    """M falls as |reference| grows: an entry that moves a lot is stepped less."""
    generator = torch.Generator().manual_seed(seed)
    p = Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
    optimizer = cls([p], **options)
    for _ in range(steps):
        p.grad = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        optimizer.step()
    reference = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    ones = torch.ones_like(p)
    small, large = (ours().linearise(optimizer, {p: factor * reference}).scale[p].apply(ones) for factor in (1.0, 3.0))
    assert bool((large <= small).all())
