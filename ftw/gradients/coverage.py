"""Coverage: which layers to tap so that every trainable parameter is recorded, and a table that says so.

Called by the recorder (`find_layers`) and by `selector.coverage()` (`describe`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import nn
from torch.nn import Parameter

from ftw.errors import CoverageError
from ftw.gradients.rules import RULES, LayerRule
from ftw.optim_state.shards import is_dtensor, shape_of

UNCOVERED = ("error", "scale", "ignore")


@dataclass(frozen=True)
class TappedLayer:
    """A layer whose output carries a tap, with the parameters (by their name in the layer) that are recorded."""

    name: str
    module: nn.Module
    rule: LayerRule
    parameters: Mapping[str, Parameter]
    _taken: list[tuple[Any, str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)

    def detach(self) -> None:
        """Give the layer detached parameters, so that autograd forms no gradient of its own ones."""
        for owner, key, p in self.places():
            owner._parameters[key] = p.detach()
            self._taken.append((owner, key, p))

    def put_back(self) -> None:
        """Give the layer its own parameters again."""
        while self._taken:
            owner, key, p = self._taken.pop()
            owner._parameters[key] = p

    def places(self) -> list[tuple[Any, str, Any]]:
        """Where the layer looks its parameters up (owner and key), and what stands there: of sharded ones (FSDP2) the
        whole, while the layer runs."""
        found = []
        for name in self.parameters:
            path, _, key = name.rpartition(".")
            owner: Any = self.module.get_submodule(path) if path else self.module
            found.append((owner, key, owner._parameters[key]))
        return found

    def whole(self) -> dict[str, Any]:
        """The parameters by name, of sharded ones the whole; where that is not at hand, its form without numbers."""
        if not any(map(is_dtensor, self.parameters.values())):
            return dict(self.parameters)
        held = zip(self.parameters, self.places(), strict=True)
        return {name: shape_of(p) if is_dtensor(p) else p for name, (_, _, p) in held}


@dataclass(frozen=True)
class Covered:
    """How one trainable parameter is handled.

    Attributes:
        parameter: its name in the model.
        shape: of the parameter.
        layers: names of the layers that use it: those tapped where it is recorded, else those that hold it.
        how: "recorded", "scale" or "ignore" (the `uncovered` policy), or "not in the optimizer".
        rule: in a few words, how its contributions come about, or why there are none.
    """

    parameter: str
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    how: str
    rule: str


class CoverageTable(tuple[Covered, ...]):
    """One row for each trainable parameter, in the model's order; printed, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("parameter", "shape", "how", "layers", "rule")
        rows = [
            (row.parameter, "x".join(map(str, row.shape)) or "()", row.how, _some(row.layers), row.rule) for row in self
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        numbers = {how: sum(prod(row.shape) for row in self if row.how == how) for how in {row.how for row in self}}
        total = ", ".join(f"{how} {number:,}" for how, number in sorted(numbers.items(), key=lambda pair: -pair[1]))
        return "\n".join(
            [line.rstrip() for line in lines] + [f"{len(self)} trainable parameters; numbers: {total or 0}"]
        )


def _some(layers: tuple[str, ...]) -> str:
    return ", ".join(layers[:2]) + (f" and {len(layers) - 2} more" if len(layers) > 2 else "")


@dataclass(frozen=True)
class Coverage:
    """The layers to tap, and the parameters that no rule covers with the kind of module that holds them."""

    layers: list[TappedLayer]
    uncovered: dict[Parameter, str]


def find_layers(
    model: nn.Module,
    wanted: list[Parameter] | None,
    *,
    uncovered: str = "error",
    rules: Sequence[LayerRule] = RULES,
) -> Coverage:
    """The layers to tap so that every wanted parameter that requires grad is recorded.

    Args:
        wanted: the parameters to record; None: all of the model's.
        uncovered: "error", or what will be done about parameters without a rule.
        rules: asked in this order; a rule that covers a whole module takes its children's parameters too.

    Raises:
        CoverageError: a parameter belongs to a module without a rule, or is not the model's.
    """
    names = {p: name for name, p in model.named_parameters()}
    targets = {p for p in (names if wanted is None else wanted) if p.requires_grad}
    strangers = [p for p in targets if p not in names]
    if strangers:
        raise CoverageError(
            f"{len(strangers)} parameters of the optimizer (the first of shape {tuple(strangers[0].shape)}) are not "
            "parameters of the model; contributions exist for the model's own; pass the module that owns them, or "
            "leave them out of this optimizer."
        )
    found: list[TappedLayer] = []
    missing: dict[Parameter, str] = {}
    taken: set[nn.Module] = set()  # children of a module that a rule covers as a whole
    bound = [rule.bind(model) for rule in rules]
    for name, module in model.named_modules():
        if module in taken:
            continue
        rule = next((rule for rule in bound if rule.handles(module)), None)
        if rule is None:
            missing.update({p: type(module).__name__ for p in module._parameters.values() if p is not None})
            continue
        parameters = rule.parameters(module)
        taken.update(_owners(module, parameters))
        own = {key: p for key, p in parameters.items() if p in targets}
        if own:
            found.append(TappedLayer(name or type(module).__name__, module, rule, own))
    recorded = {p for layer in found for p in layer.parameters.values()}
    # A weight that only one of its modules can record is incomplete; the audit would say so, this says it sooner.
    lacking = {p: kind for p, kind in missing.items() if p in targets}
    if lacking and uncovered == "error":
        listed = [f"{names[p]} ({kind})" for p, kind in lacking.items()]
        raise CoverageError(
            f"{len(listed)} trainable parameters belong to layers whose contributions cannot be recorded: "
            f"{', '.join(listed[:8])}{' ...' if len(listed) > 8 else ''}; recorded are Linear, Conv1D, Embedding, "
            "LayerNorm, RMSNorm and their like, MultiheadAttention, DoRA and experts; name the module, or its class, "
            "in functional=[...] if its rows are independent, choose uncovered='scale' or 'ignore', freeze them "
            "(requires_grad_(False)), or leave them out of the optimizer."
        )
    if lacking:
        found = [_without(layer, lacking) for layer in found]
        found = [layer for layer in found if layer.parameters]
    if not recorded - lacking.keys():
        raise CoverageError(
            "the model has no trainable parameter to record; at least one must require grad and be in the optimizer; "
            "call requires_grad_() on what you train."
        )
    return Coverage(found, lacking)


def describe(
    model: nn.Module, layers: Sequence[TappedLayer], uncovered: Mapping[Parameter, str], policy: str
) -> CoverageTable:
    """How each trainable parameter of the model is handled.

    Args:
        layers: those tapped.
        uncovered: parameters in the optimizer without a rule, with the kind of module that holds them.
        policy: what is done about them, "scale" or "ignore".

    Law: one row for each of the model's parameters that require grad, no matter whether the optimizer has it.
    """
    used: dict[Parameter, dict[str, str]] = {}  # layer -> rule
    for layer in layers:
        for p in layer.parameters.values():
            used.setdefault(p, {})[layer.name] = layer.rule.summary
    holders: dict[Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for held in module._parameters.values():
            if held is not None:
                holders.setdefault(held, []).append(name or type(module).__name__)
    table = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        names = tuple(used.get(p, holders[p]))
        if p in used:
            how, rule = "recorded", "; ".join(dict.fromkeys(used[p].values()))
        elif p in uncovered:
            how, rule = policy, f"no rule for {uncovered[p]}: {_WITHOUT_RULE[policy]}"
        else:
            how, rule = "not in the optimizer", "no step is taken on it"
        table.append(Covered(name, tuple(p.shape), names, how, rule))
    return CoverageTable(table)


_WITHOUT_RULE = {
    "scale": "weighted gradient from a second backward, not seen by the choice",
    "ignore": "its gradient is left as the backward made it",
}


def _owners(module: nn.Module, parameters: Mapping[str, Parameter]) -> set[nn.Module]:
    """The submodules that a rule covers along with the module itself."""
    whole = any("." in name for name in parameters)
    return set(module.modules()) - {module} if whole else set()


def _without(layer: TappedLayer, lacking: Mapping[Parameter, str]) -> TappedLayer:
    kept = {key: p for key, p in layer.parameters.items() if p not in lacking}
    return TappedLayer(layer.name, layer.module, layer.rule, kept)
