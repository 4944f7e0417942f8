"""Optimizers of torchao and bitsandbytes, whose state is kept in 4, 8 or 32 bits, as affine updates.

Neither library is imported: an optimizer is known by the name of its class, torchao's tensors by their `dequantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ftw.errors import OptimizerStateError, UnsupportedOptimizerError
from ftw.optim_state.adam import Adam, AdamW
from ftw.optim_state.base import TensorUpdate
from ftw.optim_state.lion import Lion
from ftw.optim_state.moments import steps_taken
from ftw.optim_state.shards import is_dtensor, local

BLOCK = 256
"""Consecutive entries of a flattened tensor that share one scale in bitsandbytes' 8-bit state."""


class TorchaoAdam(Adam):
    """The step of torchao's `Adam8bit`, `Adam4bit` and `AdamFp8` (torchao 0.18, `torchao/optim/adam.py`).

    It takes the old moments out of their few bits, updates and applies them in float32, and only then puts them back.
    So the map is that of `Adam` at the dequantised state; what putting them back loses enters the next step's m and v,
    which are read from the state as it then is. What is left is float32 rounding (2e-7 of the largest entry,
    `benchmarks/affine.py`), of the bias corrections too, as with torch's `capturable`. Parameters with fewer than 4096
    entries keep their state in full.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = tuple(
        f"torchao.optim.adam.Adam{bits}" for bits in ("8bit", "4bit", "Fp8")
    )

    def prepare(self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Dequantises the state, as a whole: its blocks do not end where rows do."""
        return super().prepare(parameter, _as_capturable(group), dequantised(parameter, state))

    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        return super().linearise_tensor(parameter, _as_capturable(group), state, reference)


class TorchaoAdamW(TorchaoAdam):
    """The step of torchao's `AdamW8bit`, `AdamW4bit` and `AdamWFp8`: as `TorchaoAdam`, decay decoupled."""

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = tuple(
        f"torchao.optim.adam.AdamW{bits}" for bits in ("8bit", "4bit", "Fp8")
    )
    decoupled: ClassVar[bool] = True


class BitsandbytesAdam(AdamW):
    """The step of bitsandbytes' `Adam` and `AdamW`, paged or not, with 8-bit or 32-bit state (version 0.50; Dettmers et
    al., 2022, "8-bit Optimizers via Block-wise Quantization").

    As `AdamW` at the dequantised state, which is updated and applied in float32 before it is quantised again; see
    `TorchaoAdam` for what that means (here 5e-7 of the largest entry, on the CPU). Followed: `Adam` decouples decay
    like `AdamW`, and both ignore `amsgrad`. Not followed: CUDA kernels decay after the step and the others before it,
    a difference of lr*decay relative to M; CUDA kernels skip entries whose gradient is not finite.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = tuple(
        f"bitsandbytes.optim.{name.lower()}.{paged}{name}{bits}"
        for name in ("Adam", "AdamW")
        for paged in ("", "Paged")
        for bits in ("", "8bit", "32bit")
    )

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        _refuse_arguments(optimizer)

    def prepare(self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Dequantises the state, as a whole: its blocks do not end where rows do."""
        return super().prepare(parameter, group, dequantised(parameter, state))


class BitsandbytesLion(Lion):
    """The step of bitsandbytes' `Lion`, paged or not, with 8-bit or 32-bit state (version 0.50): `Lion` at the
    dequantised momentum. Unlike other Lions it counts its steps."""

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = tuple(
        f"bitsandbytes.optim.lion.{paged}Lion{bits}" for paged in ("", "Paged") for bits in ("", "8bit", "32bit")
    )

    def check(self, optimizer: Optimizer) -> None:
        super().check(optimizer)
        _refuse_arguments(optimizer)

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int:
        return steps_taken(state)

    def prepare(self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Dequantises the state, as a whole, and adds the floor."""
        return super().prepare(parameter, group, dequantised(parameter, state))


def dequantised(parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state by torch's names and in float32 where it was quantised; other entries as they are.

    Two layouts are known: tensors that `dequantize()` themselves (torchao); and bitsandbytes' `state1` and `state2`,
    float32 or bytes shaped as the parameter, which stand for `qmap[byte] * absmax[i // 256]` at flat index i.

    Raises:
        OptimizerStateError: bytes without their `qmap` and `absmax`, or not as many as the parameter has entries.
    """
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and is_quantised(local(value)):
            plain[key] = _like(value, local(value).dequantize())
        elif key in ("state1", "state2"):
            plain["exp_avg" if key == "state1" else "exp_avg_sq"] = _unpacked(parameter, state, key[-1])
        elif not key.startswith(("qmap", "absmax")):
            plain[key] = value
    return plain


def is_quantised(tensor: Tensor) -> bool:
    """Whether this is a tensor of a class that knows how to dequantise itself."""
    return type(tensor).dequantize is not Tensor.dequantize


def _like(value: Tensor, part: Tensor) -> Tensor:
    """`part` as this process's part of a DTensor laid out like `value`; `part` itself where that is none."""
    if not is_dtensor(value):
        return part
    whole: Tensor = type(value).from_local(
        part, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    return whole


def _unpacked(parameter: Tensor, state: Mapping[str, Any], which: str) -> Tensor:
    codes: Tensor = state[f"state{which}"].to(parameter.device)  # paged state lives on the host
    if codes.is_floating_point():
        return codes
    qmap, absmax = state.get(f"qmap{which}"), state.get(f"absmax{which}")
    blocks = -(-codes.numel() // BLOCK)
    if qmap is None or absmax is None or absmax.numel() != blocks or codes.shape != parameter.shape:
        raise OptimizerStateError(
            f"the optimizer's 8-bit state of a parameter of shape {tuple(parameter.shape)} has {sorted(state)}, with "
            f"state{which} of shape {tuple(codes.shape)}; needed are qmap{which} and {blocks} scales in absmax{which}, "
            f"one for every {BLOCK} entries; use block-wise quantisation, or keep the state in 32 bits."
        )
    values: Tensor = qmap.to(codes.device)[codes.flatten().int()]
    scales = absmax.to(codes.device).repeat_interleave(BLOCK)[: codes.numel()]
    return values.mul_(scales).view(codes.shape)


def _as_capturable(group: Mapping[str, Any]) -> dict[str, Any]:
    return {**group, "capturable": True}


def _refuse_arguments(optimizer: Optimizer) -> None:
    """Raise `UnsupportedOptimizerError` for what bitsandbytes takes besides the groups and is not modelled."""
    given = getattr(optimizer, "args", None)
    for name, off in (("max_unorm", 0.0), ("skip_zeros", False), ("percentile_clipping", 100)):
        value = getattr(given, name, off)
        if value != off:
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__qualname__} has {name}={value}; only {name}={off} is modelled; leave it out."
            )
    manager = getattr(optimizer, "mng", None)
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            own = {
                **getattr(manager, "index2config", {}).get((index, position), {}),
                **getattr(manager, "pid2config", {}).get(id(p), {}),
            }
            strange = sorted(set(own) - {"optim_bits", "min_8bit_size"})
            if strange:
                raise UnsupportedOptimizerError(
                    f"parameter {position} of group {index} overrides {strange} through bitsandbytes' "
                    "GlobalOptimManager; only the state's width may be overridden there; give the parameter a group of "
                    "its own."
                )
