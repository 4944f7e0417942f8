"""Sharded optimizer state read per shard, on two gloo processes: FSDP2 (DTensor), ZeRO-1, FSDP1.

This file is the program of those processes as well: `python test_sharded_state.py SCENARIO RANK FOLDER` writes what it
found to FOLDER/RANK.json.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, UnsupportedOptimizerError
from ftw.optim_state import SGD, Adam, AdamW, Preconditioner, preconditioner_for, unwrapped
from ftw.optim_state.adafactor import Adafactor
from ftw.optim_state.adagrad import Adagrad
from ftw.optim_state.muon import Muon
from ftw.optim_state.nadam import NAdam
from ftw.optim_state.radam import RAdam
from ftw.optim_state.rmsprop import RMSprop
from ftw.optim_state.shards import local, local_gradient
from tests.gloo import needs_gloo, run, serve

WORLD = 2
F64 = torch.float64

pytestmark = needs_gloo

OPTIMIZERS: dict[str, tuple[Preconditioner, type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD(), torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (Adam(), torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "adam, foreach off": (Adam(), torch.optim.Adam, {"foreach": False}),
    "adamw": (AdamW(), torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw, fused": (AdamW(), torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    "nadam": (NAdam(), torch.optim.NAdam, {"weight_decay": 0.1}),
    "radam": (RAdam(), torch.optim.RAdam, {"weight_decay": 0.1}),
    "rmsprop": (RMSprop(), torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (Adagrad(), torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
}


# --- FSDP2 ---------------------------------------------------------------------------------------------------------


def fsdp2(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    errors = {name: _fsdp2_steps(rank, mesh, *case) for name, case in OPTIMIZERS.items()}
    return {
        "errors": errors,
        "refusals": _fsdp2_refusals(mesh),
        "layouts": _layouts(rank, mesh),
        "copies": _copies(mesh),
    }


def _fsdp2_steps(
    rank: int, mesh: Any, ours: Preconditioner, cls: type[Optimizer], options: dict[str, Any]
) -> dict[str, float]:
    """Largest relative errors over several steps, against the real step and against the unsharded parameters."""
    model = _sharded_model(mesh)
    ps = list(model.parameters())
    optimizer = cls(_groups(ps), lr=0.05, **options)
    twins = [Parameter(p.full_tensor()) for p in ps]  # type: ignore[attr-defined]
    twin = cls(_groups(twins), lr=0.05, **options)
    step_error = whole_error = stale_error = floor_error = 0.0
    for t in range(4):
        _backward(model, rank, t)
        reference = {p: p.grad for p in ps if p.grad is not None}
        assert len(reference) == len(ps)
        gathered = {w: reference[p].full_tensor() for p, w in zip(ps, twins, strict=True)}  # type: ignore[attr-defined]
        state = {p: copy.deepcopy(optimizer.state.get(p, {})) for p in ps}
        update = ours.linearise(optimizer, reference)
        predicted = update.displacement(reference)
        assert _same_state(state, {p: optimizer.state.get(p, {}) for p in ps}), "linearise wrote to the state"
        by_part = ours.linearise(optimizer, {p: local(g) for p, g in reference.items()})
        for p in ps:
            assert type(predicted[p]) is Tensor
            assert predicted[p].shape == local(p.detach()).shape
            assert torch.equal(by_part.offset[p], update.offset[p])
        known = ours.linearise(twin, gathered).displacement(gathered)
        pairs = [(predicted[p], _part(known[w], rank)) for p, w in zip(ps, twins, strict=True)]
        whole_error = max(whole_error, _error(pairs))
        if t:
            stale = _stale(ours, optimizer, twin, ps, twins, rank)
            stale_error = max(stale_error, _error(stale))
            if cls is torch.optim.AdamW:
                floored = _stale(AdamW(floor=0.9), optimizer, twin, ps, twins, rank)
                moved = [(one, other) for (one, _), (other, _) in zip(stale, floored, strict=True)]
                assert _error(moved) > 1e-3, "the floor did nothing"
                floor_error = max(floor_error, _error(floored))
        before = [local(p.detach()).clone() for p in ps]
        optimizer.step()
        for w, gradient in gathered.items():
            w.grad = gradient
        twin.step()
        pairs = [(predicted[p], local(p.detach()) - old) for p, old in zip(ps, before, strict=True)]
        step_error = max(step_error, _error(pairs))
    return {"step": step_error, "whole": whole_error, "stale": stale_error, "floor": floor_error}


def _stale(
    ours: Preconditioner,
    optimizer: Optimizer,
    twin: Optimizer,
    ps: list[Parameter],
    twins: list[Parameter],
    rank: int,
) -> list[tuple[Tensor, Tensor]]:
    """Displacements of a gradient of ones, shard and part of the whole, with the second moment as it stands."""
    mine, whole = ours.linearise(optimizer), ours.linearise(twin)
    ones = mine.displacement({p: torch.ones_like(local(p.detach())) for p in ps})
    known = whole.displacement({w: torch.ones_like(w) for w in twins})
    return [(ones[p], _part(known[w], rank)) for p, w in zip(ps, twins, strict=True)]


def _fsdp2_refusals(mesh: Any) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh

    said = {}
    model = _sharded_model(mesh)
    ps = list(model.parameters())
    optimizer = torch.optim.AdamW(ps, lr=0.1)
    _backward(model, dist.get_rank(), 0)
    reference = {p: p.grad for p in ps if p.grad is not None}
    rows = torch.optim.Adafactor(ps, lr=0.1)
    said["Adafactor"] = _said(UnsupportedOptimizerError, lambda: Adafactor().linearise(rows, reference))
    if hasattr(torch.optim, "Muon"):
        matrices = torch.optim.Muon([p for p in ps if p.dim() == 2], lr=0.1)
        said["Muon"] = _said(UnsupportedOptimizerError, lambda: Muon().linearise(matrices, reference))
    whole = {ps[0]: torch.ones(ps[0].shape, dtype=F64)}
    said["shape"] = _said(ConfigurationError, lambda: AdamW().linearise(optimizer, whole))
    update = AdamW().linearise(optimizer, reference)
    said["displacement"] = _said(ConfigurationError, lambda: update.displacement(whole))

    # Copies on both processes are whole, whatever the placement says: nothing to refuse. (The step itself is another
    # matter: torch's Adafactor cannot take it where a placement is `Shard`.)
    copies = list(_sharded_model(init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("copy", "shard"))).parameters())
    ones = {p: torch.ones_like(p) for p in copies}
    found = Adafactor().linearise(torch.optim.Adafactor(copies, lr=0.1), ones).displacement(ones)
    plain = [Parameter(p.full_tensor()) for p in copies]  # type: ignore[attr-defined]
    ones = {p: torch.ones_like(p) for p in plain}
    known = Adafactor().linearise(torch.optim.Adafactor(plain, lr=0.1), ones).displacement(ones)
    assert all(torch.equal(found[p], known[q]) for p, q in zip(copies, plain, strict=True))
    return said


def _copies(mesh: Any) -> float:
    """Adafactor on copies: largest relative error against the real step."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    generator = torch.Generator().manual_seed(5)
    p = Parameter(distribute_tensor(torch.randn(5, 3, generator=generator, dtype=F64), mesh, [Replicate()]))
    optimizer = torch.optim.Adafactor([p], lr=0.1, weight_decay=0.1)
    error = 0.0
    for _ in range(4):
        p.grad = distribute_tensor(torch.randn(5, 3, generator=generator, dtype=F64), mesh, [Replicate()])
        predicted = Adafactor().linearise(optimizer, {p: p.grad}).displacement({p: p.grad})[p]
        before = local(p.detach()).clone()
        optimizer.step()
        error = max(error, _error([(predicted, local(p.detach()) - before)]))
    return error


