"""One pool over several gloo processes: the same selection, weights and parameters as one process with all of it.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ftw
from ftw.errors import FtwError
from ftw.filters import Chain
from ftw.quotas import WeightQuota
from tests.gloo import needs_gloo, run, serve
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean

pytestmark = needs_gloo

ROWS = 4  # of each process
STEPS = 3
Batch = dict[str, Tensor]

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"filter": "greedy", "budget": 3},
    "topk": {"filter": "topk", "budget": 0.4},
    "chain": {"filter": Chain(["topk", "greedy"], keep=[1.5]), "budget": 3},
    "without K": {"filter": "topk", "solver": "uniform", "budget": 3},
    "drawn": {"filter": "random", "budget": 3, "seed": 5},
    "utility": {"filter": "topk", "objective": "utility", "budget": 3, "warmup": 1},
    "update": {"filter": "topk", "geometry": "update", "budget": 3, "warmup": 1},
    "previous": {"filter": "topk", "reference": "previous", "budget": 3, "warmup": 0},
    "target": {"filter": "topk", "reference": "target", "budget": 3, "warmup": 0},
    "again": {"filter": "topk", "relinearise": True, "budget": 3, "warmup": 1},
}


def batches(world: int, step: int) -> list[Batch]:
    """Each process's rows of a step."""
    return [batch_of(ROWS, seed=100 * step + rank) for rank in range(world)]


def targets(rank: int) -> list[Batch]:
    return [batch_of(2, seed=1000 + rank), batch_of(2, seed=2000 + rank)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)


def train(
    model: nn.Module, selector: ftw.Selector, optimizer: torch.optim.Optimizer, own: Callable[[int], Sequence[Batch]]
) -> list[dict[str, Any]]:
    """Steps of a loop that knows nothing of processes; what each selected."""
    found = []
    for step in range(STEPS):
        micro = own(step)
        for batch in micro:
            with selector.record(mass=label_tokens(batch) / label_tokens(batch).sum()):
                (token_mean(model, batch) / len(micro)).backward()
        selection = selector.apply()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append(
            {
                "indices": selection.indices.tolist(),
                "weights": selection.weights.tolist(),
                "drop": selection.predicted_drop,
                "alignment": selection.diagnostics["alignment"].tolist(),
            }
        )
    return found


def numbers_of(model: nn.Module) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in model.parameters() if p.requires_grad]


def in_processes(make: Callable[[], nn.Module], rank: int, **arguments: Any) -> dict[str, Any]:
    world = dist.get_world_size()
    inner = make()
    model = DistributedDataParallel(inner)
    optimizer = optimizer_of(inner)
    selector = ftw.Selector(
        model, optimizer, target=targets(rank), loss_fn=token_mean, target_batches="all", **arguments
    )
    found = train(model, selector, optimizer, lambda step: [batches(world, step)[rank]])
    with selector.record():
        token_mean(model, batches(world, 9)[rank]).backward()
    return {"steps": found, "parameters": numbers_of(inner), "sent": selector.apply().diagnostics["sent_bytes"]}


def in_one(make: Callable[[], nn.Module], world: int, **arguments: Any) -> dict[str, Any]:
    model = make()
    optimizer = optimizer_of(model)
    target = [batch for rank in range(world) for batch in targets(rank)]
    selector = ftw.Selector(model, optimizer, target=target, loss_fn=token_mean, target_batches="all", **arguments)
    found = train(model, selector, optimizer, lambda step: batches(world, step))
    return {"steps": found, "parameters": numbers_of(model)}


def selector_of(
    rank: int, make: Callable[[], nn.Module] = MLP, static_graph: bool = False, **arguments: Any
) -> ftw.Selector:
    model = DistributedDataParallel(make(), static_graph=static_graph)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = [rows_of(10 + rank)]
    return ftw.Selector(
        model, optimizer, **{"target": target, "loss_fn": squares, "budget": 3, "warmup": 0, **arguments}
    )


def rows_of(seed: int, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 6, generator=generator, dtype=torch.float64),
        "y": torch.randn(rows, 2, generator=generator, dtype=torch.float64),
    }


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def record(selector: ftw.Selector, batch: Batch, scaler: Any = None, **arguments: Any) -> None:
    with selector.record(scaler=scaler, **arguments):
        loss = squares(selector._processes.wrapped, batch)
        (loss if scaler is None else scaler.scale(loss)).backward()


