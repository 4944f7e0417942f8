"""Lightning's ModelParallelStrategy with FSDP2 in two processes: one process with the whole pool and the whole model.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ftw
from tests.gloo import needs_gloo, run, serve
from tests.models import lora_llama, tiny_llama

pytest.importorskip("lightning", reason="the integration is for its Trainer")

import lightning.pytorch as pl
from ftw_integrations.lightning import SelectionCallback, token_mean

from tests.lightning_runs import (
    EVERYTHING,
    TARGET,
    Labelled,
    Module,
    counted,
    loader,
    stream,
    trainer,
    without_labels,
)

pytestmark = needs_gloo

STEPS = 4
MAKE: dict[str, Callable[[], Any]] = {"full": tiny_llama, "lora": lora_llama}  # float64
ORDER = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]  # candidates go process by process, whose batches are every second one
CHOOSING: dict[str, Any] = {"budget": 3, "warmup": 1}
RESUMED: dict[str, Any] = {"budget": 3, "warmup": 2, "refresh": 2, "ema": 0.3, "watch": 4}


class Sharded(Module):
    """Every decoder layer is a unit, and what remains of the model is one."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for module in list(self.model.modules()):
            if type(module).__name__.endswith("DecoderLayer"):
                fully_shard(module, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class ShardedItself(Module):
    """The LightningModule is the unit, and its training step what FSDP counts as its forward."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        fully_shard(self, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]
        register_fsdp_forward_method(self, "training_step")


class ShardedLabelled(Labelled, Sharded):
    pass


def parallel(**given: Any) -> dict[str, Any]:
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **given)
    return {"strategy": strategy, "devices": 2, "use_distributed_sampler": False, "accumulate_grad_batches": 2}


def fitted(
    folder: Path,
    module: Any,
    chosen: dict[str, Any] | None,
    data: list[Any],
    *more: Any,
    resume: Path | None = None,
    **changed: Any,
) -> dict[str, Any]:
    """The selections' weights, the parameters in the end, and how many numbers of them this process holds."""
    made: list[ftw.Selection] = []
    callbacks = list(more)
    if chosen is not None:
        callbacks.append(SelectionCallback(told=made.append, **{"mass": token_mean, "target": TARGET, **chosen}))
    trainer(folder, *callbacks, **{"max_steps": STEPS, **changed}).fit(module, loader(data), ckpt_path=resume)
    whole = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in module.parameters()]
    return {
        "parameters": [number for p in whole for number in p.flatten().tolist()],
        "weights": [selection.weights.tolist() for selection in made],
        "held": sum(getattr(p, "_local_tensor", p).numel() for p in module.parameters()),
    }


def trainers(rank: int) -> dict[str, Any]:
    own = stream(4 * STEPS)[rank::2]  # two micro-batches of each process in a step
    found = {}
    for kind, make in MAKE.items():
        for name, chosen in (("untouched", None), ("all", EVERYTHING), ("chosen", CHOOSING)):
            found[f"{name}, {kind}"] = fitted(Path(sys.argv[4]) / "out", Sharded(make), chosen, own, **parallel())
    for name, chosen in (("untouched", None), ("all", EVERYTHING)):
        by_value = {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01}
        found[f"{name}, by value"] = fitted(
            Path(sys.argv[4]) / "out", Sharded(lora_llama), chosen, own, **by_value, **parallel()
        )
    found["chosen, itself"] = fitted(Path(sys.argv[4]) / "out", ShardedItself(lora_llama), CHOOSING, own, **parallel())
    found["chosen, named"] = fitted(
        Path(sys.argv[4]) / "out", Sharded(lora_llama), {**CHOOSING, "model": "model"}, own, **parallel()
    )
    return found


def unlabelled(rank: int) -> dict[str, Any]:
    own = without_labels()[rank::2]
    return fitted(
        Path(sys.argv[4]) / "out",
        ShardedLabelled(lora_llama),
        {**CHOOSING, "mass": counted},
        own,
        max_steps=3,
        **parallel(),
    )


