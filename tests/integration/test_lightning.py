"""Lightning's Trainer with selection: the untouched trainer where nothing is selected, a plain loop where it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import CandidateLayoutError, ConfigurationError, TargetError, UnsupportedOptimizerError
from tests.models import MLP, batch_of, lora_llama, tiny_llama

pytest.importorskip("lightning", reason="the integration is for its Trainer")

import lightning.pytorch as pl
from ftw_integrations.lightning import SelectionCallback, token_mean
from lightning.pytorch.plugins import MixedPrecision

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


class Norms(pl.Callback):
    """Gradient norms before clipping, as any callback sees them."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen.append(float(torch.nn.utils.get_total_norm(gradients)))


def assert_same(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> None:
    named = dict(second.named_parameters())
    for name, p in first.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=0, atol=tolerance)


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


# -- precision, checkpointing, compilation -----------------------------------------------------------------------------


def test_bf16(tmp_path: Path) -> None:
    data, told = stream(24), []
    runs = []
    for arguments in (None, EVERYTHING, CHOOSING):
        module = Module(single(tiny_llama))
        given = [] if arguments is None else [SelectionCallback(TARGET, mass=token_mean, told=told.append, **arguments)]
        fit(tmp_path, module, data, *given, max_steps=6, precision="bf16-mixed")
        runs.append(module.losses)
    assert runs[0] == pytest.approx(runs[1], abs=2e-3)

    _, expected = plain_loop(single(tiny_llama)(), data, 6, dtype=torch.bfloat16)
    assert [selection.weights.tolist() for selection in expected] == [each.weights.tolist() for each in told[6:]]


