"""The lines of a decision log: what stands in one, how it is written as JSON and read back.

The first line says what the file is, every further one is a step. A line is written whole or, when the writer is
killed, cut short without its line break: such a last line is passed over. Called by `ftw.watching.log`, which writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from ftw.errors import DataError
from ftw.fidelity import Fidelity
from ftw.problem import Selection

VERSION = 1
BEGIN = b'{"ftw_decisions":'
"""Of every log, whatever its version."""

LONGEST = 1 << 22
"""Bytes of the longest line; a reader never holds more of a file than one."""

NAMES = ("id", "source", "text")
"""Columns of `record(extras=...)` that are logged."""

_NUMBERS = ("alignment", "mass", "weight")


@dataclass(frozen=True)
class Header:
    """The first line.

    Attributes:
        every: steps that are in the log: those whose number it divides.
        about: how the steps were decided, name -> text.
    """

    every: int = 1
    about: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> bytes:
        """As JSON."""
        return _encoded({"ftw_decisions": VERSION, "every": self.every, "about": dict(self.about)})


@dataclass(frozen=True)
class Entry:
    """One step.

    Attributes:
        step: its number, from 1.
        status: as `Selection.status`.
        stepped: whether the optimizer made the step. False: a GradScaler skipped it, or nobody called for it; a step
            that overflowed has the number of the step that took its place.
        geometry: the one used.
        candidates, chosen, quarantined: how many.
        predicted_drop, first_order, curvature, offset_drop, effective_sample_size, relative_residual, kkt_residual: as
            in `Selection` and its diagnostics; None where not measured or not finite.
        fidelity: of a watched step: `Fidelity`'s figures and "ratio"; None where not finite.
        predicted_drops: of several targets, by name.
        columns: "alignment", "mass", "weight", and of "id", "source", "text" those that the run gave; one entry for
            each candidate. Empty where the step was not made, or the line would have been too long.
    """

    step: int
    status: str
    stepped: bool
    geometry: str
    candidates: int
    chosen: int
    quarantined: int
    predicted_drop: float | None = None
    first_order: float | None = None
    curvature: float | None = None
    offset_drop: float | None = None
    effective_sample_size: float | None = None
    relative_residual: float | None = None
    kkt_residual: float | None = None
    fidelity: Mapping[str, float | None] | None = None
    predicted_drops: Mapping[str, float | None] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def line(self) -> bytes:
        """As JSON, without what is not known."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "columns"}
        return _encoded({name: value for name, value in values.items() if value is not None} | dict(self.columns))


def entry_of(
    selection: Selection,
    *,
    stepped: bool,
    step: int,
    fidelity: Fidelity | None,
    columns: Mapping[str, Sequence[Any]],
    characters: int,
) -> Entry:
    """What is logged of a selection, `characters` of each text; columns that do not fit its candidates are left out."""
    found = selection.diagnostics
    figures = {
        name: _finite(found.get(name))
        for name in (
            "first_order",
            "curvature",
            "offset_drop",
            "effective_sample_size",
            "relative_residual",
            "kkt_residual",
        )
    }
    drops = found.get("predicted_drops")
    watched = None
    if fidelity is not None:
        watched = {each.name: _finite(getattr(fidelity, each.name)) for each in fields(fidelity) if each.name != "step"}
        watched["ratio"] = _finite(fidelity.ratio)
    listed: dict[str, list[Any]] = {}
    if stepped:
        for name in NAMES:
            column = columns.get(name, ())
            if len(column) == len(selection.weights) and any(value is not None for value in column):
                listed[name] = [label(value) for value in column]
        if "text" in listed:
            listed["text"] = [None if text is None else str(text)[:characters] for text in listed["text"]]
        if not characters:
            listed.pop("text", None)
        numbers = {"alignment": found.get("alignment"), "mass": found.get("mass"), "weight": selection.weights}
        listed |= {name: [_finite(v) for v in value.tolist()] for name, value in numbers.items() if value is not None}
    return Entry(
        step=step,
        status=str(selection.status),
        stepped=stepped,
        geometry=str(found.get("geometry", "")),
        candidates=len(selection.weights),
        chosen=len(selection.indices),
        quarantined=len(found.get("quarantined", ())),
        predicted_drop=_finite(selection.predicted_drop),
        **figures,
        fidelity=watched,
        predicted_drops=None if drops is None else {str(name): _finite(drop) for name, drop in drops.items()},
        columns=listed,
    )


