"""SFTTrainer in two processes: the untouched one where nothing is selected, and one process with the whole pool.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="models and tokenizers come from it")
pytest.importorskip("peft", reason="adapters come from it")
pytest.importorskip("trl", reason="the integration is for its SFTTrainer")

from ftw_integrations.trl import SelectionArguments

from tests.gloo import needs_gloo, run, serve
from tests.integration.test_trl import CHOOSING, METRICS, UNTOUCHED, Choices, logged, trainer_of

pytestmark = needs_gloo

STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "full, completions": {"kind": "prompt"},
    "lora, packed": {"adapters": True, "packing": True, "max_length": 24},
}


def trained(folder: Path, selection: SelectionArguments | None, **settings: Any) -> dict[str, Any]:
    choices = Choices()
    given = {"max_steps": STEPS, "gradient_accumulation_steps": 2, **settings}
    trainer = choices.trainer = trainer_of(folder, selection, callbacks=[] if selection is None else [choices], **given)
    trainer.train()
    return {
        "parameters": [x for p in trainer.model.parameters() if p.requires_grad for x in p.detach().flatten().tolist()],
        "metrics": {name: logged(trainer, name) for name in METRICS},
        "weights": [selection.weights.tolist() for selection in choices.made],
    }


def trainers(rank: int) -> dict[str, Any]:
    folder = Path(sys.argv[4]) / "out"
    selections = {"untouched": None, "all": UNTOUCHED, "chosen": CHOOSING}
    return {
        f"{name}, {kind}": trained(folder, selection, **settings)
        for kind, settings in KINDS.items()
        for name, selection in selections.items()
    }


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {"trainers": trainers}


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_pool(tmp_path: Path) -> None:
    both = run(__file__, "trainers", tmp_path)
    found = both[0]
    for name in found:
        assert found[name]["parameters"] == both[1][name]["parameters"], name
        assert found[name]["weights"] == both[1][name]["weights"], name
    for kind, settings in KINDS.items():
        plain, everything = found[f"untouched, {kind}"], found[f"all, {kind}"]
        assert everything["parameters"] == pytest.approx(plain["parameters"], abs=1e-6), kind
        for metric in METRICS:
            assert everything["metrics"][metric] == pytest.approx(plain["metrics"][metric], abs=1e-6), (kind, metric)
        several = replace(CHOOSING, target_batches=2)  # one of each process
        alone = trained(tmp_path / "alone", several, **{**settings, "gradient_accumulation_steps": 4})
        for mine, theirs in zip(alone["weights"], found[f"chosen, {kind}"]["weights"], strict=True):
            # Candidates are numbered process by process, and its batches are every second one.
            assert sorted(theirs) == pytest.approx(sorted(mine), abs=1e-3), kind
        assert found[f"chosen, {kind}"]["parameters"] == pytest.approx(alone["parameters"], abs=1e-4), kind


if __name__ == "__main__":
    serve(SCENARIOS)
