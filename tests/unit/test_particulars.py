"""Masses and columns of a window: in order, of kept blocks alone, and the same kind in each."""

from __future__ import annotations

import pytest
import torch

from ftw.errors import ConfigurationError
from ftw.particulars import Particulars


def test_blocks_follow_each_other() -> None:
    said = Particulars()
    said.add(said.fitting([1.0, 2.0], {"source": ["a", "b"]}, 2))
    said.fitting([7.0], {"source": ["dropped"]}, 1)  # never added
    said.add(said.fitting(torch.tensor([3.0]), {"source": ["c"]}, 1))
    assert said.mass.tolist() == [1.0, 2.0, 3.0]
    assert said.columns == {"source": ["a", "b", "c"]}
    said.clear()
    assert said.mass.shape == (0,)
    assert said.mass.dtype == torch.float64
    assert said.columns == {}


def test_a_block_of_nobody_settles_nothing() -> None:
    said = Particulars()
    said.add(said.fitting(None, {}, 0))
    said.add(said.fitting([2.0], {}, 1))
    assert said.mass.tolist() == [2.0]


@pytest.mark.parametrize(
    ("mass", "extras", "count", "message"),
    [
        (None, {"source": ["b"]}, 1, "for some micro-batches"),
        ([1.0, 2.0], {"source": ["b"]}, 1, r"shape \(2,\) for 1"),
        ([0.0], {"source": ["b"]}, 1, "positive"),
        ([1.0], {"source": ["b", "c"]}, 1, "'source': 2"),
        ([1.0], {}, 1, "earlier block"),
    ],
)
def test_what_does_not_fit_is_refused(mass: object, extras: dict[str, list[str]], count: int, message: str) -> None:
    said = Particulars()
    said.add(said.fitting([1.0], {"source": ["a"]}, 1))
    with pytest.raises(ConfigurationError, match=message):
        said.fitting(mass, extras, count)
    assert said.mass.tolist() == [1.0]
