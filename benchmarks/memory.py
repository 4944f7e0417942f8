"""Peak memory of a step with selection over that of a plain step on the same pool.

    python benchmarks/memory.py [--tokens 256] [--pool 16] [--cap-mb 96] [--cases lora full] [--out figures.json]
    python benchmarks/memory.py --preset qwen3-0.6b --dtype bf16 --device cuda --tokens 2048

Each figure comes from a process of its own, so that no allocator or cache is warm from another. What is counted is
torch's own: on the CPU every allocation and release that the profiler reports, from before the model is built, so that
the running sum is the bytes of live tensors, autograd's and temporary ones included; on an accelerator
`max_memory_allocated`. Both repeat to the byte or nearly so, on a busy machine too. The resident set's high-water mark
stands beside it as a check from outside, less what it was before the model was built. It includes what C libraries hold
and pages that malloc did not give back, so that it overstates small differences; it comes from one more process, as the
profiler's events would count.

A ratio is peak over peak, weights and optimizer state included, as that is what must fit. "Above what stays" leaves out
what is live between steps. The first step (audit: non-lean, with extra forwards) is reported apart. The target
gradient is part of every step, as by default.

With `memory_cap`, "kept" is the most that the last step's window held by the selector's own count, which the cap
bounds, and "replays" how many second forwards and backwards of the survivors' rows that took. The cap must hold the
pool's output gradients: candidates x tokens x vocabulary numbers, 64 MiB by default. Beside it stand g and the
direction M g, a gradient's size each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _models import DTYPES, PRESETS, build, resized, shape_of, token_numbers

STEPS = 3
"""The last one counts: the optimizer has its state, the selector its audits behind it."""


@dataclass(frozen=True)
class Case:
    """What is trained, how the pool is divided, and what the selector is given."""

    title: str
    lora: bool
    micro_batches: int = 1
    checkpointing: bool = False
    capped: bool = False


CASES = {
    "lora": Case("LoRA, 4 micro-batches, checkpointing", lora=True, micro_batches=4, checkpointing=True),
    "lora-window": Case("LoRA, one window", lora=True),
    "full": Case("full, one window", lora=False),
    "full-capped": Case("full, one window, memory_cap", lora=False, capped=True),
    "full-accumulated": Case("full, 4 micro-batches, checkpointing", lora=False, micro_batches=4, checkpointing=True),
    "full-accumulated-capped": Case(
        "full, 4 micro-batches, checkpointing, memory_cap",
        lora=False,
        micro_batches=4,
        checkpointing=True,
        capped=True,
    ),
}

METHODS = ("plain", "ftw")


Step = Callable[[], dict[str, int]]
"""Makes a step; returns what the selector says of it, where it does."""


def prepare(arguments: argparse.Namespace, case: Case, method: str) -> Step:
    """Everything that a run makes before its first step; returns the step."""
    import ftw

    shape = resized(
        shape_of(arguments.preset, shrink=arguments.smoke), arguments.hidden, arguments.layers, arguments.vocabulary
    )
    model = build(
        shape,
        arguments.tokens,
        case.lora,
        dtype=DTYPES[arguments.dtype],
        device=arguments.device,
        checkpointing=case.checkpointing,
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = token_numbers(arguments.pool + arguments.target, arguments.tokens, shape["vocab_size"]).to(arguments.device)
    pool, target = ids[: arguments.pool], ids[arguments.pool :]

    def backward() -> None:
        for part in pool.chunk(case.micro_batches):
            (model(input_ids=part, labels=part, use_cache=False).loss * (len(part) / len(pool))).backward()

    def plain() -> dict[str, int]:
        backward()
        optimizer.step()
        optimizer.zero_grad()
        return {}

    if method == "plain":
        return plain
    capped: dict[str, Any] = {"memory_cap": arguments.cap_mb << 20, "reference": "previous"} if case.capped else {}
    # Target rows as many at once as the pool's micro-batches have: no larger forward than the plain loop's.
    parts = list(target.split(max(1, len(pool) // case.micro_batches)))
    batches = [{"input_ids": part, "labels": part, "use_cache": False} for part in parts]
    selector = ftw.Selector(
        model, optimizer, target=batches, target_batches=len(batches), budget=arguments.budget, warmup=0, **capped
    )

    def selected() -> dict[str, int]:
        # The block is entered once a micro-batch, as an accumulating trainer does.
        for part in pool.chunk(case.micro_batches):
            with selector.record():
                (model(input_ids=part, labels=part, use_cache=False).loss * (len(part) / len(pool))).backward()
        diagnostics = selector.apply().diagnostics
        optimizer.step()
        optimizer.zero_grad()
        return {name: diagnostics[name] for name in ("kept_bytes", "replays") if name in diagnostics}

    return selected


def measure(arguments: argparse.Namespace, case: Case, method: str) -> dict[str, int]:
    """Bytes at the peak of the first and the last step, and between steps. Runs in a process of its own."""
    torch.set_num_threads(arguments.threads)
    if arguments.device.startswith("cuda"):
        return by_device(arguments, case, method)
    return by_profiler(arguments, case, method)


def by_device(arguments: argparse.Namespace, case: Case, method: str) -> dict[str, int]:
    device = torch.device(arguments.device)
    step = prepare(arguments, case, method)
    peaks, between, said = [], 0, {}
    for _ in range(STEPS):
        between = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        said = step()
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
    return {"first": peaks[0], "peak": peaks[-1], "between": between, **said}


def by_profiler(arguments: argparse.Namespace, case: Case, method: str) -> dict[str, int]:
    from torch.profiler import ProfilerActivity, profile, record_function

    # The profiler knows the size of a block that is released only if it saw its allocation: it starts first.
    said: dict[str, int] = {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = prepare(arguments, case, method)
        for number in range(STEPS):
            with record_function(f"step {number}"):
                said = step()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    begun = sorted(event.start_ns() for event in events if event.name().startswith("step "))
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"), key=lambda pair: pair[0]
    )
    if len(begun) != STEPS or not changes:
        raise RuntimeError(f"the profiler reported {len(begun)} steps and {len(changes)} allocations; nothing is known")
    live, number, peaks, between = 0, -1, [0] * STEPS, 0
    for when, change in changes:
        while number + 1 < STEPS and when >= begun[number + 1]:
            number += 1
            between = live
            peaks[number] = live
        live += change
        if number >= 0:
            peaks[number] = max(peaks[number], live)
    return {"first": peaks[0], "peak": peaks[-1], "between": between, **said}


def resident(arguments: argparse.Namespace, case: Case, method: str) -> dict[str, int]:
    """Growth of the resident set's high-water mark from before the model is built. Runs in a process of its own."""
    for library in ("ftw", "peft", "transformers"):
        importlib.import_module(library)
    torch.set_num_threads(arguments.threads)
    torch.randn(64, 64) @ torch.randn(64, 64)  # libraries and threads that are made on first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = prepare(arguments, case, method)
    for _ in range(STEPS):
        step()
    return {"resident": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024}


