"""The methods of the comparison, and what data each of them uses. A method is hashed into its cells' keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ftw.presets import PRESETS

LR_FACTORS = (1 / 3, 1.0, 3.0)
"""Learning rates tried by tuned methods, relative to the setting's."""

HORIZONS = (0.25, 1.0)
"""Lengths tried by tuned methods, relative to the setting's: each ends with a learning rate of zero."""


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        kind: how a step's gradient comes about: "select" (by a preset), "random", "logits" (the largest nuclear norms
            of the logits), "full", "target" (a batch of target samples) or "mixture" (mean of the losses of the whole
            pool and of a target batch).
        preset: for "select".
        lr_factors, horizons: trials among which dev chooses; one each: no trial.
        offers_target: a batch of target samples stands among the candidates; never the one that g comes from, where
            there is more than one.
        representation: approximate form that the decision is made from (`representations.arguments`); "": exact.
        warm: trained first on the target samples alone, as `target_only` is, and stopped where dev says.
        options: further arguments of the selector.
        budget: what data it touches, in words.
    """

    kind: str
    preset: str = ""
    lr_factors: tuple[float, ...] = (1.0,)
    horizons: tuple[float, ...] = (1.0,)
    offers_target: bool = False
    representation: str = ""
    warm: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str = ""

    def configuration(self) -> dict[str, Any]:
        """What is hashed: everything but the words, with the preset's components."""
        found = {name: value for name, value in asdict(self).items() if name != "budget"}
        if not self.options:
            del found["options"]
        if self.preset:
            preset = PRESETS[self.preset]
            texts = ("summary", "source", "needs")
            found["preset"] = {name: value for name, value in asdict(preset).items() if name not in texts}
        return found

    @property
    def tuned(self) -> bool:
        return len(self.lr_factors) * len(self.horizons) > 1

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields of a setting that change none of its losses: such cells are those of the core, and not run again."""
        return _IGNORED.get(self.kind, ())


_IGNORED: Mapping[str, tuple[str, ...]] = {
    "target": ("corrupted", "budget", "pool_size"),
    "full": ("budget", "target_samples"),
    "random": ("target_samples",),
    "logits": ("target_samples",),
}


_POOL = "pool: all n seen, {}; target: none"
_SELECTED = "pool: all n seen, k trained on; target: steers by its gradient"


def _selecting(name: str) -> Method:
    blind = {"max_loss": "the k with the largest loss", "grad_norm": "the k with the longest gradient"}
    words = _POOL.format(blind[name] + " trained on") if name in blind else _SELECTED
    return Method("select", name, budget=words)


_TRIALS: Mapping[str, Any] = {"lr_factors": LR_FACTORS, "horizons": HORIZONS}

CORE: Mapping[str, Method] = {
    **{
        name: _selecting(name)
        for name in (
            *("ours", "hard_filter", "adam_topk", "vanilla_topk", "vanilla_reweight", "unbounded", "token_level"),
            *("greats", "grad_match", "opus", "less_online", "max_loss", "grad_norm"),
        )
    },
    "random": Method("random", budget="pool: k drawn at random, trained on; target: none"),
    "logit_utility": Method("logits", budget=_POOL.format("the k with the largest nuclear norm of logits trained on")),
    "full": Method("full", budget=_POOL.format("all trained on")),
    "target_only": Method(
        "target", **_TRIALS, budget="pool: none; target: trained on; dev chooses learning rate, length and step"
    ),
    "mixture": Method(
        "mixture",
        **_TRIALS,
        budget="pool: all n trained on; target: trained on; dev chooses learning rate, length and step",
    ),
    "ours_with_target": Method(
        "select", "ours", offers_target=True, budget=f"{_SELECTED}, and a batch of it stands among the candidates"
    ),
    "ours_warm": Method(
        "select",
        "ours",
        warm=True,
        **_TRIALS,
        budget=f"{_SELECTED}, after training on it as target_only (tuned there by dev)",
    ),
}
"""The paper's eight rows (`full` is one), the rivals, and what a sceptic asks for."""

APPROXIMATE: Mapping[str, Method] = {
    f"ours ({form})": Method("select", "ours", representation=form, budget=_SELECTED)
    for form in ("projection 64", "projection 1024", "row x column", "blocks 4", "blocks 64", "blocks all")
}
"""What deciding from approximate representations does to the loss."""

CAUSES: Mapping[str, Method] = {
    f"ours ({words})": Method("select", "ours", options=options, lr_factors=factors, budget=_SELECTED)
    for words, options, factors in (
        ("whole target", {"target_batches": "all"}, (1.0,)),
        ("ema 0.8", {"ema": 0.8}, (1.0,)),
        ("cap 2", {"cap": 2.0}, (1.0,)),  # with a budget of 4 the default, 4 times the mean, binds nothing
        ("ridge 0.1", {"ridge": 0.1}, (1.0,)),
        ("utility", {"objective": "utility"}, (1.0,)),
        ("utility, adaptive trust", {"objective": "utility", "trust": "adaptive"}, (1.0,)),
        ("relinearised", {"relinearise": True}, (1.0,)),
        ("whole target, tuned", {"target_batches": "all"}, LR_FACTORS),
    )
}
"""What may hold `ours` back: noise of g, ill-posed weights, objective and trust, M's reference, the learning rate."""

METHODS: Mapping[str, Method] = {**CORE, **APPROXIMATE, **CAUSES}
