"""One training run: a way to fill `p.grad`, an optimizer, a curve on dev and test. Called by `cells`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import ftw
from ftw.errors import ConfigurationError
from ftw.experiment import data, models
from ftw.experiment.compare import masses
from ftw.experiment.data import Row

from . import representations
from .material import Material
from .methods import Method
from .settings import Setting

PAD = 0
EVALUATION_BATCH = 32


@dataclass
class Curve:
    """What is measured every `eval_every` steps; the clocks are stored apart: they alone are never the same twice."""

    step: list[int] = field(default_factory=list)
    dev: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)
    """Samples trained on so far: those with a weight, or the share of the tokens kept times n."""

    passed: list[int] = field(default_factory=list)
    """Samples that went forward and backward so far, target samples included."""

    wall: list[float] = field(default_factory=list)
    """Seconds of training so far, without evaluation."""

    processor: list[float] = field(default_factory=list)
    """The same in processor time: what the one thread would take on an idle core."""

    @property
    def best(self) -> int:
        """Position of the smallest dev loss; the first of equal ones."""
        return min(range(len(self.dev)), key=self.dev.__getitem__)

    def follow(self, earlier: Curve) -> None:
        """Counts and clocks go on from where an earlier run was best."""
        for name in ("step", "trained", "passed", "wall", "processor"):
            before = getattr(earlier, name)[earlier.best]
            setattr(self, name, [before + each for each in getattr(self, name)])


@dataclass
class Trial:
    """One run: its curve, and the parameters where dev was best and at the end."""

    curve: Curve
    best: dict[str, Tensor]
    final: dict[str, Tensor]
    weight: dict[str, float] = field(default_factory=dict)
    """Source -> sum of `mu_i w_i` of the candidates over all steps."""

    statuses: dict[str, int] = field(default_factory=dict)
    """Of the selector, how often each."""


@dataclass(frozen=True)
class Filled:
    """What a step did: what it trained on, what passed through the model, and the weight by candidate."""

    trained: float
    passed: int
    weights: Tensor | None = None  # (n,) float64
    status: str = ""


class Filling(Protocol):
    """Puts the step's gradient into `p.grad`."""

    def fill(self, step: int) -> Filled: ...

    def close(self) -> None: ...


