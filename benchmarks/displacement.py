"""How well the affine update foresees the coming step, by the gradient its second moment is predicted from.

    python benchmarks/displacement.py [--steps 60] [--seeds 3] [--lr 1e-3]

The selector weighs candidates before it knows the gradient G(w) that the optimizer will get, so Adam's v_hat
is predicted from a reference gradient. Printed per step of a run on the demo's data with the pre-trained tiny
model: the relative error |d_predicted - d_real| / |d_real| of the displacement of G(w), median over seeds, for

    pool      the sum of all contributions (the default)
    target    the target gradient
    previous  the second moment as the last step left it
    own       G(w) itself, which shows that the map is affine and exact; the rest is v_hat's error
    no offset pool, but momentum and decay left out
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor
from torch.nn import Parameter

import ftw
from ftw.errors import OptimizerStateError
from ftw.experiment import data, models
from ftw.experiment.compare import masses
from ftw.experiment.sources import demo_data
from ftw.optim_state import AdamW

Gradient = dict[Parameter, Tensor]
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
        references: dict[str, Gradient | None] = {
            "pool": gradients(model, batch),
            "target": gradients(model, target[step % len(target)]),
            "previous": None,
        }
        with selector.record(mass=masses(rows)):
            model(**batch).loss.backward()
        selector.apply()
        used = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        predicted: dict[str, Gradient] = {}
        for name, reference in {**references, "own": used}.items():
            try:
                update = AdamW().linearise(optimizer, reference)
            except OptimizerStateError:  # nothing to be stale before the first step
                continue
            predicted[name] = update.displacement(used)
            if name == "pool":
                predicted["no offset"] = {p: -update.scale[p].apply(g) for p, g in used.items()}
        before = {p: p.detach().clone() for p in used}
        optimizer.step()
        optimizer.zero_grad()
        real = {p: p.detach() - before[p] for p in used}
        size = _norm(real)
        for name, displacement in predicted.items():
            error = _norm({p: displacement[p] - real[p] for p in real}) / size
            found.setdefault(name, [float("nan")] * step).append(error)
    selector.close()
    return found


def _norm(tensors: Gradient) -> float:
    return float(torch.stack([t.square().sum() for t in tensors.values()]).sum().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    runs = [errors(seed, arguments.steps, arguments.lr) for seed in range(arguments.seeds)]
    names = list(runs[0])
    print("step" + "".join(f"{name:>12}" for name in names))
    for step in (step for step in SHOWN if step <= arguments.steps):
        row = [statistics.median(run[name][step - 1] for run in runs) for name in names]
        print(f"{step:4d}" + "".join(f"{value:12.3g}" for value in row))


if __name__ == "__main__":
    main()
