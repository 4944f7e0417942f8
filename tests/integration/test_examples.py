"""The examples run as they stand, in a process of their own, and show what they are to show."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gloo import needs_gloo

pytest.importorskip("transformers", reason="the examples build a small Llama")
pytest.importorskip("accelerate", reason="Trainer needs it")
pytest.importorskip("peft", reason="hf_lora trains adapters")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_lora", "lightning_module", "plain_loop", "trl_sft"])
def test_an_example_as_it_stands(name: str, tmp_path: Path) -> None:
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="its Trainer is what the example shows")
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = [line.rsplit(": ", 1) for line in done.stdout.splitlines() if line.startswith("test loss")]
    losses = [float(loss) for _, loss in shown]
    assert losses[1] < losses[0]  # selected below all of it
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_gloo
def test_two_processes_under_torchrun(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [*launch, str(EXAMPLES / "ddp.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.rsplit(": ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("test loss")]
    assert losses[1] < losses[0]  # selected below all of it


def test_sft_takes_selection_arguments() -> None:
    pytest.importorskip("trl", reason="the example is for its SFTTrainer")
    losses = example("trl_sft").main(["--steps", "1", "--pretrain_steps", "1", "--packing", "true", "--budget", "3"])
    assert losses.keys() == {"all of it", "selected"}
    assert losses["all of it"] != losses["selected"]


def test_the_plain_loop_three_ways() -> None:
    losses = example("plain_loop").main(["--steps", "2", "--pretrain-steps", "2"])
    assert losses["recorded"] == pytest.approx(losses["attached"], abs=1e-5)
    assert losses["plain"] != losses["recorded"]


def test_the_trainer_takes_selection_arguments() -> None:
    losses = example("hf_lora").main(
        ["--steps", "1", "--pretrain_steps", "1", "--filter", "topk", "--solver", "uniform"]
    )
    assert losses.keys() == {"all of it", "selected"}


def test_a_lightning_module_as_it_is() -> None:
    pytest.importorskip("lightning", reason="its Trainer is what the example shows")
    losses = example("lightning_module").main(["--steps", "1", "--pretrain-steps", "1", "--budget", "0.5"])
    assert losses.keys() == {"all of it", "selected"}
    assert losses["selected"] != losses["all of it"]
