"""Selectors' states in files: of one process, or of several in the one that the first of them writes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from ftw.errors import ConfigurationError, DataError
from ftw.processes.group import Group

_STATES = "processes"


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """The states of all processes, plain data; a single process's as it is. Collective."""
    if _processes() == 1:
        return state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    parts = Group().gather_tensor(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    return {_STATES: [torch.load(io.BytesIO(bytes(part.tolist())), weights_only=True) for part in parts]}


def own(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """This process's part of what `gathered` gave.

    Raises:
        ConfigurationError: the run that saved it had another number of processes.
    """
    states, count = state.get(_STATES, [state]), _processes()
    if len(states) != count:
        raise ConfigurationError(
            f"the checkpoint holds the selectors' states of {len(states)} process(es) and this run has {count}: their "
            f"pools are others; resume with {len(states)}, or give the callback no checkpoint of a run with selection."
        )
    found: Mapping[str, Any] = states[torch.distributed.get_rank() if count > 1 else 0]
    return found


def read(path: str) -> Any:
    """What a selector's `state_dict()` was saved as: plain data, and nothing else is read.

    Raises:
        DataError: the file is cut short, or holds anything but plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as a selector's state ({type(error).__name__}); resume from an earlier checkpoint, "
            "or remove the file and the selector begins anew."
        ) from error


def _processes() -> int:
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1
