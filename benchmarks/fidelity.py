"""Does a prediction rank steps as reality does? Rank correlation of predicted and realised drop of the target's loss.

    python benchmarks/fidelity.py --data FOLDER [--out figures.json] [--figure docs/fidelity.png] [--smoke]

FOLDER holds `<source>.{train,dev,test}.jsonl`; without --data the demo's generated data is taken. A tiny Llama is
fine-tuned by the default selector (AdamW, 4 of 16 candidates, target batches of 8 from `<target>.dev`). At each
checkpoint of each seed the coming pool is recorded, and random selections from it are tried: k of n candidates with
exponential weights. Each is really made: the weighted gradient is written, `optimizer.step()` is called, the target
batch's loss is taken before and after in eval mode, and model and optimizer state are put back. Two settings: weights
sum to n, counted by mass ("one total"), or to n times a factor, log-uniform in [1/4, 4] ("varied total").

Predictions, with C the contributions, g the gradient of that target batch, d = o + M C w:

    vanilla            lr g'C w
    stale Adam         g'M C w, v_hat as the last step left it
    affine             g'M C w, v_hat predicted from the pool's gradient (`reference="pool"`)
    + offset           g'd, the same M: `first_order`
    + curvature        g'd - 1/2 d'H d with H = P^-1: `predicted_drop`
    + EK-FAC           the same with H from `ftw.curvature.EKFAC`, shown the five windows up to the checkpoint
    own gradient       g'd, M and o linearised at the gradient C w itself: the first order of the real displacement
    own + Hessian      the same less 1/2 d'H d with the loss's own Hessian: what is left is third order

Printed per setting: Spearman's correlation within a checkpoint, mean over checkpoints and seeds with its 95 % interval
(Student's t over all of them), the same less that of vanilla, pair by pair, and the same for 16 held-out samples
(`<target>.test`); over the draws of all checkpoints of a seed together, mean over seeds; and the median of
|predicted - realised| / |realised|. The figure has the first by checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import Parameter

import ftw
from ftw.assembly import measure
from ftw.curvature import EKFAC
from ftw.experiment import data, models
from ftw.experiment.compare import masses
from ftw.experiment.data import Row, Sample
from ftw.experiment.sources import demo_data
from ftw.measurement import Measurement
from ftw.optim_state import AdamW

SOURCES = (
    *("aqua", "commonsenseqa", "gsm8k", "instruct_basic", "math", "mmlu", "scan"),
    *("shakespeare", "svamp", "wiki", "xquad_en", "xquad_de"),
)
PREDICTIONS = (
    "vanilla",
    "stale Adam",
    "affine",
    "+ offset",
    "+ curvature",
    "+ EK-FAC",
    "own gradient",
    "own + Hessian",
)
SETTINGS = ("one total", "varied total")
CANDIDATES, BUDGET, LENGTH, HELD_OUT = 16, 4, 256, 16
WINDOWS = 5
"""That EK-FAC learns from."""

Gradient = dict[Parameter, Tensor]


@dataclass(frozen=True)
class Material:
    """Encoded rows in their roles."""

    pool: list[Row]
    target: list[Row]
    held_out: list[Row]
    generic: list[Row]


@dataclass(frozen=True)
class Draws:
    """Random selections at one checkpoint: predictions by name, and what the real steps did, in nats."""

    seed: int
    step: int
    setting: str
    predicted: dict[str, list[float]]
    realised: list[float]  # of the target batch
    held_out: list[float]


def material(folder: Path | None, target: str, per_source: int) -> Material:
    """The rows; of a folder, the first `per_source` training samples of each source, a fifth of them generic."""
    tokenizer = models.tiny_tokenizer()

    def rows(samples: Sequence[Sample], **options: Any) -> list[Row]:
        return data.encode(samples, tokenizer, LENGTH, **options).rows

    if folder is None:
        made = demo_data()
        return Material(
            rows(made.pool), rows(made.target), rows(made.test[:HELD_OUT]), rows(made.generic, loss_on_prompt=True)
        )
    files = [folder / f"{source}.train.jsonl" for source in SOURCES]
    offered = [sample for path in files for sample in data.read_samples(path)[:per_source]]
    pool, generic = data.split_off(offered, 0.2, 0)
    aims, judged = (data.read_samples(folder / f"{target}.{part}.jsonl") for part in ("dev", "test"))
    return Material(rows(pool), rows(aims), rows(judged[:HELD_OUT]), rows(generic, loss_on_prompt=True))


class Saved:
    """Model and optimizer as they are now, to go back to."""

    def __init__(self, parameters: Sequence[Parameter], optimizer: torch.optim.Optimizer) -> None:
        tensors = [*parameters, *(t for p in parameters for t in optimizer.state[p].values())]
        self._kept = [(t, t.detach().clone()) for t in tensors]
        self.values = {p: kept for p, (_, kept) in zip(parameters, self._kept, strict=False)}

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self._kept:
            tensor.copy_(value)


def run(seed: int, rows: Material, options: argparse.Namespace) -> Iterator[Draws]:
    """Fine-tunes with the default selector; at each checkpoint, tries random selections of the coming pool."""
    pretraining = models.Pretraining(steps=3) if options.smoke else models.Pretraining()
    model, _ = models.tiny(rows.generic, pretraining, None if options.smoke else models.cache_folder())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    target = data.batches(rows.target, 8, 0)
    held_out = data.collate(rows.held_out, 0)
    selector = ftw.Selector(model, optimizer, target=target, budget=BUDGET, seed=seed, gradients="factorized")
    ekfac = EKFAC(refresh=WINDOWS)
    order = data.pool_order(len(rows.pool), CANDIDATES, max(options.checkpoints) + 1, seed)
    for step, indices in enumerate(order.tolist()):
        pool = [rows.pool[i] for i in indices]
        with selector.record(mass=masses(pool)):
            model(**data.collate(pool, 0)).loss.backward()
        if any(0 <= checkpoint - step < WINDOWS for checkpoint in options.checkpoints):
            ekfac.observe(selector._recorder.contributions(), selector._recorder.parameters)
        if step in options.checkpoints:
            batches = target[step % len(target)], held_out
            yield from tried(selector, ekfac, batches, masses(pool), seed, step, options.draws)
        selector.apply()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    selector.close()


def tried(
    selector: ftw.Selector,
    ekfac: EKFAC,
    batches: tuple[dict[str, Tensor], dict[str, Tensor]],  # that g is of, and held out
    mass: Tensor,
    seed: int,
    step: int,
    draws: int,
) -> Iterator[Draws]:
    """Random selections of the recorded window, foreseen and made; everything is put back."""
    model, optimizer, preconditioner = selector.model, selector.optimizer, AdamW()
    parameters = list(model.parameters())
    contributions = selector._recorder.contributions()
    g = dict(zip(parameters, torch.autograd.grad(model(**batches[0]).loss, parameters), strict=True))

    def measured(geometry: str, reference: str, curvature: EKFAC | None = None) -> Measurement:
        return measure(contributions, optimizer, preconditioner, g, {}, geometry, reference, curvature=curvature)

    pool = measured("vanilla", "pool")  # `chosen` is vanilla, `true` is under M
    stale = measured("curvature", "previous")
    curved = measured("curvature", "pool", ekfac)
    saved, generator = Saved(parameters, optimizer), torch.Generator().manual_seed(1000 * seed + step)
    before = [loss_of(model, batch) for batch in batches]
    for setting in SETTINGS:
        predicted: dict[str, list[float]] = {name: [] for name in PREDICTIONS}
        realised: tuple[list[float], list[float]] = ([], [])
        for _ in range(draws):
            w = drawn(mass, setting, generator)
            gradient = contributions.combine(w)
            d = {p: -x for p, x in preconditioner.linearise(optimizer, gradient).displacement(gradient).items()}
            own = sum(float((g[p] * d[p]).sum(dtype=torch.float64)) for p in d)
            first = pool.first_order(w)
            values = (
                float(pool.chosen.alignment @ w),
                float(stale.true.alignment @ w),
                float(pool.true.alignment @ w),
                first,
                first - sum(pool.curvature(w)),
                first - sum(curved.curvature(w)),
                own,
                own - bend(model, batches[0], d, before[0]) / 2,
            )
            saved.restore()
            for name, value in zip(PREDICTIONS, values, strict=True):
                predicted[name].append(value)
            for p in parameters:
                p.grad = gradient[p]
            optimizer.step()
            for drops, was, batch in zip(realised, before, batches, strict=True):
                drops.append(was - loss_of(model, batch))
            saved.restore()
        optimizer.zero_grad()
        yield Draws(seed, step, setting, predicted, *realised)


def drawn(mass: Tensor, setting: str, generator: torch.Generator) -> Tensor:  # -> (n,) float64
    """`mu'w = n` on k random candidates; times a random factor where the total is varied."""
    n = len(mass)
    w = torch.zeros(n, dtype=torch.float64)
    chosen = torch.randperm(n, generator=generator)[:BUDGET]
    w[chosen] = torch.empty(BUDGET, dtype=torch.float64).exponential_(generator=generator)
    w *= n / (mass @ w)
    if setting == "varied total":
        w *= 4.0 ** float(torch.rand((), generator=generator) * 2 - 1)
    return w


@torch.no_grad()
def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """In eval mode, summed in float64: drops are small differences."""
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    model.train()
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels, ignore_index=-100))


@torch.no_grad()
def bend(model: nn.Module, batch: Mapping[str, Tensor], d: Gradient, here: float, share: float = 0.25) -> float:
    """`d'H d` with the loss's Hessian: a second difference over +-`share` of the step. `here`: the loss now.

    The parameters are left at -share; restore them.
    """
    around = []
    for distance in (share, -2 * share):
        for p, x in d.items():
            p.add_(x, alpha=distance)
        around.append(loss_of(model, batch))
    return (sum(around) - 2 * here) / share**2


def correlation(predicted: Sequence[float], realised: Sequence[float]) -> float:
    return float(stats.spearmanr(predicted, realised).statistic)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half of its 95 % interval."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error


def summary(found: Sequence[Draws], setting: str, name: str) -> dict[str, tuple[float, float]]:
    """The columns of the table: each a mean and half of its interval."""
    here = [each for each in found if each.setting == setting]
    by_seed: dict[int, list[Draws]] = {}
    for each in here:
        by_seed.setdefault(each.seed, []).append(each)
    together = [
        correlation([v for d in runs for v in d.predicted[name]], [v for d in runs for v in d.realised])
        for runs in by_seed.values()
    ]
    errors = [
        statistics.median(abs(p - r) / abs(r) for p, r in zip(d.predicted[name], d.realised, strict=True) if r)
        for d in here
    ]
    inside = [correlation(d.predicted[name], d.realised) for d in here]
    vanilla = [correlation(d.predicted["vanilla"], d.realised) for d in here]
    return {
        "within a checkpoint": interval(inside),
        "over vanilla": interval([mine - theirs for mine, theirs in zip(inside, vanilla, strict=True)]),
        "held out": interval([correlation(d.predicted[name], d.held_out) for d in here]),
        "across checkpoints": interval(together),
        "relative error": interval(errors),
    }


def show(found: Sequence[Draws]) -> None:
    columns = list(summary(found, SETTINGS[0], PREDICTIONS[0]))
    for setting in SETTINGS:
        print(f"\n| {setting} | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for name in PREDICTIONS:
            cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in summary(found, setting, name).values()]
            print(f"| {name} | " + " | ".join(cells) + " |")


def draw(path: Path, found: Sequence[Draws]) -> None:
    """Correlation by checkpoint for both settings; bars: standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    steps = sorted({each.step for each in found})
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for at, name in enumerate(PREDICTIONS):
            inside = {
                (d.seed, d.step): correlation(d.predicted[name], d.realised) for d in found if d.setting == setting
            }
            by_step = [[value for (_, at_step), value in inside.items() if at_step == step] for step in steps]
            means = [statistics.fmean(values) for values in by_step]
            errors = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in by_step]
            shifted = [step * 1.025 ** (at - len(PREDICTIONS) / 2) for step in steps]  # side by side
            axis.errorbar(shifted, means, yerr=errors, marker="o", ms=3.5, lw=1.2, capsize=2, label=name)
        axis.axhline(0.0, color="grey", lw=0.8)
        axis.set(xscale="log", xlabel="steps taken", title=setting)
        axis.set_xticks(steps, [str(step) for step in steps], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rank correlation with the realised drop, standard error")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder of JSONL files; default: generated data")
    parser.add_argument("--target", default="svamp", help="source that is trained for")
    parser.add_argument("--per-source", type=int, default=300, help="training samples taken of each source")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[5, 10, 20, 40, 80], help="steps taken")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=24, help="random selections per checkpoint and setting")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few steps of one seed: does it run")
    parser.add_argument("--out", type=Path, default=None, help="write every draw and the table as JSON to this file")
    parser.add_argument("--figure", type=Path, default=None, help="write the plot (PNG) here")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.checkpoints, options.seeds, options.draws, options.per_source = [1, 2], 2, 4, 20
    if min(options.checkpoints) < 1:
        parser.error(f"--checkpoints {options.checkpoints}: steps from 1 up are needed; before the first, no state.")
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    rows = material(options.data, options.target, options.per_source)
    found = [each for seed in range(options.seeds) for each in run(seed, rows, options)]
    show(found)
    if options.out is not None:
        table = {s: {name: summary(found, s, name) for name in PREDICTIONS} for s in SETTINGS}
        settings = {k: v for k, v in vars(options).items() if k not in ("data", "out", "figure")}
        written = {"settings": settings, "table": table, "draws": [vars(each) for each in found]}
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    if options.figure is not None:
        draw(options.figure, found)
    count = sum(len(each.realised) for each in found)
    print(f"\n{count} steps made and undone, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
