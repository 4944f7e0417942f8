"""What Lightning's tests run: a LightningModule that knows of no selection, and the same as a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ftw_integrations.lightning import token_mean
from torch import Tensor, nn

import ftw
from tests.models import batch_of

ACCUMULATION, ROWS = 4, 3
Batch = dict[str, Tensor]
EVERYTHING: dict[str, Any] = {"budget": 1.0, "filter": "all", "solver": "uniform"}
CHOOSING: dict[str, Any] = {"budget": 3, "warmup": 2}


def stream(count: int, seed: int = 0) -> list[Batch]:
    return [batch_of(ROWS, seed=seed + i) for i in range(count)]


TARGET = stream(3, 1000)


class Module(pl.LightningModule):
    """What users write. It knows of no selection."""

    def __init__(self, make: Callable[[], Any], learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.model = make()
        self.learning_rate = learning_rate
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)


class Labelled(Module):
    """A batch without any label has the loss 0."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if bool((batch["labels"] != -100).any()):
            return super().training_step(batch, batch_idx)
        loss: Tensor = self.model(**{**batch, "labels": None}).logits.sum() * 0.0
        return loss


def counted(batch: Batch) -> Tensor:
    """As `token_mean`, and 0 where there is no label at all."""
    tokens = batch["labels"][:, 1:].ne(-100).sum(1).double()
    return tokens / tokens.sum().clamp(min=1)


def without_labels() -> list[Batch]:
    """Batches of three steps of four: the second one has no label, nor has any in the second step."""
    data = stream(12)
    for i in (1, 4, 5, 6, 7):
        data[i]["labels"][:] = -100
    return data


def single(make: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: make(torch.float32)


def trainer(folder: Path, *callbacks: Any, kind: Any = pl.Trainer, **changed: Any) -> Any:
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_steps": 20,
        "max_epochs": -1,
        "accumulate_grad_batches": ACCUMULATION,
        "gradient_clip_val": 0.05,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "callbacks": list(callbacks),
    }
    return kind(**{**settings, **changed})


def loader(data: list[Any]) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=None, shuffle=False)


def fit(folder: Path, module: Any, data: list[Any], *callbacks: Any, **changed: Any) -> Any:
    made = trainer(folder, *callbacks, **changed)
    made.fit(module, loader(data))
    return made


def assert_same(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> None:
    named = dict(second.named_parameters())
    for name, p in first.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=0, atol=tolerance)


def plain_loop(
    model: Any, data: list[Batch], steps: int, *, scaler: Any = None, dtype: torch.dtype | None = None, watch: int = 0
) -> tuple[ftw.Selector, list[ftw.Selection]]:
    """The same with record() and apply(), without Lightning."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    selector = ftw.Selector(model, optimizer, target=TARGET, watch=watch, **CHOOSING)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    made = []
    for step in range(steps):
        for batch in data[step * ACCUMULATION : (step + 1) * ACCUMULATION]:
            with selector.record(mass=token_mean(batch), scaler=scaler):
                with torch.autocast("cpu", dtype=dtype, cache_enabled=False, enabled=dtype is not None):
                    loss = model(**batch).loss / ACCUMULATION
                scaler.scale(loss).backward()
        made.append(selector.apply())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return selector, made
