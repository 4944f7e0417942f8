"""The states of several processes in the one checkpoint that the first of them writes, for trainers that save so."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from ftw.errors import ConfigurationError
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


def _processes() -> int:
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1
