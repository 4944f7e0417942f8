"""Every solver on every set over generated problems: worst KKT residual and failures of each pair, as Markdown.

    python benchmarks/certify.py [--problems 2000] [--largest 24] [--seed 0] [--solvers pgd qp] [--json FILE]

Problems go round all shapes of `ftw.testing.ugly_problem` (singular, rank one, duplicates, zero rows, conflicting,
graded, out of range and so on), with sizes from 1 to the largest and the scales of K and b drawn from 1e-16 to 1e16
independently. A solve fails if it ends neither `optimal` nor, where the problem has no minimum, `unbounded` (or
`failed`, of a solver that cannot tell the two apart). Whether it has one is decided by a linear program: is there a
direction of the set without curvature that goes down? Problems that are within rounding of having none are left out.

A column is a solver, a row a set: `worst residual of all optimal solves (failures)`; `-` is a set that it refuses.
For `softmax` and `uniform`, which do not minimise, the residual shows what there is to gain; weights that the set
does not hold are no failure of theirs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftw.errors import ConfigurationError
from ftw.problem import Status
from ftw.solvers import (
    DAQP,
    ActiveSet,
    ClosedForm,
    ConstraintSet,
    CvxpyQP,
    Entropic,
    ProjectedGradient,
    Softmax,
    Uniform,
    WeightSolver,
    kkt_residual,
)
from ftw.testing import SHAPES, UglyProblem, constraint_sets, ugly_problem

SOLVERS: dict[str, type[WeightSolver]] = {
    "pgd": ProjectedGradient,
    "active_set": ActiveSet,
    "entropic": Entropic,
    "closed_form": ClosedForm,
    "daqp": DAQP,
    "qp": CvxpyQP,
    "softmax": Softmax,
    "uniform": Uniform,
}
SCALES = (1e-16, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e16)


def drawn(count: int, largest: int, seed: int) -> list[UglyProblem]:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    return [
        ugly_problem(
            SHAPES[i % len(SHAPES)], draw.randint(1, largest), generator, draw.choice(SCALES), draw.choice(SCALES)
        )
        for i in range(count)
    ]


def has_no_minimum(ugly: UglyProblem, constraints: ConstraintSet) -> bool | None:
    """Whether the objective falls without end over the set; None within rounding of the answer.

    A direction d of the set, entries at most 1, without curvature (K d = 0 up to 1e-10 of K) is sought in which b
    gains most, by HiGHS. A minimum is certain if there is no gain even beside the part of b along such directions,
    and none is certain if the gain stands out beside all of the gradient's terms.
    """
    from scipy.optimize import linprog

    polyhedron = constraints.polyhedron(ugly.size)
    start = constraints.project(torch.zeros(ugly.size)).numpy()
    K, b = ugly.gram.numpy(), ugly.alignment.numpy()
    size = float(np.linalg.norm(K)) * float(np.linalg.norm(start)) + float(np.linalg.norm(b))
    if math.isfinite(polyhedron.radius) or not np.any(b):
        return False
    values, vectors = np.linalg.eigh(K)
    relative = values / values[-1] if values[-1] > 0 else np.zeros_like(values)
    curved, flat = vectors[:, relative > 1e-10].T, vectors[:, relative <= 1e-10]
    along = flat @ (flat.T @ b)
    part = float(np.linalg.norm(along))
    if part <= 1e-13 * np.linalg.norm(b):
        return False
    equal = np.concatenate((curved, polyhedron.rows))
    above = polyhedron.inequalities()[0]
    low = np.where(np.isfinite(polyhedron.lower), 0.0, -1.0)
    high = np.where(np.isfinite(polyhedron.upper), 0.0, 1.0)
    found = linprog(
        -along / part,  # of size 1: HiGHS takes costs below 1e-7 for none
        above if len(above) else None,
        np.zeros(len(above)) if len(above) else None,
        equal if len(equal) else None,
        np.zeros(len(equal)) if len(equal) else None,
        np.column_stack((low, high)),
    )
    if found.status != 0:
        return None
    gain = -float(found.fun)
    slope = gain * part / size
    nearly_flat = bool(np.any((relative > 1e-15 * len(b)) & (relative <= 1e-10)))
    if nearly_flat and len(polyhedron.rows):  # on the plane, K's nearly flat directions are others than in space
        return None
    if gain <= 1e-6:
        return False
    return True if slope > 1e-4 and not nearly_flat else None


def run(problems: Sequence[UglyProblem], names: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    solvers = {name: SOLVERS[name]() for name in names}
    table: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    refused: set[tuple[str, str]] = set()
    left_out: dict[str, int] = defaultdict(int)
    for ugly in problems:
        for label, constraints in constraint_sets(ugly.size).items():
            endless = has_no_minimum(ugly, constraints)
            if endless is None:
                left_out[label] += 1
                continue
            for name, solver in solvers.items():
                if (name, label) in refused:
                    continue
                try:
                    solution = solver.solve(ugly.gram, ugly.alignment, constraints, throw=False)
                except ConfigurationError:
                    refused.add((name, label))
                    continue
                cell = table[name].setdefault(label, {"solves": 0, "worst": 0.0, "failures": 0, "examples": []})
                cell["solves"] += 1
                if math.isinf(solver.tolerance) and solution.status == Status.INFEASIBLE:
                    continue  # the one answer that its rule has is not in the set
                if endless and math.isfinite(solver.tolerance):
                    good = solution.status in (Status.UNBOUNDED, Status.FAILED)
                else:
                    good = solution.status == Status.OPTIMAL and constraints.contains(solution.weights, 1e-11)
                    if good:
                        measured = kkt_residual(ugly.gram, ugly.alignment, constraints, solution.weights)
                        cell["worst"] = max(cell["worst"], measured)
                if not good:
                    cell["failures"] += 1
                    cell["examples"] = [*cell["examples"], f"{ugly.name}: {solution.status}"][:5]
    for name, label in refused:
        table[name].pop(label, None)
    print(f"{len(problems)} problems; left out as undecided: {dict(left_out)}\n")
    return table


def markdown(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    sets = list(constraint_sets(3))
    lines = ["| set | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    for label in sets:
        cells = []
        for row in table.values():
            cell = row.get(label)
            cells.append("-" if cell is None else f"{cell['worst']:.0e} ({cell['failures']})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--largest", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = run(drawn(options.problems, options.largest, options.seed), options.solvers)
    print(markdown(table))
    failed = {f"{name} on {label}": cell["examples"] for name, row in table.items() for label, cell in row.items()
              if cell["failures"]}  # fmt: skip
    for pair, examples in failed.items():
        print(f"\n{pair}: {'; '.join(examples)}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
