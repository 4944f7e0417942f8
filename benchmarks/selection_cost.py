"""Cost of selection: a step with it over a plain step on the same pool, interleaved in one process.

    python benchmarks/selection_cost.py [--tokens 256] [--pool 16] [--budget 4] [--repeats 7] [--threads 2]

Baseline: forward, backward and AdamW step of the plain loop over the whole pool. Both loops run in turns on one model
and one optimizer; medians and their ratio are printed, with the range of the paired ratios. The selector has
its shipped defaults but for the warm-up, which is over from the start here: the first steps' vanilla geometry is
not what a run pays. "without target gradient" uses a cached one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ftw

RETAIN = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def build(hidden: int, layers: int, vocabulary: int, tokens: int, lora: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def steps(
    model: nn.Module, pool: Tensor, target: Tensor, budget: int, target_gradient: bool
) -> tuple[Callable[[], Any], Callable[[], Any], ftw.Selector]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    batch = {"input_ids": target, "labels": target}
    selector = ftw.Selector(
        model, optimizer, target=[batch], budget=budget, warmup=0, refresh=1 if target_gradient else 1_000_000
    )

    def plain() -> None:
        model(input_ids=pool, labels=pool).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def selected() -> None:
        with selector.record():
            model(input_ids=pool, labels=pool).loss.backward()
        selector.apply()
        optimizer.step()
        optimizer.zero_grad()

    return plain, selected, selector


def timed(function: Callable[[], Any]) -> float:
    _synchronise()
    begun = time.perf_counter()
    function()
    _synchronise()
    return time.perf_counter() - begun


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(arguments: argparse.Namespace, lora: bool, target_gradient: bool) -> dict[str, Any]:
    device = torch.device(arguments.device)
    model = build(arguments.hidden, arguments.layers, arguments.vocabulary, arguments.tokens, lora).to(device)
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.pool + arguments.target, arguments.tokens)
    ids = torch.randint(0, arguments.vocabulary, shape, generator=generator).to(device)
    pool, target = ids[: arguments.pool], ids[arguments.pool :]
    plain, selected, selector = steps(model, pool, target, arguments.budget, target_gradient)
    for _ in range(2):  # first use: allocation, the audit, the cached target gradient
        plain()
        selected()
    times: dict[str, list[float]] = {"plain": [], "selected": []}
    for _ in range(arguments.repeats):
        times["plain"].append(timed(plain))
        times["selected"].append(timed(selected))
    selector.close()
    ratios = [s / p for s, p in zip(times["selected"], times["plain"], strict=True)]
    return {
        "parameters": "lora" if lora else "full",
        "target_gradient": target_gradient,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all": sum(p.numel() for p in model.parameters()),
        "plain_s": statistics.median(times["plain"]),
        "selected_s": statistics.median(times["selected"]),
        "ratio": statistics.median(times["selected"]) / statistics.median(times["plain"]),
        "paired_ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--retain",
        action="store_true",
        help="run again with glibc's allocator told to keep freed memory, as an accelerator's does",
    )
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON to this file")
    arguments = parser.parse_args()
    if arguments.retain and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # glibc reads these at start only: the program runs itself anew.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RETAIN})
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.pool} candidates of {arguments.tokens} tokens, budget {arguments.budget}, target batch of "
        f"{arguments.target}; {arguments.device}, {arguments.threads} threads, torch {torch.__version__}"
        f"{', freed memory retained' if arguments.retain else ''}"
    )
    rows = []
    for lora in (True, False):
        for target_gradient in (False, True):
            row = compare(arguments, lora, target_gradient)
            rows.append(row)
            kind = f"{row['parameters']} ({row['trainable'] / 1e6:.2f}M of {row['all'] / 1e6:.1f}M)"
            print(
                f"{kind:<24} {'with' if target_gradient else 'without':>8} target gradient: "
                f"plain {row['plain_s']:.3f} s, "
                f"selected {row['selected_s']:.3f} s, ratio {row['ratio']:.3f} "
                f"(paired {row['paired_ratio_range'][0]:.3f} to {row['paired_ratio_range'][1]:.3f})",
                flush=True,
            )
    if arguments.out is not None:
        figures = {
            "settings": {**vars(arguments), "out": None},
            "machine": platform.processor(),
            "rows": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
