"""A model sharded by FSDP2 over several gloo processes: the same selection, weights and parameters as one process
with all candidates and the whole model.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import FtwError
from ftw.filters import Chain
from tests.gloo import needs_gloo, run, serve
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean
from tests.oracle.test_rules import tiny_mixture

pytestmark = needs_gloo

MICRO, STEPS = 2, 3  # micro-batches of a step, on each process
ROWS = (2, 3, 2, 3)  # of each process's micro-batches
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "lora": lora_llama,
    "experts": lambda: tiny_mixture("Mixtral"),
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"filter": "greedy", "warmup": 1},
    "topk": {"filter": "topk", "budget": 0.4},
    "chain": {"filter": Chain(["topk", "greedy"], keep=[1.5]), "warmup": 1},
    "without K": {"filter": "topk", "solver": "uniform", "warmup": 1},
    "utility": {"filter": "topk", "objective": "utility"},
    "update": {"filter": "topk", "geometry": "update", "warmup": 1},
    "target": {"filter": "topk", "reference": "target"},
    "previous": {"filter": "topk", "reference": "previous"},
    "again": {"filter": "topk", "relinearise": True},
    "several": {"filter": "greedy", "targets": "worst"},
    "watched": {"filter": "topk", "objective": "utility", "trust": "adaptive", "watch": 1},
    "sgd": {"filter": "greedy", "watch": 2},
    "functional": {"filter": "greedy", "functional": ["first", "norm"]},
}
RUNS: dict[str, dict[str, Sequence[str]]] = {
    "two": {"mlp": list(CASES), "llama": ["greedy"], "lora": ["without K"], "tied": ["topk"], "experts": ["greedy"]},
    "four": {"mlp": ["greedy", "without K", "watched"], "llama": ["chain"]},
}


def rows_of(seed: int, rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 6, generator=generator, dtype=torch.float64),
        "y": torch.randn(rows, 2, generator=generator, dtype=torch.float64),
    }


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def data_of(kind: str) -> tuple[Callable[[int, int], Batch], Loss]:
    """Rows and seed -> batch; and the mean loss of one."""
    if kind == "mlp":
        return lambda rows, seed: rows_of(seed, rows), squares
    return lambda rows, seed: batch_of(rows, seed=seed), token_mean


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """Every decoder layer of a language model, or linear layer of the MLP, is a unit, and what remains is one."""
    from torch.distributed.fsdp import fully_shard

    inner = "Linear" if isinstance(model, MLP) else "DecoderLayer"
    for module in list(model.modules()):
        if type(module).__name__.endswith(inner):
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()  # type: ignore[operator]


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)


def case_of(model: nn.Module, kind: str, name: str, ranks: Sequence[int]) -> ftw.Selector:
    make, loss = data_of(kind)
    both = [[make(1 + rank % 2, 1000 + rank) for rank in ranks], [make(2, 2000 + rank) for rank in ranks]]
    given: Any = {"a": both[0], "b": both[1]} if "targets" in CASES[name] else both[0] + both[1]
    options = {"budget": 3, "warmup": 0, "target_batches": "all", **CASES[name]}
    return ftw.Selector(model, optimizer_of(model, name), target=given, loss_fn=loss, **options)


def train(selector: ftw.Selector, kind: str, ranks: Sequence[int], share: int = 1) -> dict[str, Any]:
    """Steps of a loop that knows nothing of processes; what each selected, and the parameters in the end.

    Args:
        share: what each loss is divided by: a process's is its mean, and the step's the mean over processes.
    """
    make, loss = data_of(kind)
    found: list[dict[str, Any]] = []
    model = selector.model
    for step in range(STEPS):
        for rank in ranks:
            micro = [make(ROWS[rank], 100 * step + 10 * number + rank) for number in range(MICRO)]
            for batch in micro:
                mass = label_tokens(batch) / label_tokens(batch).sum() if "labels" in batch else None
                with selector.record(mass=torch.full((ROWS[rank],), 1 / ROWS[rank]) if mass is None else mass):
                    (loss(model, batch) / len(micro) / share).backward()
        selection = selector.apply()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        selector.optimizer.step()
        selector.optimizer.zero_grad()
        with torch.no_grad():  # FSDP keeps the outermost unit whole after it
            seen_loss = float(loss(model, make(2, 3000)))
        seen = selector.fidelity
        found.append(
            {
                "indices": selection.indices.tolist(),
                "weights": selection.weights.tolist(),
                "drop": selection.predicted_drop,
                "alignment": selection.diagnostics["alignment"].tolist(),
                "norm": float(whole(norm)),
                "loss": seen_loss,
                "fidelity": [] if seen is None else [seen.realised_drop, seen.cosine, seen.applied],
                "sent": selection.diagnostics.get("sent_bytes"),
            }
        )
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {"steps": found, "parameters": numbers_of(model)}


def whole(tensor: Tensor) -> Tensor:
    result: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result


def numbers_of(model: nn.Module) -> list[list[float]]:
    return [whole(p.detach()).flatten().tolist() for p in model.parameters() if p.requires_grad]


def gradients_of(selector: ftw.Selector) -> list[list[float] | None]:
    return [None if p.grad is None else whole(p.grad).flatten().tolist() for p in selector.model.parameters()]


def said(act: Callable[[], object]) -> str:
    try:
        act()
    except FtwError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def small(rank: int, model: nn.Module | None = None, **arguments: Any) -> ftw.Selector:
    """A selector for the sharded MLP."""
    model = sharded(MLP()) if model is None else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    given = {"target": [rows_of(10 + rank)], "loss_fn": squares, "budget": 3, "warmup": 0, **arguments}
    return ftw.Selector(model, optimizer, **given)


def alone(ranks: Sequence[int] = (0, 1), **arguments: Any) -> ftw.Selector:
    """As `small`, of one process with the target of these."""
    return small(0, MLP(), **{"target": [rows_of(10 + rank) for rank in ranks], "target_batches": "all", **arguments})


def record(selector: ftw.Selector, batch: Batch, share: float = 1.0, **arguments: Any) -> None:
    with selector.record(**arguments):
        (squares(selector.model, batch) / share).backward()


def step(selector: ftw.Selector) -> None:
    selector.optimizer.step()
    selector.optimizer.zero_grad()


# --- scenarios -------------------------------------------------------------------------------------------------------


def cases(rank: int, which: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, names in RUNS[which].items():
        for i, name in enumerate(names):
            model = sharded(MODELS[kind](), reshard_after_forward=i % 2 == 0)
            if kind == "lora":
                checkpointed(model)
            selector = case_of(model, kind, name, [rank])
            with precise_routers():
                found[f"{kind}, {name}"] = train(selector, kind, [rank])
            selector.close()
    return found


@contextmanager
def precise_routers() -> Iterator[None]:
    """Experts are chosen by a softmax in the model's own precision; theirs is in float32."""
    softmax = nn.functional.softmax
    with (
        patch.object(torch.Tensor, "float", lambda self: self),
        patch.object(nn.functional, "softmax", lambda x, dim=-1, **_: softmax(x, dim)),
    ):
        yield


