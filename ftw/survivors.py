"""Survivors: candidates that are run again beyond a memory cap, measured with no more kept than the cap allows.

Two ways. Where a filter or solver needs K, the survivors' contributions are read some parameters at a time, because
everything that is measured is a sum over parameters. Where neither does, the weights are equal, and one weighted second
backward is all that is needed. Called by the selector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.gradients.base import Contributions
from ftw.gradients.pieces import Dense, Piece, as_rows
from ftw.gradients.recorder import Recorder
from ftw.gradients.replay import replay_contributions, replay_gradients
from ftw.measurement import Measurement

Measure = Callable[[Contributions], Measurement]


class Survivors(NamedTuple):
    """What is known of m survivors.

    Attributes:
        measurement: of them alone, (m,).
        alignment: along the recorder's direction, as found in the replay: (m,) float64, or their sum, (1,).
        replays: second forwards and backwards of their rows so far.
        contributions: of them, where all fit the cap at once.
        total: the sum of their contributions, where it was formed instead; AMP scale divided out.
        error: estimated relative error of K, where contributions were read by estimates; None: it is exact.
    """

    measurement: Measurement
    alignment: Tensor
    replays: int
    contributions: Contributions | None = None
    total: dict[Parameter, Tensor] | None = None
    error: float | None = None


def read_survivors(recorder: Recorder, members: Tensor, measure: Measure) -> Survivors:
    """b, K and the rest, exact, from contributions read as many parameters at a time as fit the cap.

    Args:
        members: (m,) the survivors' numbers in the window, ascending.
        measure: of contributions to some parameters, or to none.

    Raises:
        RecordingError, MemoryCapError: see `replay_contributions`.
    """
    assert recorder.direction is not None
    direction = recorder.direction
    found = torch.zeros(len(members), dtype=torch.float64)
    whole = measure(Contributions({}, len(members)))  # zeros
    variances: list[float] = []

    def read(contributions: Contributions) -> None:
        found.add_(contributions.alignment(direction))
        part = measure(contributions)
        whole.add(part)
        if contributions.error is not None:
            variances.append((contributions.error * float(part.chosen.gram.norm())) ** 2)
        whole.excluded = tuple(sorted({*whole.excluded, *part.excluded}))

    contributions, replays = replay_contributions(recorder, members, read)
    size = float(whole.chosen.gram.norm())
    error = sum(variances) ** 0.5 / size if variances and size else None
    return Survivors(whole, found, replays, contributions, error=error)


def sum_survivors(recorder: Recorder, members: Tensor, measure: Measure, uncovered: list[Parameter]) -> Survivors:
    """The survivors' sum, from one weighted second backward that keeps no contributions, and what it measures.

    The measurement gives each survivor an equal part of the sum's numbers, so that it is exact for equal weights and
    for no others: for solvers with `needs_gram = False`, after a filter with `needs_gram = False`.

    Args:
        members, measure: see `read_survivors`.
        uncovered: parameters that no rule covers and whose sum is wanted as well.

    Raises:
        RecordingError: an output gradient is missing.
    """
    ones = torch.zeros(recorder.count, dtype=torch.float64)
    ones[members] = 1.0
    total = weigh_survivors(recorder, ones, uncovered)
    recorded = {p: gradient for p, gradient in total.items() if p in recorder.parameters}
    whole = measure(_single(recorded)).shared_by(len(members))
    return Survivors(whole, torch.tensor([along(recorder, recorded)], dtype=torch.float64), 1, None, total)


def weigh_survivors(recorder: Recorder, weights: Tensor, uncovered: list[Parameter]) -> dict[Parameter, Tensor]:
    """`sum_i w_i c_i` of all parameters that the window reached, AMP scale divided out, from a second backward.

    Args:
        weights: (n,).
        uncovered: parameters that no rule covers and whose sum is wanted as well.
    """
    touched = [p for p in recorder.parameters if p in recorder.window.touched]
    gradients = replay_gradients(recorder, weights, [*touched, *uncovered])
    if recorder.loss_scale != 1.0:
        for gradient in gradients.values():
            gradient.div_(recorder.loss_scale)
    return gradients


def along(recorder: Recorder, gradient: Mapping[Parameter, Tensor]) -> float:
    """A gradient's alignment: its product with the recorder's direction."""
    assert recorder.direction is not None
    sums: dict[torch.device, Tensor] = {}
    for p, value in gradient.items():
        direction = recorder.direction[p]
        wide = torch.promote_types(torch.promote_types(value.dtype, direction.dtype), torch.float32)
        share = torch.linalg.vecdot(value.flatten().to(wide), direction.flatten().to(wide)).double()
        sums[value.device] = sums[value.device] + share if value.device in sums else share
    return sum(float(share) for share in sums.values())


def _single(gradient: Mapping[Parameter, Tensor]) -> Contributions:
    """A pool of one candidate, whose contribution is this."""
    pieces: dict[Parameter, list[Piece]] = {}
    for p, value in gradient.items():
        rows = as_rows(value)
        dtype = torch.promote_types(value.dtype, torch.float32)
        pieces[p] = [Dense(0, tuple(rows.shape), dtype, rows[None])]
    return Contributions(pieces, 1)
