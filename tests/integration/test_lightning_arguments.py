"""What SelectionCallback is given: targets, packed rows, columns for filters, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import CandidateLayoutError, ConfigurationError, TargetError, UnsupportedOptimizerError
from tests.models import batch_of, tiny_llama

pytest.importorskip("lightning", reason="the integration is for its Trainer")

import lightning.pytorch as pl
from ftw_integrations.lightning import SelectionCallback, token_mean

from tests.lightning_runs import (
    CHOOSING,
    EVERYTHING,
    TARGET,
    Batch,
    Module,
    assert_same,
    fit,
    loader,
    single,
    stream,
    trainer,
)


class Data(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.pool, self.dev = stream(16), stream(3, 1000)

    def train_dataloader(self) -> Any:
        return loader(self.pool)

    def target(self) -> Any:
        return loader(self.dev)


def doubled(module: Any, batch: Batch) -> Tensor:
    loss: Tensor = 2 * module.model(**batch).loss
    return loss


@pytest.mark.parametrize(
    ("target", "changed"),
    [
        (loader(TARGET), {}),
        ("the data module's", {}),
        (TARGET, {"loss_fn": doubled}),
        (TARGET, {"model": "model"}),
        (TARGET, {"model": "model", "memory_cap": 200_000, "reference": "previous", "filter": "topk"}),
        ({"one": TARGET[:1], "two": lambda: TARGET[1:]}, {}),
    ],
    ids=["loader", "data module", "loss_fn", "model", "memory_cap", "several"],
)
def test_targets_and_models(target: Any, changed: dict[str, Any], tmp_path: Path) -> None:
    told: list[list[ftw.Selection]] = [[], []]
    data = Data()
    chosen = {**CHOOSING, "solver": "uniform", **{k: v for k, v in changed.items() if k in ("filter", "reference")}}
    callback = SelectionCallback(
        data.target if isinstance(target, str) else target,
        mass=token_mean,
        told=told[0].append,
        **{**CHOOSING, "solver": "uniform", **changed},
    )
    made = trainer(tmp_path, callback, max_steps=4)
    made.fit(Module(single(tiny_llama)), datamodule=data)
    assert len(told[0]) == 4
    if isinstance(target, dict):
        assert told[0][-1].diagnostics["predicted_drops"].keys() == {"one", "two"}
        return
    fit(
        tmp_path,
        Module(single(tiny_llama)),
        stream(16),
        SelectionCallback(TARGET, mass=token_mean, told=told[1].append, **chosen),
        max_steps=4,
    )
    for ours, theirs in zip(*told, strict=True):
        assert ours.indices.tolist() == theirs.indices.tolist()
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-5)
    if "memory_cap" in changed:
        assert told[0][-1].diagnostics["replayed"]


def packed(batches: list[Batch]) -> Batch:
    """Rows of two samples each, that begin anew in position_ids; the first label of each is nobody's to predict."""
    joined = {key: torch.cat([batch[key] for batch in batches], 1) for key in ("input_ids", "labels")}
    length = batches[0]["input_ids"].shape[1]
    joined["labels"][:, ::length] = -100
    positions = torch.arange(length).repeat(len(batches)).expand_as(joined["input_ids"])
    return {**joined, "position_ids": positions}


def packed_map(batch: Batch) -> Tensor:
    return ftw.packed_candidates(batch["position_ids"])


def packed_mass(batch: Batch) -> Tensor:
    owner = packed_map(batch)
    tokens = torch.zeros(int(owner.max()) + 1, dtype=torch.float64)
    tokens.index_add_(0, owner[:, 1:].flatten(), (batch["labels"][:, 1:] != -100).flatten().double())
    return tokens / tokens.sum()


def test_packed_rows(tmp_path: Path) -> None:
    data = [packed([batch_of(2, seed=2 * i), batch_of(2, seed=2 * i + 1)]) for i in range(16)]
    runs, told = [], []

    def make() -> Any:
        model = single(tiny_llama)()
        model.config.use_cache = False  # transformers keeps packed samples apart only then
        return model

    given = {"candidates": packed_map, "mass": packed_mass, "told": told.append}
    for callbacks in ([], [SelectionCallback(data[:2], **given, **EVERYTHING)]):
        module = Module(make)
        fit(tmp_path, module, data, *callbacks, max_steps=4)
        runs.append(module)
    assert_same(*runs, 1e-6)
    assert [len(selection.weights) for selection in told] == [16] * 4
    with pytest.raises(CandidateLayoutError, match="position_ids restart"):
        fit(tmp_path, Module(make), data, SelectionCallback(data[:2], **CHOOSING))


