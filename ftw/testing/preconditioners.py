"""The contract of preconditioners and scale operators, along real steps of a real optimizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.optim_state.base import AffineUpdate, Preconditioner, ScaleOperator, state_of, state_rows

Draw = Callable[[Sequence[int]], Tensor]
"""shape -> standard normal numbers, float64, from the check's own generator."""


def check_preconditioner(
    preconditioner: Preconditioner,
    make_optimizer: Callable[[list[Parameter]], Optimizer],
    *,
    shapes: Sequence[tuple[int, ...]] = ((3, 4), (5,), ()),
    steps: int = 4,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> float:
    """Assert the laws of `Preconditioner` and `ScaleOperator` along real steps of a real optimizer, float64.

    At every step, the first included: the displacement predicted from the gradient is what `step()` does; it
    is affine in the gradient; M is symmetric positive semidefinite, acts on batches and has a square root;
    the rows of an elementwise update are the update of the rows; nothing is written; `age` counts the steps.

    Args:
        preconditioner: what is checked; it must model `step()` of the optimizer that is made.
        make_optimizer: the oracle: makes the optimizer, with the options and groups to be checked, from
            parameters of the given `shapes`.
        steps: how many steps deep.
        tolerance: largest allowed error of a displacement, relative to the largest entry of `|o| + |M G|`.

    Returns:
        The largest such error that was met.

    Raises:
        AssertionError: a law is broken; the message says which, and at which step.
    """
    draw: Draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parameters = [Parameter(draw(shape)) for shape in shapes]
    optimizer = make_optimizer(parameters)
    for group in optimizer.param_groups:
        for p in group["params"]:
            # As small as its steps, or else the subtraction after a step cancels the digits compared.
            p.data.mul_(float(group.get("lr") or 1.0))

    worst = 0.0
    for step in range(steps):
        size = 10.0 ** float(draw(()))  # gradients of a run vary in size, and second moments remember it
        reference = {p: draw(p.shape) * size for p in parameters}
        for p in parameters:
            p.grad = reference[p].clone()
        before = _snapshot(optimizer)
        update = preconditioner.linearise(optimizer, reference)
        _check_affine(update, reference, draw, step)
        for p in parameters:
            _check_scale_operator(update.scale[p], draw(p.shape), draw(p.shape), step)
        _check_tensors(preconditioner, optimizer, update, reference, step)
        changed = [name for name, value in _snapshot(optimizer).items() if not _same(value, before.get(name))]
        assert not changed, f"step {step}: linearise wrote to {changed}; it must leave the optimizer as it was"

        predicted = update.displacement(reference)
        old = {p: p.detach().clone() for p in parameters}
        optimizer.step()
        for p in parameters:
            # The new value was rounded when it was stored; that ulp is no error of the prediction.
            ulp = torch.finfo(p.dtype).eps * torch.maximum(p.detach().abs(), old[p].abs())
            error = _relative(
                ((predicted[p] - (p.detach() - old[p])).abs() - ulp).clamp_min(0),
                update.offset[p].abs() + update.scale[p].apply(reference[p]).abs(),
            )
            worst = max(worst, error)
            assert error <= tolerance, (
                f"step {step}: the predicted displacement of a parameter of shape {tuple(p.shape)} is off by "
                f"{error:.1e} of its largest term; {tolerance:.1e} is allowed"
            )
    return worst


def _check_affine(update: AffineUpdate, x: Mapping[Parameter, Tensor], draw: Draw, step: int) -> None:
    share, y = 0.3, {p: draw(p.shape) for p in x}
    mixed = update.displacement({p: share * x[p] + (1 - share) * y[p] for p in x})
    at_x, at_y = update.displacement(x), update.displacement(y)
    for p in x:
        error = _relative(mixed[p] - share * at_x[p] - (1 - share) * at_y[p], at_x[p].abs() + at_y[p].abs())
        assert error <= 1e-12, f"step {step}: the displacement is not affine in the gradient ({error:.1e})"


def _check_scale_operator(scale: ScaleOperator, x: Tensor, y: Tensor, step: int) -> None:
    at_x, at_y, batch = scale.apply(x), scale.apply(y), scale.apply(torch.stack([x, y]))
    error = _relative(batch - torch.stack([at_x, at_y]), batch)
    assert error <= 1e-12, f"step {step}: M acts on a batch otherwise than on its entries ({error:.1e})"
    skew = (y * at_x - x * at_y).sum() / ((y * at_x).abs() + (x * at_y).abs()).sum().clamp_min(1e-300)
    assert abs(skew) <= 1e-12, f"step {step}: M is not symmetric ({skew:.1e})"
    assert (x * at_x).sum() >= 0, f"step {step}: M is not positive semidefinite"
    root = scale.power(0.5)
    error = _relative(root.apply(root.apply(x)) - at_x, at_x)
    assert error <= 1e-12, f"step {step}: power(.5) applied twice is not M ({error:.1e})"


def _check_tensors(
    preconditioner: Preconditioner,
    optimizer: Optimizer,
    update: AffineUpdate,
    reference: Mapping[Parameter, Tensor],
    step: int,
) -> None:
    """Age, rows, and a reference that lacks parameters."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            age = preconditioner.age(group, state_of(optimizer, p))
            assert age in (None, step), f"step {step}: age is {age}; it must count the steps taken, or be None"
            alone = preconditioner.linearise(optimizer, {p: reference[p]})
            assert list(alone.scale) == [p], f"step {step}: parameters without a reference must be left out"
            if not (preconditioner.elementwise and p.dim()):
                continue
            state = preconditioner.prepare(p.detach(), group, state_of(optimizer, p))
            for rows in (slice(0, 1), slice(1, None)):
                part = preconditioner.linearise_tensor(
                    p.detach()[rows], group, state_rows(state, p, rows), reference[p][rows]
                )
                for name, ours, whole in (
                    ("M", part.scale.apply(reference[p][rows]), update.scale[p].apply(reference[p])[rows]),
                    ("the offset", part.offset, update.offset[p][rows]),
                    ("kappa", torch.tensor(part.gain), torch.tensor(update.gain[p])),
                    ("the sign", torch.tensor(part.sign), torch.tensor(update.sign[p])),
                ):
                    error = _relative(ours - whole, whole)
                    assert error <= 1e-12, f"step {step}: {name} of rows is not that of the whole ({error:.1e})"


def _snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Everything that a preconditioner can reach, by a name for the message."""
    seen: dict[str, Any] = {"the entries of optimizer.state": len(optimizer.state)}
    for g, group in enumerate(optimizer.param_groups):
        seen |= {f"group {g} {key}": copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for i, p in enumerate(group["params"]):
            seen[f"parameter {g}.{i}"] = p.detach().clone()
            seen[f"gradient {g}.{i}"] = None if p.grad is None else p.grad.clone()
            seen |= {f"state {g}.{i} {k}": copy.deepcopy(_plain(v)) for k, v in state_of(optimizer, p).items()}
    return seen


def _plain(value: Any) -> Any:
    """What a tensor that is quantised inside stands for; it may know neither copies nor comparisons."""
    quantised = isinstance(value, Tensor) and type(value).dequantize is not Tensor.dequantize
    return value.dequantize() if quantised else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _relative(error: Tensor, size: Tensor) -> float:
    """Largest entry of the error over the largest entry of what it is an error of."""
    if not error.numel():
        return 0.0
    return float(error.abs().max() / size.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
