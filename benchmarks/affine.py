"""How exact the affine maps are: every optimizer and option against its real `step()`.

    python benchmarks/affine.py [--seeds 5] [--steps 20] [--only adam] [--out affine.json]

Runs of 20 steps in float64 with gradients of varying size, parameters of several shapes in three groups with learning
rate, decay, betas and alpha of their own, drawn anew for each seed, and a parameter that is frozen. Printed as a
Markdown table, the largest over seeds, steps and parameters:

    at G     error of the map that was linearised at the gradient used: largest entry, relative to the largest entry of
             `|o| + |M G|`, less the rounding of the new parameter when it is stored
    off 10%  |predicted - real| / |real| (Euclidean), linearised at a reference that differs from G by a tenth of each
             entry's size, median over the later half of the steps; nothing where the map does not depend on a reference

and once more in short, a line for each optimizer.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ftw.optim_state import Identity, Preconditioner, preconditioner_for
from tests import optimizers as tables
from tests.unit import test_structured_optimizers as structured

ROUNDED = "computes in float32"
SHAPES = ((6, 5), (7,), (), (4, 3, 2), (3, 8), (1, 5))
MATRICES = ((6, 5), (5, 8), (4, 4), (48, 32), (1, 5))
LARGE = ((64, 80), (7,), (128, 32))  # 8-bit state starts at 4096 entries


@dataclass(frozen=True)
class Row:
    """One line of the table. `reason`: why the map is not exact, where it is not."""

    optimizer: str
    option: str
    make: Callable[..., Optimizer]
    options: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    dtype: torch.dtype = torch.float64
    reason: str = ""
    vanilla: bool = False


def rows() -> Iterator[Row]:
    yield Row("identity", "of plain SGD", torch.optim.SGD, {"weight_decay": 0.0}, vanilla=True)
    for _, cls, table in tables.TORCH:
        yield from (Row(cls.__name__, name, cls, options) for name, options in table.items())
    for full_name, where in (("lion_pytorch.Lion", ""), ("lion_pytorch.foreach.Lion", "foreach, ")):
        for name, options in tables.LION_OPTIONS.items():
            yield from _installed("Lion", f"{where}{name}", full_name, options)
    for name, options in structured.ADAFACTOR_OPTIONS.items():
        yield Row("Adafactor", name, torch.optim.Adafactor, options)
    for name, options in structured.HF_OPTIONS.items():
        yield from _installed("transformers Adafactor", name, "transformers.optimization.Adafactor", options)
    muon = Row("Muon", "", getattr(torch.optim, "Muon", torch.optim.SGD), {}, MATRICES, reason="iterates in bfloat16")
    if hasattr(torch.optim, "Muon"):
        yield from (replace(muon, option=name, options=o) for name, o in structured.MUON_OPTIONS.items())
    for name in ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8"):
        yield from _installed("torchao", name, f"torchao.optim.{name}", {}, LARGE, torch.float32, ROUNDED)
    for name in ("Adam", "Adam8bit", "AdamW", "AdamW8bit", "Lion", "Lion8bit"):
        yield from _installed("bitsandbytes", name, f"bitsandbytes.optim.{name}", {}, LARGE, torch.float32, ROUNDED)
    tables.let_capturable_onto_the_cpu()
    for _, cls in tables.COUNTED:
        why = "" if cls is torch.optim.RMSprop else "works out its scalars in float32"  # its scalars know no counter
        yield Row(cls.__name__, "capturable", cls, {"capturable": True}, reason=why)
    half = "rounds parameters and state to 8 bits of mantissa"
    for cls in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        yield Row(cls.__name__, "all in bfloat16", cls, {}, dtype=torch.bfloat16, reason=half)


def _installed(optimizer: str, option: str, cls: str, options: dict[str, Any], *rest: Any) -> Iterator[Row]:
    module, _, name = cls.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except ImportError:
        print(f"left out: {optimizer}, {option} ({module} is not installed)", file=sys.stderr)
        return
    yield Row(optimizer, option, made, options, *rest)


def measure(row: Row, seed: int, steps: int) -> tuple[float, float]:
    """`at G` and `off 10%` of one run."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    frozen = Parameter(draw((3, 2)).to(row.dtype), requires_grad=False)
    parameters = [Parameter((0.1 * draw(shape)).to(row.dtype)) for shape in row.shapes]
    optimizer = _optimizer(row, [*parameters, frozen], random.Random(seed))
    preconditioner: Preconditioner = Identity() if row.vanilla else preconditioner_for(optimizer)
    before_all, worst, gaps = frozen.detach().clone(), 0.0, []
    for step in range(steps):
        size = 10.0 ** float(draw(()) / 2)
        used = {p: (draw(tuple(p.shape)) * size).to(row.dtype) for p in parameters}
        near = {p: g * (1 + 0.1 * draw(tuple(p.shape))).to(row.dtype) for p, g in used.items()}
        update = preconditioner.linearise(optimizer, used)
        predicted = update.displacement(used)
        away = preconditioner.linearise(optimizer, near).displacement(used)
        old = {p: p.detach().clone() for p in parameters}
        for p, g in used.items():
            p.grad = g.clone()
        optimizer.step()
        real = {p: p.detach().double() - old[p].double() for p in parameters}
        for p in parameters:
            ulp = torch.finfo(p.dtype).eps * torch.maximum(p.detach().abs(), old[p].abs()).double()
            error = ((predicted[p].double() - real[p]).abs() - ulp).clamp_min(0).max()
            terms = update.offset[p].abs() + update.scale[p].apply(used[p].to(update.offset[p].dtype)).abs()
            worst = max(worst, float(error / terms.max()))
        if step >= steps // 2:
            gaps.append(_norm({p: away[p].double() - real[p] for p in real}) / _norm(real))
    assert torch.equal(frozen, before_all), "a frozen parameter moved"
    return worst, statistics.median(gaps)