def _layouts(rank: int, mesh: Any) -> dict[str, float]:
    """Gradients laid out otherwise than their parameter, in both dimensions it may be cut along."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    errors = {}
    both = [torch.randn(5, 3, generator=torch.Generator().manual_seed(r), dtype=F64) for r in range(WORLD)]
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(9), dtype=F64)
    for dim in (0, 1):
        p = Parameter(distribute_tensor(start, mesh, [Shard(dim)]))
        optimizer = torch.optim.AdamW([p], lr=0.1)
        twin = Parameter(start.clone())
        whole = torch.optim.AdamW([twin], lr=0.1)
        for name, gradient, full in (
            ("partial", DTensor.from_local(both[rank], mesh, [Partial()]), both[0] + both[1]),
            ("copies", DTensor.from_local(both[0], mesh, [Replicate()]), both[0]),
            ("other dimension", distribute_tensor(both[1], mesh, [Shard(1 - dim)]), both[1]),
        ):
            mine = AdamW().linearise(optimizer, {p: gradient}).displacement({p: gradient})[p]
            known = AdamW().linearise(whole, {twin: full}).displacement({twin: full})[twin]
            errors[f"{name}, {dim}"] = _error([(mine, _part(known, rank, dim))])
            assert torch.equal(local(DTensor.from_local(both[rank], mesh, [Partial()])), both[0] + both[1])
    plain = Parameter(torch.zeros(5, 3, dtype=F64))
    assert torch.equal(local_gradient(DTensor.from_local(both[0], mesh, [Replicate()]), plain), both[0])
    return errors


def _sharded_model(mesh: Any) -> nn.Module:
    """Shards of five rows, three and two; of four, even; of one, one and none."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    first, last = nn.Linear(3, 5, dtype=F64), nn.Linear(4, 1, dtype=F64)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 4, dtype=F64), last)
    for part in (first, last, model):
        fully_shard(part, mesh=mesh)
    return model


