"""Markdown tables of stored cells: means over seeds with 95 % intervals, and paired differences to `ours`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from scipy import stats

from . import methods
from .grids import CORE, HANDFUL, settled
from .settings import Setting, difference

Record = Mapping[str, Any]
Runs = dict[str, dict[int, Record]]
"""Method -> seed -> record."""

OURS, FULL = "ours", "full"


def collect(records: Iterable[Record]) -> tuple[dict[tuple[Setting, str], Runs], list[str]]:
    """(setting, target) -> runs, the core first, and what was left out and why.

    Of cells that differ in nothing but data, versions, format or the method's own components, those that agree with
    the record stored last are shown. A method that takes no notice of what a setting changes stands in its tables with
    the record of the core.
    """
    known = [record for record in records if _setting(record) is not None]
    latest = {part: value for record in known for part, value in _provenance(record).items()}
    groups: dict[tuple[Setting, str], Runs] = {}
    others = 0
    for record in known:
        if any(latest[part] != value for part, value in _provenance(record).items()):
            others += 1
            continue
        config, setting = record["configuration"], _setting(record)
        assert setting is not None
        runs = groups.setdefault((setting, config["target"]["name"]), {})
        runs.setdefault(_method(record), {})[config["seed"]] = record
    for (setting, target), runs in groups.items():
        for method in HANDFUL:
            elsewhere = groups.get((settled(method, setting), target), {})
            if OURS in runs and method not in runs and method in elsewhere:
                runs[method] = elsewhere[method]
    notes = [f"{others} records of other data, versions or components were left out."] if others else []
    return dict(sorted(groups.items(), key=lambda item: item[0][0] != CORE)), notes


def interval(values: Sequence[float]) -> tuple[float, float]:  # mean, half of the 95 % interval
    """Student's t over seeds; the half is NaN for fewer than two, or where a value is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return (statistics.fmean(values) if values else math.nan), math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error


def paired(runs: Mapping[int, float], ours: Mapping[int, float]) -> tuple[float, float]:
    """Mean and half of the interval of the differences to `ours`, over the seeds that both have."""
    return interval([runs[seed] - ours[seed] for seed in sorted(runs.keys() & ours.keys())])


def shown(value: tuple[float, float], digits: int = 3, sign: bool = False) -> str:
    """`1.234 ± 0.056`; the mean alone where there is no interval, a dash where there is nothing."""
    mean, half = value
    if not math.isfinite(mean):
        return "-" if math.isnan(mean) else "not finite"
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def report(records: Iterable[Record]) -> str:
    """Every table, as Markdown."""
    records = list(records)
    groups, notes = collect(records)
    hours = sum(record["clock"]["total"] for record in records) / 3600
    parts = [
        "# Tables of the evidence harness",
        "",
        LEGEND,
        "",
        f"{len(records)} cells in {hours:.2f} hours of one process.",
    ]
    parts += [f"\nLeft out: {note}" for note in notes]
    settings = list(dict.fromkeys(setting for setting, _ in groups))
    if len(settings) > 1:
        parts += ["", "## At a glance", "", "Loss at dev's best and, in brackets, the paired difference to `ours`.", ""]
        parts += at_a_glance(groups)
    for setting in settings:
        here = {target: runs for (other, target), runs in groups.items() if other == setting}
        parts += ["", f"## {title(setting)}", ""]
        if len(here) > 1:
            parts += [*overview(here), ""]
        for target, runs in here.items():
            parts += [f"### {target}", "", *by_method(runs), ""]
            if FULL in runs:
                parts += ["Until the final loss of `full` is reached:", "", *reaching(runs), ""]
            if setting.corrupted:
                parts += ["Share of the weight on corrupted samples:", "", *on_corrupted(runs), ""]
    parts += [*chosen_rates(groups), "## What data each method uses", "", *budgets(), ""]
    return "\n".join(parts).rstrip() + "\n"


LEGEND = """\
Loss: per response token of the target's test samples, nats; mean over seeds ± half of the 95 % interval (Student's t).
`end`: after the last step. `best`: at the step (and, for tuned methods, with the learning rate and the length) that
the dev samples choose; dev samples steer nothing. Differences are to `ours`, paired by seed: positive is worse than
`ours`. `trained`: samples with a weight, to the end, of the trial chosen; `passes`: samples that went forward and
backward, target samples and all trials included; `seconds`: processor time of training on one thread, without
evaluation, of all trials. `exact`, `number`: share of the generated answers at `best` that are right as a whole, or in
their last number."""


