"""The cost model: which form of a matrix layer's contributions is the cheapest, and why.

For a weight of `rows` x `columns`, n candidates and N tokens in all (T = N / n each), in floating-point operations and
in numbers moved through memory:

| form | operations | moved |
|---|---|---|
| written out, row block by row block | 2 N rows columns, then 2 n^2 rows columns for K | 4 n rows columns |
| factors (ghost inner products) | 2 N rows columns for b, then 2 N^2 (rows + columns) for K | 3 N^2 |

Writing out serves any M; factors serve one that passes through outer products (`ScaleOperator.separable`: a multiple of
the identity, Adafactor's row x column, Muon's two sides), and no diagonal. Both are linear in T but for N^2: factors
win on short contexts and wide layers. T x T products are hence formed only where they are the cheaper way.
"""

from __future__ import annotations

OPERATIONS_PER_NUMBER = 60.0
"""Floating-point operations in the time that one number takes to move. Measured on a CPU with AVX-512 (310 GFLOP/s,
about 5 G numbers/s through the cache); accelerators are between 50 (float32) and 300 (bfloat16)."""

SKINNY = 3.0
"""How much slower than square products the n x n one of a block runs; measured 2 to 3 for n = 16 to 64."""


def written_out(n: int, tokens: int, rows: int, columns: int) -> float:
    """Cost of b and K from written-out gradients, in operations."""
    numbers = rows * columns
    return 2.0 * tokens * numbers + SKINNY * 2.0 * n * n * numbers + OPERATIONS_PER_NUMBER * 4.0 * n * numbers


def by_factors(n: int, tokens: int, rows: int, columns: int) -> float:
    """Cost of b and K from the factors, in operations."""
    pairs = float(tokens) * tokens
    return 2.0 * tokens * rows * columns + 2.0 * pairs * (rows + columns) + OPERATIONS_PER_NUMBER * 3.0 * pairs


def prefers_factors(n: int, tokens: int, rows: int, columns: int) -> bool:
    """Whether K under a separable M is cheaper from the factors."""
    return by_factors(n, tokens, rows, columns) < written_out(n, tokens, rows, columns)


def prefers_written_out(count: int, tokens: int, rows: int, columns: int) -> bool:
    """Whether a call's gradients, written out in the backward, take less memory than its factors.

    `count rows columns` numbers against `tokens (rows + columns)`: low-rank adapters, norms and biases, and any
    layer on a long context (T > rows columns / (rows + columns)), are written out at once and their inputs freed.
    The time is much the same: what is saved in the combination (2 k T rows columns operations) is spent on writing
    to memory and reading back (2 n rows columns numbers), which are equal where memory is.
    """
    return count * rows * columns <= tokens * (rows + columns)
