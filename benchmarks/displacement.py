"""How well the affine update foresees the coming step, by the gradient its second moment is predicted from.

    python benchmarks/displacement.py [--steps 100] [--seeds 3] [--lr 1e-3] [--out docs/displacement.png]

The selector weighs candidates before it knows the gradient G(w) that the optimizer will get, so Adam's v_hat
is predicted from a reference gradient. Printed per step of a run on the demo's data with the pre-trained tiny
model: the relative error |d_predicted - d_real| / |d_real| of the displacement of G(w), median over seeds, for

    pool      the sum of all contributions (the default)
    target    the target gradient
    previous  the second moment as the last step left it
    previous+ the same with `AdamW(floor=0.01)`, target+ likewise
    again     weights decided a second time, with G(w) of the first decision as reference, the pool's gradient where it
              is zero (`relinearise=True`); the error is that of the second weights' own displacement
    unfilled  the same with plain G(w) as reference
    own       G(w) itself, which shows that the map is affine and exact; the rest is v_hat's error
    no offset pool, but momentum and decay left out

The figure has the same numbers, with the range over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

import ftw
from ftw.assembly import measure
from ftw.errors import OptimizerStateError
from ftw.experiment import data, models
from ftw.experiment.compare import masses
from ftw.experiment.sources import demo_data
from ftw.optim_state import AdamW

Gradient = dict[Parameter, Tensor]
FLOOR = 0.01
SHOWN = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100)


def gradients(model: torch.nn.Module, batch: dict[str, Tensor]) -> Gradient:
    params = list(model.parameters())
    return dict(zip(params, torch.autograd.grad(model(**batch).loss, params), strict=True))


def errors(seed: int, steps: int, lr: float) -> dict[str, list[float]]:
    tokenizer = models.tiny_tokenizer()
    made = demo_data()
    generic = data.encode(made.generic, tokenizer, 256, loss_on_prompt=True).rows
    model, _ = models.tiny(generic, models.Pretraining(), models.cache_folder())
    pool = data.encode(made.pool, tokenizer, 256).rows
    target = data.batches(data.encode(made.target, tokenizer, 256).rows, 8, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    selector = ftw.Selector(model, optimizer, target=target, budget=4)
    found: dict[str, list[float]] = {}
    for step, indices in enumerate(data.pool_order(len(pool), 16, steps, seed).tolist()):
        rows = [pool[i] for i in indices]
        batch = data.collate(rows, 0)
        g = gradients(model, target[step % len(target)])
        references: dict[str, Gradient | None] = {"pool": gradients(model, batch), "target": g, "previous": None}
        with selector.record(mass=masses(rows)):
            model(**batch).loss.backward()
        selector.select()
        twice = {
            name: decided_again(selector, optimizer, g, masses(rows), filled)
            for name, filled in (("again", True), ("unfilled", False))
        }
        selector.apply()
        used = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        predicted: dict[str, Gradient] = {}
        for name, reference in {**references, "own": used}.items():
            try:
                update = AdamW().linearise(optimizer, reference)
            except OptimizerStateError:  # nothing to be stale before the first step
                continue
            predicted[name] = update.displacement(used)
            if name in ("target", "previous"):
                predicted[f"{name}+"] = AdamW(floor=FLOOR).linearise(optimizer, reference).displacement(used)
            if name == "pool":
                predicted["no offset"] = {p: -update.scale[p].apply(g) for p, g in used.items()}
        of_step: dict[str, float] = {}
        for name, (reference, second) in twice.items():
            # The real displacement of weights that the run does not take is that of its own reference: see `own`.
            foreseen = AdamW().linearise(optimizer, reference).displacement(second)
            real = AdamW().linearise(optimizer, second).displacement(second)
            of_step[name] = _norm({p: foreseen[p] - real[p] for p in real}) / _norm(real)
        before = {p: p.detach().clone() for p in used}
        optimizer.step()
        optimizer.zero_grad()
        real = {p: p.detach() - before[p] for p in used}
        size = _norm(real)
        of_step |= {name: _norm({p: d[p] - real[p] for p in real}) / size for name, d in predicted.items()}
        for name, error in of_step.items():
            found.setdefault(name, [float("nan")] * step).append(error)
    selector.close()
    return found


def decided_again(
    selector: ftw.Selector, optimizer: torch.optim.Optimizer, target: Gradient, mass: Tensor, filled: bool
) -> tuple[Gradient, Gradient]:
    """Reference and G(w) of the second decision, as `relinearise=True` makes it."""
    contributions = selector._recorder.contributions()
    assert selector._decided is not None
    first = contributions.combine(selector._decided.selection.weights)
    if filled:
        pool = contributions.combine()
        first = {p: torch.where(first[p] == 0, pool[p], first[p]) for p in first}
    numbers = measure(contributions, optimizer, AdamW(), target, {}, "curvature", "pool", first)
    second = selector.policy.decide(numbers, "curvature", mass, torch.Generator())
    return first, contributions.combine(second.weights)


def _norm(tensors: Gradient) -> float:
    return float(torch.stack([t.square().sum() for t in tensors.values()]).sum().sqrt())


def draw(path: Path, runs: list[dict[str, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in runs[0]:
        columns = list(zip(*(run[name] for run in runs), strict=True))
        steps = range(1, len(columns) + 1)
        style = "--" if name.endswith("+") else "-"
        (line,) = axes.plot(steps, [statistics.median(c) for c in columns], style, label=name, linewidth=1.5)
        axes.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axvline(5.5, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("step (dotted: end of the default warm-up)")
    axes.set_ylabel("relative error of the displacement")
    axes.set_title(f"AdamW: predicted against real step, median and range of {len(runs)} seeds")
    axes.legend(ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=None, help="write the figure (PNG) here")
    arguments = parser.parse_args()
    runs = [errors(seed, arguments.steps, arguments.lr) for seed in range(arguments.seeds)]
    names = list(runs[0])
    print("step" + "".join(f"{name:>12}" for name in names))
    worst = [max(max(run[name][5:], default=float("nan")) for run in runs) for name in names]
    for step in (step for step in SHOWN if step <= arguments.steps):
        row = [statistics.median(run[name][step - 1] for run in runs) for name in names]
        print(f"{step:4d}" + "".join(f"{value:12.3g}" for value in row))
    print("worst of any seed, from step 6 on:\n    " + "".join(f"{value:12.3g}" for value in worst))
    if arguments.out is not None:
        draw(arguments.out, runs)


if __name__ == "__main__":
    main()
