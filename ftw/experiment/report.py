"""What a comparison shows: progress, tables, picture and JSON. Called by `ftw.experiment.job`.

Progress goes to stderr and results to stdout, so that results can be piped. Plain output is line by line,
without control characters, and is chosen by itself where no terminal listens.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ftw.experiment.compare import Run
from ftw.experiment.extras import optional


@dataclass(frozen=True)
class Summary:
    """One method over its seeds."""

    method: str
    losses: list[float]
    trained: float
    passed: float
    seconds: float
    weight_share: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean final loss."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the final loss; 0 for one seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """One summary per method, in the order of their first runs."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.method, []).append(run)
    return [
        Summary(
            method,
            [run.final_loss for run in group],
            statistics.fmean(run.trained for run in group),
            statistics.fmean(run.passed for run in group),
            statistics.fmean(run.seconds for run in group),
            {
                source: statistics.fmean(run.weight_share.get(source, 0.0) for run in group)
                for source in sorted({source for run in group for source in run.weight})
            },
        )
        for method, group in grouped.items()
    ]


class Display:
    """Progress on stderr: a bar, or a line wherever the loss was measured. Use as a context manager."""

    def __init__(self, plain: bool, total_steps: int) -> None:
        self._plain = plain or not sys.stderr.isatty()
        self._label, self._steps = "", 0
        self._bar: Any = None
        if not self._plain:
            progress = optional("rich.progress")
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=optional("rich.console").Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=total_steps)

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def prepare(self, done: int, steps: int) -> None:
        """A step of preparation that the comparison's own count leaves out."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"pre-training tiny {done}/{steps}")
        elif done == 1:
            self.note(f"pre-training tiny: {steps} steps")

    def begin(self, method: str, seed: int, steps: int) -> None:
        """A run starts."""
        self._label, self._steps = f"{method}, seed {seed}", steps
        if self._bar is not None:
            self._bar.update(self._task, description=self._label)

    def step(self, done: int, loss: float | None) -> None:
        """A step of it is over."""
        if self._bar is not None:
            self._bar.advance(self._task)
        if loss is not None:
            if self._bar is not None:
                self._bar.update(self._task, description=f"{self._label}: loss {loss:.3f}")
            else:
                print(f"{self._label}: step {done}/{self._steps}, loss {loss:.4f}", file=sys.stderr, flush=True)


def print_tables(summaries: Sequence[Summary], evaluated_on: str, pool_share: dict[str, float], plain: bool) -> None:
    """The result on stdout: losses and costs by method, then the share of the weight by source and method."""
    console, table_type, box = _console(plain)
    several = len(summaries[0].losses) > 1
    print(f"Loss on {evaluated_on}")
    table = table_type(box=box)
    table.add_column("method", no_wrap=True)
    for heading in ("loss", *(("sd", "range") if several else ()), "trained on", "passes", "seconds"):
        table.add_column(heading, justify="right")
    for each in summaries:
        spread = (f"{each.deviation:.4f}", f"{min(each.losses):.3f} to {max(each.losses):.3f}") if several else ()
        table.add_row(
            each.method,
            f"{each.mean:.4f}",
            *spread,
            f"{each.trained:.0f}",
            f"{each.passed:.0f}",
            f"{each.seconds:.1f}",
        )
    console.print(table)
    print(
        "loss: per response token, nats" + (f", mean of {len(summaries[0].losses)} seeds" if several else "") + "; "
        "trained on: samples with a weight, all steps;\n"
        "passes: samples that went forward and backward, target samples included; seconds: training alone."
    )
    print("\nShare of the weight per source (each response token counts with its sample's weight)")
    shares = table_type(box=box)
    shares.add_column("source", no_wrap=True)
    for heading in ("pool", *(each.method for each in summaries)):
        shares.add_column(heading, justify="right")
    for source, share in sorted(pool_share.items(), key=lambda item: -item[1]):
        found = (f"{each.weight_share.get(source, 0.0):.1%}" for each in summaries)
        shares.add_row(source, f"{share:.1%}", *found)
    console.print(shares)


def verdicts(summaries: Sequence[Summary]) -> list[str]:
    """A sentence for every method against `random` (same budget) and `full` (all of it), good or bad."""
    by_name = {each.method: each for each in summaries}
    sentences = []
    for each in summaries:
        for rival, what in (
            ("random", "same number of samples trained on"),
            ("full", "every candidate trained on"),
        ):
            if each.method in ("random", "full") or rival not in by_name:
                continue
            difference = each.mean - by_name[rival].mean
            if not math.isfinite(difference):
                sentences.append(f"{each.method} against {rival}: a loss is not finite, so nothing can be said.")
                continue
            wins = sum(a < b for a, b in zip(each.losses, by_name[rival].losses, strict=True))
            side = "below" if difference < 0 else "above"
            sentences.append(
                f"{each.method} ends {abs(difference):.4f} {side} {rival} ({what}); "
                f"lower in {wins} of {len(each.losses)} seed{'s' if len(each.losses) > 1 else ''}."
            )
    return sentences


def write_figure(path: Path, runs: Sequence[Run], curve_label: str, pool_share: dict[str, float]) -> None:
    """Loss against steps (mean, and range over seeds) beside the share of the weight per source."""
    matplotlib = optional("matplotlib")
    matplotlib.use("Agg")
    plt = optional("matplotlib.pyplot")
    summaries = summarise(runs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.15, 1), layout="constrained")
    for each in summaries:
        curves = [run.curve for run in runs if run.method == each.method]
        # Without the first point, common to all: it would leave the differences no room.
        steps = [step for step, _ in curves[0][1:]]
        values = list(zip(*([loss for _, loss in curve[1:]] for curve in curves), strict=True))
        (line,) = left.plot(steps, [statistics.fmean(at) for at in values], marker="o", ms=3, label=each.method)
        if len(curves) > 1:
            left.fill_between(
                steps,
                [min(at) for at in values],
                [max(at) for at in values],
                color=line.get_color(),
                alpha=0.2,
            )
    several = f", mean and range of {len(summaries[0].losses)} seeds" if len(summaries[0].losses) > 1 else ""
    title = f"Loss on {curve_label}{several} (untrained: {runs[0].curve[0][1]:.2f})"
    left.set(xlabel="step", ylabel="loss per response token, nats", title=title)
    left.title.set_fontsize(10)
    left.legend()
    left.grid(alpha=0.3)
    _stacked_shares(right, summaries, pool_share, plt.get_cmap("Set2" if len(pool_share) <= 8 else "tab20"))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_json(path: Path, content: dict[str, Any], runs: Sequence[Run]) -> None:
    """Every figure of the comparison; numbers that are not finite are written as null."""
    summaries = [{**asdict(each), "mean": each.mean, "standard_deviation": each.deviation} for each in summarise(runs)]
    detailed = [{**asdict(run), "weight_share": run.weight_share} for run in runs]
    whole = {**content, "summary": summaries, "runs": detailed}
    path.write_text(json.dumps(_finite(whole), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _stacked_shares(axes: Any, summaries: Sequence[Summary], pool_share: dict[str, float], colours: Any) -> None:
    bars = [("pool", pool_share), *((each.method, each.weight_share) for each in summaries)]
    names = [name for name, _ in bars]
    edge = [0.0] * len(bars)
    for number, source in enumerate(sorted(pool_share, key=lambda name: -pool_share[name])):
        shares = [share.get(source, 0.0) for _, share in bars]
        drawn = axes.barh(names, shares, left=edge, color=colours(number % colours.N), label=source)
        # A share too small for its number goes without: the table and the JSON have it.
        labels = [f"{share:.0%}" if share >= 0.06 else "" for share in shares]
        axes.bar_label(drawn, labels=labels, label_type="center", fontsize=8)
        edge = [at + share for at, share in zip(edge, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the weight, by response tokens", title="Where the weight went")
    axes.title.set_fontsize(10)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, fontsize=8, frameon=False)


def _console(plain: bool) -> tuple[Any, Any, Any]:
    rich_box = optional("rich.box")
    table = optional("rich.table").Table
    if plain or not sys.stdout.isatty():
        console = optional("rich.console").Console(
            file=sys.stdout, width=120, color_system=None, force_terminal=False, legacy_windows=False
        )
        return console, table, rich_box.ASCII
    return optional("rich.console").Console(), table, rich_box.SIMPLE_HEAD


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
