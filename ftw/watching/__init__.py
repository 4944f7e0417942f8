"""Watching a run: the log of its decisions. See docs/watching.md."""

from ftw.watching.entries import Entry, read_log
from ftw.watching.log import DecisionLog

__all__ = ["DecisionLog", "Entry", "read_log"]
