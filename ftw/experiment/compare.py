"""The comparison: every method trains on the same stream from the same weights, and is measured alike.

Called by `ftw.experiment.job`. `compare` is also a function for scripts: give it any causal language model.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ftw.experiment import data, models
from ftw.experiment.data import Row
from ftw.experiment.methods import Method
from ftw.problem import Selection, Status

FIGURES = (
    "predicted_drop",
    "first_order",
    "curvature",
    "relative_residual",
    "effective_sample_size",
    "kkt_residual",
    "iterations",
)
"""The selector's diagnostics that have a meaningful mean."""


@dataclass(frozen=True)
class Settings:
    """What all methods have in common."""

    steps: int
    pool_size: int
    budget: int
    """k, in samples per step."""

    lr: float
    seeds: tuple[int, ...] = (0,)
    lr_warmup: int = 0
    """Steps of linear warm-up."""

    lr_decay: bool = False
    """Linear fall to zero at the end, after the warm-up; else constant."""

    clip: float = 1.0
    target_batch: int = 8
    target_batches: int | str = 1
    """Batches of the target that make one target gradient, or "all"."""

    refresh: int = 1
    gradients: str = "auto"
    eval_every: int = 20
    curve_samples: int = 128
    """The curve is measured on this many evaluation samples, the final loss on all."""

    pad: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Stream:
    """Encoded data: the pool, the target that steers, and the samples on which methods are compared."""

    pool: list[Row]
    target: list[Row]
    evaluation: list[Row]


@dataclass
class Run:
    """What came out of one method with one seed."""

    method: str
    seed: int
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss on the first `curve_samples` evaluation samples)."""

    final_loss: float = float("nan")
    trained: int = 0
    """Samples with a weight, summed over the steps."""

    passed: int = 0
    """Samples that went forward and backward, target samples included: what the machine worked on."""

    seconds: float = 0.0
    """Training alone, without evaluation."""

    weight: dict[str, float] = field(default_factory=dict)
    """Source -> sum of `mu_i w_i` over all steps: how much of the weighted loss was its own (DESIGN, section 1)."""

    statuses: dict[str, int] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)
    """Selecting methods: means over the steps of the figures in `FIGURES`."""

    @property
    def weight_share(self) -> dict[str, float]:
        """Source -> share of the weight."""
        total = sum(self.weight.values())
        return {source: (weight / total if total else 0.0) for source, weight in self.weight.items()}


class Watcher(Protocol):
    """Is told how far the comparison is."""

    def begin(self, method: str, seed: int, steps: int) -> None: ...

    def step(self, done: int, loss: float | None) -> None:
        """`loss` is given where it was measured."""


def compare(
    model: nn.Module,
    stream: Stream,
    methods: Sequence[Method],
    settings: Settings,
    watcher: Watcher,
) -> list[Run]:
    """All methods with all seeds. The model is left with its first weights.

    A seed decides which candidates each step offers (alike for all methods), and what random methods draw.
    """
    model.to(settings.device)
    for method in methods:  # what a method cannot work with is found before another one has trained
        optimizer = torch.optim.AdamW(models.trainable(model).values(), lr=settings.lr)
        _filling(model, optimizer, stream, method, settings, settings.seeds[0]).close()
    start = models.snapshot(model)
    curve_set = stream.evaluation[: settings.curve_samples]
    untrained = mean_loss(model, curve_set, settings)
    runs = []
    for seed in settings.seeds:
        for method in methods:
            run = Run(method.label, seed, curve=[(0, untrained)])
            watcher.begin(method.label, seed, settings.steps)
            try:
                _train(model, stream, method, settings, run, watcher)
                whole = len(stream.evaluation) == len(curve_set)
                run.final_loss = run.curve[-1][1] if whole else mean_loss(model, stream.evaluation, settings)
            finally:
                models.restore(model, start)
            runs.append(run)
    return runs


def mean_loss(model: nn.Module, rows: Sequence[Row], settings: Settings, size: int = 32) -> float:
    """Loss per response token over all rows, in evaluation mode."""
    total, count, mode = 0.0, 0, model.training
    model.eval()
    with torch.no_grad():
        for batch in data.batches(rows, size, settings.pad, settings.device):
            tokens = int(data.label_tokens(batch).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    model.train(mode)
    return total / count


def masses(rows: Sequence[Row]) -> Tensor:  # mu, (n,) float64, sums to n
    """Each row's share of the token-mean loss."""
    tokens = torch.tensor([row.response_tokens for row in rows], dtype=torch.float64)
    return tokens * (len(rows) / tokens.sum())


