"""The two exact ways to b and K give the same numbers, and the cost model picks the faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from ftw.gradients import Contributions, OuterProduct
from ftw.gradients.blocks import FactorBlock
from ftw.gradients.cost import prefers_factors
from ftw.optim_state import Scalar


def contributions(n: int, each: int, rows: int, columns: int, dtype: torch.dtype, pieces: int = 1) -> Contributions:
    torch.manual_seed(0)
    p = Parameter(torch.zeros(rows, columns, dtype=dtype))
    kept = [
        OuterProduct(
            start=0,
            shape=(rows, columns),
            dtype=dtype,
            bounds=tuple(range(0, n * each + 1, each)),
            grads=torch.randn(n * each, rows, dtype=dtype),
            scale=0.5,
            inputs=torch.randn(n * each, columns, dtype=dtype),
        )
        for _ in range(pieces)
    ]
    return Contributions({p: kept}, n)


@pytest.mark.parametrize("excluded", [(), (1,)])
@pytest.mark.parametrize("pieces", [1, 2])
def test_factors_give_what_written_out_gradients_give(pieces: int, excluded: tuple[int, ...]) -> None:
    held = contributions(4, 2, 30, 40, torch.float64, pieces).without(excluded)
    (p,) = held.parameters
    g, pull = torch.randn(2, 30, 40, dtype=torch.float64)
    (factors,) = held.blocks(p, structure="scalar")
    assert isinstance(factors, FactorBlock)
    (written,) = held.blocks(p)
    assert written.memory is not None
    first_total, second_total = factors.total(), written.total()
    assert first_total is not None
    assert second_total is not None
    torch.testing.assert_close(first_total, second_total)
    first, second = (block.products(Scalar(0.7), g, pull) for block in (factors, written))
    assert first is not None
    assert second is not None
    for found, expected in zip(first, second, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_diagonal_scale_never_gets_factors() -> None:
    held = contributions(4, 1, 300, 400, torch.float32)
    (p,) = held.parameters
    assert prefers_factors(4, 4, 300, 400)
    assert not any(isinstance(block, FactorBlock) for block in held.blocks(p, structure="any"))


@pytest.mark.slow
def test_the_model_picks_the_measured_winner() -> None:
    """Where one way is at least twice as fast, the model says which. One process, interleaved, medians of seven."""
    wrong = []
    for n, each, rows, columns in (
        (16, 1, 512, 512),
        (16, 1, 1024, 256),
        (64, 1, 384, 384),
        (8, 4, 768, 768),
        (16, 64, 128, 128),
        (16, 256, 128, 128),
        (4, 512, 192, 64),
        (32, 64, 96, 96),
    ):
        held = contributions(n, each, rows, columns, torch.float32)
        (p,) = held.parameters
        (outer,) = held._pieces[p]
        assert isinstance(outer, OuterProduct)
        g, pull = torch.randn(2, rows, columns)
        factors = FactorBlock(slice(0, rows), None, (outer,), n)
        ways: dict[bool, Callable[[], object]] = {
            True: lambda block=factors, g=g, pull=pull: block.products(Scalar(1.0), g, pull * 0),
            False: lambda held=held, p=p, g=g, pull=pull: [
                block.products(Scalar(1.0), g[block.rows], pull[block.rows]) for block in held.blocks(p)
            ],
        }
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(8):
            for way, function in ways.items():
                begun = time.perf_counter()
                function()
                times[way].append(time.perf_counter() - begun)
        fast = {way: statistics.median(seconds[1:]) for way, seconds in times.items()}
        winner = fast[True] < fast[False]
        if max(fast.values()) > 2 * min(fast.values()) and prefers_factors(n, n * each, rows, columns) != winner:
            wrong.append((n, each, rows, columns, fast))
    assert not wrong


def test_a_layer_wider_than_its_context_is_kept_as_factors_and_a_low_rank_one_written_out() -> None:
    from ftw.gradients import Auto, Dense

    layer = nn.Linear(64, 64)
    wide = contributions(4, 8, *layer.weight.shape, torch.float32)
    narrow = contributions(4, 200, 8, 64, torch.float32)
    for held, kind in ((wide, OuterProduct), (narrow, Dense)):
        (p,) = held.parameters
        assert isinstance(Auto().keep(held._pieces[p][0]), kind)