def faults(rank: int) -> dict[str, Any]:
    """A process without a batch, faulty numbers, a target that fails; and in between, what is right."""
    wrong = [False]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return squares(model, batch) * (float("nan") if wrong[0] and rank == 1 else 1.0)

    selector = small(rank, loss_fn=loss)
    record(selector, rows_of(rank))
    found: dict[str, Any] = {"first": selector.apply().weights.tolist()}
    step(selector)
    if rank == 0:
        record(selector, rows_of(5))
    else:  # nothing to offer: it runs the model all the same, as FSDP wants it, for nobody
        record(selector, rows_of(6), share=float("inf"), candidates=[-1] * 4)
    selection = selector.apply()
    found["empty"] = {"weights": selection.weights.tolist(), "own": selection.diagnostics["own"]}
    found["gradients"] = gradients_of(selector)
    selector.optimizer.zero_grad()
    record(selector, rows_of(6), share=float("inf"), candidates=[-1] * 4)
    found["nobody"] = said(selector.apply)
    selector.discard()
    batch = rows_of(rank)
    if rank == 1:
        batch["x"][2] = float("nan")
    record(selector, batch)
    selection = selector.apply()
    found["faulty"] = {"weights": selection.weights.tolist(), "quarantined": selection.diagnostics["quarantined"]}
    found["without it"] = gradients_of(selector)
    selector.optimizer.zero_grad()
    record(selector, {"x": batch["x"] * float("nan"), "y": batch["y"]})
    found["all"] = said(selector.apply)
    found["untouched"] = gradients_of(selector)
    selector.discard()
    record(selector, rows_of(rank))
    wrong[0] = True
    found["target"] = said(selector.apply)
    wrong[0] = False
    found["again"] = selector.apply().weights.tolist()
    selector.close()
    uneven = small(rank, target=[rows_of(1), rows_of(2)][: 1 + rank], target_batches="all")
    record(uneven, rows_of(rank))
    found["uneven"] = said(uneven.apply)
    uneven.discard()
    uneven.model.set_requires_gradient_sync(False)  # type: ignore[operator]
    record(uneven, rows_of(rank))
    found["sync"] = said(uneven.apply)
    return found


