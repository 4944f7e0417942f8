"""How near each filter comes to the best set there is, and what it costs by size.

    python benchmarks/filters.py [--pools 200] [--repeats 15] [--sizes 16 64 256] [--low-rank] [--json FILE]

Quality: pools of 12 candidates, budgets 2, 4 and 6, and every set of that size tried. The measure is the largest drop
`max b'w - 1/2 w'Kw` over w >= 0 on the filter's set, as a share of the best set's; quantiles over pools. Pools go round
four kinds: independent contributions, ones that share a direction, ones of uneven length, and ones that come twice.
Filters that read a loss are left out: their columns would be made up.

Time: interleaved medians, so that a busy machine burdens all alike; k = n / 4. `--low-rank` adds n = 4096 and k = 256
on a factor of rank 256.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.filters import (
    DPP,
    OMP,
    Chain,
    Cluster,
    FacilityLocation,
    Filter,
    GradNorm,
    Greats,
    Greedy,
    Opus,
    Random,
    TopK,
)
from ftw.filters.refit import non_negative
from ftw.problem import SelectionProblem

FILTERS: dict[str, Filter] = {
    "greedy": Greedy(),
    "greedy, refit": Greedy("refit"),
    "omp": OMP(),
    "chain": Chain(),
    "dpp": DPP(),
    "dpp, sample": DPP("sample"),
    "topk": TopK(),
    "topk, cosine": TopK("cosine"),
    "topk, gain": TopK("gain"),
    "greats": Greats(1e-3),
    "greats, lr 1": Greats(1.0, "mean"),
    "opus": Opus(),
    "cluster": Cluster(),
    "facility_location": FacilityLocation(),
    "grad_norm": GradNorm(),
    "random": Random(),
}
KINDS = ("plain", "common", "uneven", "twice")
SMALL, BUDGETS = 12, (2, 4, 6)
QUANTILES = (0.0, 0.05, 0.25, 0.5)


def features(kind: str, n: int, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # (n, r), (r,)
    """Contributions as rows, and the target gradient."""
    C = torch.randn(n, r, generator=generator, dtype=torch.float64)
    g = torch.randn(r, generator=generator, dtype=torch.float64)
    if kind == "common":
        C += 0.5 * g
    elif kind == "uneven":
        C *= 10 ** (2 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1)
    elif kind == "twice":
        C[n - n // 2 :] = C[: n // 2]
    return C, g


def drop(K: np.ndarray, b: np.ndarray, index: Sequence[int]) -> float:
    """max b'w - 1/2 w'Kw over w >= 0 on the index."""
    block, right = K[np.ix_(index, index)], b[list(index)]
    weights = non_negative(block, right, np.zeros(len(right)))
    return float(right @ weights - weights @ block @ weights / 2)


def shares(pools: int) -> dict[str, list[float]]:
    """Filter -> its drop as a share of the best set's, for each pool and budget in which anything can be gained."""
    found: dict[str, list[float]] = {name: [] for name in FILTERS}
    generator = torch.Generator().manual_seed(0)
    for i in range(pools):
        C, g = features(KINDS[i % len(KINDS)], SMALL, 16, generator)
        gram, alignment = C @ C.T, C @ g
        K, b = gram.numpy(), alignment.numpy()
        for k in BUDGETS:
            best = max(drop(K, b, S) for S in itertools.combinations(range(SMALL), k))
            if best <= 1e-9 * float(g @ g):
                continue
            for name, filter in FILTERS.items():
                index = filter(SelectionProblem(gram, alignment, k, None, generator)).tolist()
                found[name].append(drop(K, b, index) / best)
    return found


def times(problems: Sequence[SelectionProblem], filters: dict[str, Filter], repeats: int) -> dict[str, float]:
    """Filter -> median milliseconds."""
    taken: dict[str, list[float]] = {name: [] for name in filters}
    for i in range(repeats + 1):
        given = problems[i % len(problems)]
        for name, filter in filters.items():
            # A new problem each time: what one filter formed shall not save another the work.
            problem = SelectionProblem(
                given.gram, given.alignment, given.budget, None, torch.Generator().manual_seed(i), factor=given.factor
            )
            start = time.perf_counter()
            filter(problem)
            if i:  # the first warms caches and imports
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def dense(n: int) -> list[SelectionProblem]:
    generator = torch.Generator().manual_seed(n)
    drawn = []
    for kind in KINDS:
        C, g = features(kind, n, 2 * n, generator)
        drawn.append(SelectionProblem(C @ C.T, C @ g, n // 4))
    return drawn


def low_rank(n: int, r: int, k: int) -> list[SelectionProblem]:
    C, g = features("plain", n, r, torch.Generator().manual_seed(n))
    return [SelectionProblem(factor=C, alignment=C @ g, budget=k)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--low-rank", action="store_true", help="n = 4096, rank 256, k = 256")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    figures: dict[str, Any] = {"shares": {}, "milliseconds": {}}
    if options.pools:
        print(f"Share of the best set's drop, {options.pools} pools of {SMALL}, budgets {BUDGETS}\n")
        print("| filter | least | 5 % | 25 % | median | best set found |\n|---|---|---|---|---|---|")
        for name, values in shares(options.pools).items():
            quantiles = np.quantile(values, QUANTILES).tolist()
            hits = float(np.mean(np.array(values) >= 1 - 1e-9))
            figures["shares"][name] = {"quantiles": quantiles, "best": hits, "count": len(values)}
            print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in quantiles) + f" | {100 * hits:.0f} % |")
    cases = [(f"n = {n}, k = {n // 4}", dense(n), FILTERS) for n in options.sizes]
    if options.low_rank:
        # Clusters need all distances of 4096 candidates, and are left out.
        some = {name: filter for name, filter in FILTERS.items() if name != "cluster"}
        cases.append(("n = 4096, rank 256, k = 256", low_rank(4096, 256, 256), some))
    if cases:
        print("\nMedian milliseconds\n\n| filter | " + " | ".join(label for label, _, _ in cases) + " |")
        print("|---|" + "---|" * len(cases))
        columns = {label: times(problems, filters, options.repeats) for label, problems, filters in cases}
        figures["milliseconds"] = columns
        for name in FILTERS:
            cells = [f"{values[name]:.2f}" if name in values else "" for values in columns.values()]
            print(f"| {name} | " + " | ".join(cells) + " |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
