"""Sketched products: right in the mean, as far off as they say, and gone from the gradient that is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import ftw
from ftw.errors import ConfigurationError
from ftw.gradients import Contributions, Factorized, OuterProduct, Piece, Projection, Recorder, RowScatter
from ftw.gradients.pieces import Broadcast, Dense, as_rows
from ftw.gradients.projection import ProjectedContributions, fold, kronecker_sides
from ftw.optim_state import Diagonal, Scalar
from ftw.optim_state.base import ScaleOperator
from tests.models import MLP, batch_of, label_tokens, tiny_llama, token_mean

Pieces = dict[Parameter, list[Piece]]
N = 5
F64 = torch.float64


def made_up(seed: int = 0) -> Pieces:
    """Every kind of piece: ragged and even tokens, two forwards, a tied table and head, experts, a norm, a bias."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    def outer(shape: tuple[int, int], bounds: tuple[int, ...], start: int = 0, **options: Any) -> OuterProduct:
        tokens, height = bounds[-1], options.pop("height", shape[0])
        return OuterProduct(
            start, shape, F64, bounds, draw(tokens, height), 0.5, inputs=draw(tokens, shape[1]), **options
        )

    def scatter(shape: tuple[int, int], bounds: tuple[int, ...]) -> RowScatter:
        row_of = torch.randint(0, shape[0] - 3, (bounds[-1],), generator=generator)
        row_of[:4] = -1  # padding
        return RowScatter(0, shape, F64, bounds, draw(bounds[-1], shape[1]), 2.0, row_of=row_of)

    ragged, even = (0, 3, 3, 8, 9, 13), (0, 4, 8, 12, 16, 20)

    def weight(*shape: int) -> Parameter:
        return Parameter(torch.zeros(shape, dtype=F64))

    return {
        weight(12, 9): [outer((12, 9), ragged)],
        weight(8, 20): [outer((8, 20), even)],
        weight(10, 10): [outer((10, 10), (0, 2, 5)), outer((10, 10), (0, 4, 4, 6), start=2)],
        weight(20, 6): [scatter((20, 6), ragged), outer((20, 6), even)],
        weight(30, 5): [scatter((30, 5), even)],
        weight(2, 6, 7): [outer((12, 7), ragged, height=6), outer((12, 7), ragged, height=6, first_row=6)],
        weight(7): [Broadcast(0, (7,), F64, ragged, draw(13, 7), 1.0)],
        weight(9): [Dense(0, (9,), F64, draw(N, 9))],
    }


def scales(pieces: Pieces, kind: str) -> dict[Parameter, ScaleOperator]:
    generator = torch.Generator().manual_seed(7)
    if kind == "scalar":
        return {p: Scalar(0.1 * (i + 1)) for i, p in enumerate(pieces)}
    return {p: Diagonal(torch.rand(p.shape, generator=generator, dtype=F64)) for p in pieces}


def directions(pieces: Pieces) -> dict[Parameter, Tensor]:
    """Half along the candidates, so that b is not all noise."""
    generator = torch.Generator().manual_seed(8)
    total = Contributions(pieces, N).combine()
    return {p: total[p] / N + torch.randn(p.shape, generator=generator, dtype=F64) for p in pieces}