def precisions(rank: int) -> dict[str, Any]:
    """Layers that run in another precision than their parameters are kept in, by policy or autocast; a GradScaler."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policies = {
        name: MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float64)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    models = {name: sharded(MLP(), mp_policy=policy) for name, policy in policies.items()}
    models["autocast"] = sharded(MLP().float())  # with the same numbers
    found: dict[str, Any] = {}
    for name, model in models.items():
        cast = single if name == "autocast" else dict

        def loss(model: nn.Module, batch: Batch, cast: Callable[[Batch], Batch] = cast) -> Tensor:
            return squares(model, cast(batch))

        selector = small(rank, model, loss_fn=loss, warmup=1)
        steps = []
        for number in range(2):
            with selector.record(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "autocast"):
                loss(model, rows_of(number + 5 * rank)).backward()
            selection = selector.apply()
            step(selector)
            steps.append([selection.diagnostics["alignment"].tolist(), selection.weights.tolist()])
        found[name] = {"steps": steps, "parameters": numbers_of(model)}
        selector.close()
    model = sharded(MLP(dtype=torch.float32))
    selector = small(rank, model, loss_fn=lambda model, batch: squares(model, single(batch)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found["scaled"] = []
    for number in range(3):
        batch = single(rows_of(number + 5 * rank))
        if number == 1 and rank == 1:
            batch["x"][0] = float("inf")
        with selector.record(scaler=scaler):
            scaler.scale(squares(selector.model, batch)).backward()
        selection = selector.apply()
        scaler.step(selector.optimizer)
        scaler.update()
        selector.optimizer.zero_grad()
        found["scaled"].append([selection.status, scaler.get_scale(), selector.state_dict()["step"]])
    selector.close()
    return found


def single(batch: Batch) -> Batch:
    return {name: tensor.float() for name, tensor in batch.items()}


def attached(rank: int) -> dict[str, Any]:
    """A loop with nothing in it."""
    from ftw_integrations.loop import attach

    model = sharded(MLP())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given: dict[str, Any] = {"target": [rows_of(10 + rank)], "loss_fn": squares, "budget": 3, "warmup": 0}
    weights: list[list[float]] = []
    with attach(model, optimizer, told=lambda selection: weights.append(selection.weights.tolist()), **given):
        for number in range(3):
            squares(model, rows_of(number + 5 * rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"weights": weights, "parameters": numbers_of(model)}


class Bypassing(MLP):
    """Uses a weight outside its layer, in training mode from the second forward on or at once."""

    after = 0

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        if self.training and self.after <= 0:
            result = result + 0.1 * self.root.weight.sum()
        self.after -= 1
        return result


class Mixing(MLP):
    """Row 0 sees row 1, where the batch says so."""

    def forward(self, x: Tensor) -> Tensor:
        other = torch.cat([x[1:2], x[1:]])
        return super().forward(torch.where(x[:, :1].abs().amax() > 100, x + other, x))


class Dropping(MLP):
    """Draws dropout, once a forward in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.3, self.training))


def drawn_for(rows: int) -> Tensor:
    """State of the generator after the model was made, and ran one forward of this many rows."""
    Dropping()(rows_of(0, rows)["x"])
    return torch.get_rng_state()