# --- ZeRO-1 --------------------------------------------------------------------------------------------------------


def zero(rank: int) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.distributed.optim import ZeroRedundancyOptimizer

    Accelerator(cpu=True)  # its wrapper asks for one
    overlapping = ZeroRedundancyOptimizer(
        _plain_model().parameters(), optimizer_class=torch.optim.Adam, overlap_with_ddp=True, lr=0.1
    )
    return {
        "plain": _zero_steps(lambda given: given),
        "bucket views": _zero_steps(lambda given: given, parameters_as_bucket_view=True),
        "in accelerate": _zero_steps(lambda given: AcceleratedOptimizer(given, device_placement=False)),
        "said": _said(UnsupportedOptimizerError, lambda: unwrapped(overlapping)),
    }


def _zero_steps(wrap: Callable[[Optimizer], Optimizer], **options: Any) -> dict[str, Any]:
    """Largest relative error over steps, and which parameters this process reads. A scheduler drives the wrapper."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_plain_model())
    ps = list(model.parameters())
    given = ZeroRedundancyOptimizer(_groups(ps), optimizer_class=torch.optim.AdamW, lr=0.1, weight_decay=0.1, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(given, gamma=0.5)
    optimizer = wrap(given)
    assert unwrapped(optimizer) is given.optim
    ours = preconditioner_for(optimizer)
    error, held = 0.0, []
    for t in range(4):
        _backward(model, dist.get_rank(), t)
        reference = {p: p.grad for p in ps if p.grad is not None}
        assert len(reference) == len(ps)
        update = ours.linearise(optimizer, reference)
        held = [index for index, p in enumerate(ps) if p in update.scale]
        assert set(ours.linearise(optimizer).scale if t else update.scale) == set(update.scale)
        predicted = update.displacement({p: reference[p] for p in update.scale})
        everywhere: list[dict[int, Tensor]] = [{} for _ in range(WORLD)]
        dist.all_gather_object(everywhere, {index: predicted[ps[index]] for index in held})
        known = {index: tensor for share in everywhere for index, tensor in share.items()}
        assert sorted(index for share in everywhere for index in share) == list(range(len(ps)))
        before = [p.detach().clone() for p in ps]
        optimizer.step()
        scheduler.step()
        pairs = [(known[index], p.detach() - old) for index, (p, old) in enumerate(zip(ps, before, strict=True))]
        error = max(error, _error(pairs))
    _said(ConfigurationError, lambda: update.displacement(reference))
    return {"error": error, "held": held, "lr": given.optim.param_groups[0]["lr"]}


# --- FSDP1 ---------------------------------------------------------------------------------------------------------


def fsdp1(rank: int) -> dict[str, Any]:
    return {
        "adamw": _fsdp1_steps(rank, AdamW(), torch.optim.AdamW, original=True),
        "adafactor": _fsdp1_steps(rank, Adafactor(), torch.optim.Adafactor, original=True),
        "flat": _fsdp1_steps(rank, AdamW(), torch.optim.AdamW, original=False),
    }


def _fsdp1_steps(rank: int, ours: Preconditioner, cls: type[Optimizer], *, original: bool) -> dict[str, Any]:
    """FSDP1 hands the optimizer flat pieces of parameters, plain tensors; some are empty."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(_plain_model(), use_orig_params=original, device_id=torch.device("cpu"))
    ps = list(model.parameters())
    optimizer = cls(_groups(ps), lr=0.1, weight_decay=0.1)
    error, numbers = 0.0, 0
    for t in range(4):
        _backward(model, rank, t)
        reference = {p: p.grad for p in ps if p.grad is not None}
        predicted = ours.linearise(optimizer, reference).displacement(reference)
        numbers = sum(d.numel() for d in predicted.values())
        if t:
            assert set(ours.linearise(optimizer).scale) == set(reference)
        before = {p: p.detach().clone() for p in ps}
        optimizer.step()
        assert all(torch.equal(p.detach(), before[p]) for p in ps if p not in reference)
        error = max(error, _error([(predicted[p], p.detach() - before[p]) for p in reference]))
    return {"error": error, "numbers": numbers, "empty": sum(p.numel() == 0 for p in ps)}


