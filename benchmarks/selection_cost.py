"""Cost of selection: a step with it over a plain step on the same pool, interleaved in one process.

    python benchmarks/selection_cost.py                                                   # small model, CPU
    python benchmarks/selection_cost.py --case full --tokens 256 2048 --rivals
    python benchmarks/selection_cost.py --preset qwen3-0.6b --dtype bf16 --checkpointing  # on an accelerator
    python benchmarks/selection_cost.py --smoke --rivals                                  # does it run, is it right

Baseline of every ratio: forward, backward and AdamW step of the plain loop over the whole pool. All methods run in
turns on one model and one optimizer. A ratio is the median, over rounds, of a step's time over that of the plain step
of the same round; the range of those ratios stands beside it. The selector has its shipped defaults but for the
warm-up, which is over from the start here: the first steps' vanilla geometry is not what a run pays. Without the target
gradient in the step, a cached one is used.

`--rivals` adds per-sample gradients by vmap and the two-pass ghost scheme (`rivals.py`), with the same filter, solver
and budget. Several `--tokens` also print how much each ratio grows from the shortest to the longest. Presets have the
shape of the model named, with random weights; memory is `torch.cuda.max_memory_allocated` during the step, model and
optimizer included. What does not fit is reported as such and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _models import DTYPES, PRESETS, build, resized, shape_of, token_numbers
from rivals import Ghost, Task, Vmap, agreement

import ftw
from ftw.errors import MemoryCapError

RETAIN = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}

TOKENS = {"tiny": [256], "qwen3-0.6b": [512, 2048, 8192], "llama-3.2-1b": [512, 2048, 8192]}


@dataclass(frozen=True)
class Method:
    """One way to make a step."""

    name: str
    step: Callable[[], int]  # -> candidates that the step was made of
    around: Callable[[], AbstractContextManager[None]] = nullcontext  # entered outside the clock


def methods(arguments: argparse.Namespace, task: Task) -> tuple[list[Method], ftw.Selector]:
    """The plain step first, then selection, then its rivals."""
    pieces = task.pool.chunk(arguments.micro_batches)

    def backward() -> None:
        for ids in pieces:
            with task.autocast():
                loss = task.model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss * (len(ids) / len(task.pool))).backward()

    def plain() -> int:
        backward()
        task.finish()
        return len(task.pool)

    batch = {"input_ids": task.target, "labels": task.target, "use_cache": False}
    selector = ftw.Selector(
        task.model,
        task.optimizer,
        target=[batch],
        budget=arguments.budget,
        warmup=0,
        refresh=1 if task.target_gradient else 1_000_000,
        reference=arguments.reference,
        memory_cap=arguments.memory_cap,
    )
    task.policy = selector.policy

    def selected() -> int:
        with selector.record():
            backward()
        selection = selector.apply()
        task.finish()
        return len(selection.indices)

    found = [Method("plain", plain), Method("ftw", selected)]
    if arguments.rivals:
        vmap = Vmap(task, chunk=arguments.vmap_chunk, attention=arguments.vmap_attention)
        found.append(Method("vmap", vmap.step, vmap.around))
        for name, mixed in (("ghost", False), ("ghost, mixed", True)):
            ghost = Ghost(task, mixed=mixed)
            found.append(Method(name, ghost.step, ghost.around))

    return found, selector


def timed(method: Method, device: torch.device) -> tuple[float, int, int]:
    """Seconds, candidates chosen, and the peak of the device's memory in bytes (0: not measured)."""
    with method.around():
        _synchronise(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begun = time.perf_counter()
        chosen = method.step()
        _synchronise(device)
        seconds = time.perf_counter() - begun
    return seconds, chosen, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(arguments: argparse.Namespace, lora: bool, tokens: int, target_gradient: bool) -> list[dict[str, Any]]:
    """One row for each method."""
    device = torch.device(arguments.device)
    shape = shape_of(arguments.preset, shrink=arguments.smoke)
    shape = resized(shape, arguments.hidden, arguments.layers, arguments.vocabulary)
    model = build(
        shape, tokens, lora, dtype=DTYPES[arguments.dtype], device=device, checkpointing=arguments.checkpointing
    )
    ids = token_numbers(arguments.pool + arguments.target, tokens, shape["vocab_size"]).to(device)
    pool, target = ids[: arguments.pool], ids[arguments.pool :]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    autocast: Callable[[], Any] = nullcontext
    if arguments.autocast:
        autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16)
    policy: Any = None  # comes with the selector
    task = Task(model, optimizer, pool, target, policy, target_gradient, autocast)
    every, selector = methods(arguments, task)
    times: dict[str, list[float]] = {method.name: [] for method in every}
    chosen: dict[str, list[int]] = {method.name: [] for method in every}
    peaks: dict[str, int] = dict.fromkeys(times, 0)
    failed: dict[str, str] = {}
    for turn in range(arguments.repeats + 2):  # two of first use: allocation, the audit, the cached target gradient
        for method in every[:1] + every[1:][turn % 2 :] + every[1:][: turn % 2]:
            if method.name in failed:
                continue
            try:
                seconds, count, peak = timed(method, device)
            except (torch.OutOfMemoryError, MemoryCapError) as error:
                failed[method.name] = type(error).__name__
            if method.name in failed:  # only here the exception has let go of the step's tensors
                selector.discard()
                optimizer.zero_grad()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if turn >= 2:
                times[method.name].append(seconds)
                chosen[method.name].append(count)
                peaks[method.name] = max(peaks[method.name], peak)
    selector.close()
    setting = {
        "preset": arguments.preset,
        "parameters": "lora" if lora else "full",
        "tokens": tokens,
        "target_gradient": target_gradient,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all": sum(p.numel() for p in model.parameters()),
    }
    return [
        {**setting, "method": name, "chosen": chosen[name], **figures(name, times, peaks, failed.get(name))}
        for name in times
    ]


