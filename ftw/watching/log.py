"""The decision log: one JSON line for each step, in a file that stays below a bound.

A plain consumer of selections. The selector writes to it where it is given one (`Selector(log=...)`); any loop can.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftw.errors import ConfigurationError, DataError
from ftw.fidelity import Fidelity
from ftw.problem import Selection
from ftw.watching.entries import LONGEST, Entry, Header, entry_of, read_header, read_lines

NAME = "decisions.jsonl"
"""The log's name in a folder."""

SMALLEST = 1 << 16


class DecisionLog:
    """Where the decisions of a run are written, a line for each step that the optimizer made.

    Every line is a single write to a file opened for it, so that a process that is killed loses no more than the line
    under way. The file holds at most `max_bytes`: when it would outgrow them every second of its steps is dropped, and
    from then on every second is written; then every fourth, and so on, so that what is left spans the whole run.
    A step whose line would be longer than 4 MiB, or a quarter of `max_bytes`, is written without its candidates.

    What the file already holds is read when the first step is written. Steps from that one on are dropped: the run was
    resumed at a checkpoint before them. If it begins at step 1 the file is another run's, and becomes `*.previous`.

    Args:
        path: the file, if it ends in ".jsonl"; else a folder, and the file in it is "decisions.jsonl". Made with its
            folders when the first step is written.
        max_bytes: bound on the file, 64 MiB by default; at least 64 KiB.
        text: characters that are kept of each sample's text; 0 for none.

    Raises:
        ConfigurationError: a bound that is too small; a path that is a folder, or a file that is no decision log.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = 64 << 20, text: int = 200) -> None:
        for name, value, least in (("max_bytes", max_bytes, SMALLEST), ("text", text, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(
                    f"{name} of the decision log is {value!r}; an integer of at least {least} is needed; raise it."
                )
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ConfigurationError(f"log is {path!r}; the path of a file or folder is needed; give log='runs/mine'.")
        given = Path(path)
        self.path = given if given.suffix == ".jsonl" else given / NAME
        self.max_bytes, self.text = max_bytes, text
        self._header = Header()
        self._last: Entry | None = None
        self._check()

    def write(
        self,
        selection: Selection,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        stepped: bool = True,
        step: int | None = None,
        fidelity: Fidelity | None = None,
        about: Mapping[str, str] | None = None,
        candidates: bool = True,
    ) -> None:
        """Write a step.

        Args:
            selection: of the step.
            columns: "id", "source" and "text" of its candidates, in their order, as far as they are known.
            stepped: whether the optimizer made the step; without it no candidates are written.
            step: its number; default: `selection.diagnostics["step"]`.
            fidelity: what the step really did, if it was watched.
            about: how the run decides, name -> text; kept with the first step.
            candidates: False where they are no samples, but tokens: only the step's own figures are written.

        Raises:
            OSError: the file cannot be written; it is as it was before.
            DataError: the file is there already, and a line of it is malformed.
        """
        number = int(selection.diagnostics["step"] if step is None else step)
        if number < 1:
            raise ConfigurationError(f"step is {number}; steps are counted from 1; pass step=1 for the first.")
        last = self._last
        if last is None or number < last.step or (number == last.step and last.stepped):
            self._begin(number, about or {})
        entry = entry_of(
            selection,
            stepped=stepped,
            step=number,
            fidelity=fidelity,
            columns=columns or {},
            characters=self.text,
        )
        self._last = replace(entry, columns={})
        if number % self._header.every:
            return
        line = entry.line()
        if not candidates or len(line) > min(LONGEST, self.max_bytes // 4):
            line = self._last.line()
        self._append(line, number)

    def _check(self) -> None:
        """A file that is somebody else's must be known now, not in the middle of the first step."""
        try:
            if self.path.is_dir():
                raise ConfigurationError(f"log is {self.path}, a folder; a file is needed there; give another path.")
            if self.path.exists() and self.path.stat().st_size:
                read_header(self.path)
        except DataError as error:
            raise ConfigurationError(f"the decision log cannot go where another file is: {error}") from error
        except OSError as error:
            raise ConfigurationError(
                f"log is {self.path}: {error.strerror}; a file that can be written is needed; give another path."
            ) from error

    def _begin(self, step: int, about: Mapping[str, str]) -> None:
        """Make the file end before `step`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            if step > 1:
                self._header = read_header(self.path)
                self._keep(lambda entry: entry.step < step)
                return
            previous = self.path.with_name(self.path.name + ".previous")
            os.replace(self.path, previous)
            warnings.warn(
                f"{self.path} held the decisions of another run, and this one begins at step 1; they are in {previous} "
                "now, in place of any that were there.",
                stacklevel=2,
            )
        self._header = Header(1, about)
        self.path.write_bytes(self._header.line())

    def _append(self, line: bytes, step: int) -> None:
        while self.path.stat().st_size + len(line) > self.max_bytes:
            every = self._header.every * 2
            self._header = replace(self._header, every=every)
            self._keep(lambda entry, every=every: entry.step % every == 0)  # type: ignore[misc]
            if step % every:
                return
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError("no space is left for the line")
            except BaseException:
                file.truncate(size)
                raise

    def _keep(self, wanted: Callable[[Entry], bool]) -> None:
        """Rewrite the file with the steps that are wanted, beside it, and put it in its place at once."""
        part = self.path.with_name(self.path.name + ".part")
        with part.open("wb") as file:
            file.write(self._header.line())
            for entry, line in read_lines(self.path):
                if wanted(entry):
                    file.write(line)
        os.replace(part, self.path)
