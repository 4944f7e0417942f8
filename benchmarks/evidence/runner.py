"""Runs the cells that are not stored yet, in this process or in several, with progress and an estimate of the rest.

A worker is a process of its own that is sent one cell at a time through a pipe and ends when the pipe does, so that it
does not outlive a runner that was killed.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ftw.errors import FtwError

from . import cells
from .settings import Cell, key_of
from .store import Store, finite

Record = dict[str, Any]


def run(
    grid: Sequence[Cell],
    folder: Path,
    store: Store,
    *,
    cache: Path | None,
    jobs: int = 1,
    budget_minutes: float | None = None,
    again: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> int:
    """Runs what is missing and stores each cell as it ends; returns how many cells are still missing.

    Args:
        folder: of the data. cache: of the pre-trained models.
        budget_minutes: no cell is begun after so many.
        again: run stored cells too, so that the store can compare (`Store.conflicts`).

    Raises:
        FtwError: cells failed, with what they raised; all others were run and are stored.
    """
    began = time.perf_counter()
    keys = [key_of(cells.configuration(cell, folder)) for cell in grid]
    missing = [cell for cell, key in zip(grid, keys, strict=True) if again or key not in store]
    say(f"{len(grid)} cells, {sum(key in store for key in keys)} of them stored, {len(missing)} to run")
    estimate = Estimate(store, jobs)
    if missing and estimate.known:
        say(f"estimated: {estimate.minutes(missing):.0f} min with {jobs} job{'s' if jobs > 1 else ''}")

    def late() -> bool:
        return budget_minutes is not None and time.perf_counter() - began > 60 * budget_minutes

    left = list(missing)
    source = _here if jobs == 1 else _elsewhere(jobs)
    failures: list[str] = []
    for cell, found in source(left, folder, cache, late):
        if isinstance(found, str):
            failures.append(f"{cell.label} failed:\n{found}")
            say(failures[-1])
            continue
        record = finite(found)
        store.append(record)
        estimate.learn(cell, record["clock"]["total"])
        loss, best = record["figures"]["final"]["loss"], record["figures"]["best"]["loss"]
        say(
            f"[{len(missing) - len(left)}/{len(missing)}] {cell.label}: {_shown(loss)} at the end, {_shown(best)} at "
            f"dev's best, {record['clock']['total']:.0f} s; {estimate.minutes(left):.0f} min left"
        )
    if left:
        say(f"{len(left)} cells were not begun within {budget_minutes:g} minutes; the same command goes on with them")
    if failures:
        raise FtwError(
            f"{len(failures)} of {len(missing)} cells failed, the first: {failures[0]}\nThe others are stored; mend "
            "the cause and run the same command again."
        )
    return len(left)


class Estimate:
    """How long cells take: the mean of those of the same method and sizes, else of the method, else of all."""

    def __init__(self, store: Store, jobs: int) -> None:
        self._jobs = jobs
        self._seen: dict[Any, list[float]] = {}
        for record in store.records.values():
            config = record["configuration"]
            self._add(config["method"]["name"], config["setting"], record["clock"]["total"])

    @property
    def known(self) -> bool:
        return bool(self._seen)

    def learn(self, cell: Cell, seconds: float) -> None:
        self._add(cell.method, vars(cell.setting), seconds)

    def minutes(self, left: Sequence[Cell]) -> float:
        return sum(self._seconds(cell) for cell in left) / self._jobs / 60

    def _seconds(self, cell: Cell) -> float:
        for name in (*_names(cell.method, vars(cell.setting)), None):
            if self._seen.get(name):
                return sum(self._seen[name]) / len(self._seen[name])
        return 0.0

    def _add(self, method: str, setting: dict[str, Any], seconds: float) -> None:
        for name in (*_names(method, setting), None):
            self._seen.setdefault(name, []).append(seconds)


def _names(method: str, setting: dict[str, Any]) -> tuple[Any, ...]:
    sizes = tuple(setting[name] for name in ("steps", "pool_size", "tuning", "width", "layers"))
    return (method, sizes), sizes


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


Late = Callable[[], bool]


Found = Iterator[tuple[Cell, Record | str]]
"""Cells that ended, each with its record or with what it raised."""


def _here(left: list[Cell], folder: Path, cache: Path | None, late: Late) -> Found:
    while left and not late():
        cell = left.pop(0)
        yield cell, _tried(cell, folder, cache)


def _tried(cell: Cell, folder: Path, cache: Path | None) -> Record | str:
    try:
        return cells.run_cell(cell, folder, cache)
    except Exception:  # whatever it is, the other cells do not depend on it
        return traceback.format_exc()


def _elsewhere(jobs: int) -> Callable[..., Found]:
    def results(left: list[Cell], folder: Path, cache: Path | None, late: Late) -> Found:
        for cell in {(c.setting.pretrain_steps, c.setting.width, c.seed): c for c in left}.values():
            cells.prepare(cell, folder, cache)  # once, before two workers would
        context = multiprocessing.get_context("spawn")
        busy: dict[Connection, Cell] = {}
        workers = []
        try:
            for _ in range(min(jobs, len(left))):
                ours, theirs = context.Pipe()
                worker = context.Process(target=_work, args=(theirs, folder, cache), daemon=True)
                worker.start()
                theirs.close()  # so that the worker sees the end of the pipe when this process ends
                workers.append((worker, ours))
            idle = [pipe for _, pipe in workers]
            while True:
                while idle and left and not late():
                    pipe, cell = idle.pop(), left.pop(0)
                    pipe.send(cell)
                    busy[pipe] = cell
                if not busy:
                    return
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    cell = busy.pop(ready)
                    yield cell, _received(ready, cell)
                    idle.append(ready)
        finally:
            for worker, pipe in workers:
                pipe.close()
                worker.terminate()
                worker.join()

    return results


def _received(pipe: Connection, cell: Cell) -> Record | str:
    try:
        found: Record | str = pipe.recv()
    except EOFError as error:
        raise FtwError(
            f"the process that ran {cell.label} ended without an answer (killed, or out of memory); the cell is not "
            "stored; run the same command again, with fewer --jobs."
        ) from error
    return found


def _work(pipe: Connection, folder: Path, cache: Path | None) -> None:
    with suppress(EOFError, OSError, KeyboardInterrupt):  # the runner is gone, or goes
        while True:
            pipe.send(_tried(pipe.recv(), folder, cache))
