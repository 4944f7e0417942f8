"""What the decision logs of a run add up to, in memory that does not grow with the number of its steps.

Called by `ftw.watching.report`, which shows it. Only what is known of single samples is kept for each of them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftw.errors import DataError
from ftw.watching.entries import BEGIN, Entry, Header, read_header, read_log
from ftw.watching.log import NAME

MOST = 50
"""Intervals of steps that figures over time are made of, at most."""

WATCHED = 500
"""Watched steps that are kept one by one, at most."""

Name = str | int | None


@dataclass
class Interval:
    """Sums over some steps.

    Attributes:
        steps, chosen: how many of both.
        sizes, drops: (sum, number, smallest, largest) of the effective sample size and the predicted drop.
        weight, mass: by source; a candidate's weight counts with its mass, as it does in the gradient.
    """

    steps: int = 0
    chosen: int = 0
    sizes: Range = field(default_factory=lambda: Range())
    drops: Range = field(default_factory=lambda: Range())
    weight: dict[Name, float] = field(default_factory=lambda: defaultdict(float))
    mass: dict[Name, float] = field(default_factory=lambda: defaultdict(float))

    def merge(self, other: Interval) -> None:
        """Take in another's sums."""
        self.steps += other.steps
        self.chosen += other.chosen
        self.sizes.merge(other.sizes)
        self.drops.merge(other.drops)
        for mine, theirs in ((self.weight, other.weight), (self.mass, other.mass)):
            for name, value in theirs.items():
                mine[name] += value


@dataclass
class Range:
    """Mean, smallest and largest of some numbers; None is none."""

    total: float = 0.0
    count: int = 0
    smallest: float = math.inf
    largest: float = -math.inf

    @property
    def mean(self) -> float:
        """NaN of no numbers."""
        return self.total / self.count if self.count else math.nan

    def add(self, value: float | None) -> None:
        """One more."""
        if value is not None:
            self.merge(Range(value, 1, value, value))

    def merge(self, other: Range) -> None:
        """Those of another."""
        self.total += other.total
        self.count += other.count
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)


@dataclass
class Sample:
    """One sample over all steps that it was on offer in.

    Attributes:
        name: its id; None where samples are told apart by their text.
        offered, chosen: number of steps.
        usefulness: mean over the steps of its alignment, as a multiple of the mean absolute alignment of that step's
            candidates: their scale changes from step to step, with the learning rate and the optimizer's state. Above
            0 it was predicted to lower the target's loss, below 0 to raise it.
        weight: of each of these steps, summed.
    """

    name: Name
    source: Name = None
    text: str | None = None
    offered: int = 0
    chosen: int = 0
    usefulness: float = 0.0
    weight: float = 0.0


