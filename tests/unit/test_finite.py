"""Whether a gradient is finite is told as the largest entry would, whatever its squares or its sum do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftw.modes import all_finite

LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("bad", [(math.nan,), (math.inf,), (math.inf, -math.inf), (-math.inf, math.nan)])
def test_one_entry_is_enough(dtype: torch.dtype, bad: tuple[float, ...]) -> None:
    clean = [torch.ones(3, 5, dtype=dtype), torch.zeros(0, 4, dtype=dtype), torch.ones((), dtype=dtype)]
    assert all_finite(clean)
    spoilt = torch.zeros(2, 7, dtype=dtype)
    spoilt.view(-1)[4 : 4 + len(bad)] = torch.tensor(bad, dtype=dtype)
    assert not all_finite([*clean, spoilt])


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    large = torch.full((4, 4), LARGEST[dtype], dtype=dtype)
    assert all_finite([large, -large])
    large[1, 2] = math.nan
    assert not all_finite([-large, large])


def test_nothing_is_finite() -> None:
    assert all_finite([])
    assert all_finite([torch.zeros(0)])


@given(st.lists(st.lists(st.floats(width=32), max_size=6), max_size=4))
def test_as_entry_by_entry(numbers: list[list[float]]) -> None:
    tensors = [torch.tensor(each, dtype=torch.float32) for each in numbers]
    assert all_finite(tensors) == all(math.isfinite(number) for each in numbers for number in each)
