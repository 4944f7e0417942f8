"""Pieces cut to some rows: what a process measures of a sharded parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ftw.gradients.pieces import Broadcast, Dense, OuterProduct, Piece, RowScatter

F64 = torch.float64
ROWS = 7


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=F64)


PIECES: dict[str, Callable[[], Piece]] = {
    "dense": lambda: Dense(1, (ROWS, 3), F64, noise(2, ROWS, 3)),
    "dense vector": lambda: Dense(0, (ROWS,), F64, noise(2, ROWS)),
    "factors": lambda: OuterProduct(1, (ROWS, 3), F64, (0, 2, 5), noise(5, ROWS), 0.5, inputs=noise(5, 3)),
    "even factors": lambda: OuterProduct(0, (ROWS, 3), F64, (0, 2, 4), noise(4, ROWS), 1.0, inputs=noise(4, 3)),
    "an expert": lambda: OuterProduct(0, (ROWS, 3), F64, (0, 1, 4), noise(4, 2), 0.5, inputs=noise(4, 3), first_row=3),
    "broadcast": lambda: Broadcast(0, (ROWS,), F64, (0, 3, 4), noise(4, ROWS), 2.0),
    "table": lambda: RowScatter(2, (ROWS, 3), F64, (0, 3, 5), noise(5, 3), 0.5, row_of=torch.tensor([6, -1, 0, 4, 4])),
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("rows", [slice(0, 7), slice(0, 4), slice(4, 7), slice(3, 4), slice(5, 7), slice(2, 2)])
def test_a_piece_cut_to_rows_holds_these_rows(name: str, rows: slice) -> None:
    piece = PIECES[name]()
    part = piece.cut(rows)
    expected = piece.dense().values[:, rows]  # type: ignore[attr-defined]
    assert part.shape == tuple(expected.shape[1:])
    assert (part.start, part.count, part.dtype) == (piece.start, piece.count, piece.dtype)
    assert torch.allclose(part.dense().values, expected, rtol=1e-14, atol=1e-14)  # type: ignore[attr-defined]
    total, weights = torch.zeros(part.shape, dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    part.add_combined(total, weights)
    assert torch.allclose(total, torch.tensordot(weights, expected, dims=1), rtol=1e-13, atol=1e-13)
    along = noise(*expected.shape[1:])
    assert torch.allclose(part.alignment(along), expected.flatten(1) @ along.flatten(), rtol=1e-13, atol=1e-13)
    touched = part.touched_rows()
    if touched is not None:
        rest = torch.ones(rows.stop - rows.start, dtype=torch.bool)
        rest[touched] = False
        assert not expected[:, rest].any()