def gradients_of(selector: ftw.Selector) -> list[list[float] | None]:
    return [None if p.grad is None else p.grad.flatten().tolist() for p in selector.model.parameters()]


def said(act: Callable[[], object]) -> str:
    try:
        act()
    except FtwError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def cases(rank: int, make: Callable[[], nn.Module]) -> dict[str, Any]:
    return {name: in_processes(make, rank, **CASES[name]) for name in names(dist.get_world_size())}


def names(world: int) -> list[str]:
    """All cases with two processes, the most different ones with more."""
    return list(CASES) if world == 2 else ["greedy", "topk", "chain", "without K"]


# --- scenarios -------------------------------------------------------------------------------------------------------


def empty(rank: int) -> dict[str, Any]:
    """The last process has no batch in the second step, and none has one in the third."""
    found: dict[str, Any] = {"steps": []}
    selector = selector_of(rank)
    for step in range(2):
        if not (step == 1 and rank == 1):
            record(selector, rows_of(step + 5 * rank))
        selection = selector.apply()
        found["steps"].append({"weights": selection.weights.tolist(), "own": selection.diagnostics["own"]})
        found["gradients"] = gradients_of(selector)
        selector.optimizer.step()
        selector.optimizer.zero_grad()
    found["nobody"] = said(selector.apply)
    return found


def faulty(rank: int) -> dict[str, Any]:
    """NaN in one candidate of the last process; then in all of everybody's."""
    selector = selector_of(rank)
    batch = rows_of(rank)
    if rank == 1:
        batch["x"][2] = float("nan")
    record(selector, batch)
    selection = selector.apply()
    found = {
        "weights": selection.weights.tolist(),
        "quarantined": selection.diagnostics["quarantined"],
        "gradients": gradients_of(selector),
    }
    selector.optimizer.zero_grad()
    record(selector, {"x": batch["x"] * float("nan"), "y": batch["y"]})
    found["all"] = said(selector.apply)
    found["untouched"] = gradients_of(selector)
    return found


def failing(rank: int) -> dict[str, Any]:
    """The last process cannot form its target's gradient, then its extras, then is itself again."""
    wrong = [True]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return squares(model, batch) * (float("nan") if wrong[0] and rank == 1 else 1.0)

    selector = selector_of(rank, loss_fn=loss)
    record(selector, rows_of(rank))
    found: dict[str, Any] = {"target": said(selector.apply), "before": gradients_of(selector)}
    wrong[0] = False
    found["again"] = selector.apply().weights.tolist()
    selector.optimizer.step()
    selector.optimizer.zero_grad()
    record(selector, rows_of(rank), extras={"source": [object() if rank == 1 else "a"] * ROWS})
    found["extras"] = said(selector.apply)
    selector.discard()
    record(selector, rows_of(rank), extras={"one" if rank else "other": [0] * ROWS})
    found["names"] = said(selector.apply)
    selector.discard()
    if rank == 1:  # a block that raises drops what it recorded: this process then offers nothing
        with contextlib.suppress(RuntimeError):
            record(selector, {"x": torch.zeros(3, 7, dtype=torch.float64), "y": torch.zeros(3, 2)})
    else:
        record(selector, rows_of(rank))
    found["alone"] = selector.apply().weights.tolist()
    return found


def unlike(rank: int) -> dict[str, Any]:
    """Each argument in turn is another on the last process."""
    found: dict[str, Any] = {}
    for name, values in UNLIKE.items():
        selector = selector_of(rank, **{name: values[rank]})
        record(selector, rows_of(rank))
        found[name] = said(selector.apply)
        found[f"{name} left"] = gradients_of(selector)
        selector.close()
    return found


UNLIKE: dict[str, tuple[Any, Any]] = {
    "budget": (3, 4),
    "filter": ("greedy", "topk"),
    "solver": ("pgd", "uniform"),
    "seed": (0, 1),
    "reference": ("pool", "target"),
}


