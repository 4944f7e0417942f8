"""What windows count and keep: the ledger, output gradients, shares of the parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from ftw.errors import RecordingError
from ftw.gradients.layout import Layout
from ftw.gradients.output_gradient import OutputGradient
from ftw.gradients.pieces import Dense
from ftw.gradients.share import Share
from ftw.gradients.window import Forward, Ledger, Window, tensors_of


def test_a_ledger_counts_every_storage_once_and_whole() -> None:
    ledger, whole = Ledger(), torch.zeros(100, dtype=torch.float64)
    first, second, other = whole[:10], whole[50:].view(5, 10), torch.zeros(3, dtype=torch.float64)
    assert ledger.extra([first, second, other]) == 824
    ledger.add([first])
    assert ledger.bytes == 800
    assert ledger.extra([second, other]) == 24
    ledger.add([second, other])
    ledger.remove([first])
    assert ledger.bytes == 824
    ledger.remove([second])
    assert (ledger.bytes, ledger.peak) == (24, 824)
    ledger.remove([other])
    assert ledger.bytes == 0


@st.composite
def gradients(draw: st.DrawFn) -> tuple[Tensor, int]:
    """An output gradient, some of whose positions are zero or NaN, and its positions a row."""
    rows, each, width = (draw(st.integers(1, 4)) for _ in range(3))
    grad = torch.randn(rows, each, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    grad[torch.tensor(draw(st.lists(st.booleans(), min_size=rows * each, max_size=rows * each))).view(rows, each)] = 0
    if draw(st.booleans()):
        grad[0, 0, 0] = float("nan")
    shape = draw(st.sampled_from([(rows, each, width), (rows, each, 1, width), (rows, each * width)]))
    return grad.view(shape), each if len(shape) > 2 else 1


@settings(deadline=None)
@given(gradients(), st.data())
def test_weighted_rows_are_the_gradient_times_the_factor(given_: tuple[Tensor, int], data: st.DataObject) -> None:
    grad, each = given_
    kept = OutputGradient.of(grad)
    assert torch.equal(kept.reached.any(1), grad.flatten(1).ne(0).any(1))
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(grad) - 1), min_size=1))))
    by_token = data.draw(st.booleans()) and grad.dim() > 2
    size = (len(rows), each) if by_token else (len(rows),)
    factor = torch.randint(0, 3, size, generator=torch.Generator().manual_seed(len(rows))).double() / 2
    if data.draw(st.booleans()):
        kept = kept.only(rows)
        assert len(kept.values) <= each * len(rows)
    wide = factor.view(*factor.shape, *[1] * (grad.dim() - factor.dim())).float()
    expected = torch.where(wide == 0, torch.zeros(()), grad[rows] * wide)
    torch.testing.assert_close(kept.weighted(rows, factor), expected, rtol=0, atol=0, equal_nan=True)


def test_positions_without_gradient_are_left_out_where_it_is_worth_a_copy() -> None:
    grad = torch.ones(4, 8, 3)
    assert OutputGradient.of(grad).values.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr()
    grad[:, -1] = 0  # what the shift of causal language models leaves: an eighth
    assert len(OutputGradient.of(grad).values) == 28
    longer = torch.ones(4, 9, 3)
    longer[:, -1] = 0
    assert len(OutputGradient.of(longer).values) == 36


def test_an_output_of_one_number_a_row() -> None:
    grad = torch.tensor([1.0, 0.0, 2.0])
    kept = OutputGradient.of(grad)
    assert torch.equal(kept.weighted(torch.tensor([0, 2]), torch.tensor([1.0, 0.5])), torch.tensor([1.0, 1.0]))


def test_two_backwards_add_up() -> None:
    first, second = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    first[0, 1], second[1, 2] = 1.0, 2.0
    both = OutputGradient.of(first) + OutputGradient.of(second)
    assert torch.equal(both.weighted(torch.arange(2), torch.ones(2)), first + second)


def test_rows_that_were_dropped_are_not_zeros() -> None:
    kept = OutputGradient.of(torch.ones(3, 2, 2)).only(torch.tensor([0, 2]))
    with pytest.raises(RecordingError, match="dropped"):
        kept.weighted(torch.arange(3), torch.ones(3))
    kept.weighted(torch.arange(3), torch.tensor([1.0, 0.0, 1.0]))  # not read where the factor is 0


def test_an_output_without_the_tokens_of_the_map_is_refused() -> None:
    with pytest.raises(RecordingError, match="each of 5 tokens"):
        OutputGradient.of(torch.ones(2, 3, 4)).weighted(torch.arange(2), torch.ones(2, 5))


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 3)])
def test_an_output_for_each_next_token(shape: tuple[int, ...]) -> None:
    grad = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    weighted = OutputGradient.of(grad).weighted(torch.arange(1), torch.tensor([[1.0, 0.0, 0.5, 0.0, 7.0]]))
    factor = torch.tensor([[1.0, 0.0, 0.5, 0.0]])
    assert torch.equal(weighted, grad * factor.view(1, 4, *[1] * (grad.dim() - 2)))


def test_candidates_without_gradient_at_the_output() -> None:
    window = Window(count=4)
    owner = torch.tensor([[0, 0, 1], [1, -1, -1]])
    for layout, alive in ((Layout(2, 0), [[0, 0, 0], [1, 0, 0]]), (Layout(2, 2, owner, 2), [[1, 0, 0], [0, 0, 0]])):
        forward = Forward(layout, recomputable=True)
        window.forwards.append(forward)
        window.keep_output(forward, OutputGradient.of(torch.tensor(alive, dtype=torch.float32)[..., None]))
    assert window.unreached() == [0, 3]


def piece(size: int) -> Dense:
    return Dense(0, (size,), torch.float64, torch.zeros(1, size, dtype=torch.float64))


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=6),
    room=st.integers(1, 60),
)
def test_shares_complete_all_parameters_within_their_room(sizes: list[list[int]], room: int) -> None:
    """Three micro-batches; each share keeps whole parameters, one at least, and never more than its room."""
    sizes_of = {Parameter(torch.zeros(1)): each for each in sizes}
    pending, shares = list(sizes_of), 0
    while pending:
        share = Share(pending=frozenset(pending), room=8 * room)
        for batch in range(3):
            for p, each in sizes_of.items():
                if share.wants(p):
                    assert share.keep(p, piece(each[batch]), None)
                    held = sum(t.nbytes for kept in share.pieces.values() for one in kept for t in tensors_of(one))
                    assert share.ledger.bytes == held <= 8 * room
        if share.needed:
            assert share.first is pending[0]
            assert share.needed == 8 * sum(sizes_of[pending[0]]) > 8 * room
            return
        done = [p for p in pending if p not in share.postponed]
        assert done[0] is pending[0]
        assert set(share.pieces) == set(done)
        for p in done:
            assert [one.shape[0] for one in share.pieces[p]] == sizes_of[p]
        pending = [p for p in pending if p in share.postponed]
        shares += 1
    assert shares >= -(-sum(sum(each) for each in sizes) // room)


def test_a_parameter_given_up_between_two_pieces_of_one_call_is_not_kept_in_part() -> None:
    """An expert's matrices come one by one, and a small one would fit where a large one before it did not."""
    first, second = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    share = Share(pending=frozenset([first, second]), room=80)
    for p, size in ((first, 4), (second, 5), (second, 3), (second, 1)):
        assert share.keep(p, piece(size), None)
    assert share.postponed == {second}
    assert set(share.pieces) == {first}
    share = Share(pending=frozenset([first, second]), room=80)
    for p, size in ((first, 11), (second, 5), (first, 2)):
        assert share.keep(p, piece(size), None)
    assert share.needed == 8 * 13