@pytest.mark.parametrize("init_scale", [2.0**7, 2.0**40], ids=["fits", "overflows at first"])
def test_a_gradient_scaler(init_scale: float, tmp_path: Path) -> None:
    """As under 16-mixed, which Lightning replaces by bf16 on a CPU."""
    told: list[ftw.Selection] = []
    runs, data = [], stream(24 * ACCUMULATION)
    for given in (None, EVERYTHING, CHOOSING):
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
        callback = None if given is None else SelectionCallback(TARGET, mass=token_mean, told=told.append, **given)
        module = Module(single(tiny_llama))
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        fit(tmp_path, module, data, *([] if callback is None else [callback]), plugins=plugins, max_steps=24)
        runs.append((module, scaler.get_scale(), callback))
    (plain, before, _), (ours, after, callback), (chosen, scale, _) = runs
    # A sum over tokens may overflow in half precision where no candidate's share of it does.
    assert after in (before, 2 * before, 4 * before)
    if after == before:
        assert plain.losses == pytest.approx(ours.losses, abs=2e-2)
    overflows = [selection.status == "overflow" for selection in told[:24]]
    assert overflows[0] == (init_scale == 2.0**40)
    assert not overflows[-1]
    assert callback is not None
    assert callback.state_dict()["step"] == overflows.count(False)

    model = single(tiny_llama)()
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    _, expected = plain_loop(model, data, 24, scaler=scaler, dtype=torch.float16)
    assert [selection.weights.tolist() for selection in expected] == [each.weights.tolist() for each in told[24:]]
    assert scaler.get_scale() == scale
    assert_same(model, chosen.model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    told: list[list[float]] = [[], []]
    modules = []
    for checkpointing in (False, True):
        module = Module(single(lora_llama))
        if checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            module.model.enable_input_require_grads()
        callback = SelectionCallback(
            TARGET,
            mass=token_mean,
            told=lambda made, seen=told[checkpointing]: seen.extend(made.weights.tolist()),
            **CHOOSING,
        )
        fit(tmp_path, module, stream(16), callback, max_steps=4)
        modules.append(module)
    assert told[0] == pytest.approx(told[1], abs=1e-6)
    assert_same(*modules, 1e-6)


class Silent(Module):
    """Lightning 2.6's own `log` cannot be compiled by torch 2.13."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        return None


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["the module", "its model"])
def test_a_compiled_module_chooses_the_same(compiled: str, tmp_path: Path, fresh_dynamo: None) -> None:
    told: list[list[ftw.Selection]] = [[], []]
    modules = []
    for compiling in (False, True):
        module: Any = Silent(single(tiny_llama)) if compiled == "the module" else Module(single(tiny_llama))
        modules.append(module)
        if compiling and compiled == "its model":
            module.model = torch.compile(module.model, backend="aot_eager")
        elif compiling:
            module = torch.compile(module, backend="aot_eager")
        callback = SelectionCallback(TARGET, mass=token_mean, told=told[compiling].append, **CHOOSING)
        made = trainer(tmp_path, callback, max_steps=4)
        made.fit(module, loader(stream(16)), loader(stream(1, 500)))  # the sanity check traces first
    for a, b in zip(*told, strict=True):
        assert a.indices.tolist() == b.indices.tolist()
        torch.testing.assert_close(a.weights, b.weights, rtol=1e-3, atol=1e-3)
    assert modules[0].losses == pytest.approx(modules[1].losses, abs=1e-4)


# -- resuming ----------------------------------------------------------------------------------------------------------

RESUMED: dict[str, Any] = {"budget": 0.5, "warmup": 2, "refresh": 2, "ema": 0.3, "watch": 4}


class Stream:
    """A loader that knows where it is, as torchdata's do; without that Lightning itself begins the epoch anew."""

    def __init__(self, data: list[Batch]) -> None:
        self.data, self.at = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        while self.at < len(self.data):
            self.at += 1
            yield self.data[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Dropping(Module):
    """Draws dropout, and does what Lightning leaves to its users: the generator's state goes into the checkpoint."""

    state: Tensor | None = None

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__(make)
        for module in self.modules():
            if type(module).__name__ == "LlamaAttention":
                module.attention_dropout = 0.1  # type: ignore[assignment]
        torch.manual_seed(1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.state = checkpoint["random"]

    def on_train_start(self) -> None:
        if self.state is not None:
            torch.set_rng_state(self.state)


class Killed(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


MAKERS = {"full": tiny_llama, "lora": lora_llama}


def resumable(folder: Path, kind: str, *callbacks: Any, resume: str | None = None) -> Any:
    """A run with a checkpoint every five steps, in epochs of six."""
    told: list[ftw.Selection] = []
    module = Dropping(single(MAKERS[kind]))
    saving = pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=5)
    selecting = SelectionCallback(TARGET, mass=token_mean, told=told.append, **RESUMED)
    made = trainer(folder, selecting, *callbacks, saving, max_steps=12, enable_checkpointing=True)
    made.fit(module, Stream(stream(6 * ACCUMULATION)), ckpt_path=resume)
    return module, told, selecting


def run_until_killed(folder: str, kind: str) -> None:
    """In a process of its own."""
    resumable(Path(folder), kind, Killed())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_run_resumes_bitwise(kind: str, tmp_path: Path) -> None:
    whole, expected, selecting = resumable(tmp_path / "whole", kind)

    source = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_lightning as t; t.run_until_killed(*sys.argv[2:])"
    )
    command = [sys.executable, "-c", source, str(Path(__file__).parent), str(tmp_path / "killed"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (saved,) = (tmp_path / "killed").glob("*.ckpt")
    assert saved.name == "step=5.ckpt"

    resumed, found, again = resumable(tmp_path / "killed", kind, resume=str(saved))
    assert len(found) == 7
    for ours, theirs in zip(found, expected[5:], strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.weights, theirs.weights)
        assert ours.predicted_drop == theirs.predicted_drop
    assert_same(resumed, whole)
    assert again.selector.fidelity == selecting.selector.fidelity


def test_the_state_in_a_checkpoint_is_plain_data(tmp_path: Path) -> None:
    resumable(tmp_path, "lora")
    checkpoint = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["SelectionCallback"]["step"] == 5


def test_a_checkpoint_without_the_state_is_named(tmp_path: Path) -> None:
    module = Module(single(tiny_llama))
    plain = fit(tmp_path, module, stream(8), max_steps=1)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    made = trainer(tmp_path, SelectionCallback(TARGET, mass=token_mean, **CHOOSING), max_steps=2)
    with pytest.warns(UserWarning, match="no state of SelectionCallback"):
        made.fit(module, loader(stream(8)), ckpt_path=tmp_path / "plain.ckpt")


def test_a_checkpoint_within_a_window_resumes_as_lightning_does(tmp_path: Path) -> None:
    """That is, with the rest of the window: what was accumulated is in no checkpoint."""
    runs, told = [], []
    for arguments in (None, EVERYTHING):
        given = arguments or {}
        for resume in (None, tmp_path / "step=1.ckpt"):
            callbacks = [SelectionCallback(TARGET, mass=token_mean, told=told.append, **given)] if arguments else []
            saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
            settings = {"val_check_interval": 6, "max_steps": 4, "enable_checkpointing": resume is None}
            made = trainer(tmp_path, *callbacks, *([saving] if resume is None else []), **settings)
            module = Module(single(tiny_llama))
            made.fit(module, Stream(stream(8)), loader(stream(1, 500)), ckpt_path=resume)
            runs.append(module)
        (tmp_path / "step=1.ckpt").unlink()
    assert_same(runs[0], runs[2], 1e-6)
    assert_same(runs[1], runs[3], 1e-6)
    assert [len(selection.weights) for selection in told] == [12] * 4 + [6, 12, 12]


# -- arguments ---------------------------------------------------------------------------------------------------------


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


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, SelectionCallback(TARGET))
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(ConfigurationError, match="2 processes"):
        made.fit(Module(single(tiny_llama)), loader(stream(8)))


def test_a_strategy_that_wraps_the_module_is_refused(tmp_path: Path) -> None:
    class Wrapping(pl.strategies.SingleDeviceStrategy):
        def _setup_model(self, model: nn.Module) -> nn.Module:
            return nn.Sequential(model)

    made = trainer(tmp_path, SelectionCallback(TARGET), strategy=Wrapping("cpu"), accelerator="auto")
    with pytest.raises(ConfigurationError, match="wraps the module in a Sequential"):
        made.fit(Module(single(tiny_llama)), loader(stream(8)))
