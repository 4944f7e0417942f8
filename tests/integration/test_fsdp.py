"""A model sharded by FSDP2 over several gloo processes: the same selection, weights and parameters as one process
with all candidates and the whole model.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ftw
from ftw.filters import Chain
from tests.gloo import needs_gloo, run, serve
from tests.models import batch_of, label_tokens, lora_llama, tiny_llama, token_mean

pytestmark = needs_gloo

MICRO, STEPS = 2, 3  # micro-batches of a step, on each process
ROWS = (2, 3, 2, 3)  # of each process's micro-batches
Batch = dict[str, Tensor]

KINDS: dict[str, Callable[[], nn.Module]] = {
    "full": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "lora": lora_llama,
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"filter": "greedy", "budget": 3, "warmup": 1},
    "topk": {"filter": "topk", "budget": 0.4, "warmup": 0},
    "chain": {"filter": Chain(["topk", "greedy"], keep=[1.5]), "budget": 3, "warmup": 1},
    "without K": {"filter": "topk", "solver": "uniform", "budget": 3, "warmup": 1},
    "utility": {"filter": "topk", "objective": "utility", "budget": 3, "warmup": 0},
    "update": {"filter": "topk", "geometry": "update", "budget": 3, "warmup": 1},
    "target": {"filter": "topk", "reference": "target", "budget": 3, "warmup": 0},
    "again": {"filter": "topk", "relinearise": True, "budget": 3, "warmup": 0},
    "several": {"filter": "greedy", "targets": "worst", "budget": 3, "warmup": 0},
    "sgd": {"filter": "greedy", "budget": 3},
}


def names(kind: str, world: int) -> list[str]:
    """All cases with two processes, the most different ones elsewhere."""
    if kind == "full" and world == 2:
        return list(CASES)
    return ["greedy", "without K"] if kind == "lora" else ["topk"] if kind == "tied" else ["greedy", "chain", "sgd"]


def batches(rank: int, step: int) -> list[Batch]:
    """A process's micro-batches of a step: not of one size on all."""
    return [batch_of(ROWS[rank], seed=100 * step + 10 * number + rank) for number in range(MICRO)]


def targets(rank: int) -> list[Batch]:
    return [batch_of(1 + rank % 2, seed=1000 + rank), batch_of(2, seed=2000 + rank)]


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)


def selector_of(model: nn.Module, name: str, ranks: list[int]) -> ftw.Selector:
    given: Any = [batch for rank in ranks for batch in targets(rank)]
    if "targets" in CASES[name]:
        given = {"a": [targets(rank)[0] for rank in ranks], "b": [targets(rank)[1] for rank in ranks]}
    optimizer = optimizer_of(model, name)
    return ftw.Selector(model, optimizer, target=given, loss_fn=token_mean, target_batches="all", **CASES[name])


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """Every layer of the Llama is a unit, and what remains is one."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def train(selector: ftw.Selector, ranks: list[int], world: int) -> dict[str, Any]:
    """Steps of a loop that knows nothing of processes; what each selected, and the parameters in the end.

    Each process's loss is its mean, the step's the mean over processes: one process with all divides by their number.
    """
    found: list[dict[str, Any]] = []
    model = selector.model
    for step in range(STEPS):
        for rank in ranks:
            micro = batches(rank, step)
            for batch in micro:
                with selector.record(mass=label_tokens(batch) / label_tokens(batch).sum()):
                    (token_mean(model, batch) / len(micro) / (world if len(ranks) > 1 else 1)).backward()
        selection = selector.apply()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        selector.optimizer.step()
        selector.optimizer.zero_grad()
        found.append(
            {
                "indices": selection.indices.tolist(),
                "weights": selection.weights.tolist(),
                "drop": selection.predicted_drop,
                "alignment": selection.diagnostics["alignment"].tolist(),
                "norm": float(whole(norm)),
                "sent": selection.diagnostics.get("sent_bytes"),
            }
        )
    return {"steps": found, "parameters": numbers_of(model)}


def whole(tensor: Tensor) -> Tensor:
    result: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result


def numbers_of(model: nn.Module) -> list[list[float]]:
    return [whole(p.detach()).flatten().tolist() for p in model.parameters() if p.requires_grad]


# --- scenarios -------------------------------------------------------------------------------------------------------


def cases(rank: int, kind: str) -> dict[str, Any]:
    world = dist.get_world_size()
    found = {}
    for i, name in enumerate(names(kind, world)):
        model = sharded(KINDS[kind](), reshard_after_forward=i % 2 == 0)
        if i % 3 == 1:
            checkpointed(model)
        selector = selector_of(model, name, [rank])
        found[name] = train(selector, [rank], world)
        selector.close()
    return found


def checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()  # type: ignore[operator]


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    kind: (lambda rank, kind=kind: cases(rank, kind))  # type: ignore[misc]
    for kind in KINDS
}


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("full", 2), ("full", 4), ("lora", 2), ("tied", 2)])
def test_a_sharded_model_selects_as_one_process_does(kind: str, world: int, tmp_path: Path) -> None:
    everywhere = run(__file__, kind, tmp_path, world)
    for name in names(kind, world):
        alone = train(selector_of(KINDS[kind](), name, list(range(world))), list(range(world)), world)
        first = everywhere[0][name]
        for found in everywhere:
            for key in ("indices", "weights", "drop", "alignment"):
                assert [step[key] for step in found[name]["steps"]] == [step[key] for step in first["steps"]], name
            assert found[name]["parameters"] == first["parameters"], name
        for step, (mine, theirs) in enumerate(zip(alone["steps"], first["steps"], strict=True)):
            assert mine["indices"] == theirs["indices"], (name, step)
            assert theirs["weights"] == pytest.approx(mine["weights"], abs=1e-9), (name, step)
            size = max(map(abs, mine["alignment"]))
            assert theirs["alignment"] == pytest.approx(mine["alignment"], rel=0, abs=1e-9 * size), (name, step)
            assert theirs["drop"] == pytest.approx(mine["drop"], rel=1e-8), (name, step)
            assert theirs["norm"] == pytest.approx(mine["norm"], rel=1e-9), (name, step)
        for mine, theirs in zip(alone["parameters"], first["parameters"], strict=True):
            assert theirs == pytest.approx(mine, abs=1e-10), name


if __name__ == "__main__":
    serve(SCENARIOS)
