"""How well Lion's sign, linearised at the pool's gradient, foresees the step, by the floor of its slope.

    python benchmarks/lion.py [--steps 100] [--seeds 3] [--lr 1e-4]

Demo data, pre-trained tiny Llama, 4 of 16 candidates kept, lion-pytorch's Lion. Median over seeds and over each stretch
of steps, for the displacement of the gradient G(w) that the optimizer really gets:

    flips    share of the entries of u = b1*m + (1-b1) G that have one sign at the pool's gradient and another at G(w)
    error    |predicted - real| / |real|
    cosine   of predicted and real displacement
    sign     the same two for the step that the pool's gradient would make, `-lr sign(u_pool)`, whatever G(w) is
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from lion_pytorch import Lion as LionPytorch
from torch import Tensor
from torch.nn import Parameter

import ftw
from ftw.experiment import data, models
from ftw.experiment.compare import masses
from ftw.experiment.sources import demo_data
from ftw.optim_state import Lion

Gradient = dict[Parameter, Tensor]
FLOORS = (0.0, 0.1, 0.3, 1.0, 2.0, 3.0, 10.0)
STRETCHES = ((2, 5), (6, 15), (16, 100))


def run(seed: int, steps: int, lr: float) -> Iterator[dict[str, float]]:
    """The figures of each step."""
    tokenizer = models.tiny_tokenizer()
    made = demo_data()
    generic = data.encode(made.generic, tokenizer, 256, loss_on_prompt=True).rows
    model, _ = models.tiny(generic, models.Pretraining(), models.cache_folder())
    pool = data.encode(made.pool, tokenizer, 256).rows
    target = data.batches(data.encode(made.target, tokenizer, 256).rows, 8, 0)
    optimizer = LionPytorch(model.parameters(), lr=lr)
    selector = ftw.Selector(model, optimizer, target=target, budget=4)
    for indices in data.pool_order(len(pool), 16, steps, seed).tolist():
        rows = [pool[i] for i in indices]
        batch = data.collate(rows, 0)
        parameters = list(model.parameters())
        reference = dict(zip(parameters, torch.autograd.grad(model(**batch).loss, parameters), strict=True))
        with selector.record(mass=masses(rows)):
            model(**batch).loss.backward()
        selector.apply()
        used = {p: p.grad.clone() for p in parameters if p.grad is not None}
        predicted = {
            f"floor {floor:g}": Lion(floor).linearise(optimizer, reference).displacement(used) for floor in FLOORS
        }
        there, here = _momentum(optimizer, reference), _momentum(optimizer, used)
        predicted["sign"] = {p: -lr * there[p].sign() for p in used}
        old = {p: p.detach().clone() for p in used}
        optimizer.step()
        optimizer.zero_grad()
        real = {p: p.detach() - old[p] for p in used}
        both = sum(int(((there[p] != 0) & (here[p] != 0)).sum()) for p in used)
        found = {"flips": sum(int((there[p] * here[p] < 0).sum()) for p in used) / both}
        for name, displacement in predicted.items():
            found[f"{name}, error"] = _norm({p: displacement[p] - real[p] for p in real}) / _norm(real)
            inner = float(sum((displacement[p] * real[p]).sum(dtype=torch.float64) for p in real))
            found[f"{name}, cosine"] = inner / (_norm(displacement) * _norm(real))
        yield found
    selector.close()


def _momentum(optimizer: torch.optim.Optimizer, gradient: Gradient) -> Gradient:
    """u, at lion-pytorch's default b1 = .9."""
    state = optimizer.state
    return {p: 0.1 * g + (0.9 * state[p]["exp_avg"] if p in state else 0.0) for p, g in gradient.items()}


def _norm(tensors: Gradient) -> float:
    return float(torch.stack([t.square().sum(dtype=torch.float64) for t in tensors.values()]).sum().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()
    runs = [list(run(seed, arguments.steps, arguments.lr)) for seed in range(arguments.seeds)]
    print(f"{'steps':20}" + "".join(f"{f'{first}-{last}':>12}" for first, last in STRETCHES))
    for name in runs[0][0]:
        medians = [
            statistics.median(step[name] for found in runs for step in found[first - 1 : last])
            for first, last in STRETCHES
        ]
        print(f"{name:20}" + "".join(f"{value:12.3g}" for value in medians))


if __name__ == "__main__":
    main()