def train(
    model: nn.Module,
    filling: Callable[[torch.optim.Optimizer], Filling],
    material: Material,
    setting: Setting,
    lr: float,
    steps: int,
) -> Trial:
    """Trains the model as it stands for `steps` steps with a learning rate that falls linearly to zero."""
    parameters = list(models.trainable(model).values())
    optimizer = optimizer_for(model, setting.optimizer, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    fill = filling(optimizer)
    curve, weight, statuses = Curve(), dict[str, float](), dict[str, int]()
    best, trained, passed, wall, processor = models.snapshot(model), 0.0, 0, 0.0, 0.0

    def measure(step: int) -> None:
        nonlocal best
        curve.step.append(step)
        curve.dev.append(mean_loss(model, material.dev))
        curve.test.append(mean_loss(model, material.test[: setting.curve_samples]))
        curve.trained.append(trained)
        curve.passed.append(passed)
        curve.wall.append(wall)
        curve.processor.append(processor)
        if curve.best == len(curve.dev) - 1:
            best = models.snapshot(model)

    measure(0)
    model.train()
    try:
        for step in range(steps):
            began, worked = time.perf_counter(), time.process_time()
            filled = fill.fill(step)
            nn.utils.clip_grad_norm_(parameters, setting.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            wall += time.perf_counter() - began
            processor += time.process_time() - worked
            trained += filled.trained
            passed += filled.passed
            if filled.status:
                statuses[filled.status] = statuses.get(filled.status, 0) + 1
            if filled.weights is not None:
                rows = ordered(material.candidates[step])
                for row, share in zip(rows, (masses(rows) * filled.weights).tolist(), strict=True):
                    weight[row.source] = weight.get(row.source, 0.0) + share
            if (step + 1) % setting.eval_every == 0 or step + 1 == steps:
                measure(step + 1)
    finally:
        fill.close()
    return Trial(curve, best, models.snapshot(model), weight, statuses)


def optimizer_for(model: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a setting."""
    parameters = list(models.trainable(model).values())
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    raise ConfigurationError(f"optimizer is {name!r}; the harness knows adamw and sgd; choose one of them.")


def filling_for(
    model: nn.Module, method: Method, material: Material, setting: Setting, seed: int, steps: int
) -> Callable[[torch.optim.Optimizer], Filling]:
    """How a method fills `p.grad`, given its optimizer."""
    if method.kind == "select":
        return lambda optimizer: Selecting(model, optimizer, method, material, setting, seed)
    return lambda optimizer: Plain(model, method.kind, material, setting, seed, steps)


class Plain:
    """Loops without a selector: some candidates or all of them, target samples, or pool and target samples."""

    def __init__(
        self, model: nn.Module, kind: str, material: Material, setting: Setting, seed: int, steps: int
    ) -> None:
        self._model, self._kind, self._material, self._setting = model, kind, material, setting
        self._generator = torch.Generator().manual_seed(seed)
        size = min(setting.target_batch, len(material.target))
        self._targets = data.pool_order(len(material.target), size, steps, seed).tolist()

    def fill(self, step: int) -> Filled:
        pool = ordered(self._material.candidates[step])
        target = [self._material.target[i] for i in self._targets[step]]
        if self._kind == "target":
            return Filled(len(target), backward(self._model, target))
        if self._kind == "mixture":
            passed = backward(self._model, pool, share=0.5) + backward(self._model, target, share=0.5)
            return Filled(passed, passed, torch.ones(len(pool), dtype=torch.float64))
        index = self._chosen(pool)
        weights = torch.zeros(len(pool), dtype=torch.float64)
        weights[index] = len(pool) / masses(pool)[index].sum()  # mean-preserving: mu'w = n
        trained = backward(self._model, [pool[i] for i in index.tolist()])
        return Filled(trained, len(pool) if self._kind == "logits" else trained, weights)

    def _chosen(self, pool: Sequence[Row]) -> Tensor:  # (k,) ascending
        if self._kind == "logits":
            return utilities(self._model, pool).topk(self._setting.budget).indices.sort().values
        count = self._setting.budget if self._kind == "random" else len(pool)
        return torch.randperm(len(pool), generator=self._generator)[:count].sort().values

    def close(self) -> None:
        pass


class Selecting:
    """Everything with a selector: record the pool's backward, then let it weigh the candidates."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        material: Material,
        setting: Setting,
        seed: int,
    ) -> None:
        preset = ftw.presets.PRESETS[method.preset]
        self._model, self._method, self._material = model, method, material
        self._needs = preset.needs
        self._tokens = preset.granularity == "token"
        size = setting.target_batch
        target = material.target
        self._batches = [target[start : start + size] for start in range(0, len(target), size)]
        self._selector = ftw.Selector(
            model,
            optimizer,
            target=[batch_of(rows) for rows in self._batches],
            # Of tokens, the same share as of samples.
            budget=setting.budget / setting.pool_size if self._tokens else setting.budget,
            preset=method.preset,
            seed=seed,
            **representations.arguments(method.representation),
            **method.options,
        )

    def fill(self, step: int) -> Filled:
        rows = list(self._material.candidates[step])
        if self._method.offers_target:
            rows += self._batches[(step + 1) % len(self._batches)]  # g comes from batch `step`
        rows = ordered(rows)
        count, total = len(rows), sum(row.response_tokens for row in rows)
        # Tokens are numbered in rows of one length, so that all must then be in one forward.
        for part in [rows] if self._tokens else halves(rows):
            batch = batch_of(part)
            columns: dict[str, list[float]] = {name: [] for name in self._needs}
            mass = None if self._tokens else [row.response_tokens for row in part]
            with self._selector.record(mass=mass, extras=columns):
                output = self._model(**batch)
                if columns:  # read when the block ends
                    columns["loss"].extend(losses(output.logits.detach(), batch["labels"]))
                (output.loss * (sum(row.response_tokens for row in part) / total)).backward()
        whole = self._method.options.get("target_batches") == "all"
        target = sum(map(len, self._batches)) if whole else len(self._batches[step % len(self._batches)])
        selection = self._selector.apply()
        status = str(selection.status)
        if self._tokens:
            live = int((selection.diagnostics["token_alignment"] != 0).sum())
            return Filled(count * len(selection.indices) / max(1, live), count + target, status=status)
        trained = int((selection.weights != 0).sum())
        weights = None if self._method.offers_target else selection.weights
        return Filled(trained, count + target, weights, status)

    def close(self) -> None:
        self._selector.close()


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By length, so that halves need little padding."""
    return sorted(rows, key=lambda row: len(row.input_ids))


def halves(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Ordered rows in two parts, or in one where there are fewer than eight."""
    middle = len(rows) // 2
    yield from (rows[:middle], rows[middle:]) if len(rows) >= 8 else (rows,)


def backward(model: nn.Module, rows: Sequence[Row], share: float = 1.0) -> int:
    """Adds the gradient of `share` times the mean loss over all response tokens; returns how many rows passed."""
    total = sum(row.response_tokens for row in rows)
    for part in halves(ordered(rows)):
        tokens = sum(row.response_tokens for row in part)
        (model(**batch_of(part)).loss * (share * tokens / total)).backward()
    return len(rows)


def batch_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Padded on the right. A causal model's real tokens see no padding, so that no mask is needed."""
    batch = data.collate(rows, PAD)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def losses(logits: Tensor, labels: Tensor) -> list[float]:  # (n, T, v), (n, T) -> n
    """Each row's mean loss over its response tokens."""
    each = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=data.IGNORED, reduction="none"
    )
    found: list[float] = (each.sum(1) / (labels[:, 1:] != data.IGNORED).sum(1)).tolist()
    return found


@torch.no_grad()
def utilities(model: Callable[..., Any], rows: Sequence[Row]) -> Tensor:  # (n,) float64
    """Nuclear norm of each row's logits at its response tokens, a matrix of them and the vocabulary.

    What UDS scores a sample by (Zou et al., 2025, arXiv 2510.16882), without its comparison with earlier samples.
    """
    found = []
    for part in halves(rows):
        batch = batch_of(part)
        logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        found += [
            torch.linalg.matrix_norm(own[wanted], "nuc").double()
            for own, wanted in zip(logits, labels != data.IGNORED, strict=True)
        ]
    return torch.stack(found)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Row]) -> float:
    """Loss per response token over all rows, in nats, in evaluation mode."""
    total, count, mode = 0.0, 0, model.training
    model.eval()
    rows = ordered(rows)
    for start in range(0, len(rows), EVALUATION_BATCH):
        part = rows[start : start + EVALUATION_BATCH]
        tokens = sum(row.response_tokens for row in part)
        total += float(model(**batch_of(part)).loss) * tokens
        count += tokens
    model.train(mode)
    return total / count


def restored(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The model with these parameters."""
    models.restore(model, state)
    return model
