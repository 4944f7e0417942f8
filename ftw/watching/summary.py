"""A digest in words and numbers, for a page and for a terminal. Called by `ftw.watching.report`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from ftw.problem import Status
from ftw.watching.digest import Digest, Name, Sample

NO_SOURCE = "(no source)"

USEFULNESS = (
    "A sample's usefulness in a step is its alignment there: how far one unit of its weight is predicted to lower the "
    "target's loss, to first order. As its scale changes from step to step, it is given as a multiple of the mean size "
    "of all alignments in that step, and averaged over the steps that the sample was on offer in. 1 is as much as "
    "candidates have at the mean, 0 nothing; below 0 the sample was predicted to raise the target's loss. "
    "A mean of one or two steps says little."
)


def facts(digest: Digest) -> list[tuple[str, str]]:
    """What the run amounts to: (name, value)."""
    made, overall = digest.decisions[True], digest.overall
    found = [
        ("steps", f"{made}" if made == digest.last else f"{made}, {digest.first} to {digest.last}"),
        ("candidates a step", number(digest.candidates / made if made else math.nan)),
        ("chosen a step", number(overall.chosen / made if made else math.nan)),
        ("effective sample size, mean", number(overall.sizes.mean)),
        ("predicted drop a step, mean", f"{number(overall.drops.mean)} nats"),
    ]
    if digest.watched:
        found.append(("realised / predicted drop, median", number(median_ratio(digest))))
    if digest.kkt_residual.count:
        found.append(("KKT residual, largest", number(digest.kkt_residual.largest)))
    if digest.samples:
        found.append(("different samples on offer", f"{len(digest.samples)}"))
    return found


def faults(digest: Digest) -> list[tuple[str, int, str]]:
    """What went otherwise than it should, and how often: (what, steps or candidates, what it means)."""
    found = [
        (f"status {name}", count, Status(name).sentence if name in set(Status) else "Not known to this release.")
        for name, count in digest.statuses.most_common()
    ]
    found.append(
        (
            "steps that were not made",
            digest.decisions[False],
            "A GradScaler skipped the step, or the loop never called for it. Nothing but its status is counted.",
        )
    )
    found.append(
        (
            "candidates quarantined",
            digest.quarantined,
            "Their contributions had NaN or infinite values, and they were left out of their step.",
        )
    )
    found += [
        (
            f"steps in {name or 'no'} geometry",
            count,
            "Vanilla is also what a warm-up is made in, and the fall-back while the optimizer has no history."
            if name == "vanilla"
            else "",
        )
        for name, count in digest.geometries.most_common()
    ]
    return found


def median_ratio(digest: Digest) -> float:
    """Of realised to predicted drop over the watched steps; NaN where nothing was predicted."""
    ratios = [realised / predicted for _, predicted, realised in digest.watched if predicted]
    return statistics.median(ratios) if ratios else math.nan


def agreement(digest: Digest) -> float:
    """Share of the watched steps in which predicted and realised drop have the same sign."""
    same = [(predicted > 0) == (realised > 0) for _, predicted, realised in digest.watched]
    return sum(same) / len(same)


def shares(digest: Digest) -> list[tuple[Name, float, float]]:
    """(source, share of the pool, share of the weight), the largest share of the pool first."""
    overall = digest.overall
    pool, weight = sum(overall.mass.values()), sum(overall.weight.values())
    return [
        (name, _share(overall.mass.get(name, 0.0), pool), _share(overall.weight.get(name, 0.0), weight))
        for name in digest.sources
    ]


def extremes(digest: Digest, count: int) -> tuple[list[Sample], list[Sample]]:
    """The `count` most and the `count` least useful samples, the extreme ones first; none is in both."""
    ranked = digest.ranked()
    half = len(ranked) // 2
    return ranked[: min(count, len(ranked) - half)], ranked[::-1][: min(count, half)]


def terminal(digest: Digest, *, samples: int = 3, width: int = 100) -> str:
    """A summary in lines of plain text.

    Args:
        samples: how many of the most and of the least useful are shown.
        width: of a line, about.
    """
    lines = [f"{', '.join(map(str, digest.paths))}", ""]
    lines += _columns([(name, value) for name, value in facts(digest)])
    found = shares(digest)
    if found:
        lines += ["", "Share of the pool and of the weight, by source"]
        shown = [(clean(NO_SOURCE if name is None else name)[:40], pool, weight) for name, pool, weight in found[:12]]
        lines += _columns(
            [(name, f"{pool:6.1%} {weight:6.1%}", "#" * round(30 * weight)) for name, pool, weight in shown]
        )
        if len(found) > 12:
            lines.append(f"  and {len(found) - 12} more")
    ranked = digest.ranked()
    if ranked:
        for title, some in (
            ("Most useful samples", ranked[:samples]),
            ("Least useful samples", ranked[::-1][:samples]),
        ):
            lines += ["", title]
            lines += [_line(sample, width) for sample in some]
    lines += ["", "Faults and fallbacks"]
    lines += _columns([(what, f"{count}") for what, count, _ in faults(digest)])
    lines += [f"note: {note}" for note in digest.notes]
    return "\n".join(map(clean, lines))


def clean(text: object) -> str:
    """Text in one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def number(value: float) -> str:
    """Three figures of it; of none, a dash."""
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _share(part: float, whole: float) -> float:
    return part / whole if 0 < whole < math.inf else 0.0


def _line(sample: Sample, width: int) -> str:
    named = "" if sample.name is None else f"{clean(sample.name)[:24]}  "
    source = "" if sample.source is None else f"[{clean(sample.source)[:24]}] "
    head = f"  {sample.usefulness:+.2f}  {sample.chosen}/{sample.offered} chosen  {named}{source}"
    text = clean(sample.text or "")
    room = max(width - len(head), 20)
    return head + (text if len(text) <= room else text[: room - 3] + "...")


def _columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip() for row in rows]
