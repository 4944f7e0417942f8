"""Tables and the picture of the study of long contexts. Called by the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .context import MEASURES, REPRESENTATIONS
from .tables import interval, shown, table


def report(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: one table per measure, representations by context lengths, and the cost."""
    by_length = _by_length(records)
    lengths = list(by_length)
    parts = ["# Context length: approximate representations against the exact one", "", _LEGEND]
    headings = {
        "alignment": "Relative error of b",
        "gram": "Relative error of K (Frobenius)",
        "jaccard": "Overlap of the chosen sets (Jaccard)",
        "weights": "Relative change of the weights",
        "match": "Cosine of the weighted gradient with the target's, as a share of that of the exact decision",
    }
    for name in MEASURES:
        lines = [
            [each, *(shown(_over(by_length[length], each, name)) for length in lengths)] for each in REPRESENTATIONS
        ]
        parts += ["", f"## {headings[name]}", "", *table(["representation", *map(str, lengths)], lines)]
    lines = [
        [
            each,
            *(
                shown(interval([r["clock"][each] / r["clock"]["forward and backward"] for r in by_length[t]]), 3)
                for t in lengths
            ),
        ]
        for each in ("exact", *REPRESENTATIONS)
    ]
    parts += ["", "## Processor time of reading b and K, as a share of the pool's forward and backward", ""]
    parts += table(["representation", *map(str, lengths)], lines)
    lines = [
        [each, *(f"{by_length[length][0]['figures'][each]['numbers'] / 1e6:.2f}" for length in lengths)]
        for each in ("exact", *REPRESENTATIONS)
    ]
    parts += ["", "## Numbers read, in millions", "", *table(["representation", *map(str, lengths)], lines)]
    return "\n".join(parts) + "\n"


_LEGEND = """\
Mean over pools ± half of the 95 % interval. One AdamW step of a small Llama; a pool of long rows, each of one source's
text. `exact`: factors, written out row block by row block. `projection m`: sketches of m numbers for each parameter.
`row x column`: second moment of every matrix by its row and column means. `blocks s`: s consecutive tokens as one
product of sums; `blocks all`: the whole row. What each reads is in benchmarks/evidence/representations.py."""


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Errors of b and K, and what the decision is worth, against the context length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_length = _by_length(records)
    lengths = list(by_length)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    colours = plt.get_cmap("tab10")
    for axis, name, heading in zip(
        axes,
        ("alignment", "gram", "match"),
        (
            "relative error of b",
            "relative error of K",
            "cosine with the target gradient, to the exact's",
        ),
        strict=True,
    ):
        for number, each in enumerate(REPRESENTATIONS):
            means = [_over(by_length[length], each, name)[0] for length in lengths]
            axis.plot(lengths, means, marker="o", ms=3, lw=1.2, color=colours(number), label=each)
        axis.set(xscale="log", xlabel="context length, tokens", title=heading)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].set(yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _by_length(records: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda each: each["configuration"]["study"]["length"]):
        found.setdefault(record["configuration"]["study"]["length"], []).append(record)
    return found


def _over(records: Sequence[dict[str, Any]], form: str, measure_: str) -> tuple[float, float]:
    """Mean and half of the interval over the records that have a figure."""
    found = [record["figures"][form][measure_] for record in records]
    return interval([each for each in found if each is not None])
