"""Lightning's checkpoints carry the selection on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ftw
from ftw.errors import ConfigurationError
from tests.models import lora_llama, tiny_llama

pytest.importorskip("lightning", reason="the integration is for its Trainer")

import lightning.pytorch as pl
from ftw_integrations.lightning import SelectionCallback, token_mean

from tests.lightning_runs import (
    ACCUMULATION,
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

    here = Path(__file__)
    source = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_lightning_resume as t; t.run_until_killed(*sys.argv[3:])"
    )
    folders = [str(here.parent), str(here.parents[2])]
    command = [sys.executable, "-c", source, *folders, str(tmp_path / "killed"), kind]
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


def test_a_checkpoint_of_two_processes_is_refused_by_one(tmp_path: Path) -> None:
    resumable(tmp_path, "lora")
    path = tmp_path / "step=5.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["SelectionCallback"]
    checkpoint["callbacks"]["SelectionCallback"] = {"processes": [state, state]}
    torch.save(checkpoint, path)
    with pytest.raises(ConfigurationError, match=r"states of 2 process\(es\) and this run has 1"):
        resumable(tmp_path, "lora", resume=str(path))


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
