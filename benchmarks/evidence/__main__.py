"""Command line of the harness; see docs/evidence.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ftw.errors import FtwError
from ftw.experiment import models

from . import context, context_report, figures, grids, tables
from .runner import run
from .settings import filtered, key_of
from .store import Store, finite

OUT = Path("benchmarks/results/evidence")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.action(options))
    except FtwError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one ended", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    grid = grids.grid("quick" if options.quick else options.grid, options.seeds)
    if options.only:
        grid = filtered(grid, options.only)
    store = Store(options.out / "cells.jsonl")
    run(
        grid,
        options.data,
        store,
        cache=models.cache_folder(),
        jobs=options.jobs,
        budget_minutes=options.budget_minutes,
        again=options.again,
    )
    return _report(options)


def _report(options: argparse.Namespace) -> int:
    store = Store(options.out / "cells.jsonl")
    if not store.records:
        print(f"no cell is stored in {store.path}; run some first", file=sys.stderr)
        return 2
    records = list(store.records.values())
    (options.out / "tables.md").write_text(tables.report(records), encoding="utf-8")
    drawn = figures.write(records, options.out)
    hours = sum(record["clock"]["total"] for record in records) / 3600
    print(f"{len(records)} cells, {hours:.2f} h of one process: {options.out / 'tables.md'} and {len(drawn)} pictures")
    if store.broken:
        print(f"{store.broken} broken lines in {store.path} were passed over (a run was killed)", file=sys.stderr)
    for key in store.conflicts:
        print(f"warning: {key} has two records with different figures: it is not reproducible here", file=sys.stderr)
    return 1 if store.conflicts else 0


def _context(options: argparse.Namespace) -> int:
    store = Store(options.out / "context.jsonl")
    records = []
    for pool in range(options.pools):
        for length in options.lengths:
            study = context.Study(length, pool)
            key = key_of(context.configuration(study, options.data))
            if key not in store:
                record = context.run_study(study, options.data, models.cache_folder())
                store.append(finite(record))
                print(f"T = {length}, pool {pool}: {record['clock']['total']:.0f} s", file=sys.stderr, flush=True)
            records.append(store.records[key])
    (options.out / "context.md").write_text(context_report.report(records), encoding="utf-8")
    context_report.draw(records, options.out / "context.png")
    print(f"{options.out / 'context.md'} and a picture of {len(records)} records")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("run", help="run the cells of a grid that are not stored yet")
    each.add_argument("data", type=Path, help="folder of <source>.{train,dev,test}.jsonl")
    each.add_argument("--grid", choices=grids.GRIDS, default="core")
    each.add_argument("--quick", action="store_true", help="the quick grid: does everything run")
    each.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    each.add_argument("--only", nargs="+", default=[], metavar="NAME=VALUE", help="cells that meet all conditions")
    each.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    each.add_argument("--budget-minutes", type=float, default=None, help="begin no cell after so many")
    each.add_argument("--again", action="store_true", help="run stored cells too and say where figures differ")
    each.add_argument("--out", type=Path, default=OUT)
    each.set_defaults(action=_run)
    each = commands.add_parser("report", help="write tables and pictures of what is stored")
    each.add_argument("--out", type=Path, default=OUT)
    each.set_defaults(action=_report)
    each = commands.add_parser("context", help="the study of approximate representations over context lengths")
    each.add_argument("data", type=Path, nargs="?", default=None, help="folder of the data; default: generated text")
    each.add_argument("--pools", type=int, default=3)
    each.add_argument("--lengths", type=int, nargs="+", default=list(context.LENGTHS))
    each.add_argument("--out", type=Path, default=OUT)
    each.set_defaults(action=_context)
    return parser


if __name__ == "__main__":
    sys.exit(main())
