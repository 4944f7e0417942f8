"""Coverage: which layers to tap so that every trainable parameter is recorded. Called by the recorder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter

from ftw.errors import CoverageError
from ftw.gradients.layers import LayerRule, rule_for


@dataclass(frozen=True)
class TappedLayer:
    """A layer whose output carries a tap, with the parameters (by their name in the layer) that are recorded."""

    name: str
    module: nn.Module
    rule: LayerRule
    parameters: Mapping[str, Parameter]

    def put_back(self) -> None:
        """Give the layer its own parameters again, after a forward with detached ones."""
        for name, p in self.parameters.items():
            self.module._parameters[name] = p


def find_layers(model: nn.Module, wanted: list[Parameter] | None) -> list[TappedLayer]:
    """The layers to tap so that every wanted parameter that requires grad is recorded.

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
    layers: list[TappedLayer] = []
    uncovered: dict[Parameter, str] = {}
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None and p in targets}
        if not own:
            continue
        rule = rule_for(module)
        if rule is None:
            uncovered.update({p: type(module).__name__ for p in own.values()})
        else:
            layers.append(TappedLayer(name or type(module).__name__, module, rule, own))
    if uncovered:
        listed = [f"{names[p]} ({kind})" for p, kind in uncovered.items()]
        raise CoverageError(
            f"{len(listed)} trainable parameters belong to layers whose contributions cannot be recorded: "
            f"{', '.join(listed[:8])}{' ...' if len(listed) > 8 else ''}; recorded are Linear, Embedding, LayerNorm "
            "and RMSNorm; freeze them (requires_grad_(False)), train adapters (LoRA) instead, or leave them out of "
            "the optimizer."
        )
    if not layers:
        raise CoverageError(
            "the model has no trainable parameter to record; at least one must require grad and be in the optimizer; "
            "call requires_grad_() on what you train."
        )
    return layers
