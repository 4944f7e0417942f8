"""Small services around a model: its modes borrowed and given back, its numbers checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter


@contextmanager
def evaluating(model: nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """The model in eval mode; each module's own mode is put back.

    Args:
        checkpointing: modules that checkpoint their activations in training mode only, as transformers' do, stay in
            it, unless they draw dropout themselves; their children are in eval mode all the same.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if checkpointing:
        for module, mode in modes.items():
            if getattr(module, "gradient_checkpointing", False) and not _drops(module):
                module.training = mode
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _drops(module: nn.Module) -> bool:
    """Whether a module holds a dropout rate of its own, which it may apply by its mode."""
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """For forwards that leave no trace: no gradients, eval mode, the state of torch's generators put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
        yield


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


def random_state(device: torch.device) -> list[Tensor]:
    """State of torch's generators that a forward on the device draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; one transfer from the device, no overflow of its own."""
    filled = [t for t in tensors if t.numel()]
    if bool(torch.isfinite(torch.nn.utils.get_total_norm(filled))):
        return True
    # The squares may have overflowed. The largest entry tells, and is ten times as slow to find on a CPU.
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(filled, norm_type=float("inf"))))
