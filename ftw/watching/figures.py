"""The figures of a report, as SVG to stand in an HTML page: they take the page's colour of text and its width.

Called by `ftw.watching.report`. No name or text of the run's stands in a figure; the page names the colours.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ftw.errors import MissingDependencyError
from ftw.watching.digest import Digest, Name

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe & Ito's, told apart by the colour-blind and on light and dark ground; without black and yellow."""

REST = "#8C8C8C"
"""Of the sources that are left."""

_INK = "#010203"  # becomes the page's own


def grouped(digest: Digest) -> list[tuple[str, list[Name]]]:
    """The sources that have a colour of their own, and the rest of them together in the last."""
    sources = digest.sources
    own = len(sources) if len(sources) <= len(PALETTE) else len(PALETTE)
    groups = [(colour, [name]) for colour, name in zip(PALETTE, sources[:own], strict=False)]
    return [*groups, (REST, sources[own:])] if sources[own:] else groups


def weight_over_time(digest: Digest, alt: str) -> str:
    """Shares of the weight by source, stacked."""
    figure, axes = _axes()
    edges, shares = [], []
    for first, last, interval in _intervals(digest):
        total = sum(interval.weight.values())
        if 0 < total < math.inf:
            edges.append((first - 0.5, last + 0.5))
            shares.append([sum(interval.weight[name] for name in names) / total for _, names in grouped(digest)])
    floor = [0.0] * len(edges)
    for number, (colour, _) in enumerate(grouped(digest)):
        top = [low + share[number] for low, share in zip(floor, shares, strict=True)]
        x, low, high = _stairs(edges, floor, top)
        axes.fill_between(x, low, high, color=colour, linewidth=0)
        floor = top
    axes.set(ylim=(0, 1), xlabel="step", ylabel="share of the weight")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _svg(figure, "weight", alt)


def effective_size(digest: Digest, alt: str) -> str:
    """Effective sample size, its range, and how many samples were chosen."""
    figure, axes = _axes()
    found = [(first, last, each) for first, last, each in _intervals(digest)]
    edges = [(first - 0.5, last + 0.5) for first, last, each in found if each.sizes.count]
    sizes = [each.sizes for _, _, each in found if each.sizes.count]
    x, low, high = _stairs(edges, [each.smallest for each in sizes], [each.largest for each in sizes])
    axes.fill_between(x, low, high, color=PALETTE[0], alpha=0.25, linewidth=0)
    axes.plot(*_stairs(edges, [each.mean for each in sizes])[:2], color=PALETTE[0], linewidth=2)
    edges = [(first - 0.5, last + 0.5) for first, last, _ in found]
    axes.plot(
        *_stairs(edges, [each.chosen / each.steps for _, _, each in found])[:2],
        color=PALETTE[5],
        linewidth=1.5,
        linestyle="--",
    )
    axes.set(xlabel="step", ylabel="samples")
    axes.set_ylim(bottom=0)
    return _svg(figure, "size", alt)


def drop_over_time(digest: Digest, alt: str) -> str:
    """Predicted drop of every step, and the realised of those that were watched."""
    figure, axes = _axes()
    found = [(first, last, each.drops) for first, last, each in _intervals(digest) if each.drops.count]
    edges = [(first - 0.5, last + 0.5) for first, last, _ in found]
    means = [drops.mean for _, _, drops in found]
    realised = [drop for _, _, drop in digest.watched]
    axes.axhline(0, color=_INK, linewidth=0.8, alpha=0.5)
    axes.plot(
        [step for step, _, _ in digest.watched],
        realised,
        linestyle="",
        marker="o",
        markersize=3,
        color=PALETTE[5],
        alpha=0.8,
    )
    axes.plot(*_stairs(edges, means)[:2], color=PALETTE[0], linewidth=2)
    _spread(axes, "y", [*means, *realised])
    axes.set(xlabel="step", ylabel="drop of the target loss, nats")
    return _svg(figure, "drop", alt)


def predicted_against_realised(digest: Digest, alt: str) -> str:
    """A point for each watched step, and the line on which both are the same."""
    figure, axes = _axes()
    predicted, realised = ([each[i] for each in digest.watched] for i in (1, 2))
    ends = [min(*predicted, *realised), max(*predicted, *realised)]
    _spread(axes, "xy", [*predicted, *realised])
    axes.plot(ends, ends, color=_INK, linewidth=1, alpha=0.6)
    axes.plot(predicted, realised, linestyle="", marker="o", markersize=4, color=PALETTE[0], alpha=0.8)
    axes.set(xlabel="predicted drop, nats", ylabel="realised drop, nats")
    return _svg(figure, "fidelity", alt)


def _spread(axes: Any, names: str, values: Sequence[float]) -> None:
    """Where few values are far larger than the others, let the axes be logarithmic beyond these, on both sides of 0."""
    sizes = sorted(abs(value) for value in values if value and math.isfinite(value))
    middle, largest = (sizes[len(sizes) // 2], sizes[-1]) if sizes else (0.0, 0.0)
    if largest <= 10 * middle:
        return
    from matplotlib.ticker import FixedLocator

    threshold = 10.0 ** math.ceil(math.log10(middle))
    exponents = range(round(math.log10(threshold)), math.ceil(math.log10(largest)) + 1)
    powers = [10.0**e for e in exponents if (e - exponents[0]) % (1 + len(exponents) // 4) == 0]
    for name in names:
        getattr(axes, f"set_{name}scale")("symlog", linthresh=threshold)
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(FixedLocator([*(-power for power in reversed(powers)), 0.0, *powers]))
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _intervals(digest: Digest) -> Iterable[tuple[int, int, Any]]:
    """First and last step of each interval, and what is known of it."""
    for number, interval in sorted(digest.intervals.items()):
        yield number * digest.width + 1, min((number + 1) * digest.width, digest.last), interval


def _stairs(
    edges: Sequence[tuple[float, float]], *levels: Sequence[float]
) -> tuple[list[float], ...]:  # x, then each level at it
    """What is constant between two edges, with a gap where intervals are missing."""
    x: list[float] = []
    found: list[list[float]] = [[] for _ in levels]
    for number, (left, right) in enumerate(edges):
        if number and left > x[-1]:
            x.append(left)
            for values in found:
                values.append(math.nan)
        x += [left, right]
        for values, level in zip(found, levels, strict=True):
            values += [level[number]] * 2
    return x, *found


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the package {error.name!r} is not installed; the page of `ftw report` has figures by matplotlib; run "
            "pip install 'filter-then-weight[plot]', or give --terminal."
        ) from error
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=10)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.ticklabel_format(useOffset=False)
    axes.yaxis.get_offset_text().set_color(_INK)
    axes.xaxis.get_offset_text().set_color(_INK)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, name: str, alt: str) -> str:
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several figures share the page's names.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(alt, quote=True)}">{rest}'
