"""`ftw report`: one page of HTML from the decision logs of a run, with nothing fetched from elsewhere.

Whatever comes out of a log (names, sources, texts) is escaped; the page itself forbids scripts and foreign content.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ftw.errors import ConfigurationError
from ftw.watching import figures
from ftw.watching.digest import Digest, Name, Sample
from ftw.watching.summary import (
    NO_SOURCE,
    USEFULNESS,
    agreement,
    extremes,
    facts,
    faults,
    median_ratio,
    number,
    shares,
)

SAMPLES = 10
"""Of the most, and of the least useful."""


def default_path(run: Path) -> Path:
    """Where the page of a run goes if nothing is said."""
    return run / "report.html" if run.is_dir() else run.with_suffix(".html")


def write_page(digest: Digest, path: Path) -> None:
    """Write the page.

    Raises:
        ConfigurationError: the file cannot be written, or is one of the logs.
        MissingDependencyError: matplotlib is not installed.
    """
    if any(path.resolve() == log.resolve() for log in digest.paths):
        raise ConfigurationError(f"--out is {path}, which is the log itself; the page needs a file of its own.")
    written = page(digest).encode()
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(written)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ConfigurationError(
            f"cannot write the page to {path}: {error.strerror}; a file is needed; choose another with --out."
        ) from error


def page(digest: Digest) -> str:
    """The page as HTML."""
    template = Template(resources.files("ftw.watching").joinpath("page.html").read_text(encoding="utf-8"))
    about = ", ".join(f"{name} {value}" for name, value in digest.about.items())
    sections = [_sources(digest), _sizes(digest), _drops(digest), _samples(digest), _faults(digest)]
    return template.substitute(
        title=_text(f"Decisions of {digest.paths[0].parent.name or digest.paths[0]}"),
        where=_text(f"{', '.join(map(str, digest.paths))}{': ' if about else ''}{about}"),
        facts="\n".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts(digest)),
        notes=_notes(digest.notes),
        sections="\n".join(each for each in sections if each),
    )


def _sources(digest: Digest) -> str:
    found = shares(digest)
    if not found:
        return _section("Weight by source", "The log names no sources: give samples a column <code>source</code>.")
    colour = {name: colour for colour, names in figures.grouped(digest) for name in names}
    shown, rest = found[: len(figures.PALETTE)], found[len(figures.PALETTE) :]
    rows = [_share_row(_name(name), colour[name], pool, weight) for name, pool, weight in shown]
    if rest:
        pool, weight = sum(each[1] for each in rest), sum(each[2] for each in rest)
        rows.append(_share_row(f"{len(rest)} further sources", figures.REST, pool, weight))
    spoken = "; ".join(
        f"{_name(name)} {weight:.0%} of the weight for {pool:.0%} of the pool" for name, pool, weight in shown
    )
    alt = f"Share of the weight by source over the steps, stacked. Over all steps: {spoken}."
    drawn = _figure(
        figures.weight_over_time(digest, alt),
        "Share of the weight over the steps, in the order of the table from below.",
    )
    table = _table(["source", "share of the pool", "share of the weight", "ratio"], rows)
    return _section(
        "Weight by source",
        "How the weight of each step was shared out among the sources, beside what each brings to the pool. A "
        "candidate counts with its share of the loss, which is its number of label tokens where the loss is a mean "
        "over tokens.",
        f'<div class="pair">\n{drawn}\n{table}\n</div>',
    )


def _share_row(name: str, colour: str, pool: float, weight: float) -> str:
    bar = '<span class="bar"><span style="width:{:.1f}%;background:{}"></span></span>'
    cells = [f"{share:.1%}{bar.format(100 * share, colour)}" for share in (pool, weight)]
    swatch = f'<span class="swatch" style="background:{colour}"></span>'
    return _row(swatch + _text(name), *cells, number(weight / pool) if pool else "-")


def _sizes(digest: Digest) -> str:
    sizes = digest.overall.sizes
    if not sizes.count:
        return ""
    alt = (
        f"Effective sample size over the steps: {number(sizes.mean)} at the mean, {number(sizes.smallest)} to "
        f"{number(sizes.largest)}; {number(digest.overall.chosen / digest.overall.steps)} samples chosen at the mean."
    )
    return _section(
        "Effective sample size",
        "With how many samples of equal weight a step would have the same spread of weights, (Σw)²/Σw²: the number "
        "chosen where the weights are even, 1 where a single sample has it all.",
        _figure(
            figures.effective_size(digest, alt),
            "Blue: mean, and range in each interval of steps. Dashed: how many were chosen.",
        ),
    )


def _drops(digest: Digest) -> str:
    drops = digest.overall.drops
    if not drops.count:
        return ""
    alt = (
        f"Predicted drop of the target loss over the steps: {number(drops.mean)} nats a step at the mean, "
        f"{number(drops.smallest)} to {number(drops.largest)}"
    )
    if not digest.watched:
        return _section(
            "Predicted drop",
            "No step was watched, so that nothing is known of what the steps really did: <code>watch=10</code> "
            "compares every tenth.",
            _figure(
                figures.drop_over_time(digest, f"{alt}."),
                "Predicted drop of the target loss in a step, mean of each interval.",
            )
            + _targets(digest),
        )
    ratio, same = number(median_ratio(digest)), f"{agreement(digest):.0%}"
    thinned = f" (the figures have every {digest.thinned}th)" if digest.thinned > 1 else ""
    over_time = _figure(
        figures.drop_over_time(digest, f"{alt}; the realised drop of {digest.watched_steps} steps as points."),
        "Blue: predicted drop before any clipping, mean of each interval. Points: realised drop of a watched step.",
    )
    against = _figure(
        figures.predicted_against_realised(
            digest,
            f"Realised against predicted drop of {digest.watched_steps} watched steps: a median ratio of {ratio}, and "
            f"the same sign in {same}.",
        ),
        "A point for each watched step, predicted for the gradient as it was clipped. On the line both are the same.",
    )
    return _section(
        "Predicted against realised drop",
        "What a step was predicted to take off the loss of the target batch, and what it really took off that same "
        f"batch, in nats: {digest.watched_steps} watched steps{thinned}. At the median the realised drop is {ratio} "
        f"times the predicted; both have the same sign in {same} of the steps. Where few values are far larger than "
        "the others, axes are linear around 0 and logarithmic beyond.",
        f'<div class="pair">\n{over_time}\n{against}\n</div>{_targets(digest)}',
    )


def _targets(digest: Digest) -> str:
    rows = [
        _row(_text(name), number(drops.mean), number(drops.smallest), number(drops.largest))
        for name, drops in digest.targets.items()
    ]
    return "\n" + _table(["target", "predicted drop, mean (nats)", "smallest", "largest"], rows) if rows else ""


def _samples(digest: Digest) -> str:
    most, least = extremes(digest, SAMPLES)
    title = "Most and least useful samples"
    if not most:
        return _section(title, "The log names no samples: give them a column <code>id</code> or <code>text</code>.")
    told = "" if digest.named else " The log has no ids: samples are told apart by the beginning of their text."
    lists = "\n".join(
        f'<div><h3>{heading}</h3>\n<ol class="samples">\n{chr(10).join(map(_sample, some))}\n</ol></div>'
        for heading, some in (("Most useful", most), ("Least useful", least))
    )
    return _section(title, USEFULNESS + told, f'<div class="pair">\n{lists}\n</div>')


def _sample(sample: Sample) -> str:
    named = "" if sample.name is None else f"<bdi>{_text(sample.name)}</bdi> "
    source = "" if sample.source is None else f"from <bdi>{_text(sample.source)}</bdi> "
    text = "" if sample.text is None else f'<div class="text" dir="auto">{_text(sample.text, lines=True)}</div>'
    steps = f"{sample.offered} step{'s' if sample.offered > 1 else ''}"
    return (
        f'<li><strong>{sample.usefulness:+.2f}</strong> {named}<span class="soft">{source}</span>{text}'
        f'<span class="soft">chosen in {sample.chosen} of {steps}, mean weight '
        f"{sample.weight / sample.offered:.2f}</span></li>"
    )


def _faults(digest: Digest) -> str:
    rows = [_row(_text(what), str(count), _text(meaning)) for what, count, meaning in faults(digest)]
    return _section("Faults and fallbacks", "", f'<div class="said">{_table(["what", "count", "meaning"], rows)}</div>')


def _section(title: str, said: str, shown: str = "") -> str:
    paragraph = f"<p>{said}</p>\n" if said else ""
    return f"<section>\n<h2>{title}</h2>\n{paragraph}{shown}\n</section>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _table(headings: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _notes(notes: Sequence[str]) -> str:
    listed = "\n".join(f"<li>{_text(note)}</li>" for note in notes)
    return f'<ul class="notes">\n{listed}\n</ul>' if notes else ""


def _name(source: Name) -> str:
    return NO_SOURCE if source is None else _harmless(source)


def _text(value: object, *, lines: bool = False) -> str:
    parts = str(value).splitlines() if lines else [str(value)]
    return escape("\n".join(map(_harmless, parts)), quote=True)


def _harmless(value: object) -> str:
    """Without control characters, and the lone surrogates that JSON can hold and UTF-8 cannot."""
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in str(value))
