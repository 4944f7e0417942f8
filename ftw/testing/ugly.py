"""Deliberately ugly problems: singular, duplicate, conflicting, empty, badly scaled. What the checks run on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftw.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class UglyProblem:
    """K, (n, n), and b, (n,), float64; `consistent` where b lies in the range of K, and float64 can tell."""

    name: str
    gram: Tensor
    alignment: Tensor
    consistent: bool

    @property
    def size(self) -> int:
        return self.alignment.numel()


SHAPES = (
    "well_posed",
    "low_rank",
    "rank_one",
    "duplicates",
    "near_duplicates",
    "conflicting",
    "zero_rows",
    "zero",
    "ill_conditioned",
    "uneven_lengths",
    "identity_ties",
    "harmful",
    "orthogonal_target",
    "out_of_range",
)
"""What can be wrong with contributions: see `ugly_problem`."""


def ugly_problem(
    shape: str,
    n: int,
    generator: torch.Generator,
    gram_scale: float = 1.0,
    alignment_scale: float = 1.0,
) -> UglyProblem:
    """One problem `K = C'C, b = C'g` (out_of_range: b arbitrary) with the defect that `shape` names."""
    wide, narrow = 2 * n + 2, max(1, n // 3)
    rank = {"low_rank": narrow, "rank_one": 1, "out_of_range": narrow}.get(shape, wide)
    C = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    g = torch.randn(rank, generator=generator, dtype=torch.float64)
    half = n // 2
    if shape in ("duplicates", "near_duplicates"):
        C[:, n - half :] = C[:, :half]
        if shape == "near_duplicates":
            C += 1e-7 * torch.randn(C.shape, generator=generator, dtype=torch.float64)
    elif shape == "conflicting":
        C[:, n - half :] = -C[:, :half]
    elif shape == "zero_rows":
        C[:, ::2] = 0.0
    elif shape == "zero":
        C.zero_()
    elif shape == "ill_conditioned":
        C *= torch.logspace(0, -7, rank, dtype=torch.float64)[:, None]
    elif shape == "uneven_lengths":
        C *= torch.logspace(-4, 4, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    elif shape == "identity_ties":
        C = torch.eye(rank, n, dtype=torch.float64)
        g = torch.ones(rank, dtype=torch.float64)
    elif shape == "harmful":
        C = C.abs()
        g = -g.abs()
    elif shape == "orthogonal_target":
        g = g - C @ torch.linalg.lstsq(C, g[:, None], driver="gelsd").solution.flatten() if n else g
    gram, alignment = C.T @ C, C.T @ g
    if shape in ("duplicates", "conflicting"):
        # A matrix product need not give equal columns equal bits; the samples' own arithmetic would.
        sign = 1.0 if shape == "duplicates" else -1.0
        alignment[n - half :] = sign * alignment[:half]
    if shape == "out_of_range":
        alignment = torch.randn(n, generator=generator, dtype=torch.float64)
    return UglyProblem(
        f"{shape}-n{n}-K{gram_scale:.0e}-b{alignment_scale:.0e}",
        gram * gram_scale,
        alignment * alignment_scale,
        consistent=shape not in ("out_of_range", "near_duplicates", "ill_conditioned", "uneven_lengths"),
    )


def ugly_problems(seed: int = 0, sizes: Sequence[int] = (0, 1, 2, 3, 8, 17)) -> Iterator[UglyProblem]:
    """Every shape at every size; the scales go round, so that each shape meets several of them."""
    scales = [(1.0, 1.0), (1e-16, 1e-16), (1e16, 1e-16), (1e-16, 1e16), (1e16, 1e16), (1e-8, 1e3)]
    generator = torch.Generator().manual_seed(seed)
    for i, shape in enumerate(SHAPES):
        for j, n in enumerate(sizes):
            yield ugly_problem(shape, n, generator, *scales[(i + j) % len(scales)])


def problems(
    shapes: Sequence[str] = SHAPES,
    sizes: tuple[int, int] = (1, 24),
    scales: Sequence[float] = (1e-16, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e16),
) -> SearchStrategy[UglyProblem]:
    """A hypothesis strategy of problems, for properties of your own filter or solver.

        @given(ftw.testing.problems())
        def test_mine(ugly):
            solution = MySolver().solve(ugly.gram, ugly.alignment, CappedCone(4.0))

    Args:
        shapes: the defects to draw from, of `SHAPES`.
        sizes: fewest and most candidates.
        scales: of K and of b, drawn apart.

    Raises:
        MissingDependencyError: hypothesis is not installed.
        ConfigurationError: a shape that there is not.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise MissingDependencyError(
            "ftw.testing.problems draws by hypothesis, which is not installed; pip install hypothesis, or go through "
            "ftw.testing.ugly_problems()."
        ) from error
    if not shapes or not set(shapes) <= set(SHAPES):
        raise ConfigurationError(f"shapes is {list(shapes)}; allowed are some of {', '.join(SHAPES)}; choose of these.")

    def drawn(shape: str, n: int, seed: int, gram_scale: float, alignment_scale: float) -> UglyProblem:
        return ugly_problem(shape, n, generator_of(seed), gram_scale, alignment_scale)

    scale = st.sampled_from(list(scales))
    return st.builds(drawn, st.sampled_from(list(shapes)), st.integers(*sizes), st.integers(0, 2**31), scale, scale)


def generator_of(seed: int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(seed)
