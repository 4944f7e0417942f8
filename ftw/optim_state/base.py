"""The interface of preconditioners: the optimizer's next step as an affine map of the gradient.

`dtheta = -(o + M G)` with the update scale M and the offset o (DESIGN, section 2). A preconditioner reads the
optimizer's hyper-parameters and state; it never writes them. Called by the assembly of the small problem.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, OptimizerStateError, UnsupportedOptimizerError
from ftw.optim_state.operators import Diagonal, RowColumn, Scalar, ScaleOperator, TwoSided
from ftw.optim_state.shards import is_sharded, local, local_gradient, local_state
from ftw.optim_state.wrappers import unwrapped

__all__ = [
    "AffineUpdate",
    "Diagonal",
    "Preconditioner",
    "RowColumn",
    "Scalar",
    "ScaleOperator",
    "TensorUpdate",
    "TwoSided",
]


@dataclass(frozen=True)
class TensorUpdate:
    """The affine update of one parameter, or of some of its rows.

    Attributes:
        scale: M.
        offset: o, shaped as the parameter; the part of the step that does not depend on the gradient.
        gain: kappa, the share of the gradient that this very step applies (1 - beta1 over its bias correction
            for Adam, 1 without momentum). `M / gain` is P, the inverse of the optimizer's curvature model.
        sign: -1 where the optimizer maximises. `dtheta = -sign (o + M G)`: with the loss negated, the same map; o is
            the offset of that.
    """

    scale: ScaleOperator
    offset: Tensor
    gain: float = 1.0
    sign: float = 1.0


@dataclass(frozen=True)
class AffineUpdate:
    """What `optimizer.step()` will do, as an affine map of the gradient, keyed by the parameter itself.

    Law: for the reference it was linearised at, `displacement(reference)` is what the step adds.

    All tensors are plain: of a DTensor parameter, those of this process's shard, and so is the displacement.
    """

    scale: Mapping[Parameter, ScaleOperator]
    offset: Mapping[Parameter, Tensor]
    gain: Mapping[Parameter, float] = field(default_factory=dict)
    sign: Mapping[Parameter, float] = field(default_factory=dict)

    def displacement(self, gradient: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """`-sign (o + M G)` for every parameter in `gradient`.

        Raises:
            ConfigurationError: a parameter that was not linearised, or a gradient that is not that of its shard.
        """
        strangers = [tuple(p.shape) for p in gradient if p not in self.scale]
        if strangers:
            raise ConfigurationError(
                f"the gradient names parameters of shape {strangers} that this update does not hold; allowed "
                f"are the {len(self.scale)} parameters it was linearised for; linearise with a reference "
                "that has them all."
            )
        return {
            p: -self.sign.get(p, 1.0) * (self.offset[p] + self.scale[p].apply(local_gradient(g, p)))
            for p, g in gradient.items()
        }


class Preconditioner(ABC):
    """Reads an optimizer as an affine update.

    Law: for an optimizer of one of the classes in `optimizers`, with the gradient that it really gets as
    `reference`, the displacement equals that of `optimizer.step()` to rounding. For any optimizer, the
    optimizer, its state and the parameters are left as they were.
    """

    optimizers: ClassVar[tuple[type[Optimizer] | str, ...]] = ()
    """Optimizer classes whose step this preconditioner models; empty: takes any, models none. A class of another
    library is given as "module.Class", so that nothing is imported for it."""

    elementwise: ClassVar[bool] = True
    """Whether each entry's update depends on that entry alone, so that rows may be linearised apart."""

    structure: ClassVar[str] = "any"
    """"scalar" where M is a multiple of the identity for every parameter and does not depend on the reference."""

    @abstractmethod
    def linearise_tensor(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        reference: Tensor | None,
    ) -> TensorUpdate:
        """The update of one parameter (or, where `elementwise`, of rows of it: all tensors sliced alike).

        Args:
            parameter: current value; not written.
            group: the parameter's group, hyper-parameters by the optimizer's own names.
            state: what `prepare` returned, or rows of it (`state_rows`); empty before the first step.
            reference: the gradient from which this step's second moment is predicted, shaped as the
                parameter; None uses the second moment as the last step left it.
        """

    def check(self, optimizer: Optimizer) -> None:
        """Raise `UnsupportedOptimizerError` if the optimizer, or an option of it, is not modelled.

        The base looks at the class alone. A subclass of a modelled class passes, because whoever names the
        preconditioner vouches for it; `preconditioner_for` is stricter.
        """
        kinds = type(optimizer).mro()
        if self.optimizers and not any(models(known, cls) for known in self.optimizers for cls in kinds):
            raise UnsupportedOptimizerError(
                f"preconditioner {type(self).__name__} was given the optimizer "
                f"{type(optimizer).__qualname__}; it models "
                f"{', '.join(qualified(known) for known in self.optimizers)}; name another preconditioner, or "
                "'identity' for plain gradients."
            )
        if len({direction(group) for group in optimizer.param_groups}) > 1:
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__qualname__} maximises in some parameter groups and minimises in others; a step "
                "has one sense for the target's loss; set maximize alike in all groups."
            )

    def prepare(self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state for `linearise_tensor`, together with whatever depends on the tensor as a whole.

        Called once per parameter and step, before anything is cut into rows, so that the updates of the rows
        are the rows of the update. Returns a mapping; never writes `state`. The base returns `state` itself.
        """
        return state

    def age(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> int | None:
        """Steps taken so far for a parameter; None if M needs no history, so that no warm-up is due."""
        return None

    def linearise(self, optimizer: Optimizer, reference: Mapping[Parameter, Tensor] | None = None) -> AffineUpdate:
        """The next `optimizer.step()` as an affine update.

        Args:
            optimizer: any optimizer that this preconditioner models, or a wrapper of one (`unwrapped`).
            reference: {parameter: gradient}. Parameters that are not in it are left out, as `step()` leaves
                alone those whose `.grad` is None. None: every parameter that requires grad and is not empty, with
                the second moment as the last step left it (stale).

        Of a parameter sharded over processes (a DTensor: FSDP2, tensor parallelism) each process linearises its
        shard. What `prepare` takes from the whole tensor is still of the whole, so that all processes of the mesh
        have to call this alike.

        Raises:
            UnsupportedOptimizerError: the optimizer, or an option of it, is not modelled; or a parameter is sharded
                and the preconditioner needs it whole (`elementwise` is False).
            ConfigurationError: a reference that is neither a DTensor nor this process's shard, for a DTensor.
            OptimizerStateError: stale second moment asked for before there is one.
        """
        optimizer = unwrapped(optimizer)
        self.check(optimizer)
        updates: dict[Parameter, TensorUpdate] = {}
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    # FSDP1 leaves empty pieces of parameters that other processes hold; no step reaches them.
                    if p in reference if reference is not None else p.requires_grad and p.numel() > 0:
                        gradient = None if reference is None else local_gradient(reference[p], p)
                        theta, state = self.held(p, group, state_of(optimizer, p))
                        updates[p] = self.linearise_tensor(theta, group, state, gradient)
        return AffineUpdate(
            scale={p: u.scale for p, u in updates.items()},
            offset={p: u.offset for p, u in updates.items()},
            gain={p: u.gain for p, u in updates.items()},
            sign={p: u.sign for p, u in updates.items()},
        )

    def held(
        self, parameter: Parameter, group: Mapping[str, Any], state: Mapping[str, Any]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """What `linearise_tensor` is given of a parameter: its value and prepared state, of a sharded one those of
        this process's shard."""
        self.require_whole(parameter)
        theta = parameter.detach()
        return local(theta), local_state(self.prepare(theta, group, state))

    def require_whole(self, parameter: Tensor) -> None:
        """Raise `UnsupportedOptimizerError` for a shard of a parameter, unless each entry is updated by itself."""
        if not self.elementwise and is_sharded(parameter):
            raise UnsupportedOptimizerError(
                f"preconditioner {type(self).__name__} needs a parameter as a whole, and the one of shape "
                f"{tuple(parameter.shape)} is sharded over processes; shards are read by preconditioners that work "
                "entry by entry (SGD, Adam, AdamW and others); train with such an optimizer, name 'identity' for "
                "plain gradients, or leave the parameter unsharded."
            )


def qualified(known: type | str) -> str:
    """The full name of an optimizer class, "module.Class"."""
    return known if isinstance(known, str) else f"{known.__module__}.{known.__qualname__}"


def models(known: type | str, cls: type) -> bool:
    """Whether an entry of `Preconditioner.optimizers` is this very class."""
    return known is cls or (isinstance(known, str) and known == qualified(cls))


def direction(group: Mapping[str, Any]) -> float:
    """-1 where the group maximises, as in `TensorUpdate.sign`."""
    return -1.0 if group.get("maximize") else 1.0


def state_of(optimizer: Optimizer, parameter: Parameter) -> Mapping[str, Any]:
    """The optimizer's state of one parameter, without creating an entry where there is none."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return state


def state_rows(state: Mapping[str, Any], parameter: Tensor, rows: slice | Tensor) -> dict[str, Any]:
    """Rows of a prepared state: entries shaped as `parameter`, the whole one, are cut; others are shared."""
    return {
        key: value[rows] if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in state.items()
    }


def working(tensor: Tensor) -> Tensor:
    """The tensor in the precision that updates are worked out in: its own, but float32 at least.

    An optimizer with half-precision state rounds its own step; M and o are those before that rounding.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_offset(parameter: Tensor) -> Tensor:
    """An offset of zero, shaped as the parameter, that takes no memory."""
    return working(parameter.new_zeros(())).expand(parameter.shape)


def refuse_differentiable(optimizer: Optimizer) -> None:
    """Raise `UnsupportedOptimizerError` if `differentiable` is switched on in any parameter group."""
    for index, group in enumerate(optimizer.param_groups):
        if group.get("differentiable"):
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__qualname__} has differentiable={group['differentiable']} in parameter group "
                f"{index}; only differentiable=False is modelled; set it to False (selection does not differentiate "
                "through the step)."
            )