def in_process(case: str, method: str, what: str) -> dict[str, Any]:
    """The figures of a child with the same arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", case, method, what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = [text for text in done.stderr.splitlines() if text.strip()][-1:]
        return {"failure": last[0] if last else f"ended with {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


HEADER = (
    "| case | plain, MB | with selection, MB | peak over plain | above what stays | first step | resident set "
    "| kept, MB | replays |\n|---|---|---|---|---|---|---|---|---|"
)


def compare(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Both methods' figures and their ratios."""
    whats = ("tensors", "resident") if not arguments.device.startswith("cuda") else ("tensors",)
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        figures: dict[str, Any] = {}
        for what in whats:
            figures |= in_process(name, method, what)
        if "failure" in figures:
            return {"case": name, "title": CASES[name].title, "failure": f"{method}: {figures['failure']}"}
        found[method] = figures
    plain, ours = found["plain"], found["ftw"]
    return {
        "case": name,
        "title": CASES[name].title,
        **found,
        "ratio": ours["peak"] / plain["peak"],
        "above": (ours["peak"] - plain["between"]) / (plain["peak"] - plain["between"]),
        "first": ours["first"] / plain["peak"],
        "resident": ours["resident"] / plain["resident"] if "resident" in whats else None,
    }


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    if "failure" in row:
        return f"| {row['title']} | {row['failure']} | | | | | | | |"
    cells = [row["title"], f"{row['plain']['peak'] / 1e6:.1f}", f"{row['ftw']['peak'] / 1e6:.1f}"]
    cells += [f"{row[key]:.2f}" for key in ("ratio", "above", "first")]
    cells.append("" if row["resident"] is None else f"{row['resident']:.2f}")
    ours = row["ftw"]
    cells += [f"{ours['kept_bytes'] / 1e6:.1f}", str(ours["replays"])] if "replays" in ours else ["", ""]
    return f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--hidden", type=int, default=None, help="another width than the preset's")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--vocabulary", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--cap-mb", type=int, default=96, help="memory_cap of the cases that have one, in MiB")
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="a shrunk model: does it run")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON to this file")
    parser.add_argument("--measure", nargs=3, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.measure is not None:
        case, method, what = arguments.measure
        by = measure if what == "tensors" else resident
        print(json.dumps(by(arguments, CASES[case], method)))
        return
    print(
        f"{arguments.preset}{' (shrunk)' if arguments.smoke else ''}, {arguments.dtype}: {arguments.pool} candidates "
        f"of {arguments.tokens} tokens, budget {arguments.budget}, target of {arguments.target}, caps of "
        f"{arguments.cap_mb} MiB; {arguments.device}, torch {torch.__version__}\n\n{HEADER}"
    )
    rows = []
    for name in arguments.cases:
        rows.append(compare(arguments, name))
        print(line(rows[-1]), flush=True)
    if arguments.out is not None:
        settings = {**vars(arguments), "out": None, "measure": None}
        written = {"settings": settings, "torch": torch.__version__, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(written, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
