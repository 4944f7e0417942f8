"""Between the selector and its log: a decision waits until the optimizer has made its step, then it is written.

So a step that a GradScaler skips is logged as not made, and what a watched step really did stands beside what was
predicted of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer

from ftw.errors import DataError
from ftw.fidelity import Fidelity
from ftw.problem import Selection
from ftw.watching.log import DecisionLog


class _Waiting(NamedTuple):
    selection: Selection
    step: int
    columns: Mapping[str, Sequence[Any]]


class Journal:
    """Writes the selector's decisions to a log, by a hook after the optimizer's step.

    Made after the selector's `Watcher`, whose hook must come first. A log that cannot be written any more ends with a
    warning: training goes on.

    Args:
        log: where to.
        optimizer: the one that steps.
        about: how the run decides.
        candidates: whether the selections' candidates are samples, and logged one by one.
    """

    def __init__(self, log: DecisionLog, optimizer: Optimizer, about: Mapping[str, str], *, candidates: bool) -> None:
        self._log: DecisionLog | None = log
        self._about, self._candidates = about, candidates
        self._waiting: _Waiting | None = None
        self._fidelity: Fidelity | None = None
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def expect(self, selection: Selection, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """The next step of the optimizer is this one."""
        self._write(stepped=False)
        self._waiting = _Waiting(selection, step, columns)

    def told(self, fidelity: Fidelity) -> None:
        """What the step that is being made did; said before the hook after it runs."""
        self._fidelity = fidelity

    def forget(self) -> None:
        """What waits was decided in a past that is undone."""
        self._waiting = self._fidelity = None

    def close(self) -> None:
        """Write what waits, as a step that was not made, and remove the hook."""
        self._write(stepped=False)
        self._handle.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer under a GradScaler steps in vain
        self._write(stepped=found_inf is None or not bool(found_inf))

    def _write(self, *, stepped: bool) -> None:
        waiting, fidelity = self._waiting, self._fidelity
        self.forget()
        if waiting is None or self._log is None:
            return
        try:
            self._log.write(
                waiting.selection,
                columns=waiting.columns,
                stepped=stepped,
                step=waiting.step,
                fidelity=fidelity if stepped and fidelity is not None and fidelity.step == waiting.step else None,
                about=self._about,
                candidates=self._candidates,
            )
        except (OSError, DataError) as error:
            warnings.warn(
                f"the decision log {self._log.path} ends before step {waiting.step}: {error}; training goes on without "
                "it.",
                stacklevel=2,
            )
            self._log = None