def test_extras_reach_the_filters(tmp_path: Path) -> None:
    told: list[ftw.Selection] = []
    callback = SelectionCallback(
        TARGET,
        mass=token_mean,
        extras=lambda batch: {"loss": batch["input_ids"][:, 0].double()},
        told=told.append,
        **{**CHOOSING, "filter": "max_loss", "solver": "uniform"},
    )
    data = stream(4)
    fit(tmp_path, Module(single(tiny_llama)), data, callback, max_steps=1)
    first = torch.cat([batch["input_ids"][:, 0] for batch in data])
    assert set(first[told[0].indices].tolist()) == set(first.topk(3).values.tolist())


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_both_namespaces(namespace: str, tmp_path: Path) -> None:
    """In a process of its own, where the other one is not there."""
    other = "pytorch_lightning" if namespace == "lightning.pytorch" else "lightning"
    pytest.importorskip(namespace.split(".")[0], reason="a trainer of this namespace is under test")
    source = f"""
import sys
sys.modules[{other!r}] = None
import torch, {namespace} as pl
from ftw_integrations.lightning import SelectionCallback
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def training_step(self, batch):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
callback = SelectionCallback([torch.ones(2, 3)], budget=2)
assert isinstance(callback, pl.Callback)
pl.Trainer(accelerator="cpu", max_steps=2, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, callbacks=callback).fit(Module(), torch.utils.data.DataLoader(torch.randn(16, 3), 4))
assert len(callback.selection.weights) == 8
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Manual(Module):
    def __init__(self) -> None:
        super().__init__(single(tiny_llama))
        self.automatic_optimization = False


class Several(Module):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()][:2]


class Without(Module):
    def configure_optimizers(self) -> None:
        return None


class Closing(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Mute(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.losses is not None and self.training else None


@pytest.mark.parametrize(
    ("make", "given", "error", "message"),
    [
        (Manual, {}, ConfigurationError, "automatic_optimization=False"),
        (lambda: Several(single(tiny_llama)), {}, RuntimeError, "only supported with manual optimization"),
        (lambda: Without(single(tiny_llama)), {}, UnsupportedOptimizerError, "_MockOptimizer"),
        (lambda: Closing(single(tiny_llama)), {}, UnsupportedOptimizerError, "LBFGS"),
        (lambda: Mute(single(tiny_llama)), {}, TargetError, "returned no loss for a target batch"),
        (None, {"target": ftw.target.Target(TARGET)}, ConfigurationError, "target is an ftw Target"),
        (None, {"target": []}, TargetError, "no batch"),
        (None, {"model": "net"}, ConfigurationError, "'net' names no submodule of Module; its children are model"),
        (None, {"geometry": "round"}, ConfigurationError, "geometry"),
    ],
)
def test_bad_fits(make: Any, given: dict[str, Any], error: Any, message: str, tmp_path: Path) -> None:
    module = Module(single(tiny_llama)) if make is None else make()
    made = trainer(
        tmp_path, SelectionCallback(**{"target": TARGET, **given}), gradient_clip_val=None, accumulate_grad_batches=1
    )
    with pytest.raises(error, match=message):
        made.fit(module, loader(stream(8)))
    assert "training_step" not in vars(module)
    assert not any(each._forward_hooks for each in module.modules())


def test_bad_arguments() -> None:
    with pytest.raises(ConfigurationError, match=r"budgett=3; did you mean budget\?"):
        SelectionCallback(TARGET, budgett=3)
    with pytest.raises(ConfigurationError, match="optimizer=None"):
        SelectionCallback(TARGET, optimizer=None)


def test_a_strategy_that_accumulates_by_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.strategies.SingleDeviceStrategy, "handles_gradient_accumulation", True)
    made = trainer(tmp_path, SelectionCallback(TARGET))
    with pytest.raises(ConfigurationError, match="accumulates gradients by itself"):
        made.fit(Module(single(tiny_llama)), loader(stream(8)))


def test_a_strategy_that_wraps_the_module_is_refused(tmp_path: Path) -> None:
    class Wrapping(pl.strategies.SingleDeviceStrategy):
        def _setup_model(self, model: nn.Module) -> nn.Module:
            return nn.Sequential(model)

    made = trainer(tmp_path, SelectionCallback(TARGET), strategy=Wrapping("cpu"), accelerator="auto")
    with pytest.raises(ConfigurationError, match="wraps the module in a Sequential"):
        made.fit(Module(single(tiny_llama)), loader(stream(8)))
