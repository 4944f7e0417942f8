"""Which cells there are: the core (every method, four targets), axes varied one at a time, and a quick grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from . import methods
from .settings import CORE_TARGETS, Cell, Setting, varied

CORE = Setting()
HANDFUL = ("ours", "vanilla_reweight", "greats", "random", "full", "target_only")
RATED = ("ours", "greats", "full")
AXIS_TARGET = "svamp"
OTHER_TARGETS = tuple(target for target in CORE_TARGETS if target != AXIS_TARGET)

AXES: tuple[tuple[Setting, tuple[str, ...], tuple[str, ...]], ...] = (
    (varied(CORE, corrupted=0.3), (AXIS_TARGET,), HANDFUL),
    (varied(CORE, tuning="lora", lr=1e-2), (AXIS_TARGET,), HANDFUL),
    (varied(CORE, optimizer="sgd", lr=1e-1), (AXIS_TARGET,), HANDFUL),
    (varied(CORE, target_samples=8), (AXIS_TARGET,), HANDFUL),
    (varied(CORE, target_samples=128), ("gsm8k_absent",), HANDFUL),  # svamp has 67 dev samples in all
    (varied(CORE, budget=8), (AXIS_TARGET,), HANDFUL),
    (varied(CORE, budget=1), (AXIS_TARGET,), HANDFUL),
    # More candidates a step: is it the pool that lacks samples?
    (varied(CORE, pool_size=64), (AXIS_TARGET,), HANDFUL),
    (varied(CORE, pool_size=64), OTHER_TARGETS, ("ours", "target_only")),
    (varied(CORE, steps=4 * CORE.steps), (AXIS_TARGET,), ("ours", "target_only")),  # as many samples as those 64 see
    (varied(CORE, width=256, layers=4, heads=4), (AXIS_TARGET,), HANDFUL),  # ten times the parameters
    # Tuned methods have tried these rates in the core.
    *((varied(CORE, lr=CORE.lr * factor), (AXIS_TARGET,), RATED) for factor in methods.LR_FACTORS if factor != 1.0),
    (CORE, ("scan", "mmlu"), HANDFUL),
)
"""One thing changed at a time: the setting, its targets, the methods compared."""

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
            yield from (Cell(method, AXIS_TARGET, seed, CORE) for method in ("ours", "target_only", *methods.CAUSES))
        elif name == "quick":
            yield from (Cell(method, "svamp", seed, QUICK) for method in methods.CORE)
        else:
            for setting, targets, names in AXES:
                yield from (
                    Cell(method, target, seed, settled(method, setting)) for target in targets for method in names
                )


def settled(method: str, setting: Setting) -> Setting:
    """The setting with what the method takes no notice of as in the core."""
    return replace(setting, **{name: getattr(CORE, name) for name in methods.METHODS[method].ignored})
