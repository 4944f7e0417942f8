"""The shipped contract check over every registered gradient extractor, and over extractors that break one law each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from ftw import registry
from ftw.gradients import Auto, Factorized, Full, GradientExtractor, LoRA, Projection
from ftw.gradients.base import Block, Contributions
from ftw.gradients.pieces import Dense, OuterProduct, Piece, TokenPiece
from ftw.testing import check_extractor

EXTRACTORS: dict[str, tuple[type[GradientExtractor], list[dict[str, Any]], bool]] = {
    "auto": (Auto, [{}], True),
    "factorized": (Factorized, [{}], True),
    "full": (Full, [{}], True),
    "lora": (LoRA, [{}], True),
    "projection": (
        Projection,
        [{}, {"dimension": 64}, {"dimension": 16}, {"dimension": 16, "kind": "kronecker", "seed": 3}],
        False,
    ),
}
CASES = [
    pytest.param(cls, options, exact, id=f"{name}{options or ''}")
    for name, (cls, all_options, exact) in EXTRACTORS.items()
    for options in all_options
]


def test_everything_registered_stands_in_the_table() -> None:
    ours = {name for name, owners in registry.available("gradients").items() if "filter-then-weight" in owners}
    assert ours == set(EXTRACTORS)
    for name, (cls, _, _) in EXTRACTORS.items():
        assert registry.load("gradients", name) is cls


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("cls", "options", "exact"), CASES)
def test_extractor(cls: type[GradientExtractor], options: dict[str, Any], exact: bool, seed: int) -> None:
    check_extractor(cls(**options), exact=exact, seed=seed)


def test_nothing_outside_is_changed() -> None:
    before = torch.get_rng_state()
    check_extractor(Full())
    assert torch.equal(torch.get_rng_state(), before)


# --- The check itself ---


class Keeping(GradientExtractor):
    """Keeps what it was told to."""

    def __init__(self, rule: Callable[[Piece], Piece], kind: type[Contributions] = Contributions) -> None:
        self.rule, self.kind = rule, kind

    def keep(self, piece: Piece) -> Piece:
        return self.rule(piece)

    def contributions(self, pieces: Mapping[Parameter, list[Piece]], count: int) -> Contributions:
        return self.kind(pieces, count)


def same(piece: Piece) -> Piece:
    return piece


def doubled(piece: Piece) -> Piece:
    return replace(piece, scale=2.0 * piece.scale) if isinstance(piece, TokenPiece) else piece


def sum_times_sum(piece: Piece) -> Piece:
    """What public code was found to do: the sum of inputs times the sum of gradients."""
    if not isinstance(piece, OuterProduct):
        return piece
    owners = piece.owners()
    left = piece.grads.new_zeros(piece.count, piece.grads.shape[1]).index_add_(0, owners, piece.grads)
    right = piece.inputs.new_zeros(piece.count, piece.inputs.shape[1]).index_add_(0, owners, piece.inputs)
    return Dense(piece.start, piece.shape, piece.dtype, left[:, :, None] * right[:, None] * piece.scale)


def rounded(piece: Piece) -> Piece:
    dense = piece.dense()
    assert isinstance(dense, Dense)
    return replace(dense, values=dense.values.float().double())


class Leaking(Contributions):
    """Reads candidates of weight 0, whose NaN then spreads."""

    def combine(
        self, weights: Tensor | None = None, parameters: Iterable[Parameter] | None = None
    ) -> dict[Parameter, Tensor]:
        chosen = torch.ones(self.count, dtype=torch.float64) if weights is None else weights
        return {p: torch.tensordot(chosen, self.per_candidate(p), dims=1) for p in self.parameters}


class Forgetful(Contributions):
    """Lets candidates out of quarantine."""

    def without(self, excluded: tuple[int, ...]) -> Contributions:
        return self


class Shy(Contributions):
    """Leaves the first block out."""

    def blocks(self, parameter: Parameter, **options: Any) -> Iterator[Block]:  # type: ignore[override]
        every = super().blocks(parameter, **options)
        return itertools.islice(every, 1 if options.get("split", True) else 0, None)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        (Keeping(doubled), "audit refuses"),
        (Keeping(sum_times_sum), "audit refuses"),
        (Keeping(rounded), "audit refuses"),
        (Keeping(same, Leaking), "weight 0"),
        (Keeping(same, Forgetful), "quarantine"),
        (Keeping(same, Shy), "blocks hold rows"),
        (Projection(dimension=16), "K of shape"),
    ],
    ids=["doubled", "sum times sum", "rounded", "leaking", "forgetful", "shy", "approximate"],
)
def test_a_broken_extractor_is_found(extractor: GradientExtractor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_extractor(extractor)


def test_an_approximation_must_estimate_its_error() -> None:
    with pytest.raises(AssertionError, match="estimate its error"):
        check_extractor(Full(), exact=False)