class Shifted(MLP):
    """A parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.shift)


def audits(rank: int) -> dict[str, Any]:
    """What is recorded wrongly is found, in the first block and, as far as gradient shows it, in later ones."""
    found: dict[str, Any] = {}
    for name, after in (("at once", 0), ("later", 2)):
        bypassing = Bypassing()
        bypassing.after = after
        selector = small(rank, sharded(bypassing))
        for _ in range(after and 1):
            record(selector, rows_of(rank))
        bypassing.after = 0
        found[name] = said(lambda selector=selector: record(selector, rows_of(rank)))  # type: ignore[misc]
        found[f"{name}, untouched"] = gradients_of(selector)
        selector.close()
    selector = small(rank, sharded(Mixing()))
    batch = rows_of(rank, 2 + 3 * rank)
    if rank == 1:
        batch["x"][:, 0] += 1000
    found["mixing"] = said(lambda: record(selector, batch))
    record(selector, rows_of(rank))  # and the processes are in step again
    found["after"] = selector.apply().weights.tolist()
    selector.close()
    selector = small(rank, sharded(Dropping()))  # more rows, more forwards of the audit
    record(selector, rows_of(rank, 2 + 3 * rank))
    found["random state"] = torch.equal(torch.get_rng_state(), drawn_for(2 + 3 * rank))
    selector.close()
    outside = small(rank, sharded(Shifted()), uncovered="ignore")
    for _ in range(2):
        record(outside, rows_of(rank))
        outside.apply()
        found["outside"] = gradients_of(outside)
        outside.optimizer.zero_grad()
    return found


def resuming(rank: int) -> dict[str, Any]:
    """A run that is broken off after two steps, and its end from what was saved then."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    found: dict[str, Any] = {}
    saved: Any = None
    for part in ("whole", "rest"):
        model = sharded(MLP())
        selector = small(rank, model, target=[rows_of(10 + i + 5 * rank) for i in range(3)], ema=0.5, refresh=2)
        if part == "rest":
            set_state_dict(model, selector.optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
            selector.load_state_dict(saved[2])
        weights = []
        for number in range(2 if part == "rest" else 0, 4):
            if number == 2 and part == "whole":
                saved = (
                    *_copied(get_state_dict(model, selector.optimizer)),
                    selector.state_dict(),
                )
            record(selector, rows_of(number + 5 * rank))
            weights.append(selector.apply().weights.tolist())
            step(selector)
        found[part] = {"weights": weights[-2:], "parameters": numbers_of(model)}
        selector.close()
    return found


def _copied(state: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state)


def refused(rank: int) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copy", "shard"))
    partly = MLP()
    sharded(partly.first)
    options: dict[str, dict[str, Any]] = {
        "local": {"pool": "local"},
        "keep": {"residual": "keep"},
        "lean": {"lean": False},
        "memory_cap": {"memory_cap": 1 << 30, "reference": "target"},
    }
    found = {name: said(lambda given=given: small(rank, **given)) for name, given in options.items()}  # type: ignore[misc]
    models: dict[str, Callable[[], nn.Module]] = {
        "offload": lambda: sharded(MLP(), offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "plane": lambda: sharded(MLP(), mesh=plane),
        "columns": lambda: sharded(MLP(8, 4), shard_placement_fn=lambda p: Shard(p.dim() - 1)),
        "partly": lambda: partly,
        "tensor parallel": lambda: parallelize_module(
            MLP(), init_device_mesh("cpu", (2,)), {"first": ColwiseParallel()}
        ),
        "flat": lambda: FullyShardedDataParallel(MLP(), device_id=torch.device("cpu")),
    }
    found |= {name: said(lambda make=make: small(rank, make())) for name, make in models.items()}  # type: ignore[misc]
    model = sharded(MLP())
    rows = torch.optim.Adafactor(model.parameters(), lr=0.1)
    found["Adafactor"] = said(lambda: ftw.Selector(model, rows, target=[rows_of(0)], loss_fn=squares))
    return found


def accelerates(rank: int) -> dict[str, Any]:
    """What accelerate makes of a model that it is told to shard, on a CPU."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = accelerator.prepare(MLP())
    return {
        "kind": accelerator.distributed_type.name,
        "model": type(model).__name__,
        "processes": accelerator.num_processes,
    }


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    **{which: (lambda rank, which=which: cases(rank, which)) for which in RUNS},  # type: ignore[misc]
    "faults": faults,
    "audits": audits,
    "accelerates": accelerates,
    "others": lambda rank: {each.__name__: each(rank) for each in (precisions, attached, resuming, refused)},
}


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("which", list(RUNS))
def test_a_sharded_model_selects_as_one_process_does(which: str, tmp_path: Path) -> None:
    world = {"two": 2, "four": 4}[which]
    everywhere = run(__file__, which, tmp_path, world)
    for kind, names in RUNS[which].items():
        for name in names:
            ranks = list(range(world))
            with precise_routers():
                mine = train(case_of(MODELS[kind](), kind, name, ranks), kind, ranks, world)
            assert_same(mine, [found[f"{kind}, {name}"] for found in everywhere], f"{kind}, {name}")
    if which == "two":
        # A filter that reads K needs everybody's contributions; one that does not, those of the chosen or none.
        sent = {name: sum(found[f"mlp, {name}"]["steps"][-1]["sent"] for found in everywhere) for name in CASES}
        assert sent["without K"] < sent["chain"] < sent["greedy"]


def assert_same(mine: dict[str, Any], theirs: Sequence[dict[str, Any]], name: str) -> None:
    """What one process found, and each of several."""
    for key in ("indices", "weights", "drop", "alignment", "norm", "loss", "fidelity"):
        for each in theirs:
            assert [s[key] for s in each["steps"]] == [s[key] for s in theirs[0]["steps"]], (name, key)
    for i, (own, found) in enumerate(zip(mine["steps"], theirs[0]["steps"], strict=True)):
        assert own["indices"] == found["indices"], (name, i)
        assert found["weights"] == pytest.approx(own["weights"], abs=1e-9), (name, i)
        size = max(map(abs, own["alignment"]))
        assert found["alignment"] == pytest.approx(own["alignment"], rel=0, abs=1e-9 * size), (name, i)
        assert found["drop"] == pytest.approx(own["drop"], rel=1e-8), (name, i)
        assert found["norm"] == pytest.approx(own["norm"], rel=1e-9), (name, i)
        assert found["loss"] == pytest.approx(own["loss"], rel=1e-9), (name, i)
        assert found["fidelity"] == pytest.approx(own["fidelity"], rel=1e-6), (name, i)
    for each in theirs:
        assert each["parameters"] == theirs[0]["parameters"], name
        for one, other in zip(mine["parameters"], each["parameters"], strict=True):
            assert other == pytest.approx(one, abs=1e-10), name


def flat(gradients: Sequence[list[float] | None]) -> list[float]:
    return [number for each in gradients if each is not None for number in each]


def test_empty_and_faulty_shares_of_a_sharded_model(tmp_path: Path) -> None:
    first, second = run(__file__, "faults", tmp_path)
    selector = alone()
    record(selector, rows_of(0), 2)
    record(selector, rows_of(1), 2)
    weights = selector.apply().weights.tolist()
    step(selector)
    for found in (first, second):
        assert found["first"] == pytest.approx(weights, abs=1e-9)
    record(selector, rows_of(5), 2)
    weights = selector.apply().weights.tolist()
    assert [found["empty"]["own"] for found in (first, second)] == [[0, 4], [0, 0]]
    for found in (first, second):
        assert found["empty"]["weights"] == pytest.approx(weights, abs=1e-9)
        assert flat(found["gradients"]) == pytest.approx(flat(gradients_of(selector)), abs=1e-12)
        assert "nothing was recorded on any process" in found["nobody"]
    selector.optimizer.zero_grad()
    broken = rows_of(1)
    broken["x"][2] = float("nan")
    record(selector, rows_of(0), 2)
    record(selector, broken, 2)
    weights = selector.apply().weights.tolist()
    for found in (first, second):
        assert found["faulty"]["quarantined"] == [6]
        assert found["faulty"]["weights"] == pytest.approx(weights, abs=1e-9)
        assert flat(found["without it"]) == pytest.approx(flat(gradients_of(selector)), abs=1e-12)
        assert "all 8 candidates of the pool" in found["all"]
        assert flat(found["untouched"]) == []
        assert "the target gradient of first.weight holds NaN" in found["target"]
        assert found["again"] == first["again"]
        assert found["uneven"].startswith("TargetError: some processes have fewer target batches")
        assert "set_requires_gradient_sync(False) is in force" in found["sync"]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Several scenarios that the same two processes go through."""
    return run(__file__, "others", tmp_path_factory.mktemp("others"))


def test_other_precisions_of_a_sharded_model(others: list[Any]) -> None:
    first, second = (each["precisions"] for each in others)
    assert first == second
    selector = alone(warmup=1)
    record(selector, rows_of(0), 2)
    record(selector, rows_of(5), 2)
    selection = selector.apply()
    alignment = selection.diagnostics["alignment"].tolist()
    size = max(map(abs, alignment))
    assert first["float32"]["steps"][0][1] == pytest.approx(selection.weights.tolist(), abs=1e-5)
    for name, error in (("float32", 1e-6), ("bfloat16", 3e-2), ("autocast", 3e-2)):  # of each 8 bits, or 24
        assert first[name]["steps"][0][0] == pytest.approx(alignment, rel=0, abs=error * size), name
    assert first["scaled"] == [["optimal", 2.0**10, 1], ["overflow", 2.0**9, 1], ["optimal", 2.0**9, 2]]


def test_a_loop_attached_to_a_sharded_model(others: list[Any]) -> None:
    weights, parameters = of_one(3)
    for found in (each["attached"] for each in others):
        for own, theirs in zip(weights, found["weights"], strict=True):
            assert theirs == pytest.approx(own, abs=1e-9)
        for one, other in zip(parameters, found["parameters"], strict=True):
            assert other == pytest.approx(one, abs=1e-10)


def of_one(steps: int) -> tuple[list[list[float]], list[list[float]]]:
    """Weights and parameters of one process with everything."""
    selector = alone()
    weights = []
    for number in range(steps):
        record(selector, rows_of(number), 2)
        record(selector, rows_of(number + 5), 2)
        weights.append(selector.apply().weights.tolist())
        step(selector)
    return weights, numbers_of(selector.model)


def test_audits_of_a_sharded_model(tmp_path: Path) -> None:
    both = run(__file__, "audits", tmp_path)
    model = Shifted()
    ((squares(model, rows_of(0)) + squares(model, rows_of(1))) / 2).backward()
    assert model.shift.grad is not None
    for found in both:
        for name in ("at once", "later"):
            assert found[name].startswith("CompletenessError"), name
            assert "root.weight" in found[name]
            assert "1 parameters" in found[name]
            assert flat(found[f"{name}, untouched"]) == []
        assert found["after"] == both[0]["after"]
        assert found["random state"]
        assert found["outside"] == both[0]["outside"]
        assert found["outside"][-7] is not None
    assert both[1]["mixing"].startswith("CandidateLayoutError")
    assert "process 1 failed in the audit of its batch" in both[0]["mixing"]


def test_a_sharded_run_resumes_bitwise(others: list[Any]) -> None:
    for found in (each["resuming"] for each in others):
        assert found["whole"] == found["rest"] == others[0]["resuming"]["whole"]


def test_what_a_sharded_model_cannot_do_is_refused(others: list[Any]) -> None:
    for found in (each["refused"] for each in others):
        for name, text in found.items():
            kind = "UnsupportedOptimizerError" if name == "Adafactor" else "ConfigurationError"
            assert text.startswith(kind), (name, text)
        assert "choose pool='global'" in found["local"]
        for name, given in (("keep", "residual='keep'"), ("lean", "lean=False")):
            assert given in found[name]
            assert "with a model that is sharded" in found[name]
        for name, given in (
            ("offload", "CPUOffloadPolicy"),
            ("plane", "a mesh of shape (1, 2)"),
            ("columns", "is cut by S"),
            ("partly", "is trained and not sharded by fully_shard"),
            ("tensor parallel", "is trained and not sharded by fully_shard"),
        ):
            assert given in found[name], (name, found[name])
            assert "without offloading" in found[name]
        assert "FSDP1" in found["flat"]


@pytest.mark.slow
def test_accelerate_shards_on_accelerators_alone(tmp_path: Path) -> None:
    """The obstacle to showing its sharding, and so Trainer's, here; should it fall, they are to be served."""
    pytest.importorskip("accelerate", reason="it is what is asked")
    for found in run(__file__, "accelerates", tmp_path):
        assert found == {"kind": "MULTI_CPU", "model": "DistributedDataParallel", "processes": 2}


if __name__ == "__main__":
    serve(SCENARIOS)
