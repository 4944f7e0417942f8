"""Optional dependencies of the command line: imported where they are used, named with their extra if missing.

Called by the modules of `ftw.experiment`; the library itself needs none of these packages.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ftw.errors import MissingDependencyError

NEEDED = ("transformers", "rich", "matplotlib")


def optional(module: str) -> Any:
    """The imported module, or a `MissingDependencyError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks a dependency of its own: the one that is really missing is named.
        raise _missing(error.name or module) from error


def require(*modules: str) -> None:
    """Raises `MissingDependencyError` unless all are installed; imports none, so that it can come first."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise _missing(module)


def _missing(module: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"the package {module!r} is not installed; `ftw run` and `ftw demo` need transformers, rich and "
        "matplotlib (and peft for --lora); run: pip install 'filter-then-weight[hf,plot]'."
    )