@dataclass
class Digest:
    """A run.

    Attributes:
        paths, about, every: of its logs.
        notes: what a reader of the figures must know.
        decisions: steps in the logs, by whether the optimizer made them.
        first, last: numbers of steps.
        candidates, chosen, quarantined: over all steps that were made.
        without_candidates: steps that were made, and whose candidates are not in the log.
        statuses, geometries: steps that were made or not, steps that were made.
        overall: of all steps that were made.
        width: steps of an interval.
        intervals: by number; interval i holds the steps `i * width + 1` to `(i + 1) * width`.
        watched: (step, predicted drop, realised drop), every `thinned`-th of them.
        watched_steps: how many there are.
        targets: predicted drop by the name of the target, where there are several.
        samples: by what tells them apart.
        named: whether that is their id.
    """

    paths: Sequence[Path]
    about: dict[str, str]
    every: int
    notes: list[str] = field(default_factory=list)
    decisions: Counter[bool] = field(default_factory=Counter)
    first: int = 0
    last: int = 0
    candidates: int = 0
    quarantined: int = 0
    without_candidates: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    geometries: Counter[str] = field(default_factory=Counter)
    overall: Interval = field(default_factory=Interval)
    kkt_residual: Range = field(default_factory=Range)
    width: int = 1
    intervals: dict[int, Interval] = field(default_factory=dict)
    watched: list[tuple[int, float, float]] = field(default_factory=list)
    watched_steps: int = 0
    thinned: int = 1
    targets: dict[str, Range] = field(default_factory=dict)
    samples: dict[tuple[str, Name], Sample] = field(default_factory=dict)
    named: bool = False

    @property
    def sources(self) -> list[Name]:
        """By their share of the pool, the largest first; empty where no sample has one."""
        found = sorted(self.overall.mass, key=lambda name: -self.overall.mass[name])
        return found if any(name is not None for name in found) else []

    def ranked(self) -> list[Sample]:
        """The samples, the most useful first."""
        return sorted(self.samples.values(), key=lambda sample: -sample.usefulness)

    def add(self, entry: Entry) -> None:
        """One more step."""
        self.decisions[entry.stepped] += 1
        self.statuses[entry.status] += 1
        self.first = min(self.first or entry.step, entry.step)
        self.last = max(self.last, entry.step)
        if not entry.stepped:
            return
        self.geometries[entry.geometry] += 1
        self.candidates += entry.candidates
        self.quarantined += entry.quarantined
        self.kkt_residual.add(entry.kkt_residual)
        for name, drop in (entry.predicted_drops or {}).items():
            self.targets.setdefault(name, Range()).add(drop)
        self._watch(entry)
        made = Interval(steps=1, chosen=entry.chosen)
        made.sizes.add(entry.effective_sample_size)
        made.drops.add(entry.predicted_drop)
        if entry.columns:
            self._list(entry, made)
        else:
            self.without_candidates += 1
        self.overall.merge(made)
        self.intervals.setdefault((entry.step - 1) // self.width, Interval()).merge(made)
        if len(self.intervals) > MOST:
            self.width *= 2
            finer, self.intervals = self.intervals, {}
            for number, interval in finer.items():
                self.intervals.setdefault(number // 2, Interval()).merge(interval)

    def _watch(self, entry: Entry) -> None:
        found = entry.fidelity or {}
        predicted, realised = found.get("predicted_drop"), found.get("realised_drop")
        if predicted is None or realised is None:
            return
        if self.watched_steps % self.thinned == 0:
            self.watched.append((entry.step, predicted, realised))
        self.watched_steps += 1
        if len(self.watched) > WATCHED:
            self.watched, self.thinned = self.watched[::2], self.thinned * 2

    def _list(self, entry: Entry, made: Interval) -> None:
        nothing = [None] * entry.candidates
        columns = [entry.columns.get(name, nothing) for name in ("id", "source", "text")]
        numbers = [entry.columns[name] for name in ("alignment", "mass", "weight")]
        known = [abs(value) for value in numbers[0] if value is not None]
        scale = sum(known) / len(known) if known else 0.0
        for name, source, text, alignment, mass, weight in zip(*columns, *numbers, strict=True):
            if mass is not None:
                made.mass[source] += mass
                made.weight[source] += mass * (weight or 0.0)
            self.named = self.named or name is not None
            if alignment is None or (name is None and text is None):
                continue
            key = ("text", text) if name is None else ("id", name)
            sample = self.samples.setdefault(key, Sample(name))
            sample.offered += 1
            sample.chosen += bool(weight)
            sample.weight += weight or 0.0
            relative = alignment / scale if scale else 0.0
            sample.usefulness += (relative - sample.usefulness) / sample.offered
            sample.source = source if sample.source is None else sample.source
            sample.text = text if sample.text is None else sample.text


def digest(run: Path) -> Digest:
    """Read the logs of a run.

    Args:
        run: a log, or a folder with the logs of one run in it (one for each process, say) or in its folders.

    Raises:
        DataError: there is no log, none holds a step, one is malformed, or they are of runs that differ.
    """
    paths, notes = logs_of(run)
    heads = [read_header(path) for path in paths]
    _alike(paths, heads)
    every = max(head.every for head in heads)
    made = Digest(paths, dict(heads[0].about), every, notes, width=every)
    for path in paths:
        before = made.decisions.total()
        for entry in read_log(path):
            made.add(entry)
        if made.decisions.total() == before:
            notes.append(f"{path} holds no step.")
        if _is_cut(path):
            notes.append(f"The last line of {path} is cut short and left out: the run was killed, or is writing it.")
    if not made.decisions:
        raise DataError(
            f"{', '.join(map(str, paths))}: no step is written yet; a log needs one; train on, or name another."
        )
    if every > 1:
        notes.append(f"The log kept every {every}th step to stay below its size; figures are of these.")
    if made.without_candidates:
        notes.append(
            "Steps that are logged without their candidates, as tokens were chosen or a line would have been too long: "
            f"{made.without_candidates}; shares and samples are of the others."
        )
    return made


def logs_of(run: Path) -> tuple[list[Path], list[str]]:
    """The logs that a path stands for, and notes on files that were passed over.

    Raises:
        DataError: there is none.
    """
    try:
        if not run.is_dir():
            read_header(run)
            return [run], []
        for pattern in ("*.jsonl", "*/*.jsonl"):
            found = sorted(path for path in run.glob(pattern) if path.is_file())
            logs, foreign = _told_apart(found)
            if logs:
                return logs, [f"{', '.join(map(str, foreign))} passed over: no decision log."] if foreign else []
    except OSError as error:
        raise DataError(f"cannot read {run}: {error.strerror}; a decision log is needed; check the path.") from error
    raise DataError(
        f"{run} and the folders in it hold no decision log ({NAME}); the run must have had Selector(log=...) or "
        "SelectionArguments(log=...); name the folder or the file given there."
    )


def _told_apart(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    logs: list[Path] = []
    foreign: list[Path] = []
    for path in paths:
        with path.open("rb") as file:
            # Whatever says that it is a log is taken for one: what is wrong with it is then an error.
            is_log = path.name == NAME or file.read(len(BEGIN)) == BEGIN
        (logs if is_log else foreign).append(path)
    return logs, foreign


def _alike(paths: Sequence[Path], heads: Sequence[Header]) -> None:
    for path, head in zip(paths, heads, strict=True):
        if dict(head.about) != dict(heads[0].about):
            differ = sorted(
                name for name in {**head.about, **heads[0].about} if head.about.get(name) != heads[0].about.get(name)
            )
            raise DataError(
                f"{paths[0]} and {path} are logs of runs that differ in {', '.join(differ)}; a report is of one run; "
                "name its file or folder."
            )


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
