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


class ScaleOperator(ABC):
    """M for one parameter: symmetric positive semidefinite, learning rate included."""

    structure: ClassVar[str]

    @abstractmethod
    def apply(self, tensor: Tensor) -> Tensor:  # (..., *shape) -> (..., *shape)
        """M times `tensor`, whose trailing dimensions are the parameter's; leading ones are a batch."""

    def apply_(self, tensor: Tensor) -> Tensor:
        """As `apply`, in place."""
        return tensor.copy_(self.apply(tensor))

    @abstractmethod
    def power(self, exponent: float) -> ScaleOperator:
        """M to the power of `exponent`; law: `M.power(.5).apply(M.power(.5).apply(x)) == M.apply(x)`."""


@dataclass(frozen=True)
class Scalar(ScaleOperator):
    """M = value * I."""

    value: float
    structure: ClassVar[str] = "scalar"

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor * self.value

    def apply_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.value)

    def power(self, exponent: float) -> Scalar:
        return Scalar(self.value**exponent)


@dataclass(frozen=True)
class Diagonal(ScaleOperator):
    """M = diag(values), `values` shaped as the parameter."""

    values: Tensor
    structure: ClassVar[str] = "diagonal"

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor * self.values

    def apply_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.values)

    def power(self, exponent: float) -> Diagonal:
        if exponent == 0.5:
            return Diagonal(self.values.sqrt())
        return Diagonal(self.values.reciprocal() if exponent == -1.0 else self.values**exponent)


@dataclass(frozen=True)
class TensorUpdate:
    """The affine update of one parameter, or of some of its rows.

    Attributes:
        scale: M.
        offset: o, shaped as the parameter; the part of the step that does not depend on the gradient.
        gain: kappa, the share of the gradient that this very step applies (1 - beta1 over its bias correction
            for Adam, 1 without momentum). `M / gain` is P, the inverse of the optimizer's curvature model.
    """

    scale: ScaleOperator
    offset: Tensor
    gain: float = 1.0


@dataclass(frozen=True)
class AffineUpdate:
    """What `optimizer.step()` will do, as an affine map of the gradient, keyed by the parameter itself.

    Law: for the reference it was linearised at, `displacement(reference)` is what the step adds.
    """

    scale: Mapping[Parameter, ScaleOperator]
    offset: Mapping[Parameter, Tensor]
    gain: Mapping[Parameter, float] = field(default_factory=dict)

    def displacement(self, gradient: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """`-(o + M G)` for every parameter in `gradient`."""
        strangers = [tuple(p.shape) for p in gradient if p not in self.scale]
        if strangers:
            raise ConfigurationError(
                f"the gradient names parameters of shape {strangers} that this update does not hold; allowed "
                f"are the {len(self.scale)} parameters it was linearised for; linearise with a reference "
                "that has them all."
            )
        return {p: -(self.offset[p] + self.scale[p].apply(g)) for p, g in gradient.items()}


class Preconditioner(ABC):
    """Reads an optimizer as an affine update.

    Law: for an optimizer of one of the classes in `optimizers`, with the gradient that it really gets as
    `reference`, the displacement equals that of `optimizer.step()` to rounding. For any optimizer, the
    optimizer, its state and the parameters are left as they were.
    """

    optimizers: ClassVar[tuple[type[Optimizer], ...]] = ()
    """Optimizer classes whose step this preconditioner models exactly; empty: takes any, models none."""

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
        if self.optimizers and not isinstance(optimizer, self.optimizers):
            raise UnsupportedOptimizerError(
                f"preconditioner {type(self).__name__} was given the optimizer "
                f"{type(optimizer).__qualname__}; it models "
                f"{', '.join(cls.__qualname__ for cls in self.optimizers)}; name another preconditioner, or "
                "'identity' for plain gradients."
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
            optimizer: any optimizer that this preconditioner models.
            reference: {parameter: gradient}. Parameters that are not in it are left out, as `step()` leaves
                alone those whose `.grad` is None. None: every parameter that requires grad, with the second
                moment as the last step left it (stale).

        Raises:
            UnsupportedOptimizerError: the optimizer, or an option of it, is not modelled.
            OptimizerStateError: stale second moment asked for before there is one.
        """
        self.check(optimizer)
        updates: dict[Parameter, TensorUpdate] = {}
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p in reference if reference is not None else p.requires_grad:
                        gradient = None if reference is None else reference[p]
                        state = self.prepare(p.detach(), group, state_of(optimizer, p))
                        updates[p] = self.linearise_tensor(p.detach(), group, state, gradient)
        return AffineUpdate(
            scale={p: u.scale for p, u in updates.items()},
            offset={p: u.offset for p, u in updates.items()},
            gain={p: u.gain for p, u in updates.items()},
        )


def state_of(optimizer: Optimizer, parameter: Parameter) -> Mapping[str, Any]:
    """The optimizer's state of one parameter, without creating an entry where there is none."""
    return optimizer.state.get(parameter, {})


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


_REMEDIES = {
    "maximize": "negate the loss instead",
    "differentiable": "selection does not differentiate through the step",
}


def refuse_options(optimizer: Optimizer, *options: str) -> None:
    """Raise `UnsupportedOptimizerError` if one of these options is switched on in any parameter group."""
    for index, group in enumerate(optimizer.param_groups):
        for option in options:
            if group.get(option):
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__qualname__} has {option}={group[option]} in parameter group "
                    f"{index}; only {option}=False is modelled; set it to False ({_REMEDIES[option]})."
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
    """Raise `OptimizerStateError` unless all `keys` are there."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise OptimizerStateError(
            f"the optimizer's state of a parameter of shape {tuple(parameter.shape)} lacks {missing} (it has "
            f"{sorted(state)}); {list(keys)} are needed; load the state of that very optimizer, or start "
            "from an empty one."
        )
