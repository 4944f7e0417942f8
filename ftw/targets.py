"""Several targets at once: a gradient each, and their mean, which stands for them all where one is needed.

Used by the selector in the place of a `Target`; what is made of the single gradients is the policy's `targets`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from ftw.errors import ConfigurationError, NonFiniteError, TargetError
from ftw.gradients.company import ALONE, Company
from ftw.target import LossFunction, Target


class Targets:
    """Named targets with a weight each.

    Memory: one gradient, the size of the trainable parameters, for each of them.

    Args:
        targets: name -> iterable of batches, or `Target`.
        weights: name -> share in the mean, on any positive scale; default: equal.
        loss_fn, options: as for `Target`, for those that are given as plain iterables.

    Raises:
        ConfigurationError: no target, a weight that is not positive, names that do not fit.
    """

    def __init__(
        self,
        targets: Mapping[str, Iterable[Any] | Target],
        weights: Mapping[str, float] | None = None,
        loss_fn: LossFunction | None = None,
        **options: Any,
    ) -> None:
        if not targets:
            raise ConfigurationError("target is an empty mapping; at least one named target is needed; add one.")
        shares = dict.fromkeys(targets, 1.0) if weights is None else dict(weights)
        if shares.keys() != targets.keys() or not all(
            isinstance(share, (int, float)) and 0 < share < math.inf for share in shares.values()
        ):
            raise ConfigurationError(
                f"target_weights are {weights}; one positive number for each of {list(targets)} is needed; leave them "
                "out for equal ones."
            )
        self.each = {
            name: target if isinstance(target, Target) else Target(target, loss_fn, **options)
            for name, target in targets.items()
        }
        total = sum(shares.values())
        self.weights = {name: shares[name] / total for name in targets}
        self.gradients: list[dict[Parameter, Tensor]] = []
        """g_j of the last call of `gradient`, in the order of the names."""

    @property
    def names(self) -> list[str]:
        """Of the targets, in their order."""
        return list(self.each)

    def gradient(
        self, model: nn.Module, parameters: Mapping[str, Parameter], company: Company = ALONE
    ) -> dict[Parameter, Tensor]:
        """`sum_j weight_j g_j`; raises as `Target.gradient`, with the target's name."""
        self.gradients = []
        for name, target in self.each.items():
            try:
                self.gradients.append(target.gradient(model, parameters, company))
            except (TargetError, NonFiniteError) as error:
                raise type(error)(f"target {name!r}: {error}") from error
        return self.mean(self.gradients)

    def mean(self, gradients: Sequence[Mapping[Parameter, Tensor]]) -> dict[Parameter, Tensor]:
        """`sum_j weight_j g_j` of gradients in the order of the names."""
        shares = list(self.weights.values())
        return {
            p: sum((share * g[p] for share, g in zip(shares[1:], gradients[1:], strict=True)), shares[0] * first)
            for p, first in gradients[0].items()
        }

    @property
    def rows(self) -> float:
        """Samples that the present gradients are the means of, in all."""
        return sum(target.rows for target in self.each.values())

    def losses(self, model: nn.Module) -> dict[str, float]:
        """As `Target.loss`, by name."""
        return {name: target.loss(model) for name, target in self.each.items()}

    def loss(self, model: nn.Module) -> float:
        """Weighted mean of `losses`."""
        return sum(self.weights[name] * loss for name, loss in self.losses(model).items())

    def state_dict(self) -> dict[str, Any]:
        """Each target's, by name."""
        return {name: target.state_dict() for name, target in self.each.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if state.keys() != self.each.keys():
            raise ConfigurationError(
                f"the state is that of targets {sorted(state)}, and there are {sorted(self.each)}; resume with the "
                "targets of the run that saved it."
            )
        for name, target in self.each.items():
            target.load_state_dict(state[name])

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to undo a step."""
        return {name: target.snapshot() for name, target in self.each.items()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Undo to a snapshot."""
        for name, target in self.each.items():
            target.restore(snapshot[name])


def target_of(
    given: Iterable[Any] | Target | Mapping[str, Iterable[Any] | Target],
    *,
    targets: str,
    target_weights: Mapping[str, float] | None,
    loss_fn: LossFunction | None,
    refresh: int,
    target_batches: int | str,
    ema: float,
) -> Target | Targets:
    """The target, or targets, that the selector's arguments of these names describe.

    Raises:
        ConfigurationError: some go with several targets, or with plain iterables, and were given otherwise.
    """
    # A mapping of tensors is a single batch, which `Target` refuses by name.
    if isinstance(given, Mapping) and not all(isinstance(each, Tensor) for each in given.values()):
        schedule = {"refresh": refresh, "batches_per_refresh": target_batches, "ema": ema}
        return Targets(given, target_weights, loss_fn, **schedule)
    if targets != "mean" or target_weights is not None:
        raise ConfigurationError(
            f"targets={targets!r} and target_weights={target_weights} were given with a single target; they say "
            "what becomes of several; pass target={'name': batches, ...}."
        )
    if not isinstance(given, Target):
        return Target(given, loss_fn, refresh=refresh, batches_per_refresh=target_batches, ema=ema)
    if (loss_fn, refresh, target_batches, ema) != (None, 1, 1, 0.0):
        raise ConfigurationError(
            "loss_fn, refresh, target_batches and ema go with a plain iterable; the Target given has its own; "
            "set them there."
        )
    return given
