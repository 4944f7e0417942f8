"""How well the affine map foresees a real step away from its reference, optimizer by optimizer.

    python benchmarks/away.py [--data FOLDER] [--steps 40] [--seeds 3] [--only muon]

A tiny Llama is fine-tuned; each step takes the gradient G of a random quarter of 16 candidates. The map is linearised
at the gradient of all 16, as the selector does before it knows G(w). FOLDER is that of `fidelity.py`; without it the
demo's data is taken. Muon steps the matrices, AdamW the rest; its rows are of the matrices alone. Printed by stretch
of steps, median over steps and seeds, for the displacement by G of all parameters together:

    error    |predicted - real| / |real|
    cosine   of predicted and real displacement
    at G     the error where the map is linearised at G itself: what is left is rounding
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fidelity import CANDIDATES, Material, material
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.experiment import data, models
from ftw.optim_state import Muon, Preconditioner, preconditioner_for

Gradient = dict[Parameter, Tensor]
QUARTER = CANDIDATES // 4
STRETCHES = ((2, 5), (6, 15), (16, 40))
NONE = 1e9
"""A clipping threshold that is never reached."""


@dataclass(frozen=True)
class Case:
    """One row. `matrices`: the optimizer gets those alone, and AdamW the rest."""

    name: str
    make: Callable[[list[Parameter]], Optimizer]
    model: Preconditioner | None = None  # None: by the optimizer's type
    matrices: bool = False


def cases() -> Iterator[Case]:
    from lion_pytorch import Lion
    from transformers.optimization import Adafactor as HFAdafactor

    optim: Any = torch.optim
    yield Case("SGD, momentum .9", lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9))
    yield Case("AdamW", lambda ps: optim.AdamW(ps, lr=1e-3))
    yield Case("RMSprop", lambda ps: optim.RMSprop(ps, lr=1e-3))
    yield Case("Adagrad", lambda ps: optim.Adagrad(ps, lr=1e-2))
    yield Case("Lion", lambda ps: Lion(ps, lr=1e-4))
    yield Case("Adafactor", lambda ps: optim.Adafactor(ps, lr=1e-2))
    yield Case("Adafactor, no clipping", lambda ps: optim.Adafactor(ps, lr=1e-2, d=NONE))
    yield Case("transformers' Adafactor", lambda ps: HFAdafactor(ps))
    yield Case("transformers' Adafactor, no clipping", lambda ps: HFAdafactor(ps, clip_threshold=NONE))
    if hasattr(optim, "Muon"):
        yield Case("Muon", lambda ps: optim.Muon(ps, lr=1e-2), matrices=True)
        yield Case("Muon, floor 0", lambda ps: optim.Muon(ps, lr=1e-2), Muon(floor=0.0), matrices=True)


def run(case: Case, rows: Material, seed: int, steps: int) -> Iterator[dict[str, float]]:
    """The figures of each step."""
    model, _ = models.tiny(rows.generic, models.Pretraining(), models.cache_folder())
    chosen = [p for p in model.parameters() if p.dim() == 2 or not case.matrices]
    others = [p for p in model.parameters() if p.dim() != 2 and case.matrices]
    optimizer = case.make(chosen)
    second = torch.optim.AdamW(others, lr=1e-3) if others else None
    ours = preconditioner_for(optimizer) if case.model is None else case.model
    generator = torch.Generator().manual_seed(seed)
    for indices in data.pool_order(len(rows.pool), CANDIDATES, steps, seed).tolist():
        pool = [rows.pool[i] for i in indices]
        quarter = [pool[i] for i in torch.randperm(CANDIDATES, generator=generator)[:QUARTER].tolist()]
        reference, used = gradients(model, pool), gradients(model, quarter)
        predicted = {
            name: ours.linearise(optimizer, {p: at[p] for p in chosen}).displacement({p: used[p] for p in chosen})
            for name, at in (("pool", reference), ("own", used))
        }
        old = {p: p.detach().clone() for p in chosen}
        for p, gradient in used.items():
            p.grad = gradient
        for each in (optimizer, second):
            if each is not None:
                each.step()
        real = {p: p.detach() - old[p] for p in chosen}
        inner = sum(float((predicted["pool"][p] * real[p]).sum(dtype=torch.float64)) for p in chosen)
        gap = {name: {p: d[p] - real[p] for p in chosen} for name, d in predicted.items()}
        yield {
            "error": norm(gap["pool"]) / norm(real),
            "cosine": inner / (norm(predicted["pool"]) * norm(real)),
            "at G": norm(gap["own"]) / norm(real),
        }


def gradients(model: nn.Module, rows: list[data.Row]) -> Gradient:
    parameters = list(model.parameters())
    return dict(zip(parameters, torch.autograd.grad(model(**data.collate(rows, 0)).loss, parameters), strict=True))


def norm(tensors: Gradient) -> float:
    return float(torch.stack([t.square().sum(dtype=torch.float64) for t in tensors.values()]).sum().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder of JSONL files; default: generated data")
    parser.add_argument("--target", default="svamp", help="whose development samples are left out of the pool")
    parser.add_argument("--per-source", type=int, default=300, help="training samples taken of each source")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="optimizers whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = material(arguments.data, arguments.target, arguments.per_source)
    stretches = [(first, min(last, arguments.steps)) for first, last in STRETCHES if first <= arguments.steps]
    heads = [f"{name}, steps {first}-{last}" for name in ("error", "cosine") for first, last in stretches]
    print("| optimizer | " + " | ".join(heads) + " | at G |")
    print("|---" * (len(heads) + 2) + "|")
    for case in cases():
        if arguments.only.lower() not in case.name.lower():
            continue
        runs = [list(run(case, rows, seed, arguments.steps)) for seed in range(arguments.seeds)]
        cells = [
            f"{statistics.median(step[name] for found in runs for step in found[first - 1 : last]):.2g}"
            for name in ("error", "cosine")
            for first, last in stretches
        ]
        own = statistics.median(step["at G"] for found in runs for step in found)
        print(f"| {case.name} | " + " | ".join(cells) + f" | {own:.1g} |", flush=True)


if __name__ == "__main__":
    main()
