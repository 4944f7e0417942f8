"""Checks of arguments whose allowed values are few, or a range. Called where the arguments arrive."""

from __future__ import annotations

import math
from typing import Any

from ftw.errors import ConfigurationError


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigurationError` unless the value is one of the allowed."""
    if value not in allowed:
        raise ConfigurationError(
            f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}; choose one of them."
        )


def integer(name: str, value: Any, least: int) -> None:
    """Raise `ConfigurationError` unless the value is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(
            f"{name} is {value!r}; an integer of at least {least} is needed; set it so or leave it out."
        )


def at_least(name: str, value: Any, least: float) -> None:
    """Raise `ConfigurationError` unless the value is a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ConfigurationError(
            f"{name} is {value!r}; a finite number of at least {least} is needed; set it so or leave it out."
        )
