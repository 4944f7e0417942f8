"""Watching a run: the log of its decisions, and the report made from it. See docs/watching.md."""

from ftw.watching.entries import Entry, read_log
from ftw.watching.log import DecisionLog

__all__ = ["DecisionLog", "Entry", "read_log"]
