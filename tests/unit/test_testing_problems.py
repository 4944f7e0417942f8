"""The exported hypothesis strategy of problems."""

import pytest
import torch
from hypothesis import find, given, settings

from ftw.errors import ConfigurationError
from ftw.testing import SHAPES, problems


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problems(sizes=(0, 5), scales=[1e3]))
def test_what_is_drawn_is_a_problem(ugly):
    assert ugly.size <= 5
    assert ugly.gram.shape == (ugly.size, ugly.size)
    assert torch.equal(ugly.gram, ugly.gram.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_can_be_asked_for(shape):
    assert find(problems(shapes=[shape]), lambda ugly: ugly.size == 3).name.startswith(f"{shape}-n3")


@pytest.mark.parametrize("shapes", [["round"], []])
def test_an_unknown_shape_is_refused(shapes):
    with pytest.raises(ConfigurationError, match="allowed are some of well_posed"):
        problems(shapes=shapes)
