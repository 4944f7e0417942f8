"""This process's part of sharded tensors (DTensor: FSDP2, tensor parallelism). Called by `Preconditioner.linearise`.

Nothing here imports `torch.distributed.tensor`, which is slow: where it was not imported, there is no DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ftw.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether `value` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    if not is_dtensor(tensor):
        return False
    mesh = tensor.device_mesh
    return any(mesh.size(dim) > 1 and not placement.is_replicate() for dim, placement in enumerate(tensor.placements))


def local(tensor: Tensor) -> Tensor:
    """This process's part of the tensor, a plain one, sharing memory; a tensor that is no DTensor is its own part.

    A pending sum (placement `Partial`) is made first: every process of the mesh has to call this.
    """
    if not is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        from torch.distributed.tensor import Replicate

        summed = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=summed)
    part: Tensor = tensor.to_local()
    return part


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype, as a whole, that holds no numbers."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def local_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The optimizer's state of one parameter, every DTensor in it replaced by this process's part."""
    return {key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def local_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The part of a gradient that belongs to this process's part of the parameter.

    A DTensor laid out in another way than the parameter is redistributed, as the step does (every process of the
    mesh has to call this); a plain tensor is taken for the part itself.

    Raises:
        ConfigurationError: one of them is a DTensor, and the parts of this process have different shapes.
    """
    if not is_dtensor(parameter) and not is_dtensor(gradient):
        return gradient
    if is_dtensor(parameter) and is_dtensor(gradient) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    gradient, here = local(gradient), local(parameter)
    if gradient.shape != here.shape:
        raise ConfigurationError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} has shape {tuple(gradient.shape)}; this "
            f"process holds {tuple(here.shape)} of it; pass p.grad as it is, or its part, "
            "p.grad.to_local()."
        )
    return gradient