def read(
    contributions: Contributions,
    scale: dict[Parameter, ScaleOperator],
    g: dict[Parameter, Tensor],
    *,
    last: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, b, g'Mg and the coupling with g, as the assembly reads them."""
    n = contributions.count
    gram, alignment = torch.zeros(n, n, dtype=F64), torch.zeros(n, dtype=F64)
    target, coupling = torch.zeros((), dtype=F64), torch.zeros(n, dtype=F64)
    kronecker = isinstance(contributions, ProjectedContributions) and contributions.projection.kind == "kronecker"
    scalar = kronecker and all(isinstance(m, Scalar) for m in scale.values())
    for p in contributions.parameters:
        for block in contributions.blocks(p, structure="scalar" if scalar else "any"):
            whole = scale[p]
            part: ScaleOperator = Diagonal(as_rows(whole.values)[block.rows]) if isinstance(whole, Diagonal) else whole
            along = as_rows(g[p])[block.rows]
            products = block.products(part.power(0.5), along, along, last=last)
            if products is None:
                target += (along * part.apply(along)).sum()
                continue
            gram += products.gram
            alignment += products.alignment
            target += products.target
            coupling += products.coupling
    return gram, alignment, target, coupling


def recorded(model: nn.Module, extractor: Any, batch: dict[str, Tensor]) -> Contributions:
    recorder = Recorder(model, extractor=extractor)
    with recorder.record():
        token_mean(model, batch).backward()
    contributions = recorder.contributions()
    recorder.close()
    return contributions


def sketched(pieces: Pieces, dimension: int, kind: str, seed: int = 0, count: int = N) -> ProjectedContributions:
    contributions = Projection(dimension, kind, seed).contributions(pieces, count)
    contributions.block_bytes = 4096  # many blocks a parameter
    return contributions


def standard_scores(draws: Tensor, exact: Tensor) -> Tensor:
    """How many standard errors the mean over draws is off."""
    spread = draws.std(0) / len(draws) ** 0.5
    gap = (draws.mean(0) - exact).abs()
    return gap[spread > 1e-12 * exact.abs().max()] / spread[spread > 1e-12 * exact.abs().max()]


@pytest.mark.parametrize("scale", ["scalar", "diagonal"])
@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
def test_right_in_the_mean(kind: str, scale: str) -> None:
    pieces = made_up()
    M, g = scales(pieces, scale), directions(pieces)
    exact = read(Contributions(pieces, N), M, g)
    draws = [read(sketched(pieces, 24, kind, seed), M, g) for seed in range(150)]
    for found, value in zip(zip(*draws, strict=True), exact, strict=True):
        stacked = torch.stack(found)
        scores = standard_scores(stacked, value)
        assert scores.numel() == 0 or float(scores.max()) < 4.5
        if scores.numel() == 0:
            torch.testing.assert_close(stacked[0], value, rtol=1e-10, atol=1e-12)
    assert float((draws[0][0] - exact[0]).norm() / exact[0].norm()) > 1e-3  # it is a sketch
    assert bool((draws[0][0] == draws[0][0].T).all()) or torch.allclose(draws[0][0], draws[0][0].T, rtol=1e-12)
    assert float(torch.linalg.eigvalsh(draws[0][0]).min()) > -1e-10 * float(exact[0].trace())


@pytest.mark.parametrize("scale", ["scalar", "diagonal"])
def test_sparse_leaves_alignment_exact(scale: str) -> None:
    pieces = made_up()
    M, g = scales(pieces, scale), directions(pieces)
    for found, exact in zip(
        read(sketched(pieces, 8, "sparse"), M, g)[1:], read(Contributions(pieces, N), M, g)[1:], strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def wide(T: int = 6, rows: int = 60, columns: int = 50) -> Pieces:
    generator = torch.Generator().manual_seed(3)
    bounds = tuple(T * i for i in range(N + 1))
    shape = (rows, columns)
    grads, inputs = (torch.randn(T * N, size, generator=generator, dtype=F64) for size in shape)
    return {Parameter(torch.zeros(shape, dtype=F64)): [OuterProduct(0, shape, F64, bounds, grads, 1.0, inputs=inputs)]}


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_sparse_error_is_the_theory_s() -> None:
    pieces = wide()
    M, g = scales(pieces, "diagonal"), directions(pieces)
    K = read(Contributions(pieces, N), M, g)[0]
    for dimension in (16, 64, 256):
        squares = [off(read(sketched(pieces, dimension, "sparse", seed), M, g)[0], K) ** 2 for seed in range(60)]
        variance = (K.diagonal()[:, None] * K.diagonal() + K**2).sum() / K.square().sum() / dimension
        # Coordinates within a stretch never meet, so that the bound is not reached near the full size.
        assert 0.6 < sum(squares) / len(squares) / float(variance) < 1.3


def test_kronecker_error_is_the_theory_s() -> None:
    pieces = wide()
    M, g = scales(pieces, "scalar"), directions(pieces)
    exact = Contributions(pieces, N)
    K = read(exact, M, g)[0]
    C = exact.per_candidate(next(iter(pieces))) * 0.1**0.5
    rows, columns = (torch.einsum(pattern, C, C) for pattern in ("iab,jcb->ijac", "iab,jac->ijbc"))
    means = []
    for dimension in (18, 98, 512):
        h, w = kronecker_sides(60, 50, dimension // 2)
        R2, T2 = rows.square().sum((2, 3)), columns.square().sum((2, 3))
        cross = torch.einsum("ijac,ijca->ij", rows, rows)
        norms = K.diagonal()[:, None] * K.diagonal()
        variance = (R2 + cross) / h + (T2 + cross) / w + (R2 + T2 + norms + K**2) / (h * w)
        expected = float(variance.sum() / K.square().sum()) / 2
        squares = [off(read(sketched(pieces, dimension, "kronecker", seed), M, g)[0], K) ** 2 for seed in range(80)]
        means.append(sum(squares) / len(squares))
        assert 0.6 < means[-1] / expected < 1.3
    assert means[0] > 3 * means[1] > 4.5 * means[2]


@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
def test_reported_error_is_near_the_true_one(kind: str) -> None:
    pieces = made_up()
    M, g = scales(pieces, "scalar"), directions(pieces)
    K, b, *_ = read(Contributions(pieces, N), M, g)
    true, told = [], []
    for seed in range(40):
        contributions = sketched(pieces, 48, kind, seed)
        assert contributions.error is None
        found = read(contributions, M, g)
        errors = contributions.errors
        assert errors is not None
        assert contributions.error == max(errors)
        true.append((off(found[0], K), off(found[1], b)))
        told.append(errors)
    for which in (0, 1) if kind == "kronecker" else (0,):
        ratio = sum(t[which] for t in told) / sum(t[which] for t in true)
        assert 0.6 < ratio < 1.7
    assert kind == "kronecker" or all(t.alignment == 0.0 for t in told)


def test_reported_error_is_that_of_the_last_pass_and_of_the_scale_that_selects() -> None:
    pieces = made_up()
    g = directions(pieces)
    contributions = sketched(pieces, 24, "sparse")
    first, second = scales(pieces, "scalar"), scales(pieces, "diagonal")
    read(contributions, first, g)
    once = contributions.error
    read(contributions, first, g)
    assert contributions.error == once  # not added up
    other = sketched(pieces, 24, "sparse")
    read(other, second, g)
    assert other.error != once
    for p in contributions.parameters:  # as the assembly reads: the scale that selects, then M
        for block in contributions.blocks(p):
            whole = second[p]
            assert isinstance(whole, Diagonal)
            part, along = Diagonal(as_rows(whole.values)[block.rows]), as_rows(g[p])[block.rows]
            block.products(part.power(0.5), along, along, last=False)
            block.products(Scalar(0.3), along, along)
    assert contributions.error == pytest.approx(other.error, rel=1e-9)


@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
def test_a_second_reading_of_a_block_finds_the_same(kind: str) -> None:
    pieces = made_up()
    M, g = scales(pieces, "scalar"), directions(pieces)
    contributions = sketched(pieces, 24, kind)
    for p in pieces:
        for block in contributions.blocks(p, structure="scalar"):
            along = as_rows(g[p])[block.rows]
            first = block.products(M[p].power(0.5), along, along, last=False)
            second = block.products(M[p].power(0.5), along, along)
            assert (first is None) == (second is None)
            for a, b in zip(first or (), second or (), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
def test_seed_decides(kind: str) -> None:
    pieces = made_up()
    M, g = scales(pieces, "scalar"), directions(pieces)
    state = torch.get_rng_state()
    first, again, other = (read(sketched(pieces, 24, kind, seed), M, g)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
def test_what_is_no_larger_than_the_sketch_passes_exactly(kind: str) -> None:
    pieces = made_up()
    M, g = scales(pieces, "scalar"), directions(pieces)
    contributions = sketched(pieces, 200, kind)
    for found, exact in zip(read(contributions, M, g), read(Contributions(pieces, N), M, g), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    assert contributions.error == 0.0


@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
def test_combination_totals_and_the_interface_s_own_numbers_stay_exact(kind: str) -> None:
    model, batch = tiny_llama(tied=True), batch_of(N)
    exact = recorded(model, Factorized(), batch)
    found = recorded(model, Projection(16, kind), batch)
    weights = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.5], dtype=F64)
    for p, value in exact.combine(weights).items():
        assert torch.equal(found.combine(weights)[p], value)
    g = {p: torch.randn_like(p).detach() for p in exact.parameters}
    M: dict[Parameter, ScaleOperator] = {p: Scalar(0.2) for p in exact.parameters}
    assert torch.equal(found.alignment(g), exact.alignment(g))
    assert torch.equal(found.gram(M), exact.gram(M))
    found = found.without((1,))
    total = exact.without((1,)).combine()
    for p in found.parameters:
        seen = torch.zeros_like(as_rows(p))
        for block in found.blocks(p, structure="scalar"):
            part = block.total()
            if part is not None:
                seen[block.rows] = part
        torch.testing.assert_close(seen.view(p.shape).detach(), total[p], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
def test_quarantine_and_members_keep_the_sketch(kind: str) -> None:
    pieces = made_up()
    M, g = scales(pieces, "scalar"), directions(pieces)
    whole = read(sketched(pieces, 24, kind), M, g)[0]
    everyone = sketched(pieces, 24, kind)
    without = everyone.without((2,))
    gram, alignment, *_ = read(without, M, g)
    assert everyone.error == without.error is not None
    assert not gram[2].any()
    assert not gram[:, 2].any()
    assert alignment[2] == 0
    keep = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(gram[keep][:, keep], whole[keep][:, keep], rtol=1e-9, atol=1e-12)
    members = sketched(pieces, 24, kind).only(torch.tensor([3, 1]))
    assert isinstance(members, ProjectedContributions)
    assert members.count == 2
    error = members.error
    assert error is None
    read(members, M, g)
    assert members.error is not None


def test_kronecker_refuses_a_scale_that_was_promised_scalar() -> None:
    pieces = wide()
    (p,) = pieces
    (block,) = sketched(pieces, 24, "kronecker").blocks(p, structure="scalar")
    along = torch.zeros(p.shape, dtype=F64)
    with pytest.raises(ConfigurationError, match=r"structure='scalar'.*kind='sparse'"):
        block.products(Diagonal(along + 1), along, along)


def test_kronecker_forms_no_gradient() -> None:
    pieces = wide()
    (p,) = pieces
    contributions = Projection(24, "kronecker").contributions(pieces, N)
    (block,) = contributions.blocks(p, structure="scalar")
    assert block.memory is None
    assert all(b.memory is not None for b in contributions.blocks(p))  # any other M: sparse


def test_exact_products_of_factors_are_taken_where_writing_out_is_dearer() -> None:
    pieces = wide()
    (p,) = pieces
    contributions = Projection(24).contributions(pieces, N)
    exact = Contributions(pieces, N)
    along = directions(pieces)[p]
    assert all(block.memory is None for block in contributions.blocks(p, structure="scalar"))
    (found,) = (block.products(Scalar(0.5), along, along) for block in contributions.blocks(p, structure="scalar"))
    (value,) = (block.products(Scalar(0.5), along, along) for block in exact.blocks(p))
    assert found is not None
    assert value is not None
    for a, b in zip(found, value, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert contributions.error == 0.0


def test_fold_is_a_count_sketch() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (3, 8, 21):
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
        turns = torch.randint(0, 8, (size // 8 + 1,), generator=generator)
        S = fold(torch.eye(size, dtype=F64), signs.to(F64), turns, 8)
        assert torch.equal(S.abs().sum(1), torch.ones(size, dtype=F64))  # one bucket each
        assert torch.equal(S.sum(1), signs.to(F64))
        x = torch.randn(4, size, generator=generator, dtype=F64)
        torch.testing.assert_close(fold(x, signs.to(F64), turns, 8), x @ S)


def test_sides_of_a_kronecker_sketch() -> None:
    assert kronecker_sides(1000, 1000, 2048) == (45, 45)
    assert kronecker_sides(16, 1000, 2048) == (16, 128)
    assert kronecker_sides(1000, 16, 2048) == (128, 16)
    assert kronecker_sides(1000, 1000, 1) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dense"}, "kind is 'dense'; allowed are sparse, kronecker"),
        ({"dimension": 7}, "dimension is 7; an even integer"),
        ({"dimension": 0}, "dimension is 0"),
        ({"dimension": 64.0}, "dimension is 64.0"),
        ({"dimension": True}, "dimension is True"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Projection(**options)


# -- in the step -------------------------------------------------------------------------------------------------------


def steps(gradients: Any, make: Any, options: dict[str, Any], count: int = 4) -> list[ftw.Selection]:
    model = tiny_llama()
    optimizer = make(model.parameters())
    selector = ftw.Selector(
        model,
        optimizer,
        target=[batch_of(3, seed=9)],
        loss_fn=token_mean,
        budget=3,
        warmup=2,
        gradients=gradients,
        **options,
    )
    found = []
    for step in range(count):
        batch = batch_of(8, seed=step)
        with selector.record(mass=label_tokens(batch)):
            token_mean(model, batch).backward()
        found.append(selector.apply())
        optimizer.step()
        optimizer.zero_grad()
    selector.close()
    return found


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.001)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
@pytest.mark.parametrize("options", [{}, {"geometry": "update"}, {"objective": "utility"}])
def test_a_run_end_to_end(kind: str, make: Any, options: dict[str, Any]) -> None:
    selections = steps(Projection(128, kind), make, options)
    for selection in selections:
        assert 0.0 < selection.diagnostics["sketch_error"] < 1.0
        assert len(selection.indices) <= 3
        assert torch.isfinite(selection.weights).all()
    exact = steps("factorized", make, options)
    # The first step shares the model: what is read of the sparse sketch's alignment is exact.
    if kind == "sparse":
        alignments = [s[0].diagnostics["alignment"] for s in (selections, exact)]
        torch.testing.assert_close(*alignments, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_weights_are_near_the_exact_ones_in_a_large_sketch(make: Any) -> None:
    options = {"filter": "all"}
    exact = steps("factorized", make, options, 1)[0].weights

    def distance(dimension: int) -> float:
        runs = [steps(Projection(dimension, seed=seed), make, options, 1)[0].weights for seed in range(6)]
        return sum(off(w, exact) for w in runs) / len(runs)

    assert distance(256) < 0.1
    assert distance(976) < 1e-8  # the largest parameter


def test_by_name_and_with_the_mlp() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(8, 6, dtype=F64, generator=torch.Generator().manual_seed(0))

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = (model(x) - 1.0).square().mean()
        return result

    selector = ftw.Selector(model, optimizer, target=[x[:3]], loss_fn=loss_of, budget=3, gradients="projection")
    with selector.record():
        loss_of(model, x).backward()
    assert selector.apply().diagnostics["sketch_error"] == 0.0  # all of it is smaller than the default sketch
    selector.close()