def resumed(rank: int) -> dict[str, Any]:
    """A run that goes on from its second step, by a checkpoint of shards and by one file."""
    found = {}
    own = stream(4 * STEPS)[rank::2]
    for name, as_shards in (("shards", True), ("file", False)):
        folder = Path(sys.argv[4]) / name
        for kind, make in MAKE.items():
            saving = pl.callbacks.ModelCheckpoint(folder, kind + "{step}", save_top_k=-1, every_n_train_steps=2)
            chosen = {**RESUMED, "target": stream(3, 1000 * (1 + rank))}
            settings = {"save_distributed_checkpoint": as_shards}
            whole = fitted(
                Path(sys.argv[4]) / "out",
                Sharded(make),
                chosen,
                own,
                saving,
                enable_checkpointing=True,
                **parallel(**settings),
            )
            checkpoint = folder / f"{kind}step=2.ckpt"
            again = fitted(
                Path(sys.argv[4]) / "out", Sharded(make), chosen, own[4:], resume=checkpoint, **parallel(**settings)
            )
            saved = torch.load(checkpoint / "meta.pt" if as_shards else checkpoint, weights_only=True)
            found[f"{name}, {kind}"] = {
                "parameters": again["parameters"] == whole["parameters"],
                "weights": again["weights"] == whole["weights"][2:],
                "steps": len(again["weights"]),
                "saved": [state["step"] for state in saved["callbacks"]["SelectionCallback"]["processes"]],
            }
    return found


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "trainers": trainers,
    "unlabelled": unlabelled,
    "resumed": resumed,
}


def agree(found: dict[str, Any], alone: dict[str, Any], order: list[int]) -> None:
    """Candidate i of the one process has the number `order[i]` among those of the two."""
    assert len(found["weights"]) == len(alone["weights"])
    for mine, theirs in zip(alone["weights"], found["weights"], strict=True):
        there = [theirs[at] for at in order[: len(mine)]]
        assert [weight > 0 for weight in there] == [weight > 0 for weight in mine]
        assert there == pytest.approx(mine, abs=1e-6)
    assert found["parameters"] == pytest.approx(alone["parameters"], abs=1e-9)


@pytest.mark.slow
def test_a_sharded_module_selects_as_one_process_does(tmp_path: Path) -> None:
    first, second = run(__file__, "trainers", tmp_path)
    for kind, make in MAKE.items():
        assert first[f"chosen, {kind}"]["held"] < 0.6 * len(first[f"chosen, {kind}"]["parameters"])
        untouched = first[f"untouched, {kind}"]["parameters"]
        assert first[f"all, {kind}"]["parameters"] == pytest.approx(untouched, abs=1e-9)
        alone = fitted(tmp_path, Module(make), CHOOSING, stream(4 * STEPS), accumulate_grad_batches=4)
        agree(first[f"chosen, {kind}"], alone, ORDER)
    plain = first["untouched, by value"]["parameters"]
    assert first["all, by value"]["parameters"] == pytest.approx(plain, abs=1e-9)
    for name in ("itself", "named"):
        agree(first[f"chosen, {name}"], first["chosen, lora"], list(range(12)))
    for name in first:
        assert first[name]["weights"] == second[name]["weights"]
        assert first[name]["parameters"] == second[name]["parameters"]


@pytest.mark.slow
def test_a_sharded_module_runs_a_batch_without_labels(tmp_path: Path) -> None:
    """In the same block as the others' batches: outside of one FSDP would reduce its gradient, and wait for theirs."""
    first, second = run(__file__, "unlabelled", tmp_path)
    assert [first[name] for name in ("weights", "parameters")] == [second[name] for name in ("weights", "parameters")]
    data, chosen = without_labels(), {**CHOOSING, "mass": counted}
    alone = fitted(tmp_path, Labelled(lora_llama), chosen, data, accumulate_grad_batches=4, max_steps=3)
    assert [len(weights) for weights in alone["weights"]] == [9, 12]
    for mine, theirs, order in zip(alone["weights"], first["weights"], (range(9), ORDER), strict=True):
        assert [theirs[at] for at in order] == pytest.approx(mine, abs=1e-6)
    assert first["parameters"] == pytest.approx(alone["parameters"], abs=1e-9)


@pytest.mark.slow
def test_a_sharded_run_of_lightning_resumes_bitwise(tmp_path: Path) -> None:
    for found in run(__file__, "resumed", tmp_path):
        assert len(found) == 4
        for name, each in found.items():
            assert each == {"parameters": True, "weights": True, "steps": STEPS - 2, "saved": [2, 2]}, name


if __name__ == "__main__":
    serve(SCENARIOS)