def scaled(rank: int) -> dict[str, Any]:
    """A GradScaler on each process; in the second step only the last one's loss overflows."""
    found: dict[str, Any] = {"steps": []}
    for pool in ("global", "local"):
        selector = selector_of(rank, pool=pool, solver="pgd")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            batch = rows_of(step + 5 * rank)
            if step == 1 and rank == 1:
                batch["x"][0] = float("inf")
            record(selector, batch, scaler)
            selection = selector.apply()
            scaler.unscale_(selector.optimizer)
            gradients = gradients_of(selector)
            scaler.step(selector.optimizer)
            scaler.update()
            selector.optimizer.zero_grad()
            found["steps"].append(
                {
                    "status": selection.status,
                    "scale": scaler.get_scale(),
                    "gradients": repr(gradients),
                    "parameters": numbers_of(selector.model),
                    "counted": selector.state_dict()["step"],
                }
            )
    return found


def local_pools(rank: int) -> dict[str, Any]:
    """Each decides alone, and what it would have done alone is averaged; the second process is idle in the end."""
    selector = selector_of(rank, pool="local")
    record(selector, rows_of(rank))
    selection = selector.apply()
    found: dict[str, Any] = {"weights": selection.weights.tolist(), "gradients": gradients_of(selector)}
    selector.optimizer.zero_grad()
    if rank == 0:
        record(selector, rows_of(rank))
    idle = selector.apply()
    found |= {"status": idle.status, "half": gradients_of(selector), "later": idle.weights.tolist()}
    return found


def outside(rank: int) -> dict[str, Any]:
    """Gradient of parameters without a rule, and gradient that no candidate owns."""
    found: dict[str, Any] = {}
    for pool in ("global", "local"):
        model = Shifted()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        selector = ftw.Selector(
            DistributedDataParallel(model),
            optimizer,
            target=[rows_of(10)],
            loss_fn=squares,
            filter="all",
            solver="uniform",
            uncovered="ignore",
            residual="keep",
            pool=pool,
        )
        with selector.record():
            (
                squares(selector._processes.wrapped, rows_of(rank)) + 0.1 * model.inner.first.weight.square().sum()
            ).backward()
        selector.apply()
        found[pool] = gradients_of(selector)
    return found


