"""Stand-ins with the layouts of torchao's and bitsandbytes' optimizer state, for tests.

A stand-in bears the library's class name, by which the optimizer is known, and does what its source says: take the
moments out of their bytes, update and apply them, put them back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SIGNED = torch.linspace(-1, 1, 256) ** 3
UNSIGNED = torch.linspace(0, 1, 256) ** 3


def packed(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes shaped as `values`, and a scale for every 256 of them, the last ones possibly fewer."""
    flat = values.flatten().float()
    absmax = torch.stack([block.abs().max().clamp_min(1e-12) for block in flat.split(256)])
    scaled = flat / absmax[torch.arange(flat.numel()) // 256]
    codes = torch.cat([(part[:, None] - qmap).abs().argmin(1) for part in scaled.split(256)])
    return codes.to(torch.uint8).view(values.shape), absmax


def unpacked(codes: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    flat = [float(qmap[code]) * float(absmax[i // 256]) for i, code in enumerate(codes.flatten().tolist())]
    return torch.tensor(flat).view(codes.shape)


class Packed(Tensor):
    """torchao's layout: a tensor that is bytes and scales inside."""

    codes: Tensor
    absmax: Tensor
    qmap: Tensor

    @staticmethod
    def of(values: Tensor, qmap: Tensor) -> Packed:
        return Packed.holding(values, *packed(values, qmap), qmap)

    @staticmethod
    def holding(like: Tensor, codes: Tensor, absmax: Tensor, qmap: Tensor) -> Packed:
        made: Packed = Tensor._make_wrapper_subclass(Packed, like.shape, dtype=like.dtype)
        made.codes, made.absmax, made.qmap = codes, absmax, qmap
        return made

    def dequantize(self) -> Tensor:
        return unpacked(self.codes, self.absmax, self.qmap)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.default:  # a DTensor takes one of its part
            it = args[0]
            return Packed.holding(it, it.codes, it.absmax, it.qmap)
        raise NotImplementedError(f"{func} on a packed tensor")


class Standin(Optimizer):
    """Adam and Lion with moments in bytes, float64 in between."""

    decoupled = True
    counter: Callable[[int], Any] = staticmethod(int)

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.8, 0.95), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", self.counter(0)) + 1
                self.advance(p, group, state)

    def advance(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        gradient, decay, lr = p.grad, group["weight_decay"], group["lr"]
        assert gradient is not None
        beta1, beta2 = group["betas"]
        first, second = self.load(p, state)
        if self.decoupled:
            p.mul_(1 - lr * decay)
        else:
            gradient = gradient + decay * p
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        self.store(state, first, second)
        root = (second / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        p.sub_(lr * first / (1 - beta1 ** state["step"]) / root)

    def load(self, p: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def store(self, state: dict[str, Any], first: Tensor, second: Tensor) -> None:
        raise NotImplementedError


class LikeTorchao(Standin):
    counter = staticmethod(lambda t: torch.tensor(float(t)))

    def load(self, p: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        moments = (state.get(key, torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq"))
        first, second = (m.dequantize().to(p.dtype) if isinstance(m, Packed) else m for m in moments)
        return first, second

    def store(self, state: dict[str, Any], first: Tensor, second: Tensor) -> None:
        large = first.numel() >= 4096
        state["exp_avg"] = Packed.of(first, SIGNED) if large else first
        state["exp_avg_sq"] = Packed.of(second, UNSIGNED) if large else second


class LikeTorchaoL2(LikeTorchao):
    decoupled = False


class LikeBitsandbytes(Standin):
    def load(self, p: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        found = []
        for which in "12":
            stored = state.get(f"state{which}", torch.zeros_like(p))
            if stored.dtype == torch.uint8:
                stored = unpacked(stored, state[f"absmax{which}"], state[f"qmap{which}"])
            found.append(stored.to(p.dtype))
        return found[0], found[1]

    def store(self, state: dict[str, Any], first: Tensor, second: Tensor) -> None:
        for which, values, qmap in (("1", first, SIGNED), ("2", second, UNSIGNED)):
            if values.numel() < 4096:
                state[f"state{which}"] = values.float()
            else:
                state[f"qmap{which}"] = qmap
                state[f"state{which}"], state[f"absmax{which}"] = packed(values, qmap)


class LionLikeBitsandbytes(LikeBitsandbytes):
    def advance(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        momentum, _ = self.load(p, state)
        beta1, beta2 = group["betas"]
        assert p.grad is not None
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (beta1 * momentum + (1 - beta1) * p.grad).sign())
        self.store(state, beta2 * momentum + (1 - beta2) * p.grad, torch.zeros_like(p))
        for key in ("state2", "qmap2", "absmax2"):
            state.pop(key, None)


def named(full_name: str, base: type[Standin]) -> type[Standin]:
    module, _, name = full_name.rpartition(".")
    made: type[Standin] = type(name, (base,), {"__module__": module, "__qualname__": name})
    return made
