"""`attach`: a loop without a word of selection in it does what a loop with record() and apply() does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ftw_integrations.loop import attach, token_mean
from torch import Tensor, nn

import ftw
from ftw.errors import CandidateLayoutError, ConfigurationError, RecordingError, UnsupportedOptimizerError
from tests.models import MLP, batch_of, lora_llama, tiny_llama

Pair = tuple[Tensor, Tensor]


def data(rows: int, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 2, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, batch: Pair) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


ARGUMENTS: dict[str, Any] = {"target": [data(5, 100), data(5, 101)], "loss_fn": loss_of, "budget": 3, "warmup": 2}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def untouched_loop(model: nn.Module, optimizer: Any, *, accumulation: int, steps: int = 6, clip: float | None = None):  # type: ignore[no-untyped-def]
    """What users write. It knows of no selection."""
    for step in range(steps):
        for part in range(accumulation):
            (loss_of(model, data(4, 10 * step + part)) / accumulation).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        loss_of(model, data(4, 999))  # an evaluation that forgot no_grad
        model.train()
        with torch.no_grad():
            loss_of(model, data(4, 999))


def explicit_loop(model: nn.Module, *, accumulation: int, clip: float | None = None) -> list[ftw.Selection]:
    optimizer = optimizer_of(model)
    selector = ftw.Selector(model, optimizer, **ARGUMENTS)
    made = []
    for step in range(6):
        for part in range(accumulation):
            with selector.record():
                (loss_of(model, data(4, 10 * step + part)) / accumulation).backward()
        made.append(selector.apply())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return made


def assert_same(first: nn.Module, second: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_attached_is_the_explicit_loop(accumulation: int, clip: float | None) -> None:
    model, twin = MLP(), MLP()
    optimizer = optimizer_of(model)
    told: list[ftw.Selection] = []
    with attach(model, optimizer, max_grad_norm=clip, told=told.append, **ARGUMENTS) as attached:
        untouched_loop(model, optimizer, accumulation=accumulation)
        assert attached.selection is told[-1]
    expected = explicit_loop(twin, accumulation=accumulation, clip=clip)
    assert [made.weights.tolist() for made in told] == [made.weights.tolist() for made in expected]
    assert all(len(made.weights) == 4 * accumulation for made in told)
    assert_same(model, twin)


@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
def test_all_and_uniform_is_the_untouched_loop(make: Callable[..., Any]) -> None:
    models, clip = [single(make), single(make)], 0.05
    norms = []
    for model, selecting in zip(models, (False, True), strict=True):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        if selecting:
            everything: dict[str, Any] = {"budget": 1.0, "filter": "all", "solver": "uniform"}
            attach(model, optimizer, target=[batch_of(3)], mass=token_mean, max_grad_norm=clip, **everything)
        for step in range(20):
            for part in range(4):
                (model(**batch_of(1 + part, seed=4 * step + part)).loss / 4).backward()
            if not selecting:
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
            optimizer.zero_grad()
    assert min(norms) > clip  # the clipping acted
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_the_loops_own_clipping_has_no_effect() -> None:
    model, twin = MLP(), MLP()
    optimizer = optimizer_of(model)
    with attach(model, optimizer, **ARGUMENTS):
        untouched_loop(model, optimizer, accumulation=2, clip=1e-6)
    explicit_loop(twin, accumulation=2)
    assert_same(model, twin)


def test_a_detached_loop_trains_plainly() -> None:
    model, twin = MLP(), MLP()
    optimizer = optimizer_of(model)
    attached = attach(model, optimizer, **ARGUMENTS)
    loss_of(model, data(4, 1))  # in the middle of a window
    attached.detach()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert "zero_grad" not in vars(optimizer)
    untouched_loop(model, optimizer, accumulation=2)
    untouched_loop(twin, optimizer_of(twin), accumulation=2)
    assert_same(model, twin)


def test_zeroed_gradients_are_none_of_the_step() -> None:
    models = [MLP(), MLP()]
    for model, dropped in zip(models, (False, True), strict=True):
        optimizer = optimizer_of(model)
        with attach(model, optimizer, reference="target", memory_cap=10**6, **ARGUMENTS) as attached:
            for step in range(4):
                if dropped and step != 1:  # a loop that thinks better of it
                    loss_of(model, data(4, 50 + step)).backward()
                    optimizer.zero_grad()
                loss = loss_of(model, data(4, step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                assert attached.selection is not None
                assert len(attached.selection.weights) == 4
                optimizer.zero_grad()
        assert "zero_grad" not in vars(optimizer)
    assert_same(*models)


@pytest.mark.parametrize("wrapped", ["by accelerate", "by Fabric"])
def test_gradients_zeroed_by_a_wrapper(wrapped: str) -> None:
    model = MLP()
    optimizer: Any = optimizer_of(model)
    if wrapped == "by Fabric":
        fabric = pytest.importorskip("lightning.fabric", reason="the wrapper is its").Fabric(accelerator="cpu")
        _, optimizer = fabric.setup(model, optimizer)
    else:
        accelerate = pytest.importorskip("accelerate", reason="the wrapper is its")
        optimizer = accelerate.Accelerator(cpu=True).prepare(optimizer)
    with attach(model, optimizer, **ARGUMENTS) as attached:
        for step in range(3):
            loss_of(model, data(4, step)).backward()
            optimizer.zero_grad()
        loss_of(model, data(4, 3)).backward()
        optimizer.step()
        assert attached.selection is not None
        assert len(attached.selection.weights) == 4
    assert "zero_grad" not in vars(optimizer)


def test_zeroed_between_a_forward_and_its_backward() -> None:
    model = MLP()
    optimizer = optimizer_of(model)
    with attach(model, optimizer, **ARGUMENTS):
        loss_of(model, data(4, 1)).backward()
        loss_of(model, data(4, 2))
        with pytest.raises(RecordingError, match="call it before the forward"):
            optimizer.zero_grad()


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: str) -> Tensor:  # type: ignore[override]
        if where == "forward":
            raise MemoryError
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise MemoryError


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("place", [0, 2, 3], ids=["first", "amid", "last"])
def test_a_micro_batch_that_breaks_off_is_none_of_the_step(place: int, where: str) -> None:
    """A loop that catches the error and goes on trains on what is left."""
    models = [MLP(), MLP()]
    for model, broken in zip(models, (False, True), strict=True):
        optimizer = optimizer_of(model)
        with attach(model, optimizer, **ARGUMENTS) as attached:
            for step in range(3):
                for part in range(4):
                    if step == 0 or part != place:
                        loss_of(model, data(4, 10 * step + part)).backward()
                    elif broken:
                        hook = model.norm.register_forward_hook(lambda *given: Fails.apply(given[-1], where))
                        with pytest.raises(MemoryError):
                            loss_of(model, data(4, 99)).backward()
                        hook.remove()
                optimizer.step()
                optimizer.zero_grad()
                assert attached.selection is not None
                assert len(attached.selection.weights) == (16 if step == 0 else 12)
    assert_same(*models)


@pytest.mark.parametrize("reference", ["target", "previous"])
def test_a_capped_window_is_the_explicit_loops(reference: str) -> None:
    """The target's gradient is made as the loop's forward begins."""
    made, models = [], [MLP(), MLP()]
    arguments = {**ARGUMENTS, "reference": reference, "memory_cap": 1500}
    for explicit, model in enumerate(models):
        optimizer = optimizer_of(model)
        if explicit:
            selector = ftw.Selector(model, optimizer, **arguments)
        else:
            attached = attach(model, optimizer, **arguments)
        for step in range(4):
            for part in range(3):
                with selector.record() if explicit else nullcontext():
                    loss_of(model, data(4, 10 * step + part)).backward()
            selection = selector.apply() if explicit else None
            optimizer.step()
            optimizer.zero_grad()
            selection = selection or attached.selection
            assert selection is not None
            made.append(selection.weights.tolist())
    assert made[:4] == made[4:]
    assert_same(*models)


def test_two_forwards_before_their_backwards() -> None:
    results = []
    for together in (False, True):
        model = MLP()
        optimizer = optimizer_of(model)
        with attach(model, optimizer, **ARGUMENTS) as attached:
            if together:
                sum(loss_of(model, data(4, part)) for part in range(2)).backward()  # type: ignore[union-attr]
            else:
                first, second = (loss_of(model, data(4, part)) for part in range(2))
                first.backward()
                second.backward()
            optimizer.step()
            assert attached.selection is not None
            results.append(attached.selection.weights)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert len(results[0]) == 8


def single(make: Callable[..., Any]) -> Any:
    return make(torch.float32)


def language_model(
    model: Any, *, way: str, stream: list[list[Any]], autocast: bool = False, **arguments: Any
) -> list[ftw.Selection]:
    """A step for each list of micro-batches, without a word of selection or with record() and apply()."""
    optimizer = optimizer_of(model)
    made: list[ftw.Selection] = []
    mass, candidates = arguments.pop("mass", token_mean), arguments.pop("candidates", None)
    arguments = {"target": [batch_of(3, seed=9)], "budget": 2, "warmup": 1, **arguments}
    if way == "attach":
        attach(model, optimizer, mass=mass, candidates=candidates, told=made.append, **arguments)
    else:
        selector = ftw.Selector(model, optimizer, **arguments)
    for window in stream:
        for batch in window:
            if way == "attach":
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**batch).loss
                loss.backward()
            else:
                owner = None if candidates is None else candidates(batch)
                with selector.record(mass=mass(batch), candidates=owner):
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = model(**batch).loss
                    loss.backward()
        if way != "attach":
            made.append(selector.apply())
        optimizer.step()
        optimizer.zero_grad()
    return made


def windows(steps: int = 3) -> list[list[Any]]:
    return [[batch_of(4, seed=2 * step + part) for part in range(2)] for step in range(steps)]


def assert_same_choice(first: list[ftw.Selection], second: list[ftw.Selection], tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(first, second, strict=True):
        assert ours.indices.tolist() == theirs.indices.tolist()
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_model(make: Callable[[], Any], checkpointing: bool) -> None:
    made = []
    for way in ("attach", "record"):
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        made.append(language_model(model, way=way, stream=windows()))
    assert_same_choice(*made)


@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
def test_bf16_autocast(make: Callable[..., Any]) -> None:
    models = [single(make) for _ in range(2)]
    made = [
        language_model(model, way=way, stream=windows(), autocast=True)
        for model, way in zip(models, ("attach", "record"), strict=True)
    ]
    assert [each.weights.tolist() for each in made[0]] == [each.weights.tolist() for each in made[1]]
    assert_same(*models)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("attached", ["the compiled model", "the model, then compiled"])
def test_a_compiled_model(attached: str, fresh_dynamo: None) -> None:
    from torch._dynamo.utils import counters

    model = single(tiny_llama)
    optimizer = optimizer_of(model)
    made: list[ftw.Selection] = []
    compiled: Any = torch.compile(model, backend="aot_eager")
    given = compiled if attached == "the compiled model" else model
    attach(given, optimizer, target=[batch_of(3, seed=9)], budget=2, warmup=1, mass=token_mean, told=made.append)
    for window in windows():
        for batch in window:
            compiled(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] > 0
    assert_same_choice(made, language_model(single(tiny_llama), way="record", stream=windows()), 1e-3)


def packed(batches: list[Any]) -> dict[str, Tensor]:
    """Rows of two samples each, that begin anew in position_ids; the first label of each is nobody's to predict."""
    joined = {key: torch.cat([batch[key] for batch in batches], 1) for key in ("input_ids", "labels")}
    length = batches[0]["input_ids"].shape[1]
    joined["labels"][:, ::length] = -100
    positions = torch.arange(length).repeat(len(batches)).expand_as(joined["input_ids"])
    return {**joined, "position_ids": positions}


