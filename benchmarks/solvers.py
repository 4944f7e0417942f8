"""Time of one weight solve by size, set and solver: interleaved medians in milliseconds.

    python benchmarks/solvers.py [--sizes 16 64 256 1024 4096] [--repeats 9] [--threads 1] [--limit 20] [--json FILE]

All solvers meet the same problems in turn, so that a busy machine burdens them alike. Problems go round three kinds:
more features than candidates, fewer (singular K), and many fewer; from 4096 candidates on all have rank 256 and are
given by their factor (`ftw.solvers.LowRank`), which solvers that take none multiply out, in their time. Beside the
median stand the slowest problem, the worst KKT residual, solves that did not end `optimal`, and the ratio of the
median to `pgd`'s.

`qp` is cvxpy compiled, timed from its second solve on, `qp_fresh` compiles each time, both with CLARABEL; `scipy` is
SLSQP with K and b at unit scale, and on the orthant NNLS with the root of K (the solver `active_set`). A solver whose
slowest solve of the last size took more than a twentieth of `--limit` seconds, or that takes more at its first solve
of a size than the limit, is left out from there on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import LinearConstraint, minimize
from torch import Tensor

from ftw.problem import Solution, Status
from ftw.solvers import (
    DAQP,
    ActiveSet,
    CappedCone,
    CappedSimplex,
    ConstraintSet,
    CvxpyQP,
    LowRank,
    NonNegative,
    ProjectedGradient,
    WeightSolver,
    kkt_residual,
)

Gram = Tensor | LowRank


class Slsqp(WeightSolver):
    """Sequential least squares of scipy; a baseline of this benchmark alone."""

    tolerance = 1e-5

    def _solve(self, gram: Tensor, alignment: Tensor, constraints: ConstraintSet) -> Solution:
        n = alignment.numel()
        size = float(gram.diagonal().mean())
        K, b = (gram / size).numpy(), (alignment / size).numpy()
        polyhedron = constraints.polyhedron(n)
        rules = []
        if len(polyhedron.rows):
            rules.append(LinearConstraint(polyhedron.rows, polyhedron.values, polyhedron.values))
        if np.isfinite(polyhedron.share):
            rules.append(LinearConstraint(polyhedron.caps(), -np.inf, 0.0))
        found = minimize(
            lambda w: (0.5 * w @ K @ w - b @ w, K @ w - b),
            constraints.project(torch.ones(n)).numpy(),
            jac=True,
            method="SLSQP",
            bounds=list(zip(polyhedron.lower, polyhedron.upper, strict=True)),
            constraints=rules,
            options={"maxiter": 1000, "ftol": 1e-12},
        )
        weights = constraints.project(torch.from_numpy(found.x))
        residual = kkt_residual(gram, alignment, constraints, weights)
        return Solution(weights, Status.OPTIMAL if residual <= self.tolerance else Status.INACCURATE, residual)


NAMES = ("pgd", "active_set", "daqp", "qp", "qp_fresh", "scipy")


def solvers_for(constraints: ConstraintSet) -> dict[str, WeightSolver]:
    return {
        "pgd": ProjectedGradient(),
        "active_set": ActiveSet(),
        "daqp": DAQP(),
        "qp": CvxpyQP(),
        "qp_fresh": CvxpyQP(compiled=False),
    } | ({} if isinstance(constraints, NonNegative) else {"scipy": Slsqp()})


def problems(n: int, count: int) -> list[tuple[Gram, Tensor]]:
    generator = torch.Generator().manual_seed(n)
    drawn: list[tuple[Gram, Tensor]] = []
    for i in range(count):
        features = 256 if n >= _THIN else (2 * n, n // 2 + 1, 20)[i % 3]
        C = torch.randn(features, n, generator=generator, dtype=torch.float64)
        C += 0.3 * torch.randn(features, 1, generator=generator, dtype=torch.float64)  # gradients share a direction
        b = C.T @ torch.randn(features, generator=generator, dtype=torch.float64)
        drawn.append((LowRank(C.T.contiguous()) if n >= _THIN else C.T @ C, b))
    return drawn


_THIN = 4096


def measure(
    n: int, constraints: ConstraintSet, repeats: int, limit: float, skipped: set[str]
) -> dict[str, dict[str, float]]:
    solvers = {name: solver for name, solver in solvers_for(constraints).items() if name not in skipped}
    times: dict[str, list[float]] = {name: [] for name in solvers}
    worst, missed = dict.fromkeys(solvers, 0.0), dict.fromkeys(solvers, 0)
    for i, (gram, alignment) in enumerate(problems(n, repeats + 1)):
        for name, solver in list(solvers.items()):
            start = time.perf_counter()
            solution = solver.solve(gram, alignment, constraints, throw=False)
            elapsed = time.perf_counter() - start
            if i:  # the first warms caches and compiles
                times[name].append(1e3 * elapsed)
                worst[name] = max(worst[name], solution.kkt_residual)
                missed[name] += solution.status is not Status.OPTIMAL
            elif elapsed > limit and name != "pgd":
                del solvers[name]
                skipped.add(name)
    pace = statistics.median(times["pgd"])
    figures = {}
    for name in solvers:
        figures[name] = {
            "median_ms": statistics.median(times[name]),
            "slowest_ms": max(times[name]),
            "worst_kkt": worst[name],
            "not_optimal": missed[name],
            "times_pgd": statistics.median(times[name]) / pace,
        }
        if max(times[name]) > 1e3 * limit / 20 and name != "pgd":
            skipped.add(name)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--solvers", nargs="+", default=list(NAMES), choices=NAMES, help="beside pgd")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds; see above")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    figures = []
    print("| set | n | solver | median ms | slowest ms | worst KKT | not optimal | x pgd |\n" + "|---" * 8 + "|")
    skipped: dict[str, set[str]] = {}
    left_out = set(NAMES) - {"pgd", *options.solvers}
    for n in options.sizes:
        sets = {
            "capped_simplex": CappedSimplex(total=n, cap=4.0),
            "capped_cone": CappedCone(4.0),
            "non_negative": NonNegative(),
        }
        for label, constraints in sets.items():
            gone = skipped.setdefault(label, set(left_out))
            for name, row in measure(n, constraints, options.repeats, options.limit, gone).items():
                figures.append({"set": label, "n": n, "solver": name} | row)
                print(
                    f"| {label} | {n} | {name} | {row['median_ms']:.2f} | {row['slowest_ms']:.2f} "
                    f"| {row['worst_kkt']:.0e} | {row['not_optimal']:.0f} | {row['times_pgd']:.1f} |",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
