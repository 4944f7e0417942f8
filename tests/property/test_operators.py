"""The algebra of scale operators, over drawn operators of every kind, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.gradients.pieces import as_rows
from ftw.optim_state.operators import Diagonal, Product, RowColumn, Scalar, ScaleOperator, TwoSided

F64 = torch.float64
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}

seeds = st.integers(0, 2**31)
sides = st.integers(1, 5)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spread(seed: int, *shape: int) -> Tensor:
    """Positive numbers over two decades."""
    return 10.0 ** (0.5 * numbers(seed, *shape).clamp(-2, 2))


def orthogonal(seed: int, side: int) -> Tensor:
    return torch.linalg.qr(numbers(seed, side, side))[0]


@st.composite
def operators(draw: st.DrawFn, *, matrix: bool = False) -> tuple[ScaleOperator, tuple[int, ...]]:
    """An operator without zeros and the shape of the parameter that it acts on."""
    kind, seed = draw(st.sampled_from(["scalar", "diagonal", "row_column", "two_sided"])), draw(seeds)
    if kind in ("scalar", "diagonal") and not matrix:
        shape = tuple(draw(st.lists(sides, max_size=4)))
    elif kind == "row_column" and not matrix:
        shape = (*draw(st.lists(sides, max_size=2)), draw(sides), draw(sides))
    else:
        shape = (draw(sides), draw(sides))
    if kind == "scalar":
        return Scalar(float(spread(seed))), shape
    if kind == "diagonal":
        return Diagonal(spread(seed, *shape)), shape
    *stack, height, width = shape
    rows, columns = spread(seed, *stack, height, 1), spread(seed + 1, *stack, 1, width)
    if kind == "row_column":
        return RowColumn(rows, columns), shape
    left, right = draw(st.booleans()), draw(st.booleans())
    inner = draw(st.sampled_from(["scalar", "diagonal", "row_column", "rows", "columns"]))
    one = torch.ones(1, 1, dtype=F64)
    scales: dict[str, ScaleOperator] = {
        "scalar": Scalar(float(rows[0])),
        "diagonal": Diagonal(rows * columns),
        "row_column": RowColumn(rows, columns),
        "rows": RowColumn(rows, one),
        "columns": RowColumn(one, columns),
    }
    bases = orthogonal(seed + 2, height) if left else None, orthogonal(seed + 3, width) if right else None
    return TwoSided(scales[inner], *bases), shape


def written_out(scale: ScaleOperator, shape: tuple[int, ...]) -> Tensor:  # (numel, numel)
    """M as a matrix, column by column."""
    size = torch.Size(shape).numel()
    units = torch.eye(size, dtype=F64).view(size, *shape)
    return torch.stack([scale.apply(unit).flatten() for unit in units], dim=1)


@settings(deadline=None)
@given(drawn=operators(), batch=st.lists(st.integers(0, 3), min_size=1, max_size=2), seed=seeds)
def test_a_batch_is_its_entries(drawn: tuple[ScaleOperator, tuple[int, ...]], batch: list[int], seed: int) -> None:
    scale, shape = drawn
    x = numbers(seed, *batch, *shape)
    expected = torch.einsum("ij,nj->ni", written_out(scale, shape), x.reshape(-1, torch.Size(shape).numel()))
    kept = x.clone()
    torch.testing.assert_close(scale.apply(x), expected.view(x.shape), **CLOSE)
    assert torch.equal(x, kept)
    written = scale.apply_(x)
    assert written.data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, expected.view(x.shape), **CLOSE)


@settings(deadline=None)
@given(drawn=operators())
def test_it_is_symmetric_and_positive(drawn: tuple[ScaleOperator, tuple[int, ...]]) -> None:
    matrix = written_out(*drawn)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(matrix).min()) > 0


@settings(deadline=None)
@given(drawn=operators(), exponent=st.floats(-1.5, 1.5), rest=st.floats(-1.5, 1.5), seed=seeds)
def test_powers_add_up(drawn: tuple[ScaleOperator, tuple[int, ...]], exponent: float, rest: float, seed: int) -> None:
    scale, shape = drawn
    x = numbers(seed, *shape)
    twice = scale.power(exponent).apply(scale.power(rest).apply(x))
    torch.testing.assert_close(twice, scale.power(exponent + rest).apply(x), **CLOSE)
    torch.testing.assert_close(scale.power(1.0).apply(x), scale.apply(x), **CLOSE)
    torch.testing.assert_close(scale.power(0.0).apply(x), x, **CLOSE)
    torch.testing.assert_close(scale.power(-1.0).apply(x), scale.solve(x), **CLOSE)
    torch.testing.assert_close(scale.sqrt().apply(scale.sqrt().apply(x)), scale.apply(x), **CLOSE)


@settings(deadline=None)
@given(drawn=operators(), batch=st.integers(1, 3), seed=seeds)
def test_solve_undoes_apply(drawn: tuple[ScaleOperator, tuple[int, ...]], batch: int, seed: int) -> None:
    scale, shape = drawn
    x = numbers(seed, batch, *shape)
    torch.testing.assert_close(scale.apply(scale.solve(x)), x, **CLOSE)
    torch.testing.assert_close(scale.solve(scale.apply(x)), x, **CLOSE)


@settings(deadline=None)
@given(drawn=operators(matrix=True), tokens=st.integers(0, 4), seed=seeds)
def test_separable_operators_pass_through_outer_products(
    drawn: tuple[ScaleOperator, tuple[int, ...]], tokens: int, seed: int
) -> None:
    scale, (height, width) = drawn
    inputs, grads = numbers(seed, tokens, width), numbers(seed + 1, tokens, height)
    if not scale.separable:
        with pytest.raises(ConfigurationError, match="does not pass through an outer product"):
            scale.apply_factors(inputs, grads)
        return
    first, second = scale.apply_factors(inputs, grads)
    assert (first.shape, second.shape) == (inputs.shape, grads.shape)
    each = torch.einsum("tr,tc->trc", grads, inputs)
    torch.testing.assert_close(torch.einsum("tr,tc->trc", second, first), scale.apply(each), **CLOSE)


@settings(deadline=None)
@given(drawn=operators(), cut=st.tuples(st.integers(0, 12), st.integers(0, 12)), seed=seeds)
def test_a_cut_acts_on_rows_as_the_whole_does(
    drawn: tuple[ScaleOperator, tuple[int, ...]], cut: tuple[int, int], seed: int
) -> None:
    scale, shape = drawn
    if not shape:
        return
    x = numbers(seed, *shape)
    if scale.mixes_rows:
        with pytest.raises(ConfigurationError, match="mixes rows and cannot be cut"):
            scale.cut(slice(0, 1))
        return
    count = len(as_rows(x))
    first, last = sorted(min(edge, count) for edge in cut)
    picked = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: last - first].sort().values
    for rows in (slice(first, last), picked):
        part = scale.cut(rows)
        torch.testing.assert_close(part.apply(as_rows(x)[rows]), as_rows(scale.apply(x))[rows], **CLOSE)
        torch.testing.assert_close(part.solve(as_rows(x)[rows]), as_rows(scale.solve(x))[rows], **CLOSE)
        assert not part.mixes_rows


@settings(deadline=None)
@given(drawn=operators(), seed=seeds)
def test_only_left_rotations_mix_rows(drawn: tuple[ScaleOperator, tuple[int, ...]], seed: int) -> None:
    """`mixes_rows` is not merely claimed: what changes one row changes no other."""
    scale, shape = drawn
    if scale.mixes_rows or not shape:
        return
    x = numbers(seed, *shape)
    y = x.clone()
    as_rows(y)[0] += 1.0
    assert torch.equal(as_rows(scale.apply(x))[1:], as_rows(scale.apply(y))[1:])


@settings(deadline=None)
@given(height=sides, width=sides, seed=seeds, left=st.booleans(), right=st.booleans())
def test_two_sided_of_two_matrices(height: int, width: int, seed: int, left: bool, right: bool) -> None:
    a, b = numbers(seed, height, height), numbers(seed + 1, width, width - 1)  # the second one is singular
    first, second = a @ a.T, b @ b.T
    x = numbers(seed + 2, 2, height, width)
    scale = TwoSided.of(first if left else None, second if right else None)
    expected = first @ x if left else x
    expected = expected @ second if right else expected
    torch.testing.assert_close(scale.apply(x), expected, **CLOSE)
    assert float(torch.linalg.eigvalsh(written_out(scale, (height, width))).min()) > -1e-12
    assert scale.mixes_rows is left


@settings(deadline=None)
@given(one=operators(matrix=True), other=operators(matrix=True), seed=seeds)
def test_a_product_is_one_after_the_other(
    one: tuple[ScaleOperator, tuple[int, ...]], other: tuple[ScaleOperator, tuple[int, ...]], seed: int
) -> None:
    (outer, shape), (inner, second) = one, other
    if shape != second:
        inner = Scalar(0.5)
    product, x = Product(outer, inner), numbers(seed, *shape)
    torch.testing.assert_close(product.apply(x), outer.apply(inner.apply(x)), **CLOSE)
    torch.testing.assert_close(product.solve(product.apply(x)), x, **CLOSE)
    torch.testing.assert_close(product.apply_(x.clone()), product.apply(x), **CLOSE)
    if product.separable:
        first, then = product.apply_factors(x[0][None], x[:, 0][None])
        torch.testing.assert_close(then.T @ first, product.apply(torch.outer(x[:, 0], x[0])), **CLOSE)
    if not product.mixes_rows:
        torch.testing.assert_close(product.cut(slice(0, 1)).apply(x[:1]), product.apply(x)[:1], **CLOSE)


class TestCornerCases:
    ZEROS = (
        Scalar(0.0),
        Diagonal(torch.zeros(2, 3, dtype=F64)),
        RowColumn(torch.zeros(2, 1, dtype=F64), torch.ones(1, 3, dtype=F64)),
        TwoSided(Scalar(0.0), orthogonal(0, 2), None),
        TwoSided(RowColumn(torch.zeros(2, 1, dtype=F64), torch.ones(1, 3, dtype=F64)), None, orthogonal(1, 3)),
    )

    @pytest.mark.parametrize("scale", ZEROS, ids=lambda scale: scale.structure)
    def test_a_scale_of_zero_solves_for_zero(self, scale: ScaleOperator) -> None:
        """A learning rate of 0: the offset is 0 as well, and its share of the curvature is 0, not NaN."""
        x = torch.zeros(2, 3, dtype=F64)
        assert torch.equal(scale.solve(x), x)
        assert torch.equal(scale.sqrt().solve(x), x)
        assert torch.equal(scale.apply(torch.ones_like(x)), x)

    @pytest.mark.parametrize("scale", ZEROS[:3], ids=lambda scale: scale.structure)
    def test_what_a_scale_of_zero_cannot_reach_is_infinitely_far(self, scale: ScaleOperator) -> None:
        x = torch.tensor([[1.0, -1.0, 2.0], [0.0, 3.0, 0.0]], dtype=F64)
        found = scale.solve(x)
        assert torch.equal(found.isinf(), x != 0)
        assert torch.equal(found.sign(), x.sign())

    @pytest.mark.parametrize(
        ("of", "to"), [(torch.float32, torch.bfloat16), (torch.float32, F64), (F64, torch.float32)]
    )
    def test_the_wider_dtype_wins(self, of: torch.dtype, to: torch.dtype) -> None:
        """A target gradient or a residual comes in the parameter's dtype, M in float32 at least."""
        rows, columns = spread(0, 3, 1).to(of), spread(1, 1, 2).to(of)
        inner = RowColumn(rows, columns)
        x = numbers(2, 4, 3, 2).to(to)
        wide = torch.promote_types(of, to)
        left, right = orthogonal(3, 3).to(of), orthogonal(4, 2).to(of)
        for scale in (Diagonal(rows * columns), inner, TwoSided(inner, left, right), TwoSided(Scalar(0.3), left)):
            assert scale.apply(x).dtype == scale.solve(x).dtype == wide
            assert scale.apply_(x.clone()).dtype == to
        for scale in (inner, TwoSided(inner, left, right)):
            first, second = scale.apply_factors(x[0], x[:3, :, 0])
            assert first.dtype == second.dtype == wide

    def test_products_have_no_power(self) -> None:
        product: Any = Product(Scalar(2.0), Scalar(3.0))
        with pytest.raises(ConfigurationError, match=r"no power 0\.5"):
            product.sqrt()

    def test_stacked_matrices_are_not_separable(self) -> None:
        scale = RowColumn(spread(0, 2, 3, 1), spread(1, 2, 1, 4))
        assert not scale.separable
        with pytest.raises(ConfigurationError, match="RowColumn does not pass through"):
            scale.apply_factors(torch.ones(1, 4), torch.ones(1, 3))
