"""What the tests of several trainers share: loss scaling on a CPU, and reading back what was reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def half_precision() -> Iterator[Callable[[Any, float], Any]]:
    """Yields `scaled(trainer, init_scale)`: autocast and a GradScaler around backward and step, as under fp16=True,
    which silently runs float32 on a CPU. Trainers must be made inside; accelerate is as it was after."""
    from accelerate.state import AcceleratorState

    def scaled(trainer: Any, init_scale: float) -> Any:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        return trainer

    AcceleratorState._reset_state(True)
    try:
        yield scaled
    finally:
        AcceleratorState._reset_state(True)


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar in the event files below a folder, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((each.step, each.value) for each in events.Scalars(tag))
    return found