def _train(model: nn.Module, stream: Stream, method: Method, settings: Settings, run: Run, watcher: Watcher) -> None:
    parameters = list(models.trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(settings))
    order = data.pool_order(len(stream.pool), settings.pool_size, settings.steps, run.seed)
    model.train()
    # Dropout, where the model has any, draws from the global generator: seeded alike, put back afterwards.
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        filling = _filling(model, optimizer, stream, method, settings, run.seed)
        statuses: Counter[str] = Counter()
        figures: dict[str, list[float]] = {name: [] for name in FIGURES}
        try:
            for done, indices in enumerate(order.tolist(), start=1):
                began = time.perf_counter()
                rows = [stream.pool[index] for index in indices]
                outcome = filling.fill(rows)
                nn.utils.clip_grad_norm_(parameters, settings.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                _wait(settings.device)
                run.seconds += time.perf_counter() - began

                weights = outcome.weights.tolist()
                run.trained += sum(weight != 0 for weight in weights)
                for row, weight, mass in zip(rows, weights, masses(rows).tolist(), strict=True):
                    run.weight[row.source] = run.weight.get(row.source, 0.0) + mass * weight
                statuses[str(outcome.status)] += 1
                for name, value in (outcome.diagnostics | {"predicted_drop": outcome.predicted_drop}).items():
                    if name in FIGURES and math.isfinite(value):
                        figures[name].append(value)
                loss = None
                if done % settings.eval_every == 0 or done == settings.steps:
                    loss = mean_loss(model, stream.evaluation[: settings.curve_samples], settings)
                    run.curve.append((done, loss))
                watcher.step(done, loss)
        finally:
            filling.close()
    run.passed = filling.passed
    run.statuses = dict(statuses)
    run.diagnostics = {name: statistics.fmean(values) for name, values in figures.items() if values}


def _schedule(settings: Settings) -> Callable[[int], float]:
    warmup = settings.lr_warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (settings.steps - step) / max(1, settings.steps - warmup) if settings.lr_decay else 1.0

    return factor


class _Filling(Protocol):
    """Puts the step's gradient into `p.grad` and says what weight each candidate got."""

    passed: int

    def fill(self, rows: Sequence[Row]) -> Selection: ...

    def close(self) -> None: ...


class _Plain:
    """`random` and `full`: no selector, so that their time is that of a plain loop."""

    def __init__(self, model: nn.Module, settings: Settings, chosen: int, seed: int) -> None:
        self._model, self._settings, self._chosen = model, settings, chosen
        self._generator = torch.Generator().manual_seed(seed)
        self.passed = 0

    def fill(self, rows: Sequence[Row]) -> Selection:
        index = torch.randperm(len(rows), generator=self._generator)[: self._chosen].sort().values
        batch = data.collate([rows[i] for i in index.tolist()], self._settings.pad, self._settings.device)
        self._model(**batch).loss.backward()
        self.passed += index.numel()
        weights = torch.zeros(len(rows), dtype=torch.float64)
        weights[index] = len(rows) / masses(rows)[index].sum()  # mean-preserving: mu'w = n
        return Selection(index, weights, float("nan"), Status.OPTIMAL)

    def close(self) -> None:
        pass


class _Selecting:
    """All other methods: record the pool's backward pass, then let the selector weigh it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        target: Sequence[Row],
        method: Method,
        settings: Settings,
        seed: int,
    ) -> None:
        from ftw.selector import Selector

        self._model, self._settings = model, settings
        self.passed = 0
        self._selector = Selector(
            model,
            optimizer,
            target=data.batches(target, settings.target_batch, settings.pad, settings.device),
            loss_fn=self._target_loss,
            budget=settings.budget,
            gradients=settings.gradients,
            target_batches=settings.target_batches,
            refresh=settings.refresh,
            seed=seed,
            **method.arguments(),
        )

    def fill(self, rows: Sequence[Row]) -> Selection:
        batch = data.collate(rows, self._settings.pad, self._settings.device)
        with self._selector.record(mass=masses(rows)):
            self._model(**batch).loss.backward()
        self.passed += len(rows)
        return self._selector.apply()

    def close(self) -> None:
        self._selector.close()

    def _target_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.passed += batch["input_ids"].shape[0]
        loss: Tensor = model(**batch).loss
        return loss


def _filling(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Stream,
    method: Method,
    settings: Settings,
    seed: int,
) -> _Filling:
    if method.kind == "selector":
        return _Selecting(model, optimizer, stream.target, method, settings, seed)
    chosen = settings.budget if method.kind == "random" else settings.pool_size
    return _Plain(model, settings, chosen, seed)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
