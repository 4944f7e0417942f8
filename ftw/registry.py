"""Name, class or instance -> component. Names are entry points: a plug-in is on a par with a built-in.

Nothing is imported before it is named: listing the names reads package metadata only, and a broken plug-in
breaks nobody but the caller who asks for it.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ftw.errors import (
    BrokenPluginError,
    ConfigurationError,
    DuplicateComponentError,
    MissingDependencyError,
    UnknownComponentError,
)

NOUNS = {
    "gradients": "gradient extractor",
    "optim_state": "preconditioner",
    "filters": "filter",
    "solvers": "solver",
    "curvature": "curvature model",
}
"""Group -> what one of its components is called in messages. The entry-point group is `ftw.<group>`."""

_INTERFACES = {
    "gradients": "ftw.gradients.base:GradientExtractor",
    "optim_state": "ftw.optim_state.base:Preconditioner",
    "filters": "ftw.filters.base:Filter",
    "solvers": "ftw.solvers.base:WeightSolver",
    "curvature": "ftw.curvature.base:Curvature",
}


def resolve(group: str, component: Any, **options: Any) -> Any:
    """The component meant by `component`: a registered name, a class of the group's interface or an instance.

    Args:
        group: one of `gradients`, `optim_state`, `filters`, `solvers`, `curvature`.
        component: `"pgd"`, `ProjectedGradient` or `ProjectedGradient()`.
        options: passed to the class; not allowed with an instance.

    Raises:
        UnknownComponentError: no such name; the message lists what there is and the nearest spelling.
        DuplicateComponentError: several distributions register the name.
        BrokenPluginError, MissingDependencyError: the component cannot be imported.
        ConfigurationError: the object does not implement the group's interface, or options do not fit.
    """
    cls = load(group, component) if isinstance(component, str) else component
    interface = _interface(group)
    if isinstance(cls, type):
        _require(group, issubclass(cls, interface), cls)
        try:
            return cls(**options)
        except TypeError as error:
            raise ConfigurationError(
                f"{NOUNS[group]} {cls.__name__} cannot be made with options {options}: {error}; "
                "pass an instance that you made yourself."
            ) from error
    _require(group, isinstance(cls, interface), cls)
    if options:
        raise ConfigurationError(
            f"options {sorted(options)} were given with a ready {type(cls).__name__}; "
            "options go with a name or a class; set them when you make the instance."
        )
    return cls


def load(group: str, name: str) -> type:
    """The class registered under `name`; raises as `resolve` does."""
    found = _entries(group)
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise UnknownComponentError(
            f"unknown {NOUNS[group]} {name!r}{hint} available: {', '.join(sorted(found)) or 'none'}. "
            f"Plug-ins register under entry-point group 'ftw.{group}'."
        )
    entries = found[name]
    if len(entries) > 1:
        claims = ", ".join(sorted(f"{distribution(entry)} ({entry.value})" for entry in entries))
        raise DuplicateComponentError(
            f"{NOUNS[group]} {name!r} is registered by several distributions: {claims}; names must be "
            "unique; uninstall one, or pass the class itself instead of the name."
        )
    entry = entries[0]
    try:
        cls = entry.load()
    except MissingDependencyError:
        raise
    except Exception as error:  # whatever a plug-in raises at import is its own fault, and is named as such
        raise BrokenPluginError(
            f"{NOUNS[group]} {name!r} of distribution {distribution(entry)} cannot be imported from "
            f"{entry.value!r}: {type(error).__name__}: {error}; reinstall or remove that distribution."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, _interface(group))):
        raise BrokenPluginError(
            f"{NOUNS[group]} {name!r} of distribution {distribution(entry)} is {cls!r}; a subclass of "
            f"{_interface(group).__name__} is needed; report it to the plug-in's author."
        )
    return cls


def available(group: str) -> dict[str, list[str]]:
    """Name -> the distributions that register it, without importing anything; more than one is a conflict."""
    return {name: [distribution(entry) for entry in entries] for name, entries in sorted(_entries(group).items())}


def distribution(entry: EntryPoint) -> str:
    """The name of the distribution that registers the entry point."""
    try:
        name = entry.dist.name if entry.dist is not None else None
    except Exception:  # half removed, it has entry points but no metadata; that must break nobody else
        name = None
    return name or "an unnamed distribution"


def _entries(group: str) -> dict[str, list[EntryPoint]]:
    if group not in NOUNS:
        raise ConfigurationError(f"unknown group {group!r}; allowed are {', '.join(NOUNS)}.")
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=f"ftw.{group}"):
        same = found.setdefault(entry.name, [])
        # An editable install can list one distribution twice on the path: that is no conflict.
        if all((distribution(entry), entry.value) != (distribution(other), other.value) for other in same):
            same.append(entry)
    return found


def _interface(group: str) -> type:
    if group not in NOUNS:
        raise ConfigurationError(f"unknown group {group!r}; allowed are {', '.join(NOUNS)}.")
    # Imported at the first use, so that `import ftw.registry` stays light and no cycle of imports can arise.
    module, _, name = _INTERFACES[group].partition(":")
    interface: type = getattr(importlib.import_module(module), name)
    return interface


def _require(group: str, fits: bool, given: Any) -> None:
    if not fits:
        raise ConfigurationError(
            f"{given!r} is no {NOUNS[group]}; allowed are a registered name "
            f"({', '.join(sorted(_entries(group)))}), a subclass of {_interface(group).__name__} or an "
            "instance of one."
        )
