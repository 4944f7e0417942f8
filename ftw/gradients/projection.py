"""Extractor `projection`: matrices and tables by their factors, the Gram from random sketches.

A sketch S is a random linear map to few numbers with E[S'S] = I, so that `(S x_i)'(S x_j)` is `x_i'x_j` in the mean.
It acts on x_i = M^(1/2) c_i, behind the update scale; nothing that the optimizer does is lost (DESIGN, section 3.5).

Sparse (CountSketch; Charikar, Chen, Farach-Colton 2002): a random sign for every coordinate, then stretches of
consecutive coordinates are laid on a ring of buckets, each at a random place, and added. Two coordinates share a bucket
with probability 1/m, or never, which is all that the variance asks for; memory is read in order, and sums have a fixed
order, which scattering on an accelerator does not have. More buckets a coordinate leave the variance as it is.

Kronecker: `S = P_out (x) P_in`, which is applied to the factors and so before a gradient is formed.

Longer than others: both kinds share their seeds, their halves and the estimate of the error that comes of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.errors import ConfigurationError
from ftw.gradients.base import Contributions, GradientExtractor
from ftw.gradients.blocks import SPARE, Block, Products
from ftw.gradients.pieces import OuterProduct, Piece, RowScatter, TokenPiece
from ftw.optim_state.base import Scalar, ScaleOperator

KINDS = ("sparse", "kronecker")


class Projection(GradientExtractor):
    """Keeps factors as `factorized` does; K is estimated from sketches, parameter by parameter.

    Law: over seeds, b and K are right in the mean, for any M. The gradient written (`combine`) is exact. K is positive
    semidefinite, being a Gram of sketches. `ProjectedContributions.error` estimates how far off b and K are.

    Every parameter has a sketch of its own, because nothing of it is kept once its share of K is added: the variance
    of K_ij is then at most the sum over parameters of `(K_ii K_jj + K_ij^2) / dimension`. One sketch for the whole
    model, or one cut up by the parameters' sizes, has many times that for the same work (docs/contributions.md).

    Args:
        dimension: m, numbers a candidate and parameter are sketched to; even. The error of K falls like 1/sqrt(m).
            Parameters of no more numbers pass exactly.
        kind: "sparse" serves any M: gradients are written out as usual, and b stays exact, being cheaper than the
            sketch. What it saves is the n^2 of the Gram: it pays for hundreds of candidates (tokens), not for few.
            Where M is a multiple of the identity and exact products of factors are cheaper than writing out, they are
            taken instead.
            "kronecker" forms no gradient and costs `sqrt(m/2) (d_in + d_out)` a token and half, but needs M to be a
            multiple of the identity (SGD, `identity`): a diagonal M does not pass through a Kronecker product, and
            parameters with any other M are sketched sparsely. Its error falls more slowly, like m^(-1/4) for
            gradients of low rank, and b has it too.
        seed: of the sketches, which depend on it, on the parameter's place and on the rows only; they are the same in
            every step (for look-up tables: in every step that touches as many rows).
    """

    def __init__(self, dimension: int = 4096, kind: str = "sparse", seed: int = 0) -> None:
        if kind not in KINDS:
            raise ConfigurationError(
                f"kind is {kind!r}; allowed are {', '.join(KINDS)}; take 'sparse', which serves every optimizer."
            )
        if not _is_integer(dimension) or dimension < 2 or dimension % 2:
            raise ConfigurationError(
                f"dimension is {dimension!r}; an even integer of at least 2 is needed, because the error is read off "
                "two halves; the default is 4096."
            )
        if not _is_integer(seed):
            raise ConfigurationError(f"seed is {seed!r}; an integer is needed; the default is 0.")
        self.dimension = dimension
        self.kind = kind
        self.seed = seed

    def keep(self, piece: Piece) -> Piece:
        return piece

    def contributions(self, pieces: Mapping[Parameter, list[Piece]], count: int) -> ProjectedContributions:
        return ProjectedContributions(pieces, count, projection=self)


class ProjectedContributions(Contributions):
    """Contributions whose blocks answer with estimates.

    Estimated: what `products` of a block says of K and, for "kronecker", of b and the coupling. Exact, as inherited:
    `combine`, `alignment`, `gram`, `per_candidate`, a block's `total`, and blocks asked for with `split=False`, which
    a preconditioner that is not elementwise reads.
    """

    def __init__(
        self,
        pieces: Mapping[Parameter, list[Piece]],
        count: int,
        *,
        projection: Projection,
        excluded: tuple[int, ...] = (),
        block_bytes: int | None = None,
    ) -> None:
        super().__init__(pieces, count, excluded=excluded, block_bytes=block_bytes)
        self.projection = projection
        self._tally = _Tally()
        self._place = {p: i for i, p in enumerate(self._pieces)}

    @property
    def errors(self) -> SketchErrors | None:
        """Estimated errors of the last pass over the blocks, under the scale that selects; None before it."""
        return self._tally.errors()

    @property
    def error(self) -> float | None:
        """The larger of `errors`: 0 where nothing was sketched, about 1 where the estimate is noise."""
        errors = self.errors
        return None if errors is None else max(errors)

    def without(self, excluded: tuple[int, ...]) -> ProjectedContributions:
        rest = ProjectedContributions(
            self._pieces, self.count, projection=self.projection, excluded=excluded, block_bytes=self.block_bytes
        )
        rest._tally = self._tally  # the assembly measures without culprits that it finds itself
        return rest

    def only(self, members: Tensor) -> ProjectedContributions:
        exact = super().only(members)
        return ProjectedContributions(
            exact._pieces, exact.count, projection=self.projection, block_bytes=self.block_bytes
        )

    def side_by_side(self, parameters: Sequence[Parameter]) -> Block:
        block = super().side_by_side(parameters)
        return _Exact(block.rows, block.memory, self._tally, (self._place[parameters[0]], "bundle"), block)

    def blocks(self, parameter: Parameter, *, split: bool = True, structure: str = "any") -> Iterator[Block]:
        kept, place, dimension = self._pieces[parameter], self._place[parameter], self.projection.dimension
        exact = super().blocks(parameter, split=split, structure=structure)
        if not split:
            yield from exact
        elif prod(kept[0].shape) <= dimension:
            for number, block in enumerate(exact):
                yield _Exact(block.rows, block.memory, self._tally, (place, number), block)
        elif self.projection.kind == "kronecker" and structure == "scalar" and _is_factored(kept):
            yield self._kronecker(kept, place)
        else:
            end = _last_touched(kept)
            sums: dict[bool, Tensor] = {}
            for number, block in enumerate(exact):
                if block.memory is None:  # untouched, or held in an exact form that is cheaper than writing out
                    yield _Exact(block.rows, None, self._tally, (place, number), block)
                    continue
                last_row = block.rows.stop - 1 if isinstance(block.rows, slice) else int(block.rows[-1])
                seed = _derived_seed(self.projection.seed, place, number)
                key = (place, number)
                yield _Sparse(block.rows, block.memory, self._tally, key, dimension // 2, seed, sums, last_row == end)

    def _kronecker(self, kept: list[Piece], place: int) -> Block:
        rows, columns = kept[0].shape
        height, width = kronecker_sides(rows, columns, self.projection.dimension // 2)
        generator = torch.Generator().manual_seed(_derived_seed(self.projection.seed, place, 0))
        halves = []
        for _ in range(2):
            left, right = (
                _sign_matrix(low, high, generator).to(kept[0].device, kept[0].dtype)
                for low, high in ((height, rows), (width, columns))
            )
            projected: list[Piece] = [_project(piece, left, right) for piece in kept]
            values = torch.empty((self.count, height, width), dtype=left.dtype, device=left.device)
            self._write(projected, values, slice(0, height))
            halves.append(_Half(left, right, values))
        everyone = torch.ones(self.count, dtype=torch.float64)
        everyone[list(self.excluded)] = 0.0
        return _Kronecker(slice(0, rows), None, self._tally, (place, 0), kept, everyone, halves)


class SketchErrors(NamedTuple):
    """Estimated standard errors, from the difference of two independent halves of every sketch.

    Attributes:
        gram: of K, Frobenius norm, relative to the estimate's.
        alignment: of b, relative to the estimate's norm.
    """

    gram: float
    alignment: float


class _Tally:
    """Sums over the blocks of one pass, for the error; a block may be read under two scales (`last`).

    Halves are independent, so `|first - second|^2 / 4` is the variance of their mean, in the mean; parameters are
    independent too, so variances add.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._sums: dict[tuple[bool, torch.device], list[Tensor]] = {}

    def add(self, key: Any, last: bool, products: Products, spread: tuple[Tensor, Tensor] | None = None) -> None:
        """Count a block; spread: variances of K and b."""
        if key in self._seen:  # every block was read to its end before: a new pass
            self._seen.clear()
            self._sums.clear()
        if last:
            self._seen.add(key)
        none = products.target.new_zeros(())
        new = [products.gram, products.alignment, *((none, none) if spread is None else spread)]
        where = last, none.device
        old = self._sums.get(where)
        self._sums[where] = [a.clone() for a in new] if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def errors(self) -> SketchErrors | None:
        # Where a block is read twice, the first reading is under the scale that selects.
        first = min((last for last, _ in self._sums), default=None)
        parts = [[a.cpu() for a in sums] for (last, _), sums in self._sums.items() if last == first]
        if not parts:
            return None
        gram, alignment, gram_variance, alignment_variance = (sum(each) for each in zip(*parts, strict=True))
        return SketchErrors(_ratio(gram_variance, gram), _ratio(alignment_variance, alignment))


