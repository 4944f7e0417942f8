"""Time of one weight solve by size, set and solver: interleaved medians in milliseconds.

    python benchmarks/solvers.py [--sizes 16 64 256] [--repeats 15] [--threads 1] [--json FILE]

All solvers meet the same problems in turn, so that a busy machine burdens them alike. Problems go round three kinds:
more features than candidates, fewer (singular K), and many fewer. cvxpy is timed compiled, that is from its second
solve on. Beside the median stand the slowest problem and the worst KKT residual.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ftw.solvers import CappedCone, CappedSimplex, ConstraintSet, CvxpyQP, NonNegative, ProjectedGradient, WeightSolver

SOLVERS = {"pgd": ProjectedGradient, "qp": CvxpyQP}


def problems(n: int, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(n)
    drawn = []
    for i in range(count):
        features = (2 * n, n // 2 + 1, 20)[i % 3]
        C = torch.randn(features, n, generator=generator, dtype=torch.float64)
        C += 0.3 * torch.randn(features, 1, generator=generator, dtype=torch.float64)  # gradients share a direction
        drawn.append((C.T @ C, C.T @ torch.randn(features, generator=generator, dtype=torch.float64)))
    return drawn


def measure(n: int, constraints: ConstraintSet, repeats: int) -> dict[str, dict[str, float]]:
    solvers: dict[str, WeightSolver] = {name: cls() for name, cls in SOLVERS.items()}
    times: dict[str, list[float]] = {name: [] for name in solvers}
    worst = dict.fromkeys(solvers, 0.0)
    for i, (gram, alignment) in enumerate(problems(n, repeats + 1)):
        for name, solver in solvers.items():
            start = time.perf_counter()
            solution = solver.solve(gram, alignment, constraints, throw=False)
            elapsed = time.perf_counter() - start
            if i:  # the first warms caches and compiles
                times[name].append(1e3 * elapsed)
                worst[name] = max(worst[name], solution.kkt_residual)
    return {
        name: {"median_ms": statistics.median(times[name]), "slowest_ms": max(times[name]), "worst_kkt": worst[name]}
        for name in solvers
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    figures = []
    print(f"{'set':<16}{'n':>5}   {'solver':<8}{'median ms':>10}{'slowest ms':>12}{'worst KKT':>11}")
    for n in options.sizes:
        sets = {
            "capped_cone": CappedCone(4.0),
            "capped_simplex": CappedSimplex(total=n, cap=4.0),
            "non_negative": NonNegative(),
        }
        for label, constraints in sets.items():
            for name, figure in measure(n, constraints, options.repeats).items():
                figures.append({"set": label, "n": n, "solver": name} | figure)
                print(
                    f"{label:<16}{n:>5}   {name:<8}{figure['median_ms']:>10.2f}{figure['slowest_ms']:>12.2f}"
                    f"{figure['worst_kkt']:>11.0e}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