def figures(method: str, times: dict[str, list[float]], peaks: dict[str, int], failure: str | None) -> dict[str, Any]:
    """What is reported of one method."""
    if failure is not None or len(times[method]) != len(times["plain"]):
        return {"failure": failure or "the plain step failed"}
    ratios = [own / base for own, base in zip(times[method], times["plain"], strict=True)]
    return {
        "plain_s": statistics.median(times["plain"]),
        "step_s": statistics.median(times[method]),
        "ratio": statistics.median(ratios),
        "paired_ratio_range": [min(ratios), max(ratios)],
        "times_s": times[method],
        "peak_bytes": peaks[method] or None,
        "peak_ratio": peaks[method] / peaks["plain"] if peaks["plain"] else None,
    }


HEADER = (
    "| trained | T | target gradient | method | step, s | over plain | range | peak memory, GB | over plain |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    cells = [
        row["parameters"],
        str(row["tokens"]),
        "in the step" if row["target_gradient"] else "cached",
        row["method"],
    ]
    if "failure" in row:
        return f"| {' | '.join([*cells, row['failure'], '', '', '', ''])} |"
    low, high = row["paired_ratio_range"]
    cells += [f"{row['step_s']:.3f}", f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}"]
    measured = row["peak_bytes"] is not None
    cells += [f"{row['peak_bytes'] / 1e9:.2f}", f"{row['peak_ratio']:.2f}"] if measured else ["", ""]
    return f"| {' | '.join(cells)} |"