def _optimizer(row: Row, parameters: list[Parameter], rng: random.Random) -> Optimizer:
    """Three groups, each with whatever of its hyper-parameters the option leaves free drawn at random."""
    known = inspect.signature(row.make).parameters
    groups = []
    for start in range(3):
        drawn = {
            "lr": 10.0 ** rng.uniform(-3, -0.5),
            "weight_decay": rng.choice([0.0, rng.uniform(0.01, 0.3)]),
            "betas": (rng.uniform(0.5, 0.95), rng.uniform(0.5, 0.999)),
            "alpha": rng.uniform(0.5, 0.99),
        }
        taken = {
            **row.options,
            **({"lr": None} if known.get("relative_step") else {}),
        }  # transformers: a step of its own
        free = {key: value for key, value in drawn.items() if key in known and key not in taken}
        groups.append({"params": parameters[start::3], **free})
    options = dict(row.options)
    if known["lr"].default is inspect.Parameter.empty or row.make is torch.optim.SGD:
        options.setdefault("lr", 0.1)
    return row.make(groups, **options)


def _norm(tensors: dict[Parameter, Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors.values()]).sum().sqrt())


def _shown(gaps: list[float | None]) -> str:
    """A figure, or the range of several."""
    known = sorted(gap for gap in gaps if gap is not None)
    if not known:
        return ""
    low, high = f"{known[0]:.2g}", f"{known[-1]:.2g}"
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="optimizers whose name holds this")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # torchao compiles its step; what it computes is the same without
    found: list[dict[str, Any]] = []
    print("| optimizer | option | at G | off 10% | not exact because it |\n|---|---|---|---|---|")
    for row in rows():
        if arguments.only.lower() not in row.optimizer.lower():
            continue
        runs = [measure(row, seed, arguments.steps) for seed in range(arguments.seeds)]
        at, off = max(run[0] for run in runs), statistics.median(run[1] for run in runs)
        away = None if off < 1e-9 else off
        print(f"| {row.optimizer} | {row.option} | {at:.1e} | {_shown([away])} | {row.reason} |", flush=True)
        found.append({"optimizer": row.optimizer, "option": row.option, "at": at, "off": away, "reason": row.reason})
    print("\n| optimizer | options | at G | off 10% | not exact because it |\n|---|---|---|---|---|")
    for optimizer, reason in dict.fromkeys((each["optimizer"], each["reason"]) for each in found):
        those = [each for each in found if (each["optimizer"], each["reason"]) == (optimizer, reason)]
        worst = max(each["at"] for each in those)
        print(f"| {optimizer} | {len(those)} | {worst:.1e} | {_shown([each['off'] for each in those])} | {reason} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
