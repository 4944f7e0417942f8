"""The Trainer in two processes: the untouched one where nothing is selected, and one process with the whole pool.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the integration is for its Trainer")
pytest.importorskip("accelerate", reason="Trainer needs it")
pytest.importorskip("peft", reason="adapters come from it")

from ftw_integrations.huggingface import STATE_NAME, SelectionArguments

from ftw.watching import read_log
from ftw.watching.log import NAME
from tests.gloo import needs_gloo, run, serve
from tests.integration.test_huggingface import CHOOSING, UNTOUCHED, model_of, rows_of, selecting, untouched

pytestmark = needs_gloo

STEPS = 8
LOCAL = SelectionArguments(budget=2, warmup=2, target_batch_size=4, pool="local")
LOGGING = SelectionArguments(budget=2, warmup=2, target_batch_size=4, log="log")
UNEVEN = SelectionArguments(budget=3, warmup=2, target_batch_size=4, filter="topk")


def numbers_of(model: torch.nn.Module) -> list[float]:
    return [number for p in model.parameters() if p.requires_grad for number in p.detach().flatten().tolist()]


def trained(kind: str, selection: SelectionArguments | None, folder: Path, **changed: Any) -> dict[str, Any]:
    model = model_of(kind)
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": 2, **changed}
    if selection is None:
        untouched(folder, model, **settings).train()
        return {"parameters": numbers_of(model)}
    columns = settings.pop("columns", False)
    trainer, choices = selecting(folder, model, selection, **settings)
    if columns:
        trainer.train_dataset = [{**row, "id": f"n{i}"} for i, row in enumerate(trainer.train_dataset)]
    trainer.train()
    return {
        "parameters": numbers_of(model),
        "weights": [selection.weights.tolist() for selection in choices.made],
        "logged": [entry for entry in trainer.state.log_history if "ftw/chosen" in entry][-1]["ftw/candidates"],
    }


def trainers(rank: int) -> dict[str, Any]:
    folder = Path(sys.argv[4]) / "out"
    own_tokens = {"average_tokens_across_devices": False}
    return {
        "untouched": trained("full", None, folder),
        "all": trained("full", UNTOUCHED, folder),
        "untouched, lora": trained("lora", None, folder, **own_tokens),
        "all, lora": trained("lora", UNTOUCHED, folder, **own_tokens),
        "full": trained("full", CHOOSING, folder),
        "lora": trained("lora", UNEVEN, folder),
        "local": trained("lora", LOCAL, folder),
        "logging": trained("lora", LOGGING, folder, max_steps=2, columns=True),
    }


def resumed(rank: int) -> dict[str, Any]:
    """A run that goes on from its fourth step, and its checkpoint's files."""
    folder = Path(sys.argv[4]) / "checkpoints"
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = trained("full", CHOOSING, folder, **settings)
    checkpoint = folder / "checkpoint-4"
    model = model_of("full", seed=1)
    trainer, choices = selecting(folder, model, CHOOSING, max_steps=STEPS, gradient_accumulation_steps=2, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    later = [selection.weights.tolist() for selection in choices.made]
    files = sorted(path.name for path in checkpoint.iterdir() if path.name.endswith(STATE_NAME))
    return {
        "same": numbers_of(model) == whole["parameters"],
        "weights": later == whole["weights"][4:],
        "files": files,
        "steps": len(later),
    }


def unlabelled(rank: int) -> dict[str, Any]:
    """The second process's last micro-batch of the first step has no label, nor has anything in the second step."""
    data = rows_of(24, 1)
    for i in (6, 7, *range(8, 16)):
        data[i]["labels"][:] = -100
    found: dict[str, Any] = {}
    for name in ("untouched", "all"):
        model, folder = model_of("full"), Path(sys.argv[4]) / "out"
        settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
        made = untouched(folder, model, **settings) if name == "untouched" else None
        trainer, choices = selecting(folder, model, UNTOUCHED, **settings) if made is None else (made, None)
        trainer.train_dataset = data
        trainer.train()
        found[name] = numbers_of(model)
        found["candidates"] = [] if choices is None else [len(made.weights) for made in choices.made]
    return found


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "trainers": trainers,
    "resumed": resumed,
    "unlabelled": unlabelled,
}


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for the log
    both = run(__file__, "trainers", tmp_path)
    for name in both[0]:
        assert both[0][name]["parameters"] == both[1][name]["parameters"], name
    for kind in ("", ", lora"):
        plain, everything = both[0][f"untouched{kind}"]["parameters"], both[0][f"all{kind}"]["parameters"]
        assert everything == pytest.approx(plain, abs=1e-6), kind
    for kind, selection in (("full", CHOOSING), ("lora", UNEVEN)):
        several = SelectionArguments(**{**vars(selection), "target_batches": 2})  # one of each process
        alone = trained(kind, several, tmp_path / "alone", gradient_accumulation_steps=4)
        found = both[0][kind]
        assert found["weights"] == both[1][kind]["weights"]
        assert found["logged"] == alone["logged"] == 8
        for step, (mine, theirs) in enumerate(zip(alone["weights"], found["weights"], strict=True)):
            # Candidates are numbered process by process, and its batches are every second one.
            order = [0, 1, 4, 5, 2, 3, 6, 7]
            assert [theirs[order.index(i)] for i in range(8)] == pytest.approx(mine, abs=1e-3), (kind, step)
        assert found["parameters"] == pytest.approx(alone["parameters"], abs=1e-4), kind
    assert [len(weights) for weights in both[0]["local"]["weights"]] == [4] * STEPS
    assert both[0]["local"]["weights"] != both[1]["local"]["weights"]
    entries = list(read_log(tmp_path / "log" / NAME))  # the first process wrote the candidates of both
    assert [entry.columns["weight"] for entry in entries] == both[0]["logging"]["weights"]
    ids = [name for entry in entries for name in entry.columns["id"]]
    assert len(set(ids)) == len(ids) == 16


@pytest.mark.slow
def test_two_processes_resume_bitwise(tmp_path: Path) -> None:
    for found in run(__file__, "resumed", tmp_path):
        assert found["steps"] == STEPS - 4
        assert found["files"] == [f"0_{STATE_NAME}", f"1_{STATE_NAME}"]
        assert found["same"]
        assert found["weights"]


@pytest.mark.slow
def test_a_micro_batch_without_labels_keeps_no_process_waiting(tmp_path: Path) -> None:
    first, second = run(__file__, "unlabelled", tmp_path)
    assert first == second
    assert first["all"] == pytest.approx(first["untouched"], abs=1e-6)
    assert first["candidates"] == [6, 6, 8]  # in the second step nothing is selected: the first one's stands


if __name__ == "__main__":
    serve(SCENARIOS)
