"""Selection in a loop that is not changed at all: attached to its model and its optimizer by hooks.

    attached = attach(model, optimizer, target=target_batches, budget=0.25)
    ...                                        # forward, backward, optimizer.step(): as before
    attached.detach()

A training forward opens a block of `record()`, the end of its backward closes it, and the selection takes place when
the optimizer steps. Loops that may gain three lines have more freedom with `record()` and `apply()` themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

import ftw
from ftw.errors import ConfigurationError, RecordingError
from ftw.optim_state.wrappers import unwrapped

MassOf = Callable[[Mapping[str, Any]], Tensor]
CandidatesOf = Callable[[Mapping[str, Any]], Any]
ColumnsOf = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    target: Any,
    mass: MassOf | None = None,
    candidates: CandidatesOf | None = None,
    extras: ColumnsOf | None = None,
    max_grad_norm: float | None = None,
    told: Callable[[ftw.Selection], None] | None = None,
    **selector: Any,
) -> Attached:
    """Select in a loop that stays as it is.

    Args:
        model: called by the loop, in training mode with gradients enabled.
        optimizer: the loop's, or accelerate's wrapper of it.
        target, selector: arguments of `ftw.Selector`.
        mass: keyword arguments of a forward -> mass of its candidates, (candidates,); rows of mass 0 are no candidates.
            `token_mean` where the loss is the model's own mean over label tokens. Default: equal.
        candidates: keyword arguments of a forward -> whose each row or token is, as in `Selector.record`:
            `ftw.packed_candidates` for packed rows, the same number for the rows of a preference pair.
        extras: keyword arguments of a forward -> what else is known of its candidates, one entry each, as in
            `Selector.record`: for filters, and "id", "source" and "text" for the decision log (`log=`). The model sees
            nothing of it: what is no argument of the forward, the loop's own variables know (docs/watching.md).
        max_grad_norm: clip what was selected to this norm. The loop's own clipping comes before the optimizer's step
            and so before the selection: there is no gradient yet that it could clip, and it has no effect.
        told: called with the selection of every step.

    Returns:
        A handle: `selection` is the last, `selector` the selector, `detach()` removes every hook. It has the
        `state_dict()` and `load_state_dict()` of the selector, so that accelerate saves it where it is registered.

    Raises:
        ConfigurationError: `lean=False`; a norm that is not positive; no `extras` for a filter that needs some. For the
            rest see `ftw.Selector`.
    """
    if not selector.get("lean", True):
        raise ConfigurationError(
            "lean=False was given to attach(); the loop would clip or unscale a gradient that is overwritten "
            "afterwards; leave it out, or call record() and apply() in the loop."
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ConfigurationError(f"max_grad_norm is {max_grad_norm!r}; a positive norm is needed, or None for none.")
    return Attached(model, optimizer, (mass, candidates, extras), max_grad_norm, told, {"target": target, **selector})


def token_mean(inputs: Mapping[str, Any]) -> Tensor:  # -> (rows,)
    """Mass of the rows of a causal language model whose loss is the mean over the forward's label tokens."""
    tokens = inputs["labels"][:, 1:].ne(-100).sum(1).double()
    return tokens / tokens.sum()


def owners(mass: Tensor) -> tuple[Tensor, Tensor | None]:  # (rows,) -> (n,), (rows,) or None
    """Mass of the candidates, and whose each row is where some, those without mass, are nobody's."""
    mass = mass.detach().cpu()
    nobody = mass == 0
    if not bool(nobody.any()):
        return mass, None
    return mass[~nobody], ((~nobody).cumsum(0) - 1).masked_fill(nobody, -1)


def of_candidates(columns: Mapping[str, Any], owner: Tensor | None) -> dict[str, list[Any]]:
    """Columns with an entry for each row, without those of the rows that `owners` says are nobody's."""
    listed = {
        name: column.detach().cpu().tolist() if isinstance(column, Tensor) else list(column)
        for name, column in columns.items()
    }
    kept = [] if owner is None else (owner >= 0).tolist()
    return {
        name: [entry for entry, keep in zip(column, kept, strict=True) if keep] if len(column) == len(kept) else column
        for name, column in listed.items()
    }


