"""Coverage: which layers to tap so that every trainable parameter is recorded. Called by the recorder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import Parameter

from ftw.errors import CoverageError
from ftw.gradients.rules import RULES, LayerRule

UNCOVERED = ("error", "scale", "ignore")


@dataclass(frozen=True)
class TappedLayer:
    """A layer whose output carries a tap, with the parameters (by their name in the layer) that are recorded."""

    name: str
    module: nn.Module
    rule: LayerRule
    parameters: Mapping[str, Parameter]

    def detach(self) -> None:
        """Give the layer detached parameters, so that autograd forms no gradient of its own ones."""
        for owner, key, p in self._places():
            owner._parameters[key] = p.detach()

    def put_back(self) -> None:
        """Give the layer its own parameters again."""
        for owner, key, p in self._places():
            owner._parameters[key] = p

    def _places(self) -> list[tuple[Any, str, Parameter]]:
        found = []
        for name, p in self.parameters.items():
            path, _, key = name.rpartition(".")
            found.append((self.module.get_submodule(path) if path else self.module, key, p))
        return found


@dataclass(frozen=True)
class Covered:
    """How one trainable parameter is handled.

    Attributes:
        parameter: its name in the model.
        shape: of the parameter.
        layers: names of the layers that use it.
        how: "recorded", "scale" or "ignore" (the `uncovered` policy), or "not in the optimizer".
        rule: in a few words, how its contributions come about.
    """

    parameter: str
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    how: str
    rule: str


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
    for name, module in model.named_modules():
        if module in taken:
            continue
        rule = next((rule for rule in rules if rule.handles(module)), None)
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
            "LayerNorm, RMSNorm, MultiheadAttention, DoRA and experts; choose uncovered='scale' or 'ignore', name the "
            "module in functional=[...], freeze them (requires_grad_(False)), or leave them out of the optimizer."
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


def _owners(module: nn.Module, parameters: Mapping[str, Parameter]) -> set[nn.Module]:
    """The submodules whose parameters a rule covers along with the module's own."""
    paths = {name.rpartition(".")[0] for name in parameters}
    return {module.get_submodule(path) for path in paths if path}


def _without(layer: TappedLayer, lacking: Mapping[Parameter, str]) -> TappedLayer:
    kept = {key: p for key, p in layer.parameters.items() if p not in lacking}
    return TappedLayer(layer.name, layer.module, layer.rule, kept)