def growth(rows: Iterable[dict[str, Any]], short: int, long: int) -> list[dict[str, Any]]:
    """How much each ratio grows between two lengths."""
    ratios = {
        (row["parameters"], row["target_gradient"], row["method"], row["tokens"]): row["ratio"]
        for row in rows
        if "ratio" in row and row["method"] != "plain"
    }
    return [
        {
            "parameters": parameters,
            "target_gradient": target_gradient,
            "method": method,
            "difference": ratios[parameters, target_gradient, method, long] - ratio,
        }
        for (parameters, target_gradient, method, tokens), ratio in ratios.items()
        if tokens == short and (parameters, target_gradient, method, long) in ratios
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--hidden", type=int, default=None, help="another width than the preset's")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--vocabulary", type=int, default=None)
    parser.add_argument("--case", choices=("lora", "full", "both"), default="both", help="what is trained")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="lengths of the candidates")
    parser.add_argument("--target-gradient", choices=("cached", "step", "both"), default="both")
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=1, help="gradient accumulation: pieces of the pool")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--autocast", action="store_true", help="run forwards under bfloat16 autocast")
    parser.add_argument("--reference", choices=("pool", "target", "previous"), default="pool", help="see Selector")
    parser.add_argument("--memory-cap", type=int, default=None, help="see Selector; bytes")
    parser.add_argument("--rivals", action="store_true", help="time vmap and ghost products as well")
    parser.add_argument("--vmap-chunk", type=int, default=4, help="candidates that vmap takes at once")
    parser.add_argument("--vmap-attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; 5 at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="check the rivals, then one round of a shrunk model")
    parser.add_argument(
        "--retain",
        action="store_true",
        help="run again with glibc's allocator told to keep freed memory, as an accelerator's does",
    )
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON to this file")
    arguments = parser.parse_args()
    if arguments.rivals and arguments.micro_batches > 1:
        parser.error("the ghost scheme's first pass needs the whole pool: --rivals goes with --micro-batches 1")
    arguments.tokens = arguments.tokens or TOKENS[arguments.preset]
    if arguments.smoke:
        arguments.tokens = [max(8, tokens // 32) for tokens in arguments.tokens]
        arguments.pool, arguments.target, arguments.budget, arguments.repeats = 6, 2, 2, 1
    elif arguments.repeats < 5:
        parser.error("a median of fewer than 5 rounds says little: --repeats 5 at least, or --smoke")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.retain and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # glibc reads these at start only: the program runs itself anew.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RETAIN})
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device.startswith("cuda")
    machine = torch.cuda.get_device_name(arguments.device) if on_gpu else platform.processor()
    if arguments.smoke and arguments.rivals:
        for lora in (True, False):
            differences = agreement(arguments.preset, lora, arguments.device, checkpointing=arguments.checkpointing)
            what, worst = max(differences.items(), key=lambda item: item[1])
            print(f"{'lora' if lora else 'full'}: rivals agree with ftw; furthest is {what}, {worst:.1e}")
    print(
        f"{arguments.preset}{' (shrunk)' if arguments.smoke else ''}, {arguments.dtype}"
        f"{' under bfloat16 autocast' if arguments.autocast else ''}"
        f"{', activation checkpointing' if arguments.checkpointing else ''}: {arguments.pool} candidates in "
        f"{arguments.micro_batches} micro-batches, budget {arguments.budget}, target batch of {arguments.target}; "
        f"{arguments.device} {machine}, {arguments.threads} threads, torch {torch.__version__}, "
        f"{arguments.repeats} rounds{', freed memory retained' if arguments.retain else ''}\n\n{HEADER}"
    )
    rows = []
    lengths = sorted(arguments.tokens)
    for lora in {"lora": (True,), "full": (False,), "both": (True, False)}[arguments.case]:
        for tokens in lengths:
            for target_gradient in {"cached": (False,), "step": (True,), "both": (False, True)}[
                arguments.target_gradient
            ]:
                found = compare(arguments, lora, tokens, target_gradient)
                rows += found
                print("\n".join(line(row) for row in found), flush=True)
                gc.collect()
    grown = growth(rows, lengths[0], lengths[-1]) if len(lengths) > 1 else []
    if grown:
        print(f"\n| trained | target gradient | method | ratio at T={lengths[-1]} minus T={lengths[0]} |")
        print("|---|---|---|---|")
    for entry in grown:
        target = "in the step" if entry["target_gradient"] else "cached"
        print(f"| {entry['parameters']} | {target} | {entry['method']} | {entry['difference']:+.3f} |")
    if arguments.out is not None:
        written = {
            "settings": {**vars(arguments), "out": None},
            "machine": machine,
            "torch": torch.__version__,
            "rows": rows,
            "growth": grown,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(written, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
