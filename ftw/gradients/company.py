"""Who else runs a model's forwards: of a sharded model every process has to run each of them, or none gets on.

Asked by the recorder and by targets; `ftw.processes.sharding` has the one for sharded models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


class Company:
    """Nobody: each process runs what it likes."""

    @contextmanager
    def in_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Forward]:
        """The model, to be called inside as often as this process needs, without gradients.

        What fails inside on one process fails on all. `args` and `kwargs` are what the model may be called with while
        other processes go on.
        """
        yield model

    def end_forwards(self) -> None:
        """To be called after forwards without a backward."""

    def all(self, fact: bool) -> bool:
        """Whether it is so on every process."""
        return fact

    def any(self, fact: bool) -> bool:
        """Whether it is so on some process."""
        return fact

    def weighted(self, batches: Iterable[Any], rows: Callable[[Any], float]) -> Iterator[tuple[Any, float, float]]:
        """Batches with the weight of each one's gradient, and what its loss is multiplied with before the backward."""
        for batch in batches:
            yield batch, rows(batch), 1.0


ALONE = Company()
