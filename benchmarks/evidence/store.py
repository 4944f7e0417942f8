"""Records of cells, one JSON line each, appended as they come. Called by `runner`, `tables` and `figures`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ftw.errors import DataError


class Store:
    """A file of records, read when opened.

    Laws: a line is written by one call and forced to the disk before `append` returns, so that a killed run leaves
    whole lines behind and at most one part of a line, which is passed over; nothing that stands is ever changed; the
    first record of a key counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.conflicts: list[str] = []
        """Keys with two records whose figures differ: a cell was not the same when it was run again."""

        self.broken = 0
        """Lines that are no records: what a killed run left."""

        self._torn = False
        if path.is_file():
            self._read(path.read_bytes())

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record.

        Raises:
            DataError: it cannot be written as JSON (a number is not finite), or to the file.
        """
        try:
            line = json.dumps(record, sort_keys=True, allow_nan=False)
        except ValueError as error:
            raise DataError(
                f"the record of {record.get('key')} holds a number that is not finite ({error}); records are JSON; "
                "mark it as null before."
            ) from error
        # A part of a line that a killed run left is ended first.
        text = (("\n" if self._torn else "") + line + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(handle, text)
            os.fsync(handle)
        finally:
            os.close(handle)
        self._torn = written < len(text)
        if self._torn:
            raise DataError(
                f"{self.path} took {written} of {len(text)} bytes; is the disk full? Run the command again."
            )
        self._add(json.loads(line))

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def _read(self, content: bytes) -> None:
        self._torn = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self._add(record)
            except (ValueError, KeyError, TypeError):
                self.broken += 1

    def _add(self, record: dict[str, Any]) -> None:
        key, figures = record["key"], record["figures"]
        if key in self.records:
            if self.records[key]["figures"] != figures and key not in self.conflicts:
                self.conflicts.append(key)
            return
        self.records[key] = record


def finite(value: Any) -> Any:
    """The same with null for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
