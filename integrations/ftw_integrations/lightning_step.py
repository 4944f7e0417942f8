"""A LightningModule's training step as the forward of a module: recorded once, and run again without a trace.

Used by `ftw_integrations.lightning` alone. The step is run again for the target and by the audit of the first window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ftw.errors import TargetError

_Back = Callable[[], None]

_TORCHS_OWN = vars(nn.Module()).keys()
"""Attributes that every module has; modes, hooks and parameters are no trace of a step."""


class TrainingStep(nn.Module):
    """`forward` is the module's `training_step`.

    Args:
        module: a LightningModule; the step it has now is kept, compiled or not.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._step: Callable[..., Any] = module.training_step
        self._live = False
        self._further = 1  # arguments after the batch
        self._loggers = [each for each in module.modules() if _is_lightning(each)]
        self._traced = [module, *(each for each in module.modules() if isinstance(each, Metric))]

    def run(self, *args: Any, recorded: bool = True) -> Any:
        """The trainer's own call; through `forward`, where hooks see it, if it is recorded."""
        self._further = len(args) - 1
        if not recorded:
            return self._step(*args)
        self._live = True
        try:
            return self(*args)
        finally:
            self._live = False

    def forward(self, *args: Any) -> Any:
        live, self._live = self._live, False
        if live:
            return self._step(*args)
        with self.without_trace():
            return self._step(*args)

    def loss(self, batch: Any) -> Tensor:
        """The step's loss for another batch, with number 0.

        Raises:
            TargetError: it returned none.
        """
        with self.without_trace():
            output = self._step(batch, *[0] * self._further)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            raise TargetError(
                "training_step returned no loss for a target batch; the target needs one; leave such batches out of "
                "the target, or pass loss_fn(module, batch)."
            )
        result: Tensor = loss
        return result

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Nothing is logged, and what the step counts, appends, or assigns to the module or its metrics is undone."""
        back = [_remembered(vars(each)) for each in self._traced] + [
            _remembered(each._buffers) for each in self._traced
        ]
        quiet = [vars(each) for each in self._loggers]
        spoken = [{name: own[name] for name in ("log", "log_dict") if name in own} for own in quiet]
        for own in quiet:
            own.update(log=_nothing, log_dict=_nothing)
        try:
            yield
        finally:
            for own, before in zip(quiet, spoken, strict=True):
                for name in ("log", "log_dict"):
                    own.pop(name, None)
                own.update(before)
            for undo in back:
                undo()


def _remembered(attributes: dict[str, Any]) -> _Back:
    """What puts the attributes back: the same objects, with what they held."""
    before = {name: value for name, value in attributes.items() if name not in _TORCHS_OWN}
    inner = [undo for value in before.values() if (undo := _content(value)) is not None]

    def back() -> None:
        for name in [name for name in attributes if name not in before and name not in _TORCHS_OWN]:
            del attributes[name]
        attributes.update(before)
        for undo in inner:
            undo()

    return back


def _content(value: Any) -> _Back | None:
    if isinstance(value, Tensor):
        return None if value.is_inference() else _numbers(value)
    if isinstance(value, list):
        return _shortened(value)
    if isinstance(value, dict | set | deque):
        before = list(value.items() if isinstance(value, dict) else value)
        lists = (
            [_shortened(each) for each in value.values() if isinstance(each, list)] if isinstance(value, dict) else []
        )

        def refill() -> None:
            value.clear()
            (value.extend if isinstance(value, deque) else value.update)(before)
            for undo in lists:
                undo()

        return refill
    return None


def _shortened(value: list[Any]) -> _Back:
    # The length alone: what a module keeps in lists may be long, and steps append to them.
    length = len(value)

    def shorten() -> None:
        del value[length:]

    return shorten


def _numbers(tensor: Tensor) -> _Back:
    # Written back only where it was written: a graph that waits for its backward may hold it.
    version, before = tensor._version, tensor.detach().clone()

    def write() -> None:
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(before)

    return write


def _is_lightning(module: nn.Module) -> bool:
    return any(kind.__name__ == "LightningModule" for kind in type(module).__mro__)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