def require_dense_real(parameter: Tensor, reference: Tensor | None) -> None:
    """Raise `UnsupportedOptimizerError` for a complex parameter or a sparse reference gradient."""
    shape = tuple(parameter.shape)
    if parameter.is_complex():
        raise UnsupportedOptimizerError(
            f"a parameter of shape {shape} is complex ({parameter.dtype}); only real parameters are "
            "modelled; store real and imaginary part (torch.view_as_real) as a real parameter."
        )
    if reference is not None and reference.layout != torch.strided:
        raise UnsupportedOptimizerError(
            f"the gradient of a parameter of shape {shape} is sparse ({reference.layout}); only dense "
            "gradients are modelled; build the layer with sparse=False."
        )


def require_state(state: Mapping[str, Any], keys: tuple[str, ...], parameter: Tensor) -> None:
    """Raise `OptimizerStateError` unless all `keys` are there, tensors among them shaped as the parameter (or single
    numbers, as counters are)."""
    require_keys(state, keys, parameter)
    for key in keys:
        require_shape(state, key, parameter, parameter.shape)


def require_keys(state: Mapping[str, Any], keys: tuple[str, ...], parameter: Tensor) -> None:
    """Raise `OptimizerStateError` unless all `keys` are there."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise OptimizerStateError(
            f"the optimizer's state of a parameter of shape {tuple(parameter.shape)} lacks {missing} (it has "
            f"{sorted(map(str, state))}); {list(dict.fromkeys(keys))} are needed; load the state of that very "
            "optimizer, or start from an empty one."
        )


def require_shape(state: Mapping[str, Any], key: str, parameter: Tensor, shape: torch.Size) -> None:
    """Raise `OptimizerStateError` unless the entry has this shape, or is a single number."""
    value = state[key]
    if isinstance(value, Tensor) and value.numel() != 1 and value.shape != shape:
        raise OptimizerStateError(
            f"the optimizer's state of a parameter of shape {tuple(parameter.shape)} has {key} of shape "
            f"{tuple(value.shape)}; {tuple(shape)} is needed; load a state that was saved with the same parameters in "
            "the same order, or start from an empty one."
        )
