"""Small services around a model: its modes borrowed and given back, its numbers checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; one transfer from the device, no overflow of its own."""
    largest = torch.nn.utils.get_total_norm([t for t in tensors if t.numel()], norm_type=float("inf"))
    return bool(torch.isfinite(largest))
