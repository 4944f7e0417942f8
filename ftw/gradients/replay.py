"""Replay: forwards of the window run again for the chosen candidates, with the output gradients that they had.

Three uses: survivors' contributions where the window was too large to keep them (`memory_cap`), all at once or some
parameters at a time; the weighted gradient of all parameters, where survivors' contributions are not kept either; and
that of parameters which no rule covers (`uncovered="scale"`). Each replay is a second forward and backward of the rows
that hold chosen candidates, and reported as such. Called by the selector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from ftw.errors import MemoryCapError, RecordingError
from ftw.gradients.audit import first_tensor
from ftw.gradients.base import Contributions
from ftw.gradients.layout import Layout
from ftw.gradients.share import Share
from ftw.gradients.window import Forward, Window
from ftw.modes import parked_gradients

if TYPE_CHECKING:
    from ftw.gradients.recorder import Recorder


class Replayed(NamedTuple):
    """What came of `replay_contributions`."""

    contributions: Contributions | None  # None: they did not fit the cap together, and are gone
    replays: int


def replay_contributions(
    recorder: Recorder, chosen: Tensor, read: Callable[[Contributions], None] = lambda _: None
) -> Replayed:
    """Have the contributions of the chosen candidates read, as many parameters at a time as fit.

    What is kept stays below the recorder's `memory_cap`, output gradients included. If the survivors' contributions
    take s bytes and the cap leaves r, it takes about s / r replays, one if they fit: sums over parameters (b, K) are
    exact however the parameters are divided.

    Args:
        chosen: (m,) candidates of the window, ascending.
        read: called for each share of the parameters with the contributions to these, which are dropped afterwards.

    Raises:
        RecordingError: an output gradient is missing.
        MemoryCapError: the chosen candidates' contributions to one parameter do not fit.
    """
    window = recorder.window
    room = None if recorder.memory_cap is None else recorder.memory_cap - window.kept_bytes
    pending = [p for p in recorder.parameters if p in window.touched]
    replays = 0
    while pending:
        share = _replay_share(recorder, chosen, pending, room)
        replays += 1
        window.ledger.peak = max(window.ledger.peak, window.ledger.bytes + share.ledger.peak)
        if share.needed:
            assert share.first is not None
            raise MemoryCapError(
                f"contributions of {len(chosen)} candidates to {recorder.parameters[share.first]} alone take "
                f"{share.needed} bytes, and {window.kept_bytes} bytes of output gradients are needed beside them: more "
                f"than memory_cap={recorder.memory_cap}; choose a cap of at least "
                f"{share.needed + window.kept_bytes} bytes, a smaller budget, or a filter and solver that need no K "
                "(filter='topk', solver='uniform'), which keep no contributions."
            )
        contributions = recorder.extractor.contributions(share.pieces, len(chosen))
        read(contributions)
        if replays == 1 and not share.postponed:
            return Replayed(contributions, 1)
        pending = [p for p in pending if p in share.postponed]
        del share, contributions
    return Replayed(None, replays)


def _replay_share(recorder: Recorder, chosen: Tensor, pending: Sequence[Parameter], room: int | None) -> Share:
    """One replay, in which as many of the pending parameters are recorded as there is room for."""
    window = recorder.window
    local = torch.full((window.count,), -1)
    local[chosen] = torch.arange(len(chosen))
    share = Share(pending=frozenset(pending), room=room, faulty=window.faulty)
    with parked_gradients(recorder.model.parameters()), recorder.aside(share):
        # Block by block, as they were recorded: a piece that is written out has room for the block's candidates only.
        for _, block in groupby(_needed(window, local), key=lambda run: run[0].layout.start):
            runs = list(block)
            maps = [_numbers(forward, local)[rows] for forward, rows in runs]
            counted = [torch.where(numbers >= 0, numbers - share.count, -1) for numbers in maps]
            with recorder.record(candidates=counted, loss_scale=recorder.loss_scale):
                for (forward, rows), numbers in zip(runs, maps, strict=True):
                    _run_again(recorder, forward, rows, (numbers >= 0).double())
    return share


def replay_gradients(recorder: Recorder, weights: Tensor, parameters: list[Parameter]) -> dict[Parameter, Tensor]:
    """`sum_i w_i c_i` of these parameters, AMP scale included, from a weighted second backward that keeps nothing else.

    Accumulated over micro-batches in the parameter's dtype, as a plain backward does.

    Args:
        weights: (n,). Candidates of weight 0 are not run, unless their micro-batch draws random numbers.
    """
    window = recorder.window
    local = torch.where(weights != 0, 0, -1)
    with parked_gradients(recorder.model.parameters()):
        for forward, rows in _needed(window, local):
            numbers = forward.candidates()[rows]
            each = torch.where(numbers >= 0, weights[numbers.clamp_min(0)], 0.0)
            _run_again(recorder, forward, rows, each)
        return {p: torch.zeros_like(p) if p.grad is None else p.grad for p in parameters}


def replayed_output(output: Any, layout: Layout) -> tuple[int, Tensor] | None:
    """The output whose gradient stands for the loss: the logits, or the first that has rows and a gradient."""
    leaves = tree_leaves(output)
    logits = getattr(output, "logits", None)
    for i, leaf in enumerate(leaves):
        if logits is None or leaf is logits:
            fits = isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim() > 0
            if fits and leaf.shape[0] == layout.rows:
                return i, leaf
    return None


def _needed(window: Window, local: Tensor) -> Iterator[tuple[Forward, Tensor]]:
    """The forwards that hold chosen candidates (local >= 0), with the rows to run."""
    for forward in window.forwards:
        numbers = _numbers(forward, local)
        rows = (numbers >= 0).flatten(1).any(1) if numbers.dim() > 1 else numbers >= 0
        if bool(rows.any()):
            # Dropout draws by the shape of the batch: the same masks need as many rows.
            whole = forward.drew or _is_ambiguous(forward)
            yield forward, torch.arange(forward.layout.rows) if whole else rows.nonzero().flatten()


def _is_ambiguous(forward: Forward) -> bool:
    """Whether a vector among the arguments may be as long as the batch by chance (positions, say)."""
    if forward.call is None:
        return False
    rows = forward.layout.rows
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(forward.call) if isinstance(leaf, Tensor)]
    return first_tensor(*forward.call).shape[1:2] == (rows,) and (rows,) in shapes


def _numbers(forward: Forward, local: Tensor) -> Tensor:
    """The new number of each row's or token's candidate; -1: not chosen."""
    numbers = forward.candidates()
    return torch.where(numbers >= 0, local[numbers.clamp_min(0)], -1)


def _run_again(recorder: Recorder, forward: Forward, rows: Tensor, factor: Tensor) -> None:
    """Forward and backward of these rows, the output gradient of each row or token times its factor."""
    if forward.call is None or forward.output is None or forward.output_gradient is None:
        raise RecordingError(
            "a forward cannot be run again: the model returned no output with rows (logits) through which the loss "
            "was computed; return one beside the loss, raise memory_cap, or cover all parameters by rules."
        )
    args, kwargs = forward.call
    total = forward.layout.rows
    data = rows if _is_ambiguous(forward) else _spare_faulty(forward, recorder.window.faulty, rows, factor)
    as_it_was = torch.equal(data, torch.arange(total))

    def take(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == total
        return leaf[data.to(leaf.device)] if batched and not as_it_was else leaf

    args, kwargs = tree_map(take, (args, dict(kwargs)))
    with _random(forward.random_state), torch.enable_grad(), recorder.autocast():
        output = tree_leaves(recorder.model(*args, **kwargs))[forward.output]
    output.backward(forward.output_gradient.weighted(rows, factor))


def _spare_faulty(forward: Forward, faulty: Sequence[int], rows: Tensor, factor: Tensor) -> Tensor:
    """The rows whose data to run: where a quarantined candidate holds a place, another's, for 0 * NaN is NaN."""
    counts = factor.flatten(1).any(1) if factor.dim() > 1 else factor != 0
    ill = torch.isin(forward.candidates()[rows], torch.tensor(faulty, dtype=torch.long))
    ill = (ill.flatten(1).any(1) if ill.dim() > 1 else ill) & ~counts
    return torch.where(ill, rows[counts][:1], rows) if bool(counts.any()) else rows


@contextmanager
def _random(states: list[Tensor]) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if len(states) > 1 else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1])
        yield