def _ratio(variance: Any, estimate: Any) -> float:
    size = float(estimate.norm())
    return float(variance) ** 0.5 / size if size else 0.0


@dataclass(frozen=True)
class _Exact(Block):
    """A block that passes as it is, and is counted."""

    tally: _Tally
    key: Any
    inner: Block

    def total(self) -> Tensor | None:
        return self.inner.total()

    def alignment(self, direction: Tensor) -> Tensor | None:
        return self.inner.alignment(direction)

    def products(self, root: ScaleOperator, g: Tensor, pull: Tensor, *, last: bool = True) -> Products | None:
        products = self.inner.products(root, g, pull, last=last)
        if products is not None:
            self.tally.add(self.key, last, products)
        return products


@dataclass(frozen=True)
class _Sparse(Block):
    """Some rows of a parameter whose blocks add up to one sketch; the last one answers for K of them all.

    K cannot be read block by block: with many candidates a block has few coordinates, fewer than the sketch.
    """

    tally: _Tally
    key: Any
    buckets: int  # of each half
    seed: int
    sums: dict[bool, Tensor]  # by `last`: (2, n, buckets), of the blocks so far
    final: bool

    def products(self, root: ScaleOperator, g: Tensor, pull: Tensor, *, last: bool = True) -> Products | None:
        assert self.memory is not None
        memory = self.memory if last else self.memory.clone()
        n = len(memory) - SPARE
        memory[n] = g
        root.apply_(memory[: n + 1])
        memory[n + 1] = pull
        flat = memory.flatten(1)
        along = (flat[: n + 1] @ flat[n:].T).double()
        folded = [fold(flat[:n], signs.to(flat.dtype), turns, self.buckets) for signs, turns in self._hashes]
        sketch = torch.stack(folded)
        if last in self.sums:
            sketch += self.sums.pop(last)
        spread = None
        if self.final:
            both = (sketch @ sketch.mT).double()
            gram = both.mean(0)
            spread = _variance(both), along.new_zeros(())
        else:
            self.sums[last] = sketch
            gram = along.new_zeros(()).expand(n, n)
        products = Products(gram, along[:n, 0], along[n, 0], along[:n, 1])
        self.tally.add(self.key, last, products, spread)
        return products

    @cached_property
    def _hashes(self) -> list[tuple[Tensor, Tensor]]:
        assert self.memory is not None
        generator = torch.Generator().manual_seed(self.seed)
        size = self.memory[0].numel()
        halves = []
        for _ in range(2):
            signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            turns = torch.randint(0, self.buckets, (size // self.buckets + 1,), generator=generator)
            halves.append((signs.to(self.memory.device), turns))
        return halves


def fold(flat: Tensor, signs: Tensor, turns: Tensor, buckets: int) -> Tensor:  # (n, D) -> (n, buckets)
    """CountSketch of every row: stretch q of `buckets` coordinates is turned by `turns[q]` on the ring and added.

    Args:
        signs: (D,), 1 or -1. turns: (D // buckets + 1,), the last one for the incomplete stretch; on the CPU.
    """
    out = flat.new_zeros(len(flat), buckets)
    for q, turn in enumerate(turns.tolist()):
        stretch = flat[:, q * buckets : (q + 1) * buckets]
        sign = signs[q * buckets : (q + 1) * buckets]
        before_seam = min(buckets - turn, stretch.shape[1])
        behind_seam = stretch.shape[1] - before_seam
        out[:, turn : turn + before_seam].addcmul_(stretch[:, :before_seam], sign[:before_seam])
        out[:, :behind_seam].addcmul_(stretch[:, before_seam:], sign[before_seam:])
    return out


class _Half(NamedTuple):
    left: Tensor  # P_out, (height, d_out)
    right: Tensor  # P_in, (width, d_in)
    values: Tensor  # (n, height, width), P_out c_i P_in'


@dataclass(frozen=True)
class _Kronecker(Block):
    """A whole parameter whose gradients were never formed; for M a multiple of the identity."""

    tally: _Tally
    key: Any
    kept: list[Piece]
    weights: Tensor  # (n,), 0 for quarantined candidates
    halves: list[_Half]

    def total(self) -> Tensor:
        first = self.kept[0]
        total = torch.zeros(first.shape, dtype=first.dtype, device=first.device)
        weights = None if bool(self.weights.all()) else self.weights
        for piece in self.kept:
            piece.add_combined(total, None if weights is None else weights[piece.start : piece.start + piece.count])
        return total

    def alignment(self, direction: Tensor) -> Tensor:
        found = torch.zeros(len(self.weights), dtype=torch.float64, device=self.kept[0].device)
        for piece in self.kept:
            found[piece.start : piece.start + piece.count] += piece.alignment(direction).double()
        return torch.where(self.weights.to(found.device) == 0, 0.0, found)

    def products(self, root: ScaleOperator, g: Tensor, pull: Tensor, *, last: bool = True) -> Products:
        if not isinstance(root, Scalar):
            raise ConfigurationError(
                f"a block sketched by kind='kronecker' was read under a scale of type {type(root).__name__}; only a "
                "multiple of the identity passes through it; a preconditioner must set structure='scalar' for that "
                "alone; or choose kind='sparse'."
            )
        r = root.value
        grams, alignments, couplings = [], [], []
        for left, right, values in self.halves:
            flat = values.flatten(1)
            across = torch.stack([(left @ t.to(left.dtype) @ right.T).flatten() for t in (g, pull)])
            along = (flat @ across.T).double()
            grams.append((flat @ flat.T).double() * r**2)
            alignments.append(along[:, 0] * r**2)
            couplings.append(along[:, 1] * r)
        gram, alignment, coupling = (torch.stack(each) for each in (grams, alignments, couplings))
        target = root.apply(g).square().sum().double()
        products = Products(gram.mean(0), alignment.mean(0), target, coupling.mean(0))
        self.tally.add(self.key, last, products, (_variance(gram), _variance(alignment)))
        return products


def kronecker_sides(rows: int, columns: int, size: int) -> tuple[int, int]:
    """Height and width of a sketch of `size` numbers at most: square, unless a side is shorter than that."""
    height = min(rows, isqrt(size))
    width = min(columns, size // height)
    return min(rows, size // width), width


def _project(piece: Piece, left: Tensor, right: Tensor) -> OuterProduct:
    """The piece of `left c_i right'`."""
    assert isinstance(piece, TokenPiece)
    if isinstance(piece, RowScatter):
        grads = left.T[piece.row_of.clamp_min(0)] * (piece.row_of >= 0)[:, None]
        inputs = piece.grads.to(right.dtype) @ right.T
    else:
        assert isinstance(piece, OuterProduct)
        grads = piece.grads.to(left.dtype) @ left[:, piece.first_row : piece.last_row].T
        inputs = piece.inputs.to(right.dtype) @ right.T
    shape = (left.shape[0], right.shape[0])
    return OuterProduct(
        start=piece.start,
        shape=shape,
        dtype=piece.dtype,
        bounds=piece.bounds,
        grads=grads,
        scale=piece.scale,
        inputs=inputs,
    )


def _sign_matrix(low: int, high: int, generator: torch.Generator) -> Tensor:  # (low, high)
    """P with E[P'P] = I; the identity where it need not be random."""
    if low == high:
        return torch.eye(low)
    return torch.randint(0, 2, (low, high), generator=generator).mul_(2).sub_(1) / low**0.5


def _is_factored(kept: list[Piece]) -> bool:
    return all(isinstance(piece, OuterProduct | RowScatter) and len(piece.shape) == 2 for piece in kept)


def _last_touched(kept: list[Piece]) -> int:
    """The last row that some candidate touches."""
    touched = [piece.touched_rows() for piece in kept]
    rows = [t for t in touched if t is not None and len(t)]
    if any(t is None for t in touched) or not rows:
        return kept[0].shape[0] - 1
    return max(int(t[-1]) for t in rows)


def _variance(halves: Tensor) -> Tensor:  # (2, ...) -> ()
    """Of the mean of two independent estimates, summed over entries."""
    return (halves[0] - halves[1]).square().sum() / 4


def _derived_seed(*numbers: int) -> int:
    """Neighbouring seeds and places must not share streams, as sums of them would."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