def title(setting: Setting) -> str:
    """What a setting changes of the core."""
    return difference(setting, CORE) or "Core"


def at_a_glance(groups: Mapping[tuple[Setting, str], Runs]) -> list[str]:
    """A line for each setting and target, a column for each method that the axes compare."""
    lines = []
    for (setting, target), runs in groups.items():
        ours = _values(runs.get(OURS, {}), best)
        cells = []
        for method in HANDFUL:
            each = runs.get(method, {})
            to_ours = paired(_values(each, best), ours)
            compared = each and ours and method != OURS
            cells.append(shown(over(each, best)) + (f" ({shown(to_ours, sign=True)})" if compared else ""))
        lines.append([title(setting), target, str(len(ours)), *cells])
    return table(["setting", "target", "seeds", *(f"`{method}`" for method in HANDFUL)], lines)


def by_method(runs: Runs) -> list[str]:
    """The table of one target in one setting, by the loss at dev's best."""
    ours = runs.get(OURS, {})
    accuracies = [
        name
        for name in ("exact", "number")
        if any(name in record["figures"]["best"] for each in runs.values() for record in each.values())
    ]
    order = sorted(runs, key=lambda method: _mean(runs[method], best))
    lines = []
    for method in order:
        each = runs[method]
        lines.append(
            [
                f"`{method}`",
                str(len(each)),
                shown(over(each, best)),
                "" if method == OURS else shown(paired(_values(each, best), _values(ours, best)), sign=True),
                shown(over(each, end)),
                "" if method == OURS else shown(paired(_values(each, end), _values(ours, end)), sign=True),
                shown((_mean(each, lambda r: r["figures"]["best"]["step"]), math.nan), 0),
                *(shown(over(each, _accuracy(name)), 3) for name in accuracies),
                shown((_mean(each, lambda r: r["figures"]["curve"]["trained"][-1]), math.nan), 0),
                shown((_mean(each, lambda r: r["figures"]["tuning"]["passed"]), math.nan), 0),
                shown((_mean(each, lambda r: r["clock"]["processor_all_trials"]), math.nan), 1),
            ]
        )
    head = ["method", "seeds", "best", "to ours", "end", "to ours", "step of best", *accuracies]
    return table([*head, "trained", "passes", "seconds"], lines)


def overview(targets: Mapping[str, Runs]) -> list[str]:
    """Methods by targets: loss at dev's best; the mean difference to ours over targets and seeds."""
    methods = list(dict.fromkeys(method for runs in targets.values() for method in runs))
    lines = []
    for method in methods:
        found = [runs.get(method, {}) for runs in targets.values()]
        differences = [
            (_values(each, best)[seed] - _values(runs[OURS], best)[seed])
            for runs, each in zip(targets.values(), found, strict=True)
            for seed in sorted(each.keys() & runs.get(OURS, {}).keys())
        ]
        mean = (statistics.fmean(differences) if differences else math.nan, math.nan)
        cells = [shown(over(each, best)) if each else "-" for each in found]
        lines.append((mean[0], [f"`{method}`", *cells, "" if method == OURS else shown(mean, sign=True)]))
    ordered = [line for _, line in sorted(lines, key=lambda item: (math.isnan(item[0]), item[0]))]
    return table(["method", *targets, "mean difference to ours"], ordered)


def reaching(runs: Runs) -> list[str]:
    """When a method's curve first lies at or below where that of `full` ends, as shares of what `full` took."""
    lines = []
    for method, each in runs.items():
        if method == FULL:
            continue
        seeds = sorted(each.keys() & runs[FULL].keys())
        ratios: list[tuple[float, float, float]] = []
        for seed in seeds:
            mine, full = each[seed], runs[FULL][seed]
            curve, bar = mine["figures"]["curve"], full["figures"]["curve"]["test"][-1]
            at = next((i for i, loss in enumerate(curve["test"]) if loss is not None and loss <= bar), None)
            if at is None:
                continue
            whole = full["figures"]["curve"]
            ratios.append(
                (
                    curve["step"][at] / whole["step"][-1],
                    curve["trained"][at] / whole["trained"][-1],
                    mine["clock"]["processor"][at] / full["clock"]["processor"][-1],
                )
            )
        columns = [shown(interval([r[i] for r in ratios]), 2) for i in range(3)]
        lines.append([f"`{method}`", f"{len(ratios)} of {len(seeds)}", *columns])
    return table(["method", "seeds that reach it", "steps", "samples trained on", "seconds (of this trial)"], lines)


