"""Replay: forwards of the window run again for the chosen candidates, with the output gradients that they had.

Two uses: survivors' contributions where the window was too large to keep them (`memory_cap`), and the weighted
gradient of parameters that no rule covers (`uncovered="scale"`). Called by the selector; a second forward and backward
of the rows that hold chosen candidates, and reported as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from ftw.errors import RecordingError
from ftw.gradients.base import Contributions
from ftw.gradients.layout import Layout
from ftw.gradients.window import Forward, Window
from ftw.modes import parked_gradients

if TYPE_CHECKING:
    from ftw.gradients.recorder import Recorder


def replay_contributions(recorder: Recorder, chosen: Tensor) -> Contributions:
    """Contributions of the chosen candidates, in their order, from a second pass over their rows.

    Args:
        chosen: (m,) candidates of the window.

    Raises:
        RecordingError: an output gradient is missing.
    """
    window = recorder.window
    local = torch.full((window.count,), -1)
    local[chosen] = torch.arange(len(chosen))
    runs = list(_needed(window, local))
    maps = [_numbers(forward.layout, local)[rows] for forward, rows in runs]
    with parked_gradients(recorder.model.parameters()), recorder.aside():
        with recorder.record(candidates=maps, loss_scale=recorder.loss_scale):
            for forward, rows in runs:
                output, grad = _rerun(recorder, forward, rows)
                mask = _numbers(forward.layout, local)[rows] >= 0
                output.backward(torch.where(_over(mask, grad), grad, 0.0))
        return recorder.contributions()


def replay_gradients(recorder: Recorder, weights: Tensor, parameters: list[Parameter]) -> dict[Parameter, Tensor]:
    """`sum_i w_i c_i` of parameters that no rule covers, AMP scale included, from a weighted second backward.

    Args:
        weights: (n,).
    """
    window = recorder.window
    local = torch.where(weights != 0, 0, -1)
    with parked_gradients(recorder.model.parameters()):
        for forward, rows in _needed(window, local):
            output, grad = _rerun(recorder, forward, rows)
            numbers = _candidates(forward.layout)[rows]
            each = torch.where(numbers >= 0, weights[numbers.clamp_min(0)], 0.0)
            factor = _over(each, grad)
            output.backward(torch.where(factor != 0, grad * factor.to(grad.dtype), 0.0))
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
        numbers = _numbers(forward.layout, local)
        rows = (numbers >= 0).flatten(1).any(1) if numbers.dim() > 1 else numbers >= 0
        if bool(rows.any()):
            # Dropout draws by the shape of the batch: the same masks need the same rows.
            yield forward, torch.arange(forward.layout.rows) if forward.drew else rows.nonzero().flatten()


def _candidates(layout: Layout) -> Tensor:
    """The number in the window of each row's or token's candidate; -1: nobody."""
    owner = torch.arange(layout.rows) if layout.owner is None else layout.owner
    return torch.where(owner >= 0, owner + layout.start, -1)


def _numbers(layout: Layout, local: Tensor) -> Tensor:
    """The new number of each row's or token's candidate; -1: not chosen."""
    numbers = _candidates(layout)
    return torch.where(numbers >= 0, local[numbers.clamp_min(0)], -1)


def _rerun(recorder: Recorder, forward: Forward, rows: Tensor) -> tuple[Tensor, Tensor]:
    if forward.call is None or forward.output is None or forward.output_grad is None:
        raise RecordingError(
            "a forward cannot be run again: the model returned no output with rows (logits) through which the loss "
            "was computed; return one beside the loss, raise memory_cap, or cover all parameters by rules."
        )
    args, kwargs = forward.call
    total = forward.layout.rows

    def take(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == total
        return leaf[rows.to(leaf.device)] if batched and len(rows) < total else leaf

    args, kwargs = tree_map(take, (args, dict(kwargs)))
    with _random(forward.random_state), torch.enable_grad(), recorder.autocast():
        output = tree_leaves(recorder.model(*args, **kwargs))[forward.output]
    return output, take(forward.output_grad)


def _over(values: Tensor, grad: Tensor) -> Tensor:
    """Values of rows or tokens, shaped to meet an output gradient."""
    return values.to(grad.device).view(*values.shape, *[1] * (grad.dim() - values.dim()))


@contextmanager
def _random(states: list[Tensor]) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if len(states) > 1 else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1])
        yield
