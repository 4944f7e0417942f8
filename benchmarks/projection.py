"""How far sketches are off: relative errors of K and b against the sketch's dimension, with theory's curve.

    python benchmarks/projection.py [--dimensions 64 256 1024 4096] [--seeds 8] [--figure docs/projection.png]

Contributions are real: a Llama of 0.5 M parameters, trained for a few steps on the bytes of this project's licence.
The sparse sketch is measured under AdamW's M, the Kronecker sketch under plain SGD's, a multiple of the identity.
For each dimension: the true error, the error that the sketch reports of itself, and theory's, root mean squares over
seeds; errors are Frobenius norms (K) or norms (b), relative to the exact value's.

Theory, with x_i = M^(1/2) c_i of one parameter and sums over sketched parameters (m numbers each, in two halves):
sparse, at most `(K_ii K_jj + K_ij^2) / m`; Kronecker of h x w numbers a half, with X_i the matrix,
`1/2 [(|X_i X_j'|^2 + t) / h + (|X_i'X_j|^2 + t) / w + (|X_i X_j'|^2 + |X_i'X_j|^2 + K_ii K_jj + K_ij^2) / (h w)]`,
t = trace of (X_i X_j')^2, where a side that is not projected drops the terms over it. For b, g stands for c_j.
Needs the extras hf and plot.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.assembly import measure
from ftw.gradients import Factorized, Projection, Recorder
from ftw.gradients.pieces import Piece
from ftw.gradients.projection import KINDS, kronecker_sides
from ftw.optim_state import preconditioner_for

CANDIDATES = 12
CORPUS = Path(__file__).resolve().parent.parent / "LICENSE"


class Window(NamedTuple):
    """What is measured: a window of candidates, a target gradient and an optimizer."""

    pieces: dict[Parameter, list[Piece]]
    target: dict[Parameter, Tensor]
    optimizer: Optimizer

    def read(self, extractor: Any) -> tuple[Tensor, Tensor, Any]:
        """K and b as the selector would see them, and the errors reported."""
        contributions = extractor.contributions(self.pieces, CANDIDATES)
        result = measure(
            contributions, self.optimizer, preconditioner_for(self.optimizer), self.target, {}, "curvature"
        )
        return result.true.gram, result.true.alignment, getattr(contributions, "errors", None)

    def whitened(self) -> dict[Parameter, Tensor]:
        """x_i of every matrix, and M^(1/2) g behind them: (n + 1, rows, columns)."""
        exact = Factorized().contributions(self.pieces, CANDIDATES)
        update = preconditioner_for(self.optimizer).linearise(self.optimizer, exact.combine())
        return {
            p: update.scale[p].power(0.5).apply(torch.cat([exact.per_candidate(p), self.target[p][None]]))
            for p in exact.parameters
            if p.dim() == 2
        }


class Errors(NamedTuple):
    """Root mean squares over seeds: of K, then of b."""

    true: tuple[float, float]
    told: tuple[float, float]
    theory: tuple[float, float]


def batch(seed: int) -> Tensor:
    text = torch.tensor(list(CORPUS.read_bytes()))
    starts = torch.randint(0, len(text) - 65, (CANDIDATES,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.stack([text[at : at + 64] for at in starts])


def trained(steps: int) -> tuple[nn.Module, Optimizer]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        model(input_ids=(x := batch(1000 + step)), labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def windows() -> dict[str, Window]:
    model, adamw = trained(60)
    x = batch(1)
    model(input_ids=x, labels=x).loss.backward()
    target = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    adamw.zero_grad()
    recorder = Recorder(model, extractor=Factorized())
    x = batch(0)
    with recorder.record():
        model(input_ids=x, labels=x).loss.backward()
    pieces = recorder.window.pieces
    recorder.close()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return {kind: Window(pieces, target, adamw if kind == "sparse" else sgd) for kind in KINDS}


def norms_of_products(window: Window) -> list[tuple[torch.Size, Tensor, Tensor, Tensor, Tensor]]:
    """Of each matrix: shape, then of all pairs of candidates and g: <X, Y>, |X Y'|^2, |X'Y|^2, trace of (X Y')^2."""
    found = []
    for X in window.whitened().values():
        inner = X.flatten(1) @ X.flatten(1).T
        rows, columns, trace = (torch.zeros_like(inner) for _ in range(3))
        for i, each in enumerate(X):
            across = each @ X.mT  # (n + 1, rows, rows)
            rows[i] = across.square().sum((1, 2))
            columns[i] = (each.T @ X).square().sum((1, 2))
            trace[i] = (across * across.mT).sum((1, 2))
        found.append((X.shape[1:], inner, rows, columns, trace))
    return found


def theory(kind: str, dimension: int, products: Any) -> Tensor:  # -> (n + 1, n + 1)
    """Variance of each inner product, the last row g's."""
    total = torch.zeros(CANDIDATES + 1, CANDIDATES + 1)
    for (rows, columns), inner, across, along, trace in products:
        if rows * columns <= dimension:
            continue
        norms = inner.diagonal()[:, None] * inner.diagonal() + inner**2
        if kind == "sparse":
            total += norms / dimension
            continue
        height, width = kronecker_sides(rows, columns, dimension // 2)
        if height < rows:
            total += (across + trace) / height / 2
        if width < columns:
            total += (along + trace) / width / 2
        if height < rows and width < columns:
            total += (across + along + norms) / (height * width) / 2
    return total


def compare(kind: str, window: Window, dimensions: Sequence[int], seeds: int) -> dict[int, Errors]:
    K, b, _ = window.read(Factorized())
    products = norms_of_products(window)
    found = {}
    for dimension in dimensions:
        true, told = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for seed in range(seeds):
            gram, alignment, errors = window.read(Projection(dimension, kind, seed))
            off = (gram - K).norm() / K.norm(), (alignment - b).norm() / b.norm()
            true += torch.stack(off).square() / seeds
            told += torch.tensor(errors, dtype=torch.float64).square() / seeds
        variance = theory(kind, dimension, products).double()
        expected = (
            float(variance[:-1, :-1].sum().sqrt() / K.norm()),
            float(variance[-1, :-1].sum().sqrt() / b.norm()),
        )
        first, second = ((float(each[0]) ** 0.5, float(each[1]) ** 0.5) for each in (true, told))
        found[dimension] = Errors(first, second, expected)
    return found


def show(found: dict[str, dict[int, Errors]]) -> None:
    print(f"{'':<22}{'K':^30}{'b':^30}".rstrip())
    print(f"{'kind':<12}{'dimension':>10}" + f"{'true':>10}{'reported':>10}{'theory':>10}" * 2)
    for kind, errors in found.items():
        for dimension, each in errors.items():
            figures = [value for which in (0, 1) for value in (each.true[which], each.told[which], each.theory[which])]
            if kind == "sparse":
                print(f"{kind:<12}{dimension:>10}" + "".join(f"{v:>10.2%}" for v in figures[:3]) + f"{'exact':>10}")
            else:
                print(f"{kind:<12}{dimension:>10}" + "".join(f"{v:>10.2%}" for v in figures))


def draw(path: Path, found: dict[str, dict[int, Errors]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    scales = {"sparse": "AdamW", "kronecker": "SGD"}
    for which, axes in enumerate(panels):
        for (kind, errors), colour in zip(found.items(), ("C0", "C3"), strict=False):
            dimensions = list(errors)
            expected = [each.theory[which] for each in errors.values()]
            if which and kind == "sparse":
                axes.plot(
                    dimensions, expected, ":", color=colour, label="sparse: b is exact; theory, had it been sketched"
                )
                continue
            name = f"{kind}, M of {scales[kind]}"
            axes.plot(
                dimensions, [each.true[which] for each in errors.values()], "o", color=colour, label=f"{name}: true"
            )
            axes.plot(
                dimensions, [each.told[which] for each in errors.values()], "x", color=colour, label=f"{name}: reported"
            )
            axes.plot(dimensions, expected, "-", color=colour, lw=1, label=f"{name}: theory")
        axes.set(xscale="log", yscale="log", xlabel="dimension", title=("K", "b")[which])
        axes.set_ylabel("relative error, root mean square over seeds")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dimensions", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096], help="even, ascending"
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="write the plot here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    found = {kind: compare(kind, window, options.dimensions, options.seeds) for kind, window in windows().items()}
    show(found)
    if options.figure is not None:
        draw(options.figure, found)
    print(f"{options.seeds} seeds, {CANDIDATES} candidates, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
