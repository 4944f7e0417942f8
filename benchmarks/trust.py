"""Trust in the curvature of the utility, fixed and adaptive, and curvature models: do they foresee the step?

    python benchmarks/trust.py [--steps 100] [--seeds 3] [--methods match "trust 1" "trust adaptive" kfac]

Demo data, pre-trained tiny Llama, AdamW 1e-3, 4 of 16 candidates, every step watched. A row is a way to decide:
`match` (the default objective), `utility` with the optimizer's own curvature divided by a fixed or adaptive trust, or
with K-FAC or EK-FAC in its place. Printed over seeds, mean and standard deviation:

    loss      mean loss per response token of the test set at the end
    ratio     median over steps of realised over predicted drop of the target batch's loss; 1 is right
    error     median over steps of |realised - predicted| / |realised|
    first     the same error of the first-order part alone
    cosine    median over steps, predicted against real displacement
    trust     at the end (geometric mean)
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch

import ftw
from ftw.experiment import data, models
from ftw.experiment.compare import Settings, masses, mean_loss
from ftw.experiment.sources import demo_data
from ftw.fidelity import Fidelity

METHODS: dict[str, dict[str, Any]] = {
    "match": {},
    **{f"trust {trust:g}": {"objective": "utility", "trust": trust} for trust in (0.1, 1.0, 10.0, 100.0)},
    "trust adaptive": {"objective": "utility", "trust": "adaptive"},
    "at most, trust 1": {"objective": "utility", "total": "at_most"},
    "at most, adaptive": {"objective": "utility", "total": "at_most", "trust": "adaptive"},
    "kfac": {"objective": "utility", "curvature": "kfac"},
    "kfac, adaptive": {"objective": "utility", "curvature": "kfac", "trust": "adaptive"},
    "ekfac": {"objective": "utility", "curvature": "ekfac"},
}


def run(options: dict[str, Any], seed: int, steps: int, lr: float) -> tuple[float, list[Fidelity], float]:
    """Test loss at the end, the watched steps, and trust at the end."""
    tokenizer = models.tiny_tokenizer()
    made = demo_data()
    generic = data.encode(made.generic, tokenizer, 256, loss_on_prompt=True).rows
    model, _ = models.tiny(generic, models.Pretraining(), models.cache_folder())
    model.train()
    pool = data.encode(made.pool, tokenizer, 256).rows
    test = data.encode(made.test, tokenizer, 256).rows
    target = data.batches(data.encode(made.target, tokenizer, 256).rows, 8, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    selector = ftw.Selector(model, optimizer, target=target, budget=4, watch=1, seed=seed, **options)
    seen: list[Fidelity] = []
    for indices in data.pool_order(len(pool), 16, steps, seed).tolist():
        rows = [pool[i] for i in indices]
        with selector.record(mass=masses(rows)):
            model(**data.collate(rows, 0)).loss.backward()
        selector.apply()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if selector.fidelity is not None:
            seen.append(selector.fidelity)
    trust = selector.policy.trust
    selector.close()
    return mean_loss(model, test, Settings(steps=steps, pool_size=16, budget=4, lr=lr)), seen, trust


def summary(seen: list[Fidelity], first: int) -> dict[str, float]:
    """Medians over the steps from `first` on."""
    kept = [f for f in seen if f.step >= first and f.realised_drop]
    return {
        "ratio": statistics.median(f.ratio for f in kept),
        "error": statistics.median(abs(f.realised_drop - f.predicted_drop) / abs(f.realised_drop) for f in kept),
        "first": statistics.median(abs(f.realised_drop - f.first_order) / abs(f.realised_drop) for f in kept),
        "cosine": statistics.median(f.cosine for f in kept),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--from-step", type=int, default=6, help="first step of the medians; 6: after the warm-up")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    names = ("ratio", "error", "first", "cosine")
    print("| method | loss | " + " | ".join(names) + " | trust | s a step |")
    print("|---" * (len(names) + 4) + "|")
    for name in arguments.methods:
        begun = time.perf_counter()
        runs = [run(METHODS[name], seed, arguments.steps, arguments.lr) for seed in range(arguments.seeds)]
        seconds = (time.perf_counter() - begun) / arguments.seeds / arguments.steps
        numbers = [summary(seen, arguments.from_step) for _, seen, _ in runs]
        losses = [loss for loss, _, _ in runs]
        cells = [f"{statistics.mean(losses):.4f} ({statistics.pstdev(losses):.4f})"]
        cells += [f"{statistics.mean(each[column] for each in numbers):.2f}" for column in names]
        cells += [f"{math.exp(statistics.mean(math.log(trust) for _, _, trust in runs)):.3g}", f"{seconds:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
