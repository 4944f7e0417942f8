"""Contributions against three naive references, in float64: the largest relative error over parameters.

    python benchmarks/oracle.py [--rows 6] [--tokens 11] [--seeds 3] [--out figures.json]

Models: a small Llama with grouped-query attention, one with a tied head, one with LoRA on all linear layers, and a
GPT-2 (Conv1D, tied head, position embeddings); padded rows, masked prompts. References: each candidate's own backward
in a loop, `torch.func.vmap(grad)`, and opacus' `GradSampleModule` (needs the extra 'dev'). An error is
`||found - expected|| / ||expected||` over a parameter's (n, *shape), with a thousandth of the largest norm as a floor:
key biases have no gradient but rounding. GPT-2's positions are passed to opacus row by row: looked up once for all
rows, as GPT-2 does by itself, opacus does not divide the table's gradient among the candidates.

The same comparisons are tests (tests/oracle), with a bound; here are the figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if importlib.util.find_spec("opacus") is None:
    sys.exit("opacus is not installed, one of the references; it comes with: pip install -e '.[dev]'")

from tests.models import batch_of, lora_llama, tiny_gpt2, tiny_llama
from tests.oracle.test_contributions import per_sample_loop, per_sample_vmap
from tests.oracle.test_gpt2 import contributions_by_name, errors
from tests.oracle.test_opacus import per_sample_opacus

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "Llama, grouped-query attention": lambda seed: tiny_llama(seed=seed),
    "Llama, tied head": lambda seed: tiny_llama(tied=True, seed=seed),
    "Llama, LoRA": lambda seed: lora_llama(seed=seed),
    "GPT-2": lambda seed: tiny_gpt2(seed=seed),
}

Reference = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def by_loop(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: value for p, value in per_sample_loop(model, batch).items()}


REFERENCES: dict[str, Reference] = {
    "loop": by_loop,
    "torch.func.vmap": per_sample_vmap,
    "opacus": per_sample_opacus,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=11)
    parser.add_argument("--seeds", type=int, default=3, help="models and batches drawn; the worst counts")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    rows = []
    print(f"| model | parameters | {' | '.join(REFERENCES)} |")
    print(f"|---|---|{'---|' * len(REFERENCES)}")
    for model, make in MODELS.items():
        worst: dict[str, float] = dict.fromkeys(REFERENCES, 0.0)
        worst_at: dict[str, str] = {}
        for seed in range(arguments.seeds):
            batch = batch_of(arguments.rows, arguments.tokens, seed=seed)
            found = contributions_by_name(make(seed), batch)
            for name, reference in REFERENCES.items():
                expected = reference(make(seed), batch)
                assert expected.keys() == found.keys(), "every parameter is compared"
                for parameter, error in errors(found, expected).items():
                    if error >= worst[name]:
                        worst[name], worst_at[name] = error, parameter
        rows.append({"model": model, "parameters": len(found), "worst": worst, "worst_at": worst_at})
        print(f"| {model} | {len(found)} | {' | '.join(f'{worst[name]:.1e}' for name in REFERENCES)} |", flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"rows": arguments.rows, "tokens": arguments.tokens, "seeds": arguments.seeds}
        figures = {"settings": settings, "torch": torch.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
