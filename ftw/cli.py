"""The command line: `ftw run`, `ftw demo`, `ftw report`, `ftw list`. Parses options; the work is elsewhere.

Whatever the user got wrong ends as one line on stderr and exit code 2; an interrupt ends with 130, and a reader of the
output that has seen enough (`ftw list | head`) with 141, as other commands end then.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ftw.errors import ConfigurationError, FtwError

if TYPE_CHECKING:
    from ftw.experiment.options import Options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.command == "list":
            _list()
        elif arguments.command == "demo":
            _demo(arguments)
        elif arguments.command == "report":
            _report(arguments)
        else:
            _run(arguments)
        sys.stdout.flush()  # here, where a pipe that was closed can still be caught
    except BrokenPipeError:
        # The interpreter flushes once more at its end, and would complain of the pipe then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FtwError as error:
        print("ftw: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ftw: interrupted", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other wrong input is reported."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ftw", description="Filter-then-Weight: choose and reweight the samples of every step.")
    parser.add_argument("--version", action="version", version=f"ftw {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,run,report,list}")
    demo = commands.add_parser("demo", help="compare methods on generated data; needs no file and no network")
    _add_common(demo, steps=60, seeds=(0, 1, 2), max_length=192)
    run = commands.add_parser("run", help="fine-tune on JSONL files and compare methods on the same stream")
    run.add_argument("--pool", nargs="+", type=Path, required=True, metavar="FILE", help="JSONL files of candidates")
    run.add_argument("--target", type=Path, required=True, metavar="FILE", help="JSONL file that says what matters")
    run.add_argument("--eval", type=Path, metavar="FILE", help="JSONL file to compare on; else part of the target")
    run.add_argument("--model", default="tiny", help="'tiny' or a local Hugging Face folder with its tokenizer")
    _add_common(run, steps=200, seeds=(0,), max_length=384)
    report = commands.add_parser("report", help="a page and a summary of what a run decided, from its decision logs")
    report.add_argument("log", type=Path, metavar="RUN", help="what the run had as log=: a folder, or a .jsonl file")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (report.html in the folder)")
    report.add_argument("--terminal", action="store_true", help="no page, the summary alone")
    commands.add_parser("list", help="registered components and the methods to compare")
    return parser


def _version() -> str:
    try:
        return metadata.version("filter-then-weight")
    except metadata.PackageNotFoundError:
        return "from a source tree, not installed"


def _add_common(parser: argparse.ArgumentParser, *, steps: int, seeds: tuple[int, ...], max_length: int) -> None:
    default = ",".join(map(str, seeds))
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--method",
        "--methods",
        default="ours,random,full",
        help="names from `ftw list`, separated by commas (%(default)s)",
    )
    what.add_argument("--filter", help="use this filter in the method 'ours'")
    what.add_argument("--solver", help="use this solver in the method 'ours'")
    what.add_argument("--geometry", choices=("curvature", "update", "vanilla"), help="use it in the method 'ours'")
    what.add_argument("--objective", choices=("match", "utility"), help="use it in the method 'ours'")
    what.add_argument("--gradients", default="auto", help="gradient extractor of all selecting methods")
    what.add_argument(
        "--budget", type=_budget, default=0.25, help="fraction or number of them to train on (%(default)s)"
    )
    what.add_argument("--pool-size", type=int, default=16, help="candidates on offer at each step (%(default)s)")
    what.add_argument("--target-batch", type=int, default=8, help="samples in one batch of the target (%(default)s)")
    what.add_argument(
        "--target-batches",
        type=_count_or_all,
        default=1,
        help="its batches per gradient, or 'all' (%(default)s)",
    )
    what.add_argument("--refresh", type=int, default=1, help="steps between target gradients (%(default)s)")
    how = parser.add_argument_group("training")
    how.add_argument("--steps", type=int, default=steps, help="optimizer steps of each run (%(default)s)")
    how.add_argument("--seed", dest="seeds", type=_seeds, default=seeds, help=f"one or several, as 0,1,2 ({default})")
    how.add_argument("--lr", type=float, help="default 1e-3 for tiny; for a folder 2e-5, with --lora 2e-4")
    how.add_argument("--lr-warmup", type=int, default=0, help="steps of linear warm-up (%(default)s)")
    how.add_argument(
        "--lr-decay",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="after the warm-up, fall linearly to zero at the end (yes); else constant",
    )
    how.add_argument("--lora", action="store_true", help="train LoRA adapters on all linear layers (needs peft)")
    how.add_argument("--lora-rank", type=int, help="of the adapters (8)")
    how.add_argument(
        "--max-length",
        type=int,
        default=max_length,
        help="tokens; longer samples lose their end (%(default)s)",
    )
    how.add_argument("--pretrain-steps", type=int, help="of tiny, on text that is then no candidate (150)")
    how.add_argument("--device", default="cpu", help="as torch names it: cpu, cuda, cuda:1 (%(default)s)")
    how.add_argument("--threads", type=int, help="of torch on the CPU (1 for tiny, else torch's own number)")
    shown = parser.add_argument_group("report")
    shown.add_argument("--eval-every", type=int, help="steps between points of the curve (a tenth of all)")
    shown.add_argument(
        "--curve-samples", type=int, default=128, help="evaluation samples behind the curve (%(default)s)"
    )
    shown.add_argument("--out", type=Path, help="folder for picture and JSON (a new one under runs/)")
    shown.add_argument("--plain", action="store_true", help="no progress bar, no colours")


def _demo(arguments: argparse.Namespace) -> None:
    from ftw.experiment import job

    arguments.model = "tiny"
    job.demo(_options(arguments, arguments.out or Path("runs/demo")))
    print(
        "\nOne word changes the method: `ftw demo --filter topk`, `ftw demo --solver uniform`,\n"
        "`ftw demo --geometry vanilla`; `ftw list` names the rest, `ftw run` takes your own files."
    )


def _run(arguments: argparse.Namespace) -> None:
    from ftw.experiment import job

    out = arguments.out or Path("runs") / time.strftime("run-%Y%m%d-%H%M%S")
    job.run(_options(arguments, out), arguments.pool, arguments.target, arguments.eval)


def _report(arguments: argparse.Namespace) -> None:
    from ftw.watching import report
    from ftw.watching.digest import digest
    from ftw.watching.summary import terminal

    if arguments.terminal and arguments.out is not None:
        raise ConfigurationError("--terminal writes no page, and --out names one; give one of the two.")
    found = digest(arguments.log)
    if not arguments.terminal:
        path = arguments.out or report.default_path(arguments.log)
        report.write_page(found, path)
    encoding = sys.stdout.encoding or "utf-8"
    print(terminal(found).encode(encoding, "replace").decode(encoding))
    if not arguments.terminal:
        print(f"\nThe page is {path}")


def _list() -> None:
    from ftw import registry
    from ftw.presets import PRESETS

    for group, noun in registry.NOUNS.items():
        print(f"{noun}s (entry-point group 'ftw.{group}')")
        for name, distributions in registry.available(group).items():
            conflict = "  (conflict: names must be unique)" if len(distributions) > 1 else ""
            print(f"  {name:<18}{', '.join(distributions)}{conflict}")
        print()
    print("presets (Selector(preset=...), and --method unless a column is needed or tokens are chosen)")
    for preset in PRESETS.values():
        columns = f" (needs extras: {', '.join(preset.needs)})" if preset.needs else ""
        print(f"  {preset.name:<18}{preset.summary}{columns}")


def _options(arguments: argparse.Namespace, out: Path) -> Options:
    from ftw.experiment import methods
    from ftw.experiment.options import Options

    given = vars(arguments)
    components = {name: given[name] for name in ("filter", "solver", "geometry", "objective")}
    made = {"methods": methods.override(methods.parse(arguments.method), components), "out": out}
    return Options(**{field.name: given[field.name] for field in fields(Options) if field.name in given} | made)


# argparse puts the name of its option before these messages.


def _budget(text: str) -> float | int:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give a fraction like 0.25 or a count") from None


def _count_or_all(text: str) -> int | str:
    try:
        return text if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor 'all'") from None


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers like 0,1,2") from None
