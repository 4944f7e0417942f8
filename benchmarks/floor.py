"""What a selecting step of full training cannot cost less than, over a plain step on the same pool.

    python benchmarks/floor.py [--threads 1] [--budget 4] [--repeats 7] [--smoke]

An exact K under a diagonal M needs every candidate's gradient of every matrix written out, once, and the gradient of
the chosen from their factors, once more. Against that stand the weight gradients of the pool, which a lean backward
does not form. Here these products, and the passes over what is written out (sum for the reference, scaling by
M^(1/2), K, and the products with g and the offset), are timed by themselves, on random factors of the model's matrices,
in blocks of 8 MB and with nothing else around them: no recording, no optimizer state, no filter and no solver. A plain
step is timed in turns with them, in the same process. `floor` is (plain - weight gradients + the rest) / plain,
the median over rounds; tied heads count once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _models import build, shape_of, token_numbers

from ftw.gradients.base import BLOCK_BYTES

PARTS = ("weight gradients", "written out", "sum", "scaling", "K", "two products", "chosen")


class Matrix:
    """One weight's factors, the blocks that its contributions pass through, and each part of the work on it."""

    def __init__(self, shape: tuple[int, int], count: int, tokens: int, chosen: int) -> None:
        rows, columns = shape
        self._count, self._tokens, self._chosen = count, tokens, chosen
        self._grads, self._inputs = torch.randn(count * tokens, rows), torch.randn(count * tokens, columns)
        self._step = min(rows, max(1, BLOCK_BYTES["cpu"] // (count * columns * 4)))
        self._block = torch.empty(count, self._step, columns)
        self._scale, self._along = torch.rand(self._step, columns), torch.randn(self._step, columns)
        self._out = torch.empty(rows, columns)
        self.blocks = rows / self._step

    def plain(self) -> None:
        torch.mm(self._grads.T, self._inputs, out=self._out)

    def written_out(self) -> None:
        left = self._grads.view(self._count, self._tokens, -1)[:, :, : self._step].transpose(1, 2)
        torch.bmm(left, self._inputs.view(self._count, self._tokens, -1), out=self._block)

    def total(self) -> Tensor:
        return self._block.sum(0)

    def scaling(self) -> None:
        self._block.mul_(self._scale)

    def gram(self) -> Tensor:
        flat = self._block.flatten(1)
        return flat @ flat.T

    def products(self) -> None:
        for _ in range(2):
            self._block.flatten(1) @ self._along.flatten()

    def combination(self) -> None:
        for i in range(self._chosen):
            own = slice(i * self._tokens, (i + 1) * self._tokens)
            self._out.addmm_(self._grads[own].T, self._inputs[own], alpha=0.5)

    def seconds(self) -> list[float]:
        """Of each of `PARTS`, for the whole matrix."""
        by_block = (self.written_out, self.total, self.scaling, self.gram, self.products)
        return [
            timed(self.plain),
            *(timed(part) * self.blocks for part in by_block),
            timed(self.combination),
        ]


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def matrices(model: nn.Module) -> list[tuple[int, int]]:
    """Shapes of the weights of linear layers, a shared one once."""
    found = {module.weight: module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)}
    return [(rows, columns) for rows, columns in found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="a shrunk model, one round")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.pool, arguments.budget, arguments.tokens, arguments.repeats = 4, 2, 8, 1
    torch.set_num_threads(arguments.threads)
    model = build(shape_of("tiny", shrink=arguments.smoke), arguments.tokens, lora=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = token_numbers(arguments.pool, arguments.tokens, model.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def plain() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    shapes = matrices(model)
    kinds = {shape: Matrix(shape, arguments.pool, arguments.tokens, arguments.budget) for shape in set(shapes)}
    rounds = []
    for turn in range(arguments.repeats + 1):  # one of first use
        step = timed(plain)
        each = {shape: matrix.seconds() for shape, matrix in kinds.items()}
        if turn:
            rounds.append([step, *(sum(each[shape][i] for shape in shapes) for i in range(len(PARTS)))])
    shares = [[part / step for part in parts] for step, *parts in rounds]
    print(
        f"{len(shapes)} matrices, {arguments.pool} candidates of {arguments.tokens} tokens, {arguments.threads} threads"
    )
    print(f"plain step: {statistics.median(step for step, *_ in rounds):.3f} s; shares of it, medians:\n")
    print("| part | share |\n|---|---|")
    for i, name in enumerate(PARTS):
        print(f"| {name} | {statistics.median(share[i] for share in shares):.3f} |")
    print(f"| floor | {statistics.median(1 - share[0] + sum(share[1:]) for share in shares):.3f} |")


if __name__ == "__main__":
    main()
