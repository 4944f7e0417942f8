"""Which cells there are: the core (every method, four targets), axes varied one at a time, and a quick grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import methods
from .settings import CORE_TARGETS, Cell, Setting, varied

CORE = Setting()
HANDFUL = ("ours", "vanilla_reweight", "greats", "random", "full", "target_only")
AXIS_TARGETS = ("svamp", "gsm8k_absent")

AXES: tuple[tuple[Setting, tuple[str, ...]], ...] = (
    (varied(CORE, corrupted=0.3), AXIS_TARGETS),
    (varied(CORE, tuning="lora", lr=1e-2), AXIS_TARGETS),
    (varied(CORE, optimizer="sgd", lr=1e-1), AXIS_TARGETS),
    (varied(CORE, target_samples=8), AXIS_TARGETS),
    (varied(CORE, target_samples=128), ("gsm8k_absent",)),  # svamp has 67 dev samples in all
    (varied(CORE, budget=8), AXIS_TARGETS),
    (varied(CORE, budget=1), AXIS_TARGETS),
    *((varied(CORE, lr=CORE.lr * factor), CORE_TARGETS) for factor in methods.LR_FACTORS if factor != 1.0),
    (CORE, ("scan", "mmlu")),
)
"""One thing changed at a time, for a handful of methods."""

QUICK = varied(
    CORE,
    steps=20,
    eval_every=10,
    test_samples=32,
    curve_samples=16,
    dev_samples=16,
    decode_samples=8,
    pretrain_steps=20,
)

GRIDS = ("core", "axes", "approximate", "causes", "quick")


def grid(name: str, seeds: Sequence[int]) -> list[Cell]:
    """The cells of a grid, seed by seed, so that a part of it is whole tables of fewer seeds."""
    return list(dict.fromkeys(_cells(name, seeds)))


def _cells(name: str, seeds: Sequence[int]) -> Iterator[Cell]:
    for seed in seeds:
        if name == "core":
            yield from (Cell(method, target, seed, CORE) for target in CORE_TARGETS for method in methods.CORE)
        elif name == "approximate":
            yield from (Cell(method, "svamp", seed, CORE) for method in ("ours", *methods.APPROXIMATE))
        elif name == "causes":
            names = ("ours", "target_only", *methods.CAUSES)
            yield from (Cell(method, target, seed, CORE) for target in AXIS_TARGETS for method in names)
        elif name == "quick":
            yield from (Cell(method, "svamp", seed, QUICK) for method in methods.CORE)
        else:
            for setting, targets in AXES:
                for method in HANDFUL:
                    # A tuned method has tried these learning rates in the core.
                    only_rate = setting != CORE and varied(setting, lr=CORE.lr) == CORE
                    if not (only_rate and methods.METHODS[method].tuned):
                        yield from (Cell(method, target, seed, setting) for target in targets)