def on_corrupted(runs: Runs) -> list[str]:
    """How much of the weighted loss fell on corrupted samples, beside how much of the candidates they were."""

    def share(weights: Mapping[str, float]) -> float:
        total = sum(weights.values())
        return sum(value for name, value in weights.items() if "(corrupted)" in name) / total if total else math.nan

    lines = [
        [
            f"`{method}`",
            shown(interval([share(r["figures"]["weight"]) for r in each.values()]), 3),
            shown((_mean(each, lambda r: share(r["figures"]["pool_share"])), math.nan), 3),
        ]
        for method, each in runs.items()
        if any(r["figures"]["weight"] for r in each.values())
    ]
    return table(["method", "of the weight", "of the candidates"], lines)


def chosen_rates(groups: Mapping[tuple[Setting, str], Runs]) -> list[str]:
    """Where several learning rates of one setting were run: the loss at the rate that dev chooses, seed by seed."""
    families: dict[tuple[Any, str], dict[float, Runs]] = {}
    for (setting, target), runs in groups.items():
        rest = tuple(getattr(setting, each.name) for each in fields(Setting) if each.name != "lr")
        families.setdefault((rest, target), {})[setting.lr] = runs
    parts: list[str] = []
    for (_, target), by_rate in families.items():
        if len(by_rate) < 2:
            continue
        chosen: dict[str, dict[int, float]] = {}
        rates: dict[str, list[float]] = {}
        for method in dict.fromkeys(name for runs in by_rate.values() for name in runs):
            for seed in sorted({seed for runs in by_rate.values() for seed in runs.get(method, {})}):
                tried = {rate: runs[method][seed] for rate, runs in by_rate.items() if seed in runs.get(method, {})}
                by_itself = methods.METHODS[method].tuned and bool(tried)  # it has tried them within a cell
                if len(tried) < len(by_rate) and not by_itself:
                    continue
                rate = min(tried, key=lambda each: tried[each]["figures"]["best"]["dev"])
                chosen.setdefault(method, {})[seed] = tried[rate]["figures"]["best"]["loss"]
                rates.setdefault(method, []).append(tried[rate]["figures"]["trial"]["lr"])
        lines = [
            [
                f"`{method}`",
                shown(interval(list(values.values()))),
                "" if method == OURS else shown(paired(values, chosen.get(OURS, {})), sign=True),
                ", ".join(f"{rate:.2g}" for rate in rates[method]),
            ]
            for method, values in sorted(chosen.items(), key=lambda item: statistics.fmean(item[1].values()))
        ]
        rates_tried = ", ".join(f"{rate:.2g}" for rate in sorted(by_rate))
        parts += [f"### {target}: learning rate chosen by dev among {rates_tried}", ""]
        parts += [*table(["method", "best", "to ours", "chosen, by seed"], lines), ""]
    return ["## Learning rates", "", *parts] if parts else []


def budgets() -> list[str]:
    return table(["method", "data"], [[f"`{name}`", method.budget] for name, method in methods.CORE.items()])


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]


def best(record: Record) -> float:
    return float(record["figures"]["best"]["loss"])


def end(record: Record) -> float:
    loss = record["figures"]["final"]["loss"]
    return math.inf if loss is None else float(loss)


def over(runs: Mapping[int, Record], figure: Callable[[Record], float]) -> tuple[float, float]:
    """Mean over seeds and half of the interval."""
    return interval(list(_values(runs, figure).values()))


def _values(runs: Mapping[int, Record], figure: Callable[[Record], float]) -> dict[int, float]:
    return {seed: figure(record) for seed, record in sorted(runs.items())}


def _mean(runs: Mapping[int, Record], figure: Callable[[Record], float]) -> float:
    return statistics.fmean(figure(record) for record in runs.values())


def _accuracy(name: str) -> Callable[[Record], float]:
    return lambda record: float(record["figures"]["best"][name])


def _method(record: Record) -> str:
    name: str = record["configuration"]["method"]["name"]
    return name


def _setting(record: Record) -> Setting | None:
    values = record["configuration"]["setting"]
    return Setting(**values) if values.keys() == {each.name for each in fields(Setting)} else None


def _provenance(record: Record) -> dict[tuple[str, str], Any]:
    """What must agree for figures to be compared: components of a method, data of a target, versions of all."""
    config = record["configuration"]
    return {
        ("method", _method(record)): config["method"],
        ("data", config["target"]["name"]): (config["target"], config["data"]),
        ("all", ""): (config["format"], config["versions"]),
    }
