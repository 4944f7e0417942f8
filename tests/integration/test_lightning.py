"""Lightning's Trainer with selection: the untouched trainer where nothing is selected, a plain loop where it is."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from tests.models import MLP, batch_of, lora_llama, tiny_llama

pytest.importorskip("lightning", reason="the integration is for its Trainer")

import lightning.pytorch as pl
from ftw_integrations.lightning import SelectionCallback, token_mean

from tests.lightning_runs import (
    ACCUMULATION,
    CHOOSING,
    EVERYTHING,
    ROWS,
    TARGET,
    Batch,
    Module,
    assert_same,
    fit,
    loader,
    plain_loop,
    single,
    stream,
    trainer,
)


class Norms(pl.Callback):
    """Gradient norms before clipping, as any callback sees them."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize("make", [tiny_llama, lora_llama], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_all_and_uniform_is_the_untouched_trainer(make: Any, algorithm: str, tmp_path: Path) -> None:
    data = stream(30)  # the second epoch's windows are cut short by its end
    runs = []
    for callbacks in ([], [SelectionCallback(TARGET, mass=token_mean, **EVERYTHING)]):
        module, norms = Module(single(make)), Norms()
        fit(tmp_path, module, data, *callbacks, norms, gradient_clip_algorithm=algorithm)
        runs.append((module, norms.seen))
    (plain, before), (ours, after) = runs
    assert len(after) == 20
    assert after == pytest.approx(before, rel=1e-4)
    assert min(after) > 0.05  # the clipping acted
    assert ours.losses == pytest.approx(plain.losses, abs=1e-6)
    assert_same(plain, ours, 1e-6)


@pytest.mark.parametrize("make", [tiny_llama, lora_llama], ids=["full", "lora"])
def test_lightning_and_plain_loop_choose_the_same(make: Any, tmp_path: Path) -> None:
    data, told = stream(40), []
    module = Module(single(make))
    callback = SelectionCallback(TARGET, mass=token_mean, told=told.append, watch=5, **CHOOSING)
    fit(tmp_path, module, data, callback, max_steps=10)

    model = single(make)()
    selector, expected = plain_loop(model, data, 10, watch=5)
    for theirs, ours in zip(expected, told, strict=True):
        assert theirs.indices.tolist() == ours.indices.tolist()
        torch.testing.assert_close(theirs.weights, ours.weights, rtol=0, atol=1e-6)
        assert len(ours.weights) == ROWS * ACCUMULATION
    assert_same(model, module.model, 1e-6)
    assert callback.selector is not None
    for theirs, ours in zip(astuple(selector.fidelity), astuple(callback.selector.fidelity), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)
    assert callback.selector.fidelity.applied < 1  # clipped


def test_batches_of_different_sizes(tmp_path: Path) -> None:
    """Each micro-batch is a mean of its own, whatever its size."""
    data = [batch_of(1 + i % 4, seed=i) for i in range(24)]
    runs = []
    for callbacks in ([], [SelectionCallback(TARGET, mass=token_mean, **EVERYTHING)]):
        module = Module(single(tiny_llama))
        fit(tmp_path, module, data, *callbacks, max_steps=6)
        runs.append(module)
    assert_same(*runs, 1e-6)


