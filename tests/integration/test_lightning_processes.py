"""Lightning's DDP in two processes: the untouched trainer where nothing is selected, one process with the whole pool.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ftw
from ftw.errors import ConfigurationError
from tests.gloo import needs_gloo, run, serve
from tests.models import lora_llama, tiny_llama

pytest.importorskip("lightning", reason="the integration is for its Trainer")

import lightning.pytorch as pl
from ftw_integrations.lightning import SelectionCallback, token_mean

from tests.lightning_runs import (
    CHOOSING,
    EVERYTHING,
    TARGET,
    Labelled,
    Module,
    counted,
    loader,
    single,
    stream,
    trainer,
    without_labels,
)

pytestmark = needs_gloo

STEPS = 5
TWO: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
ONE_BATCH: dict[str, Any] = {"accumulate_grad_batches": 1}
MAKE: dict[str, Any] = {"full": tiny_llama, "lora": lora_llama}


def fitted(
    kind: str,
    chosen: dict[str, Any] | None,
    data: list[Any],
    folder: Path,
    *,
    more: Sequence[Any] = (),
    resume: Path | None = None,
    of: type[Module] = Module,
    **changed: Any,
) -> dict[str, Any]:
    made: list[ftw.Selection] = []
    callbacks = [*more]
    if chosen is not None:
        callbacks.append(SelectionCallback(told=made.append, **{"mass": token_mean, "target": TARGET, **chosen}))
    module = of(single(MAKE[kind]))
    trainer(folder, *callbacks, **{"max_steps": STEPS, **changed}).fit(module, loader(data), ckpt_path=resume)
    numbers = [x for p in module.parameters() if p.requires_grad for x in p.detach().flatten().tolist()]
    return {"parameters": numbers, "weights": [selection.weights.tolist() for selection in made]}


def trainers(rank: int) -> dict[str, Any]:
    folder = Path(sys.argv[4]) / "out"
    own = stream(4 * STEPS)[rank::2]  # two micro-batches of each process in a step
    found = {}
    for kind in MAKE:
        for name, chosen in (("untouched", None), ("all", EVERYTHING), ("chosen", CHOOSING)):
            found[f"{name}, {kind}"] = fitted(kind, chosen, own, folder, accumulate_grad_batches=2, **TWO)
    return found


def resumed(rank: int) -> dict[str, Any]:
    """A run that goes on from its third step: what each remembers of its own target decides the fourth."""
    folder = Path(sys.argv[4]) / "checkpoints"
    chosen = {
        "budget": 3,
        "warmup": 2,
        "refresh": 2,
        "ema": 0.3,
        "pool": "local",
        "target": stream(3, 1000 * (1 + rank)),
    }
    own = stream(2 * STEPS)[rank::2]
    saving = pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3)
    whole = fitted("lora", chosen, own, folder, more=[saving], enable_checkpointing=True, **ONE_BATCH, **TWO)
    checkpoint = folder / "step=3.ckpt"
    again = fitted("lora", chosen, own[3:], folder, resume=checkpoint, **ONE_BATCH, **TWO)
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]["SelectionCallback"]["processes"]
    return {
        "parameters": again["parameters"] == whole["parameters"],
        "weights": again["weights"] == whole["weights"][3:],
        "steps": len(again["weights"]),
        "saved": [state["step"] for state in saved],
    }


def unlabelled(rank: int) -> dict[str, Any]:
    folder, settings = Path(sys.argv[4]) / "out", {"of": Labelled, "max_steps": 3, "accumulate_grad_batches": 2}
    with pytest.raises(ConfigurationError, match="has static_graph=True"):
        fitted("lora", CHOOSING, stream(2), folder, devices=2, strategy=pl.strategies.DDPStrategy(static_graph=True))
    return {
        name: fitted("lora", chosen, without_labels()[rank::2], folder, **settings, **TWO)
        for name, chosen in (("untouched", None), ("all", {**EVERYTHING, "mass": counted}))
    }


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "trainers": trainers,
    "resumed": resumed,
    "unlabelled": unlabelled,
}


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_pool(tmp_path: Path) -> None:
    both = run(__file__, "trainers", tmp_path)
    assert both[0] == both[1]
    found = both[0]
    for kind in MAKE:
        plain = found[f"untouched, {kind}"]["parameters"]
        assert found[f"all, {kind}"]["parameters"] == pytest.approx(plain, abs=1e-6)
        alone = fitted(kind, CHOOSING, stream(4 * STEPS), tmp_path / "alone", accumulate_grad_batches=4)
        # Candidates are numbered process by process, and its batches, of three rows, are every second one.
        order = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
        for mine, theirs in zip(alone["weights"], found[f"chosen, {kind}"]["weights"], strict=True):
            assert [theirs[order.index(i)] for i in range(12)] == pytest.approx(mine, abs=2e-3)
        assert found[f"chosen, {kind}"]["parameters"] == pytest.approx(alone["parameters"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_resume_bitwise(tmp_path: Path) -> None:
    for found in run(__file__, "resumed", tmp_path):
        assert found == {"parameters": True, "weights": True, "steps": STEPS - 3, "saved": [3, 3]}


@pytest.mark.slow
def test_batches_without_labels_keep_no_process_waiting(tmp_path: Path) -> None:
    first, second = run(__file__, "unlabelled", tmp_path)
    assert first == second
    assert first["all"]["parameters"] == pytest.approx(first["untouched"]["parameters"], abs=1e-6)
    assert [len(weights) for weights in first["all"]["weights"]] == [9, 12]  # the second step has no candidate


if __name__ == "__main__":
    serve(SCENARIOS)
