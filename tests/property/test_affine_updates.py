"""Affine updates over drawn hyper-parameters, shapes and depths, against the real step in float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from ftw.optim_state import SGD, Adam, AdamW, Diagonal, Scalar
from ftw.testing import check_preconditioner

TOLERANCE = 1e-12

rates = st.floats(1e-4, 1.0)
decays = st.one_of(st.just(0.0), st.floats(1e-4, 0.5))
shapes = st.lists(
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    min_size=2,
    max_size=3,
)
run = st.fixed_dictionaries({"shapes": shapes, "steps": st.integers(1, 6), "seed": st.integers(0, 2**31)})


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
        # Not 0 < beta1 << 1: there torch's own `lerp` has rounded beta1 * m away.
        "betas": st.tuples(st.one_of(st.just(0.0), st.floats(0.01, 0.99)), st.floats(0.0, 0.9999)),
        "eps": st.floats(1e-10, 1e-2),
        "weight_decay": decays,
        "amsgrad": st.booleans(),
    }
)


def groups(parameters: list[Parameter], first: dict[str, Any], rest: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": parameters[:1], **first}, {"params": parameters[1:], **rest}]


@settings(deadline=None, max_examples=60)
@given(first=sgd_group(), rest=sgd_group(), run=run)
def test_sgd(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any]) -> None:
    check_preconditioner(SGD(), lambda ps: torch.optim.SGD(groups(ps, first, rest), lr=1.0), tolerance=TOLERANCE, **run)


@settings(deadline=None, max_examples=60)
@given(first=adam_group, rest=adam_group, run=run)
def test_adam(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any]) -> None:
    check_preconditioner(Adam(), lambda ps: torch.optim.Adam(groups(ps, first, rest)), tolerance=TOLERANCE, **run)


@settings(deadline=None, max_examples=60)
@given(first=adam_group, rest=adam_group, run=run)
def test_adamw(first: dict[str, Any], rest: dict[str, Any], run: dict[str, Any]) -> None:
    check_preconditioner(AdamW(), lambda ps: torch.optim.AdamW(groups(ps, first, rest)), tolerance=TOLERANCE, **run)


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


@given(first=adam_group, seed=st.integers(0, 2**31))
def test_a_larger_reference_never_enlarges_m(first: dict[str, Any], seed: int) -> None:
    """M falls as |reference| grows: an entry that moves a lot is stepped less."""
    p = Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], **first)
    p.grad = torch.ones_like(p)
    optimizer.step()
    reference = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    ones = torch.ones_like(p)
    small, large = (AdamW().linearise(optimizer, {p: factor * reference}).scale[p].apply(ones) for factor in (1.0, 3.0))
    assert bool((large <= small).all())
