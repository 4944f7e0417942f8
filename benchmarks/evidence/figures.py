"""Pictures of stored cells: loss against samples trained on, optimizer steps and time, for each target and setting."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .tables import Record, Runs, collect, title

SHOWN = ("ours", "ours_warm", "target_only", "mixture", "full", "greats", "adam_topk", "vanilla_topk", "random")
"""Drawn in colour with a band; the rest are thin grey lines."""

PANELS = (
    ("trained", "samples trained on"),
    ("step", "optimizer steps"),
    ("processor", "seconds of training (one thread, processor time)"),
)


def write(records: Iterable[Record], folder: Path) -> list[Path]:
    """One PNG per setting and target; returns the files."""
    groups, _ = collect(records)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (setting, target), runs in groups.items():
        name = re.sub(r"[^a-z0-9.]+", "-", f"{title(setting)} {target}".lower()).strip("-")
        paths.append(folder / f"{name}.png")
        draw(paths[-1], runs, f"{target}, {title(setting)}: loss on {_curve_samples(runs)} test samples")
    return paths


def draw(path: Path, runs: Runs, heading: str) -> None:
    """Mean over seeds; the band spans the seeds. Tuned methods: the trial that dev chose, without the others' cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), sharey=True, layout="constrained")
    colours = plt.get_cmap("tab10")
    for axis, (along, label) in zip(axes, PANELS, strict=True):
        for method, each in runs.items():
            marked = method in SHOWN
            style: dict[str, Any] = {"color": colours(SHOWN.index(method)) if marked else "0.8", "zorder": 1 + marked}
            x, low, mean, high = band([_line(record, along) for record in each.values()])
            axis.plot(x, mean, lw=1.6 if marked else 0.8, label=method if marked else None, **style)
            if marked and len(each) > 1:
                axis.fill_between(x, low, high, alpha=0.15, **style)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss per response token, nats")
    axes[1].set_title(heading, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


Line = tuple[list[float], list[float]]


def band(lines: Sequence[Line]) -> tuple[list[float], list[float], list[float], list[float]]:
    """(mean x, lowest, mean, highest) point by point, as far as the shortest of the lines goes.

    Seeds measure at the same steps, so that a point of one belongs to the same step as that of another.
    """
    points = min(len(x) for x, _ in lines)
    at = [[line[1][i] for line in lines] for i in range(points)]
    x = [statistics.fmean(line[0][i] for line in lines) for i in range(points)]
    return x, [min(v) for v in at], [statistics.fmean(v) for v in at], [max(v) for v in at]


def _line(record: Record, along: str) -> Line:
    curve = record["figures"]["curve"]
    x = record["clock"]["processor"] if along == "processor" else curve[along]
    return x, [math.nan if loss is None else loss for loss in curve["test"]]


def _curve_samples(runs: Runs) -> int:
    first = next(iter(next(iter(runs.values())).values()))
    return int(first["configuration"]["setting"]["curve_samples"])