class Attached:
    """What `attach` returns; also a context manager that detaches in the end.

    Attributes:
        selector: at work.
        selection: of the last step; None before.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        described: tuple[MassOf | None, CandidatesOf | None, ColumnsOf | None],
        max_grad_norm: float | None,
        told: Callable[[ftw.Selection], None] | None,
        arguments: dict[str, Any],
    ) -> None:
        self.selection: ftw.Selection | None = None
        self._mass_of, self._candidates_of, self._columns_of = described
        self._max_norm, self._told = max_grad_norm, told
        self._block: AbstractContextManager[None] | None = None
        self._mapped = False  # whether the block has a map of its rows
        self._masses: list[float] = []
        self._columns: dict[str, list[Any]] = {}
        self._waiting = 0  # forwards whose backward has not begun
        self._under_way = False  # a forward or a backward; if another begins, it broke off
        self._closed = 0  # blocks of this window
        self._busy = False
        # Before the selector, whose own hooks (watch=) look at what this one leaves.
        self._handles: list[Any] = [unwrapped(optimizer).register_step_pre_hook(self._before_step)]
        try:
            self.selector = ftw.Selector(model, optimizer, **arguments)
        except BaseException:
            self._handles.pop().remove()
            raise
        if self._columns_of is None:
            try:
                self.selector.require_columns(())
            except ConfigurationError:
                self.detach()
                raise
        for each in {unwrapped(optimizer), optimizer}:
            # Not accelerate's own, which passes on those calls that end a window.
            if each is unwrapped(optimizer) or type(each).zero_grad is Optimizer.zero_grad:
                self._handles.append(_Preceded(each, "zero_grad", self._before_zeroing))
        # Ahead of the recorder's, which must find the block open.
        self._handles.append(model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._after_forward))

    def detach(self) -> None:
        """Remove every hook and forget what is recorded; the loop then trains plainly."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._drop("detached within a window; what it recorded is dropped; detach between steps.")
        self.selector.close()

    def state_dict(self) -> dict[str, Any]:
        """Between steps: see `Selector.state_dict`."""
        return self.selector.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict()` was taken, model and optimizer too."""
        self.selector.load_state_dict(state)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._busy or not model.training or not torch.is_grad_enabled():
            return
        self._drop_broken()
        owner = None if self._candidates_of is None else self._candidates_of(kwargs)
        mass = None if self._mass_of is None else self._mass_of(kwargs)
        columns: Mapping[str, Any] = {} if self._columns_of is None else self._columns_of(kwargs)
        if mass is not None and owner is None:
            mass, owner = owners(mass)
            columns = of_candidates(columns, owner)
        else:
            columns = of_candidates(columns, None)
        if self._block is None:
            self._masses, self._mapped = [], owner is not None
            self._columns = {name: [] for name in columns}
            self._block = self.selector.record(
                mass=None if mass is None else self._masses, candidates=owner, extras=self._columns
            )
            self._during(self._block.__enter__)
        elif columns.keys() != self._columns.keys():
            raise ConfigurationError(
                f"extras are {sorted(columns)} of this forward and {sorted(self._columns)} of the one before it in the "
                "same block; filters and the log need them of all candidates; return the same names each time."
            )
        elif self._mapped or owner is not None:
            raise RecordingError(
                "a forward began before the backward of the one before it, and one of the two has rows or tokens that "
                "are not each a candidate; such forwards need their backward first; change the order, or call record() "
                "with a map for each forward in the loop."
            )
        if mass is not None:
            self._masses.extend(mass.tolist())
        for name, column in columns.items():
            self._columns[name].extend(column)
        self._under_way = True

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._block is None or self._busy or not model.training or not torch.is_grad_enabled():
            return
        self._under_way = False
        made = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        if made:
            self._waiting += 1
            torch.autograd.graph.register_multi_grad_hook(made, self._backward_begins, mode="any")

    def _backward_begins(self, gradient: Tensor) -> None:
        self._waiting -= 1
        self._under_way = True
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        self._under_way = False
        if self._waiting == 0:  # else another forward's backward is to come
            self._close()

    def _close(self) -> None:
        if self._block is not None:
            block, self._block, self._waiting = self._block, None, 0
            self._during(block.__exit__, None, None, None)
            self._closed += 1

    def _drop(self, reason: str) -> None:
        """End an open block as one that failed."""
        self._waiting, self._under_way = 0, False
        if self._block is not None:
            block, self._block = self._block, None
            block.__exit__(RecordingError, RecordingError(reason), None)

    def _drop_broken(self) -> None:
        if self._under_way:
            self._drop("a forward or a backward broke off; what was recorded of it is dropped.")

    def _before_zeroing(self) -> None:
        if self._busy:
            return
        self._drop_broken()
        if self._block is None:
            self.selector.discard()
            self._closed = 0
        elif self._closed:
            raise RecordingError(
                "optimizer.zero_grad() was called between a forward and its backward, with earlier micro-batches "
                "recorded that it would drop, and that forward not; call it before the forward."
            )

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(given) and given is not optimizer for given in (*args, *kwargs.values())):
            raise ConfigurationError(
                "optimizer.step() was given a closure, which runs forward and backward after the selection; attach() "
                "serves steps without one; call record() and apply() in the loop."
            )
        self._drop_broken()
        self._close()
        self.selection = self._during(self.selector.apply)
        self._closed = 0
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), self._max_norm)
        if self._told is not None:
            self._told(self.selection)

    def _during(self, work: Callable[..., Any], *args: Any) -> Any:
        """Forwards of the selector's own, for the target and its audits, are not the loop's."""
        busy, self._busy = self._busy, True
        try:
            return work(*args)
        finally:
            self._busy = busy


class _Preceded:
    """A method of one object that calls something first, until `remove()`."""

    def __init__(self, owner: Any, name: str, first: Callable[[], None]) -> None:
        plain = getattr(owner, name)
        self._owner, self._name, self._own = owner, name, vars(owner).get(name)

        @functools.wraps(plain)
        def method(*args: Any, **kwargs: Any) -> Any:
            if self._active:
                first()
            return plain(*args, **kwargs)

        self._method, self._active = method, True
        setattr(owner, name, method)

    def remove(self) -> None:
        self._active = False
        if vars(self._owner).get(self._name) is not self._method:
            return  # wrapped once more since: what stands inside does nothing any more
        delattr(self._owner, self._name)
        if self._own is not None:
            setattr(self._owner, self._name, self._own)


def _tensors(output: Any) -> Iterator[Tensor]:
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))