class Vectors(pl.LightningModule):
    """No language model, a loss that is a mean over rows, and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), MLP(dtype=torch.float32)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": nn.functional.mse_loss(self(batch[0]), batch[1])}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def vectors(count: int, seed: int, *, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [1 + i % rows for i in range(count)]
    return [(torch.randn(n, 6, generator=generator), torch.randn(n, 2, generator=generator)) for n in sizes]


def test_rows_are_equal_within_a_micro_batch_by_default(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [SelectionCallback(vectors(2, 1), **EVERYTHING)]):
        torch.manual_seed(0)
        module = Vectors()
        fit(tmp_path, module, vectors(32, 0), *callbacks, max_steps=8, gradient_clip_val=None)
        runs.append(module)
    assert_same(*runs, 1e-6)


def test_rows_without_labels_are_no_candidates(tmp_path: Path) -> None:
    data = stream(8)
    data[0]["labels"][1] = data[5]["labels"][0] = -100
    runs, told = [], []
    for callbacks in ([], [SelectionCallback(TARGET, mass=token_mean, told=told.append, **EVERYTHING)]):
        module = Module(single(tiny_llama))
        fit(tmp_path, module, data, *callbacks, max_steps=2)
        runs.append(module)
    assert_same(*runs, 1e-6)
    assert [len(selection.weights) for selection in told] == [11, 11]


# -- what the module and the trainer see -------------------------------------------------------------------------------


class Logged(pl.loggers.Logger):
    name, version = "logged", 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append(metrics)


def test_metrics_are_logged_and_evaluation_is_untouched(tmp_path: Path) -> None:
    told: list[ftw.Selection] = []
    module, logger = Module(single(tiny_llama)), Logged()
    callback = SelectionCallback(TARGET, mass=token_mean, told=told.append, **CHOOSING)
    made = trainer(tmp_path, callback, max_steps=6, logger=logger, log_every_n_steps=3, val_check_interval=8)
    made.fit(module, loader(stream(24)), loader(stream(2, 500)))
    logged = [entry for entry in logger.entries if "ftw/chosen" in entry]
    assert [entry["ftw/candidates"] for entry in logged] == [12, 12]
    drops = [sum(selection.predicted_drop for selection in told[at : at + 3]) / 3 for at in (0, 3)]
    assert [entry["ftw/predicted_drop"] for entry in logged] == pytest.approx(drops)
    assert all(entry["ftw/chosen"] <= 3 for entry in logged)
    assert made.callback_metrics["ftw/chosen"] == logged[-1]["ftw/chosen"]
    evaluations = [entry["val_loss"] for entry in logger.entries if "val_loss" in entry]
    assert len(evaluations) == 3
    assert not any(key.startswith("ftw/") for entry in logger.entries if "val_loss" in entry for key in entry)

    twin = Module(single(tiny_llama))
    twin.load_state_dict(module.state_dict())
    found = [trainer(tmp_path).validate(each, loader(stream(2, 500)), verbose=False) for each in (module, twin)]
    assert found[0] == found[1] == [{"val_loss": pytest.approx(evaluations[-1], abs=1e-7)}]


def test_nothing_stays_behind(tmp_path: Path) -> None:
    module = Module(single(tiny_llama))
    callback = SelectionCallback(TARGET, mass=token_mean, **CHOOSING)
    made = fit(tmp_path, module, stream(8), callback, max_steps=2)
    assert "training_step" not in vars(module)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert not made.optimizers[0]._optimizer_step_pre_hooks
    assert callback.selection is not None
    first = callback.selector
    made.fit_loop.epoch_loop.max_steps = 4
    made.fit(module, loader(stream(8)))
    assert callback.selector is not first


class Busy(Module):
    """A step that leaves traces wherever steps do."""

    def __init__(self) -> None:
        from torchmetrics import MeanMetric
        from torchmetrics.text import Perplexity

        super().__init__(single(tiny_llama))
        self.mean, self.perplexity = MeanMetric(), Perplexity(ignore_index=-100)
        self.outputs: dict[str, list[Tensor]] = {"loss": []}
        self.calls = 0
        self.total = torch.zeros(())
        self.register_buffer("moving", torch.zeros(()))
        self.seen: set[int] = set()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self.model(**batch)
        loss: Tensor = output.loss
        self.calls += 1
        self.last = loss.detach()
        self.total += loss.detach()
        self.moving.mul_(0.9).add_(loss.detach())
        self.outputs["loss"].append(loss.detach())
        self.seen.add(int(batch["input_ids"].sum()))
        self.mean(loss.detach())
        self.perplexity.update(output.logits[:, :-1].detach(), batch["labels"][:, 1:])
        self.log("mean", self.mean, on_epoch=True)
        self.log_dict({"loss": loss}, on_epoch=True)
        self.losses.append(float(loss.detach()))
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("perplexity", self.perplexity)


def test_a_step_that_runs_for_the_target_leaves_no_trace(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [SelectionCallback(TARGET, mass=token_mean, **EVERYTHING, refresh=2)]):
        module = Busy()
        made = fit(tmp_path, module, stream(12), *callbacks, max_steps=3)
        runs.append((module, made.callback_metrics))
    (plain, expected), (ours, found) = runs
    assert {"mean_epoch", "loss_epoch", "perplexity"} <= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert ours.calls == plain.calls == 12
    assert torch.allclose(*(torch.stack(module.outputs["loss"]) for module in (ours, plain)), atol=1e-6)
    assert ours.seen == plain.seen
    for name in ("total", "moving", "last"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=0, atol=1e-5)


class Skips(Module):
    """Returns None for some micro-batches, and uses its training step for validation."""

    skipped = ()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.skipped else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.training_step(batch, 99)


@pytest.mark.parametrize("skipped", [(4,), (1, 2), (3,), (4, 5, 6, 7)], ids=str)
def test_a_step_that_returns_none_is_passed_over(skipped: tuple[int, ...], tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [SelectionCallback(TARGET, mass=token_mean, **EVERYTHING)]):
        module = Skips(single(tiny_llama))
        module.skipped = skipped
        made = trainer(tmp_path, *callbacks, max_steps=3, val_check_interval=4)
        made.fit(module, loader(stream(12)), loader(stream(1, 500)))
        runs.append(module)
    assert_same(*runs, 1e-6)
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=1e-6)


class Leaves(pl.Callback):
    """Ends the first epoch in the middle of a window."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 5:
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
            raise StopIteration


def test_a_window_that_was_broken_off_is_forgotten(tmp_path: Path) -> None:
    runs, told = [], []
    for callbacks in ([], [SelectionCallback(TARGET, mass=token_mean, told=told.append, **EVERYTHING)]):
        module = Module(single(tiny_llama))
        fit(tmp_path, module, stream(8), *callbacks, Leaves(), max_steps=3)
        runs.append(module)
    assert [len(selection.weights) for selection in told] == [12] * 3
    assert_same(*runs, 1e-6)