def packed_map(inputs: Mapping[str, Any]) -> Tensor:
    return ftw.packed_candidates(inputs["position_ids"])


def packed_mass(inputs: Mapping[str, Any]) -> Tensor:
    owner = packed_map(inputs)
    tokens = torch.zeros(int(owner.max()) + 1, dtype=torch.float64)
    return tokens.index_add_(0, owner[:, 1:].flatten(), (inputs["labels"][:, 1:] != -100).flatten().double())


def test_packed_rows() -> None:
    def model() -> Any:
        made = tiny_llama()
        made.config.use_cache = False  # type: ignore[union-attr]  # transformers keeps packed samples apart only then
        return made

    stream = [[packed(pair), packed(pair[::-1])] for pair in windows()]
    given: dict[str, Any] = {"stream": stream, "candidates": packed_map, "mass": packed_mass}
    made = [language_model(model(), way=way, **given) for way in ("attach", "record")]
    assert all(len(selection.weights) == 16 for selection in made[0])
    assert_same_choice(*made)
    with pytest.raises(CandidateLayoutError, match="position_ids restart"):
        language_model(model(), way="attach", stream=stream)


def test_rows_without_labels_are_no_candidates() -> None:
    stream = windows()
    stream[0][1]["labels"][2] = stream[2][0]["labels"][0] = -100
    everything: dict[str, Any] = {"stream": stream, "budget": 1.0, "filter": "all", "solver": "uniform"}
    model, twin = tiny_llama(), tiny_llama()
    made = language_model(model, way="attach", **everything)
    assert [len(selection.weights) for selection in made] == [7, 8, 7]
    optimizer = optimizer_of(twin)
    for window in stream:
        for batch in window:
            twin(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_packed_forwards_need_their_backward_first() -> None:
    model = MLP()
    optimizer = optimizer_of(model)
    with attach(model, optimizer, candidates=lambda _: torch.tensor([0, 0, 1, 1]), **ARGUMENTS) as attached:
        loss_of(model, data(4, 1)).backward()
        loss_of(model, data(4, 2))
        with pytest.raises(RecordingError, match="before the backward of the one before it"):
            loss_of(model, data(4, 3))
        attached.detach()


@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
def test_a_run_resumes_bitwise(make: Callable[[], Any], tmp_path: Path) -> None:
    """The handle's state beside the model's and the optimizer's, in a file of plain data."""
    arguments: dict[str, Any] = {"target": [batch_of(3, seed=9), batch_of(2, seed=8)], "budget": 2, "warmup": 1}
    arguments |= {"refresh": 2, "ema": 0.3, "watch": 2, "mass": token_mean, "max_grad_norm": 0.1}

    def run(model: Any, optimizer: Any, told: list[ftw.Selection], steps: range, resume: bool, save_at: int) -> Any:
        with attach(model, optimizer, told=told.append, **arguments) as attached:
            if resume:
                state = torch.load(tmp_path / "state.pt", weights_only=True)
                for each, kept in zip((model, optimizer, attached), state, strict=True):
                    each.load_state_dict(kept)
            for step in steps:
                for batch in windows(6)[step]:
                    model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == save_at:
                    torch.save([each.state_dict() for each in (model, optimizer, attached)], tmp_path / "state.pt")
            return attached.selector.fidelity

    whole, expected = make(), []
    fidelity = run(whole, optimizer_of(whole), expected, range(6), False, save_at=2)
    resumed, found = make(), []
    assert run(resumed, optimizer_of(resumed), found, range(3, 6), True, save_at=-1) == fidelity
    assert [each.weights.tolist() for each in found] == [each.weights.tolist() for each in expected[3:]]
    assert [each.predicted_drop for each in found] == [each.predicted_drop for each in expected[3:]]
    assert_same(whole, resumed)


def test_a_watched_step_is_the_selected_one() -> None:
    model = MLP()
    optimizer = optimizer_of(model)
    with attach(model, optimizer, watch=1, **ARGUMENTS) as attached:
        untouched_loop(model, optimizer, accumulation=2)
        fidelity = attached.selector.fidelity
        assert fidelity is not None
        assert fidelity.step == 6
        assert fidelity.applied == pytest.approx(1.0)
        assert fidelity.cosine > 0.9


class TestBadUse:
    def test_arguments(self) -> None:
        model = MLP()
        optimizer = optimizer_of(model)
        with pytest.raises(ConfigurationError, match="lean=False"):
            attach(model, optimizer, lean=False, **ARGUMENTS)
        with pytest.raises(ConfigurationError, match="max_grad_norm is 0"):
            attach(model, optimizer, max_grad_norm=0, **ARGUMENTS)
        with pytest.raises(ConfigurationError, match="geometry"):
            attach(model, optimizer, geometry="round", **ARGUMENTS)
        with pytest.raises(UnsupportedOptimizerError):
            attach(model, object(), **ARGUMENTS)  # type: ignore[arg-type]
        assert not optimizer._optimizer_step_pre_hooks
        assert not model._forward_pre_hooks

    def test_a_step_without_a_backward(self) -> None:
        model = MLP()
        optimizer = optimizer_of(model)
        with attach(model, optimizer, **ARGUMENTS):
            with pytest.raises(RecordingError, match="nothing was recorded"):
                optimizer.step()
            loss_of(model, data(4, 1))
            with pytest.raises(RecordingError, match="got no backward"):
                optimizer.step()

    def test_a_closure(self) -> None:
        model = MLP()
        optimizer = optimizer_of(model)
        with attach(model, optimizer, **ARGUMENTS):
            loss_of(model, data(4, 1)).backward()
            with pytest.raises(ConfigurationError, match="closure"):
                optimizer.step(lambda: 0.0)

    def test_a_scaler_that_saw_no_gradient_refuses_the_step(self) -> None:
        model = MLP(dtype=torch.float32)
        optimizer = optimizer_of(model)
        scaler = torch.amp.GradScaler("cpu")
        batch = tuple(t.float() for t in data(4, 1))
        with attach(model, optimizer, **{**ARGUMENTS, "target": [batch]}):
            scaler.scale(loss_of(model, batch)).backward()  # type: ignore[arg-type]
            with pytest.raises(AssertionError, match="No inf checks"):
                scaler.step(optimizer)
