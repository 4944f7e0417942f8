"""The methods that `ftw run` compares: named configurations of one problem (DESIGN, section 2).

Called by `ftw.cli` (names, one-line descriptions) and `ftw.experiment.compare` (configurations). A method
adds no code of its own: whatever it does can be written as arguments of `ftw.Selector`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ftw import registry
from ftw.errors import ConfigurationError
from ftw.presets import PRESETS, Preset


@dataclass(frozen=True)
class Method:
    """One row of the comparison. `kind` is `selector`, or a plain loop that needs none and pays for none."""

    preset: Preset
    kind: Literal["selector", "random", "full"] = "selector"
    changed: tuple[str, ...] = ()
    """Components that the user put in the place of the named ones, as `filter=topk`."""

    @property
    def name(self) -> str:
        """The preset's."""
        return self.preset.name

    @property
    def label(self) -> str:
        """The name, with what was changed."""
        return f"{self.name} ({', '.join(self.changed)})" if self.changed else self.name

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `ftw.Selector`."""
        return self.preset.arguments()


_PLAIN: Mapping[str, Literal["random", "full"]] = {"random": "random", "full": "full"}

METHODS: Mapping[str, Method] = {
    name: Method(each, _PLAIN.get(name, "selector")) for name, each in PRESETS.items() if each.self_contained
}
"""Presets that need nothing but samples: no tokens as candidates, no further losses."""

GEOMETRIES = ("curvature", "update", "vanilla")
OBJECTIVES = ("match", "utility")


def parse(names: str) -> list[Method]:
    """`"ours,random"` -> methods, in that order.

    Raises:
        ConfigurationError: an unknown name, with the nearest one; a name given twice; none given.
    """
    given = [name.strip() for name in names.split(",") if name.strip()]
    for name in given:
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            raise ConfigurationError(f"unknown method {name!r}{hint} available: {', '.join(METHODS)}. See `ftw list`.")
    if not given or len(set(given)) < len(given):
        raise ConfigurationError(
            f"methods are {names!r}; one or more different names are needed, such as ours,random; "
            f"available: {', '.join(METHODS)}."
        )
    return [METHODS[name] for name in given]


def override(methods: list[Method], components: Mapping[str, str | None]) -> list[Method]:
    """The methods with the components of `ours` replaced: `{"filter": "topk", "solver": None, ...}`.

    Raises:
        ConfigurationError: `ours` is not among the methods, so that the choice would have no effect.
        UnknownComponentError, BrokenPluginError: no filter or solver of that name, or it cannot be imported.
    """
    chosen = {name: value for name, value in components.items() if value is not None}
    for name, group in (("filter", "filters"), ("solver", "solvers")):
        if name in chosen:
            registry.load(group, chosen[name])
    if not chosen:
        return methods
    if all(method.name != "ours" for method in methods):
        options = ", ".join(f"--{name}" for name in chosen)
        raise ConfigurationError(
            f"{options} given, but the methods are {', '.join(method.name for method in methods)}; "
            "components can be changed in the method 'ours' only; add it to --method or drop the option."
        )
    return [_with(method, chosen) if method.name == "ours" else method for method in methods]


def _with(method: Method, chosen: Mapping[str, str]) -> Method:
    changed: dict[str, Any] = {name: value for name, value in chosen.items() if getattr(method.preset, name) != value}
    notes = tuple(f"{name}={value}" for name, value in changed.items())
    if changed.get("solver") == "closed_form":  # it knows no bounds, so they go with the solver that did
        changed["bounded"], notes = False, (*notes, "no bounds")
    return replace(method, preset=replace(method.preset, **changed), changed=notes)
