"""Presets: the paper's ablation rows and its rivals, each a configuration of the one problem (DESIGN, section 2).

`Selector(preset="greats")`; `ftw list` shows them, `ftw run --method` trains with them. A preset holds nothing but
values of the selector's arguments, which an argument given beside it overrides.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftw import registry
from ftw.errors import ConfigurationError

_PLAIN = ("geometry", "objective", "solver", "granularity", "ridge")


@dataclass(frozen=True)
class Preset:
    """Values for the arguments of `Selector` of the same names.

    Attributes:
        name: what the user types.
        summary: one line.
        source: where the method is from, and how far this is it.
        filter, solver: registered names. filter_options: what the filter is made with.
        bounded: False: the solver minimises over all weights.
        non_negative: True: over `w >= 0`, without a cap.
        needs: columns that `record(extras=...)` must bring.
    """

    name: str
    summary: str
    source: str = "the paper's ablation"
    geometry: str = "curvature"
    objective: str = "match"
    filter: str = "greedy"
    filter_options: Mapping[str, Any] = field(default_factory=dict)
    solver: str = "pgd"
    granularity: str = "sample"
    ridge: float = 1e-3
    bounded: bool = True
    non_negative: bool = False

    needs: tuple[str, ...] = ()

    @property
    def self_contained(self) -> bool:
        """Whether samples are the candidates, and nothing but their gradients is needed."""
        return self.granularity == "sample" and not self.needs

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `Selector`; components are made anew."""
        from ftw.solvers.constraints import Free, NonNegative

        constraints = NonNegative() if self.non_negative else None if self.bounded else Free()
        made: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        chosen = registry.resolve("filters", self.filter, **self.filter_options) if self.filter_options else self.filter
        return {**made, "filter": chosen, "constraints": constraints}


def _rival(name: str, summary: str, source: str, **values: Any) -> Preset:
    return Preset(name, summary, source, **{"solver": "uniform", **values})


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("ours", "filter then weight: greedy with refit, then bounded weights, in the optimizer's geometry"),
        Preset(
            "hard_filter", "the best k with positive alignment, equal weights", filter="threshold", solver="uniform"
        ),
        Preset("adam_topk", "top k by optimizer-aware alignment, equal weights", filter="topk", solver="uniform"),
        Preset(
            "vanilla_topk",
            "top k by raw gradient alignment, equal weights",
            geometry="vanilla",
            filter="topk",
            solver="uniform",
        ),
        Preset(
            "vanilla_reweight",
            "top k by raw gradient alignment, then bounded weights",
            geometry="vanilla",
            filter="topk",
        ),
        Preset("unbounded", "as ours, weights in closed form without bounds", solver="closed_form", bounded=False),
        Preset(
            "token_level",
            "tokens instead of samples: top k by alignment, equal weights",
            filter="topk",
            solver="uniform",
            granularity="token",
        ),
        Preset("random", "k candidates drawn at random", "baseline", filter="random", solver="uniform"),
        Preset("full", "every candidate of the pool with weight one", "baseline", filter="all", solver="uniform"),
        _rival(
            "greats",
            "greedy on raw alignment less interaction with the chosen",
            "Wang et al. 2024, GREATS",
            geometry="vanilla",
            filter="greats",
        ),
        _rival(
            "grad_match",
            "matching pursuit on raw gradients, non-negative weights",
            "Killamsetty et al. 2021, GRAD-MATCH; weights keep plain training's total",
            geometry="vanilla",
            filter="omp",
            solver="pgd",
            ridge=0.5,
            non_negative=True,
        ),
        _rival(
            "opus",
            "drawn by optimizer-aware utility less redundancy",
            "Wang et al. 2026, OPUS; units calibrated, no sketch",
            filter="opus",
        ),
        _rival(
            "less_online",
            "top k by cosine in the optimizer's geometry",
            "Xia et al. 2024, LESS, at every step; this step's second moment",
            filter="topk",
            filter_options={"by": "cosine"},
        ),
        _rival(
            "in_run_shapley",
            "top k by second-order Shapley value",
            "Wang et al. 2024, In-Run Data Shapley; Hessian of the target taken for P^-1",
            geometry="vanilla",
            filter="topk",
            filter_options={"by": "shapley"},
        ),
        _rival(
            "craig",
            "medoids that cover the pool's raw gradients; blind to the target",
            "Mirzasoleiman et al. 2020, CRAIG; equal weights instead of cluster sizes",
            geometry="vanilla",
            filter="facility_location",
        ),
        _rival(
            "tagcos",
            "clusters of contributions, each approximated by matching pursuit; blind to the target",
            "Zhang et al. 2024, TAGCOS, at every step; Ward's clusters, equal weights",
            filter="cluster",
            filter_options={"within": "omp", "towards": "centroid"},
        ),
        _rival("max_loss", "the k largest losses", "baseline", filter="max_loss", needs=("loss",)),
        _rival("grad_norm", "the k longest gradients", "baseline", geometry="vanilla", filter="grad_norm"),
        _rival(
            "rho_loss",
            "the k largest losses that a reference model can reduce",
            "Mindermann et al. 2022, RHO-LOSS",
            filter="rho_loss",
            needs=("loss", "reference_loss"),
        ),
        _rival(
            "ifd",
            "the k largest instruction-following difficulties",
            "Li et al. 2024, IFD",
            filter="ifd",
            needs=("loss_with_prompt", "loss_without_prompt"),
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigurationError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise ConfigurationError(f"unknown preset {name!r}{hint} available: {', '.join(PRESETS)}. See `ftw list`.")
    return PRESETS[name]