def label(value: Any) -> str | int | None:
    """What names a candidate, as JSON has it; a tensor or array of one number is that number, all else its text."""
    if hasattr(value, "item"):
        with suppress(ValueError, RuntimeError, TypeError):  # it has several
            value = value.item()
    return value if value is None or isinstance(value, str | int) else str(value)


def read_header(path: Path) -> Header:
    """The first line of a log.

    Raises:
        DataError: the file cannot be read, or is no decision log.
    """
    with _opened(path) as file:
        return _header(path, file)


def read_log(path: Path) -> Iterator[Entry]:
    """The steps of a log, in the order written, one line in memory at a time; a last line cut short is passed over.

    Raises:
        DataError: the file cannot be read or is no decision log, or a line is malformed; names file and line.
    """
    return (entry for entry, _ in read_lines(path))


def read_lines(path: Path) -> Iterator[tuple[Entry, bytes]]:
    """As `read_log`, each step with the line that it stands in."""
    with _opened(path) as file:
        _header(path, file)
        for number, line in enumerate(_lines(path, file), start=2):
            yield _entry(line, f"{path}, line {number}"), line


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; a decision log is needed; check the path, and that the run had "
            "Selector(log=...)."
        ) from error


def _header(path: Path, file: BinaryIO) -> Header:
    try:
        value = json.loads(file.readline(LONGEST))
        version, every, about = value["ftw_decisions"], value["every"], value["about"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}, line 1: no head of a decision log; the first line is "
            '{"ftw_decisions": 1, "every": 1, "about": {}}; name a file that Selector(log=...) wrote.'
        ) from error
    if version != VERSION:
        raise DataError(
            f"{path} is a decision log of version {version!r}; this release reads {VERSION}; use the one that wrote it."
        )
    if not _is_count(every) or every < 1 or not isinstance(about, dict):
        raise DataError(f"{path}, line 1: every={every!r}, about={about!r}; a count and an object are needed; mend it.")
    return Header(every, {str(name): str(value) for name, value in about.items()})


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    number = 1
    while line := file.readline(LONGEST):
        number += 1
        if not line.endswith(b"\n"):
            if len(line) < LONGEST:
                return  # the writer was killed
            raise DataError(
                f"{path}, line {number}: longer than {LONGEST} bytes, which no line of a decision log is; remove it."
            )
        yield line


def _entry(line: bytes, where: str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); remove the line.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object; remove the line.")
    columns = {name: value.pop(name) for name in (*NAMES, *_NUMBERS) if name in value}
    known = {each.name: value[each.name] for each in fields(Entry) if each.name in value}
    for name, fits, what in _FIELDS:
        if not fits(known.get(name)):
            raise DataError(f"{where}: {name} is {known.get(name)!r}; {what} is needed; mend or remove the line.")
    lengths = {name: len(column) if isinstance(column, list) else None for name, column in columns.items()}
    if columns and (set(lengths.values()) != {known["candidates"]} or not {*_NUMBERS} <= columns.keys()):
        raise DataError(
            f"{where}: columns have {lengths} entries for {known['candidates']} candidates; alignment, mass and weight "
            "with one entry each are needed; mend or remove the line."
        )
    for name in columns.keys() & {*_NUMBERS}:
        wrong = next((each for each in columns[name] if not _is_figure(each)), None)
        if wrong is not None:
            raise DataError(f"{where}: {name} holds {wrong!r}; numbers or null are needed; mend or remove the line.")
        columns[name] = [None if each is None else float(each) for each in columns[name]]
    for name in columns.keys() & {*NAMES}:
        columns[name] = [label(each) for each in columns[name]]
    return Entry(**known, columns=columns)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_figure(value: Any) -> bool:
    # The comparison is false for NaN, and exact for an integer that no float can hold.
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300)


def _is_figures(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_figure(each) for each in value.values()))


_FIELDS: Sequence[tuple[str, Any, str]] = [
    *((name, _is_count, "a count") for name in ("step", "candidates", "chosen", "quarantined")),
    ("stepped", lambda value: isinstance(value, bool), "true or false"),
    *((name, lambda value: isinstance(value, str), "text") for name in ("status", "geometry")),
    *((each.name, _is_figure, "a number or null") for each in fields(Entry) if each.type == "float | None"),
    *((name, _is_figures, "an object of numbers") for name in ("fidelity", "predicted_drops")),
]


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _encoded(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate has no UTF-8; what takes its place is its escape in JSON as well.
    return text.encode("utf-8", "backslashreplace") + b"\n"
