"""Small services around a model: its modes borrowed and given back, its numbers checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def parked_gradients(parameters: Iterable[Parameter]) -> Iterator[None]:
    """No parameter has a gradient inside; what it had is put back, and what was made inside is dropped."""
    parked = {p: p.grad for p in parameters}
    try:
        for p in parked:
            p.grad = None
        yield
    finally:
        for p, grad in parked.items():
            p.grad = grad


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; one transfer from the device, no overflow of its own."""
    largest = torch.nn.utils.get_total_norm([t for t in tensors if t.numel()], norm_type=float("inf"))
    return bool(torch.isfinite(largest))