# --- what the scenarios share ----------------------------------------------------------------------------------------


def _plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5, dtype=F64), nn.Tanh(), nn.Linear(5, 1, dtype=F64))


def _groups(ps: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": ps[:1], "lr": 0.2}, {"params": ps[1:]}] if len(ps) > 1 else [{"params": ps}]


def _backward(model: nn.Module, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    model.zero_grad()
    model(torch.randn(4, 3, generator=generator, dtype=F64)).square().mean().backward()


def _part(whole: Tensor, rank: int, dim: int = 0) -> Tensor:
    """This process's rows of a whole tensor: ceil(n / WORLD) each, the last ones fewer or none."""
    size = -(-whole.shape[dim] // WORLD)
    start = min(rank * size, whole.shape[dim])
    return whole.narrow(dim, start, min(size, whole.shape[dim] - start))


def _error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Largest difference relative to the largest entry, over tensors; those that have no entry agree in shape alone."""
    worst = 0.0
    for found, known in pairs:
        assert found.shape == known.shape, (found.shape, known.shape)
        if known.numel():
            worst = max(worst, float((found - known).abs().max() / known.abs().max()))
    return worst


def _same_state(one: Mapping[Parameter, Any], other: Mapping[Parameter, Any]) -> bool:
    return all(
        one[p].keys() == other[p].keys()
        and all(torch.equal(local(one[p][key]), local(value)) for key, value in other[p].items())
        for p in one
    )


def _said(error: type[Exception], act: Callable[[], object]) -> str:
    try:
        act()
    except error as raised:
        return str(raised)
    raise AssertionError(f"no {error.__name__}")


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {"fsdp2": fsdp2, "zero": zero, "fsdp1": fsdp1}


# --- tests ---------------------------------------------------------------------------------------------------------


def test_fsdp2_each_process_reads_its_shard(tmp_path: Path) -> None:
    for found in run(__file__, "fsdp2", tmp_path):
        assert set(found["errors"]) == set(OPTIMIZERS)
        for name, errors in found["errors"].items():
            assert max(errors.values()) < 1e-12, (name, errors)
        assert max(found["layouts"].values()) < 1e-12, found["layouts"]
        assert found["copies"] < 1e-12
        for name in {"Adafactor", "Muon"} & set(found["refusals"]):
            needs = f"{name} needs a parameter as a whole, and the one of shape (5, 3) is sharded"
            assert needs in found["refusals"][name]
        for name in ("shape", "displacement"):
            assert "has shape (5, 3); this process holds (" in found["refusals"][name]
            assert "p.grad.to_local()" in found["refusals"][name]


def test_zero_each_process_reads_the_parameters_it_steps(tmp_path: Path) -> None:
    first, second = run(__file__, "zero", tmp_path)
    for name in ("plain", "bucket views", "in accelerate"):
        for found in (first, second):
            assert found[name]["error"] < 1e-12, (name, found)
            assert found[name]["lr"] == pytest.approx(0.2 * 0.5**3)
        held = [found[name]["held"] for found in (first, second)]
        assert all(held)
        assert sorted(held[0] + held[1]) == [0, 1, 2, 3]
    assert "overlap_with_ddp=True" in first["said"]


def test_fsdp1_flat_pieces_are_read_as_they_are(tmp_path: Path) -> None:
    both = run(__file__, "fsdp1", tmp_path)
    for name in ("adamw", "adafactor", "flat"):
        assert max(found[name]["error"] for found in both) < 1e-12, both
    for name in ("adamw", "adafactor"):
        assert sum(found[name]["numbers"] for found in both) == 3 * 5 + 5 + 5 + 1
        assert sum(found[name]["empty"] for found in both) > 0


def test_importing_ftw_does_not_import_dtensor() -> None:
    source = "import sys, ftw.optim_state.shards; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


if __name__ == "__main__":
    serve(SCENARIOS)
