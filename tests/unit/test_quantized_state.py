"""8-bit state: stand-ins with the layouts of torchao and bitsandbytes, and the libraries where they are installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter, functional
from torch.optim import Optimizer

import ftw
from ftw.errors import OptimizerStateError, UnsupportedOptimizerError
from ftw.optim_state import (
    BitsandbytesAdam,
    BitsandbytesLion,
    Preconditioner,
    TorchaoAdam,
    TorchaoAdamW,
    preconditioner_for,
)
from ftw.optim_state.quantized import dequantised
from ftw.testing import check_preconditioner
from tests.quantized import (
    SIGNED,
    LikeBitsandbytes,
    LikeTorchao,
    LikeTorchaoL2,
    LionLikeBitsandbytes,
    Packed,
    named,
    packed,
    unpacked,
)

SHAPES = ((63, 83), (5,), ())  # 20 whole blocks of 256 entries and a part of one; too small to be quantised


def two_groups(cls: Callable[..., Optimizer]) -> Callable[[list[Parameter]], Optimizer]:
    return lambda ps: cls(
        [{"params": ps[:1], "lr": 0.3, "weight_decay": 0.2}, {"params": ps[1:]}], lr=0.05, weight_decay=0.1
    )


CASES: dict[str, tuple[Preconditioner, Callable[[list[Parameter]], Optimizer]]] = {
    name: (ours, two_groups(named(name, base)))
    for name, ours, base in (
        ("torchao.optim.adam.Adam8bit", TorchaoAdam(), LikeTorchaoL2),
        ("torchao.optim.adam.Adam4bit", TorchaoAdam(), LikeTorchaoL2),
        ("torchao.optim.adam.AdamW8bit", TorchaoAdamW(), LikeTorchao),
        ("torchao.optim.adam.AdamWFp8", TorchaoAdamW(), LikeTorchao),
        ("bitsandbytes.optim.adam.Adam8bit", BitsandbytesAdam(), LikeBitsandbytes),
        ("bitsandbytes.optim.adamw.AdamW", BitsandbytesAdam(), LikeBitsandbytes),
        ("bitsandbytes.optim.adamw.PagedAdamW8bit", BitsandbytesAdam(), LikeBitsandbytes),
        ("bitsandbytes.optim.lion.Lion8bit", BitsandbytesLion(), LionLikeBitsandbytes),
    )
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_the_dequantised_state(case: str) -> None:
    preconditioner, make_optimizer = CASES[case]
    check_preconditioner(preconditioner, make_optimizer, shapes=SHAPES, steps=4, tolerance=1e-12)
    optimizer = make_optimizer([Parameter(torch.ones(2)), Parameter(torch.ones(2))])
    assert type(preconditioner_for(optimizer)) is type(preconditioner)


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles its step; what it computes is the same without."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("library", "name"),
    [
        *(("torchao.optim", f"Adam{decay}{bits}") for decay in ("", "W") for bits in ("8bit", "4bit", "Fp8")),
        *(("bitsandbytes.optim", name) for name in ("Adam", "Adam8bit", "AdamW", "AdamW8bit", "Lion", "Lion8bit")),
    ],
)
def test_the_libraries_step_as_foreseen(library: str, name: str, dtype: torch.dtype) -> None:
    cls = getattr(pytest.importorskip(library, exc_type=ImportError), name)
    generator = torch.Generator().manual_seed(0)
    parameters = [Parameter(torch.randn(shape, generator=generator).to(dtype) * 0.05) for shape in ((64, 80), (5,))]
    optimizer = two_groups(cls)(parameters)
    preconditioner = preconditioner_for(optimizer)
    for step in range(6):
        gradient = {p: torch.randn(p.shape, generator=generator).to(dtype) for p in parameters}
        for p in parameters:
            p.grad = gradient[p].clone()
        update = preconditioner.linearise(optimizer, gradient)
        predicted = update.displacement(gradient)
        before = {p: p.detach().clone() for p in parameters}
        optimizer.step()
        for p in parameters:
            # The libraries compute in float32, whatever the parameter is.
            ulp = 1.2e-7 * torch.maximum(p.detach().abs(), before[p].abs())
            error = ((predicted[p] - (p.detach() - before[p])).abs() - ulp).clamp_min(0).max()
            size = (update.offset[p].abs() + update.scale[p].apply(gradient[p]).abs()).max()
            assert float(error / size) <= 1e-6, f"step {step}, shape {tuple(p.shape)}"
    stored = dequantised(parameters[0].detach(), optimizer.state[parameters[0]])
    assert stored["exp_avg"].shape == parameters[0].shape
    if not name.endswith(("Adam", "AdamW", "Lion")):  # it was a quantised state indeed
        assert stored["exp_avg"].unique().numel() < 0.9 * parameters[0].numel()


class TestLayout:
    def test_blocks_run_over_rows_and_the_last_may_be_short(self) -> None:
        values = torch.randn(7, 100, generator=torch.Generator().manual_seed(1))
        codes, absmax = packed(values, SIGNED)
        assert absmax.numel() == 3
        state = {"step": 4, "state1": codes, "absmax1": absmax, "qmap1": SIGNED, "unorm_vec": torch.zeros(1)}
        found = dequantised(values, state)
        assert torch.equal(found["exp_avg"], unpacked(codes, absmax, SIGNED))
        assert set(found) == {"step", "exp_avg", "unorm_vec"}

    def test_what_is_not_quantised_stays_as_it_is(self) -> None:
        state = {"step": torch.tensor(2.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
        found = dequantised(torch.ones(2), state)
        assert all(found[key] is value for key, value in state.items())

    @pytest.mark.parametrize("broken", [{"absmax1": None}, {"qmap1": None}, {"absmax1": torch.ones(5)}])
    def test_bytes_without_what_they_stand_for_are_refused(self, broken: dict[str, Any]) -> None:
        codes, absmax = packed(torch.ones(20, 20), SIGNED)
        state = {"step": 4, "state1": codes, "absmax1": absmax, "qmap1": SIGNED, **broken}
        with pytest.raises(OptimizerStateError, match=r"needed are qmap1 and 2 scales in absmax1, .*; use block-wise"):
            dequantised(torch.ones(20, 20), {key: value for key, value in state.items() if value is not None})


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    device_mesh = pytest.importorskip("torch.distributed.device_mesh")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_of_a_sharded_parameter_the_part_that_is_here_is_dequantised(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard

    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    packed_values = Packed.of(values, SIGNED)
    sharded = DTensor.from_local(packed_values, mesh, [Shard(0)], run_check=False)
    parameter = DTensor.from_local(values, mesh, [Shard(0)])
    found = dequantised(parameter, {"exp_avg": sharded, "exp_avg_sq": parameter})
    assert isinstance(found["exp_avg"], DTensor)
    assert found["exp_avg"].placements == (Shard(0),)
    assert torch.equal(found["exp_avg"].to_local(), packed_values.dequantize())
    assert found["exp_avg_sq"] is parameter


class TestRefusals:
    @pytest.mark.parametrize("name", ["bitsandbytes.optim.adamw.AdamW8bit", "bitsandbytes.optim.lion.Lion"])
    @pytest.mark.parametrize(
        "arguments", [{"max_unorm": 0.5}, {"skip_zeros": True}, {"percentile_clipping": 5}], ids=lambda a: next(iter(a))
    )
    def test_what_is_given_besides_the_groups(self, name: str, arguments: dict[str, Any]) -> None:
        optimizer = named(name, LikeBitsandbytes)([Parameter(torch.ones(2))], lr=0.1)
        optimizer.args = SimpleNamespace(max_unorm=0.0, skip_zeros=False, optim_bits=8)  # type: ignore[attr-defined]
        preconditioner_for(optimizer)
        vars(optimizer.args).update(arguments)
        with pytest.raises(UnsupportedOptimizerError, match=rf"{next(iter(arguments))}=.* is modelled; leave it out"):
            preconditioner_for(optimizer)

    def test_a_parameter_with_rates_of_its_own(self) -> None:
        p = Parameter(torch.ones(2))
        optimizer = named("bitsandbytes.optim.adamw.AdamW", LikeBitsandbytes)([p], lr=0.1)
        optimizer.mng = SimpleNamespace(  # type: ignore[attr-defined]
            index2config={(0, 0): {"optim_bits": 32}}, pid2config={id(p): {"optim_bits": 32}}
        )
        preconditioner_for(optimizer)
        optimizer.mng.pid2config[id(p)]["lr"] = 0.2
        with pytest.raises(UnsupportedOptimizerError, match=r"parameter 0 of group 0 overrides \['lr'\]"):
            preconditioner_for(optimizer)


def test_the_floor_is_that_of_the_dequantised_state() -> None:
    optimizer = named("torchao.optim.adam.AdamW8bit", LikeTorchao)([Parameter(torch.zeros(64, 64))], lr=0.1)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    floored = TorchaoAdamW(0.5).linearise(optimizer, {p: torch.zeros_like(p)})
    largest = float(floored.scale[p].apply(torch.ones_like(p)).max())
    second = optimizer.state[p]["exp_avg_sq"].dequantize()
    rms = math.sqrt(float(second.mean()) / (1 - 0.95))
    assert largest == pytest.approx(0.1 * floored.gain[p] / (0.5 * rms), rel=1e-5)


def test_the_selector_reads_it() -> None:
    """The same decision as with a float32 optimizer that holds the dequantised moments."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(63, 83), nn.Tanh(), nn.Linear(83, 2))
    inputs, labels = torch.randn(6, 63, generator=generator), torch.randint(2, (6,), generator=generator)
    quantized = named("bitsandbytes.optim.adamw.AdamW8bit", LikeBitsandbytes)(model.parameters(), lr=0.01)
    for _ in range(3):
        functional.cross_entropy(model(inputs), labels).backward()
        quantized.step()
        quantized.zero_grad()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.0)
    for p in model.parameters():
        plain.state[p] = dequantised(p.detach(), quantized.state[p])
    found = []
    for optimizer in (quantized, plain):
        selector = ftw.Selector(
            model,
            optimizer,
            target=[(inputs[:2], labels[:2])],
            loss_fn=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
            budget=3,
            warmup=0,
        )
        with selector.record():
            functional.cross_entropy(model(inputs), labels).backward()
        found.append(selector.select())
        selector.close()
        model.zero_grad()
    one, other = found
    assert one.indices.tolist() == other.indices.tolist()
    assert torch.equal(one.weights, other.weights)
    assert one.predicted_drop == other.predicted_drop