class Shifted(nn.Module):
    """A parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()
        self.shift = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x * self.shift)
        return result


def further(rank: int) -> dict[str, Any]:
    """Several targets, quotas by a column, a watched step, and state saved and loaded."""
    several = {"a": [rows_of(10 + rank)], "b": [rows_of(20 + rank)]}
    quota = WeightQuota(at_least={"second": 0.5})
    selector = selector_of(rank, target=several, targets="worst", constraints=quota, budget=4, filter="topk", watch=1)
    found: dict[str, Any] = {"steps": []}
    for step in range(3):
        record(selector, rows_of(step + 5 * rank), extras={"source": [["first", "second"][rank]] * ROWS})
        selection = selector.apply()
        selector.optimizer.step()
        selector.optimizer.zero_grad()
        assert selector.fidelity is not None
        found["steps"].append(
            {
                "weights": selection.weights.tolist(),
                "drops": selection.diagnostics["predicted_drops"],
                "drop": selection.predicted_drop,
                "realised": selector.fidelity.realised_drop,
                "cosine": selector.fidelity.cosine,
            }
        )
    return found


def refused(rank: int) -> dict[str, Any]:
    given: dict[str, dict[str, Any]] = {
        "gradients": {"gradients": "projection"},
        "curvature": {"curvature": "kfac"},
        "token": {"granularity": "token", "filter": "topk", "solver": "uniform"},
        "memory_cap": {"memory_cap": 1 << 30, "reference": "target"},
        "uncovered": {"uncovered": "scale"},
        "pool": {"pool": "everywhere"},
        "watch": {"pool": "local", "watch": 1},
        "static": {"static_graph": True},
    }
    return {name: said(lambda given=each: selector_of(rank, **given)) for name, each in given.items()}


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "full": lambda rank: cases(rank, tiny_llama),
    "lora": lambda rank: cases(rank, lora_llama),
    "empty": empty,
    "faulty": faulty,
    "failing": failing,
    "unlike": unlike,
    "scaled": scaled,
    "local": local_pools,
    "outside": outside,
    "further": further,
    "refused": refused,
}


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_global_pool_is_that_of_one_process(kind: str, world: int, tmp_path: Path) -> None:
    everywhere = run(__file__, kind, tmp_path, world)
    make = {"full": tiny_llama, "lora": lora_llama}[kind]
    for name in names(world):
        alone = in_one(make, world, **CASES[name])
        first = everywhere[0][name]
        for found in everywhere:
            assert found[name]["steps"] == first["steps"], name
            assert found[name]["parameters"] == first["parameters"], name
        for step, (mine, theirs) in enumerate(zip(alone["steps"], first["steps"], strict=True)):
            assert mine["indices"] == theirs["indices"], (name, step)
            assert theirs["weights"] == pytest.approx(mine["weights"], abs=1e-9), (name, step)
            size = max(map(abs, mine["alignment"]))
            assert theirs["alignment"] == pytest.approx(mine["alignment"], rel=0, abs=1e-9 * size), (name, step)
            assert theirs["drop"] == pytest.approx(mine["drop"], rel=1e-8), (name, step)
        for mine, theirs in zip(alone["parameters"], first["parameters"], strict=True):
            assert theirs == pytest.approx(mine, abs=1e-10), name
    # A filter that reads K needs everybody's contributions; one that does not, those of the chosen or none.
    sent = {name: sum(found[name]["sent"] for found in everywhere) for name in names(world)}
    assert sent["without K"] < sent["chain"] < sent["greedy"]


def alone(**arguments: Any) -> tuple[ftw.Selector, nn.Module]:
    """A selector of one process."""
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = {
        "target": [rows_of(10), rows_of(11)],
        "loss_fn": squares,
        "target_batches": "all",
        "budget": 3,
        "warmup": 0,
    }
    return ftw.Selector(model, optimizer, **{**given, **arguments}), model


def record_shares(selector: ftw.Selector, micro: Sequence[Batch], of: int = 2, **arguments: Any) -> None:
    for number, batch in enumerate(micro):
        given = {name: each[number] for name, each in arguments.items()}
        with selector.record(**given):
            (squares(selector.model, batch) / of).backward()


def flat(gradients: Sequence[list[float] | None]) -> list[float]:
    return [number for each in gradients if each is not None for number in each]


def test_a_process_without_candidates_keeps_nobody_waiting(tmp_path: Path) -> None:
    first, second = run(__file__, "empty", tmp_path)
    assert first["gradients"] == second["gradients"]
    assert [step["own"] for step in first["steps"]] == [[0, 4], [0, 4]]
    assert [step["own"] for step in second["steps"]] == [[4, 8], [0, 0]]
    selector, _ = alone()
    for step in range(2):
        record_shares(selector, [rows_of(step), rows_of(step + 5)][: 2 - step])
        weights = selector.apply().weights.tolist()
        for found in (first, second):
            assert found["steps"][step]["weights"] == pytest.approx(weights, abs=1e-9)
        assert flat(first["gradients"]) == pytest.approx(flat(gradients_of(selector)), abs=1e-12) or step == 0
        selector.optimizer.step()
        selector.optimizer.zero_grad()
    for found in (first, second):
        assert "nothing was recorded on any process" in found["nobody"]


def test_a_faulty_candidate_is_quarantined_everywhere(tmp_path: Path) -> None:
    first, second = run(__file__, "faulty", tmp_path)
    selector, _ = alone()
    broken = rows_of(1)
    broken["x"][2] = float("nan")
    record_shares(selector, [rows_of(0), broken])
    weights = selector.apply().weights.tolist()
    for found in (first, second):
        assert found["quarantined"] == [6]
        assert found["weights"] == pytest.approx(weights, abs=1e-9)
        assert flat(found["gradients"]) == pytest.approx(flat(gradients_of(selector)), abs=1e-12)
        assert "all 8 candidates of the pool" in found["all"]
        assert flat(found["untouched"]) == []
    assert first["gradients"] == second["gradients"]


def test_what_fails_on_one_process_fails_on_all_and_can_be_tried_again(tmp_path: Path) -> None:
    first, second = run(__file__, "failing", tmp_path)
    assert second["target"].startswith("NonFiniteError: the target gradient of")
    assert "process 1 failed while working out its target's gradient" in first["target"]
    assert second["target"] in first["target"]
    assert flat(first["before"]) == flat(second["before"]) == []
    assert first["again"] == second["again"]
    assert "cannot be sent to the other processes" in second["extras"]
    assert "process 1 failed while reading what it recorded" in first["extras"]
    assert first["names"] == second["names"]
    assert "extras are" in first["names"]
    assert first["alone"] == second["alone"]
    assert len(first["alone"]) == ROWS


def test_selectors_that_differ_between_processes_are_refused(tmp_path: Path) -> None:
    for found in run(__file__, "unlike", tmp_path):
        for name in UNLIKE:
            assert f"the selectors of the processes differ in {name}:" in found[name]
            assert flat(found[f"{name} left"]) == []


def test_a_loss_that_overflows_on_one_process_skips_the_step_on_all(tmp_path: Path) -> None:
    first, second = run(__file__, "scaled", tmp_path)
    assert [step["status"] for step in first["steps"]] == ["optimal", "overflow", "optimal"] * 2
    assert [step["scale"] for step in first["steps"]] == [2.0**10, 2.0**9, 2.0**9] * 2
    assert [step["counted"] for step in first["steps"]] == [1, 1, 2] * 2
    assert first == second


def test_local_pools_are_decided_alone_and_averaged(tmp_path: Path) -> None:
    both = run(__file__, "local", tmp_path)
    parts = []
    for rank, found in enumerate(both):
        selector, _ = alone(target=[rows_of(10 + rank)])
        record_shares(selector, [rows_of(rank)], of=1)
        assert found["weights"] == selector.apply().weights.tolist()
        parts.append(flat(gradients_of(selector)))
    mean = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
    assert both[0]["gradients"] == both[1]["gradients"]
    assert flat(both[0]["gradients"]) == pytest.approx(mean, abs=1e-14)
    assert [found["status"] for found in both] == ["optimal", "nothing_useful"]
    assert [len(found["later"]) for found in both] == [ROWS, 0]
    assert both[0]["half"] == both[1]["half"]
    assert flat(both[0]["half"]) == pytest.approx([a / 2 for a in parts[0]], abs=1e-14)


def test_gradient_that_is_nobodys_is_averaged(tmp_path: Path) -> None:
    both = run(__file__, "outside", tmp_path)
    model = Shifted()
    for rank in range(2):
        ((squares(model, rows_of(rank)) + 0.1 * model.inner.first.weight.square().sum()) / 2).backward()
    plain = [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]
    for found in both:
        assert flat(found["global"]) == pytest.approx(flat(plain), abs=1e-12)
        assert flat(found["local"]) == pytest.approx(flat(plain), abs=1e-12)


def test_several_targets_quotas_and_fidelity_are_those_of_one_process(tmp_path: Path) -> None:
    both = run(__file__, "further", tmp_path)
    several = {name: [rows_of(seed), rows_of(seed + 1)] for name, seed in (("a", 10), ("b", 20))}
    quota = WeightQuota(at_least={"second": 0.5})
    selector, _ = alone(target=several, targets="worst", constraints=quota, budget=4, filter="topk", watch=1)
    for step in range(3):
        extras = [{"source": [name] * ROWS} for name in ("first", "second")]
        record_shares(selector, [rows_of(step), rows_of(step + 5)], extras=extras)
        selection = selector.apply()
        selector.optimizer.step()
        selector.optimizer.zero_grad()
        assert selector.fidelity is not None
        for found in (each["steps"][step] for each in both):
            assert found["weights"] == pytest.approx(selection.weights.tolist(), abs=1e-8)
            assert found["drop"] == pytest.approx(selection.predicted_drop, rel=1e-8)
            assert found["drops"] == pytest.approx(selection.diagnostics["predicted_drops"], rel=1e-8)
            assert found["realised"] == pytest.approx(selector.fidelity.realised_drop, rel=1e-8)
            assert found["cosine"] == pytest.approx(selector.fidelity.cosine, rel=1e-8)
    assert both[0] == both[1]


def test_what_several_processes_cannot_do_is_refused(tmp_path: Path) -> None:
    for found in run(__file__, "refused", tmp_path):
        for name in ("gradients", "curvature", "token", "memory_cap", "uncovered"):
            assert found[name].startswith("ConfigurationError"), name
            assert "choose pool='local'" in found[name], name
        assert "allowed are 'global', 'local'" in found["pool"]
        assert "watch or an adaptive trust was given with pool='local'" in found["watch"]
        assert "has static_graph=True" in found["static"]


if __name__ == "__main__":
    serve(SCENARIOS)
