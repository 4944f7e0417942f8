"""The modes of training: mixed precision, scaled losses, checkpointing, compilation, `no_sync`, frozen parts, dropout.

In each, contributions are those of plain autograd, no weight gradient of the pool is formed, and nothing is kept
alive that the mode was chosen to free.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ftw
from ftw.gradients import Auto, Contributions, Factorized, Full, GradientExtractor, LoRA, Recorder
from ftw.gradients.pieces import OuterProduct
from ftw.optim_state import Diagonal
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean

bf16 = torch.bfloat16
fp16 = torch.float16


def data(rows: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x).square().mean()
    return result


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def per_candidate(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each row's gradient of the mean loss, one backward a row."""
    params = trainable(model)
    rows = [torch.autograd.grad(loss_of(model, x[i : i + 1]) / len(x), list(params.values())) for i in range(len(x))]
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(params)}


def assert_same_contributions(model: nn.Module, found: Contributions, expected: dict[str, Tensor]) -> None:
    params = trainable(model)
    assert set(found.parameters) == {params[name] for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found.per_candidate(params[name]), value, rtol=1e-10, atol=1e-14)


# -- lean --------------------------------------------------------------------------------------------------------------


class WeightGradients(TorchDispatchMode):
    """Counts what autograd computes when it forms gradients of matrices, tables, norms and biases."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        shapes = [tuple(p.shape) for p in trainable(model).values()]
        self.matrices = {shape for s in shapes if len(s) == 2 for shape in (s, s[::-1])}
        self.vectors = {s[0] for s in shapes if len(s) == 1}
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        product = name in ("mm", "addmm", "addmm_") and tuple(result.shape) in self.matrices
        # Norms and biases: their gradient is a sum over all tokens.
        total = name == "sum" and result.shape[-1:].numel() == result.numel() and result.numel() in self.vectors
        # Fused norms take a mask that says which gradients to form: input, weight, bias.
        fused = "norm_backward" in name and any(value is not None for value in result[1:])
        if product or total or fused or name == "embedding_dense_backward":
            self.found.append(name)
        return result


def bf16_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=bf16)


def checkpointed(reentrant: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = tiny_llama()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        return model

    return make


def half_frozen() -> nn.Module:
    model = tiny_llama()
    model.get_submodule("model.embed_tokens").requires_grad_(False)
    model.get_submodule("model.layers.0").requires_grad_(False)
    return model


MODES: dict[str, tuple[Callable[[], nn.Module], Callable[[], AbstractContextManager[Any]]]] = {
    "plain": (tiny_llama, nullcontext),
    "tied head": (lambda: tiny_llama(tied=True), nullcontext),
    "eval": (lambda: tiny_llama().eval(), nullcontext),
    "partly frozen": (half_frozen, nullcontext),
    "lora with dropout": (lambda: lora_llama(dropout=0.5), nullcontext),
    "reentrant checkpointing": (checkpointed(True), nullcontext),
    "non-reentrant checkpointing": (checkpointed(False), nullcontext),
    "bfloat16 autocast": (lambda: tiny_llama(torch.float32), bf16_autocast),
}


@pytest.mark.parametrize(
    ("mode", "forwards"),
    # Checkpointing with several waiting forwards is refused, see tests/unit/test_recorder.py.
    [*[(mode, 1) for mode in MODES], *[(mode, 2) for mode in MODES if "checkpointing" not in mode]],
)
def test_autograd_forms_no_weight_gradient_of_the_pool(mode: str, forwards: int) -> None:
    make, context = MODES[mode]
    model = make()
    # Factors are kept as they come, so that any product of a weight's shape is autograd's own.
    recorder = Recorder(model, extractor=Factorized())

    def losses() -> Tensor:
        with context():
            each = [token_mean(model, batch_of(3, seed=seed)) for seed in range(forwards)]
            return torch.stack(each).sum()

    loss = losses()
    with WeightGradients(model) as counter:
        loss.backward()
    assert len(counter.found) >= len(trainable(model))  # the counter sees them where they are formed
    model.zero_grad()
    for block in range(4):  # the audited block, lean ones, a micro-batch of the same window
        if block != 3:
            recorder.clear()
        with recorder.record():
            loss = losses()
            with WeightGradients(model) as counter:
                loss.backward()
            if block:
                assert counter.found == []
                assert all(p.grad is None for p in model.parameters())
    assert recorder.count == 2 * 3 * forwards


@pytest.mark.parametrize("extractor", [Auto, Full, Factorized])
@pytest.mark.parametrize("mode", ["plain", "reentrant checkpointing", "non-reentrant checkpointing"])
def test_a_lean_step_writes_the_gradient_that_training_would(mode: str, extractor: type[GradientExtractor]) -> None:
    model = MODES[mode][0]()
    recorder = Recorder(model, extractor=extractor())
    for seed in range(2):
        recorder.clear()
        with recorder.record():
            token_mean(model, batch_of(3, seed=seed)).backward()
    found = recorder.contributions().combine()
    token_mean(model, batch_of(3, seed=1)).backward()
    for p in model.parameters():
        torch.testing.assert_close(found[p], p.grad, rtol=1e-10, atol=1e-14)


# -- mixed precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extractor", [Auto, Full, Factorized])
@pytest.mark.parametrize("half", [bf16, fp16], ids=["bfloat16", "float16"])
def test_contributions_under_autocast_are_those_of_the_halved_backward(
    half: torch.dtype, extractor: type[GradientExtractor]
) -> None:
    model, batch = tiny_llama(torch.float32), batch_of(4)
    seen = []
    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    recorder = Recorder(model, extractor=extractor())
    for _ in range(2):
        recorder.clear()
        with recorder.record():
            with torch.autocast("cpu", dtype=half):
                loss = token_mean(model, batch)
            loss.backward()
    assert set(seen) == {half}  # autocast was really at work
    found = recorder.contributions().combine()
    with torch.autocast("cpu", dtype=half):
        loss = token_mean(model, batch)
    loss.backward()
    largest = max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    for p in model.parameters():
        assert p.grad is not None
        assert found[p].dtype == torch.float32
        assert float((found[p] - p.grad).norm()) < 0.01 * max(float(p.grad.norm()), 0.01 * largest)


@pytest.mark.parametrize("half", [bf16, fp16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("extractor", [Full, Factorized])
def test_gram_and_alignment_of_half_precision_factors_accumulate_in_float32(
    half: torch.dtype, extractor: type[GradientExtractor]
) -> None:
    """Long sums of numbers of one sign: accumulated in half precision they would be off by a per cent and more."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(7, 40))
    n, tokens = 4, 300
    piece = OuterProduct(
        start=0,
        shape=(7, 40),
        dtype=torch.float32,
        bounds=tuple(tokens * i for i in range(n + 1)),
        grads=torch.rand(n * tokens, 7).to(half),
        scale=1.0,
        inputs=torch.rand(n * tokens, 40).to(half),
    )
    contributions = extractor().contributions({weight: [extractor().keep(piece)]}, n)
    exact = torch.einsum(
        "ntr,ntd->nrd", piece.grads.double().view(n, tokens, 7), piece.inputs.double().view(n, tokens, 40)
    )
    scale, direction = torch.rand(7, 40) + 0.5, torch.rand(7, 40)
    gram = torch.einsum("ird,rd,jrd->ij", exact, scale.double(), exact)
    along = torch.einsum("ird,rd->i", exact, direction.double())
    found = contributions.gram({weight: Diagonal(scale)})
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, gram, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(contributions.alignment({weight: direction}), along, rtol=1e-5, atol=0.0)
    for block in contributions.blocks(weight):  # as the assembly reads them
        rows = block.rows
        products = block.products(Diagonal(scale[rows]).power(0.5), direction[rows], torch.zeros_like(direction[rows]))
        assert products is not None
        torch.testing.assert_close(products.gram, gram, rtol=1e-5, atol=0.0)
        weighted = torch.einsum("ird,rd,rd->i", exact, scale.double(), direction.double())
        torch.testing.assert_close(products.alignment, weighted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("half", [bf16, fp16], ids=["bfloat16", "float16"])
def test_a_scaled_run_with_an_overflow_and_micro_batches_is_the_plain_run(half: torch.dtype) -> None:
    """Weights of 1: losses, skipped step and scale history are those of training without a selector."""
    model, plain = MLP(dtype=torch.float32), MLP(dtype=torch.float32)
    scales: list[list[float]] = []
    for m in (model, plain):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        selector = None
        if m is model:
            selector = ftw.Selector(
                m,
                optimizer,
                target=[data(3, 9, torch.float32)],
                loss_fn=loss_of,
                filter="all",
                solver="uniform",
                budget=1.0,
            )
        history = []
        for step in range(6):
            for micro in range(2):
                x = data(4, 2 * step + micro, torch.float32)
                if (step, micro) == (3, 1):
                    x[2] = torch.inf
                with nullcontext() if selector is None else selector.record(scaler=scaler):
                    with torch.autocast("cpu", dtype=half):
                        loss = loss_of(m, x) / 2
                    scaler.scale(loss).backward()
            if selector is not None:
                assert (selector.apply().status == "overflow") == (step == 3)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            history.append(scaler.get_scale())
        scales.append(history)
    assert scales[0] == scales[1]
    assert min(scales[0]) < max(scales[0])  # it grew, and backed off
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-4)


# -- checkpointing -----------------------------------------------------------------------------------------------------


class _Witness(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[weakref.ref[Any]]) -> Tensor:
        memory = np.array(x.detach().numpy())
        seen.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None


class Witnessed(nn.Module):
    """Linear layers around an activation whose memory can be watched: it lies in an array of numpy's.

    Whatever refers to the activation, in Python or in autograd's graph, keeps that array alive.
    """

    def __init__(self, checkpointing: str | None, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5, dtype=torch.float64)
        self.second = nn.Linear(5, 4, dtype=torch.float64)
        self.last = nn.Linear(4, 2, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.checkpointing = checkpointing
        self.seen: list[weakref.ref[Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.checkpointing is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.checkpointing == "reentrant")
        result: Tensor = self.last(hidden)
        return result

    def block(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.second(self.dropout(_Witness.apply(hidden, self.seen))))  # type: ignore[no-untyped-call]

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.seen)


@pytest.mark.parametrize("extractor", [Auto, Full, Factorized])
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_what_checkpointing_frees_stays_free_until_the_backward(
    checkpointing: str, extractor: type[GradientExtractor]
) -> None:
    for kind, expected in ((None, 1), (checkpointing, 0)):
        model = Witnessed(kind)
        recorder = Recorder(model, extractor=extractor())
        for _ in range(2):  # audited, then lean
            recorder.clear()
            model.seen.clear()
            with recorder.record():
                loss = loss_of(model, data())
                assert model.alive() == expected
                loss.backward()
        recorder.clear()
        del loss
        assert model.alive() == 0


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_dropout_inside_a_checkpointed_block_is_recorded_with_the_mask_of_its_forward(checkpointing: str) -> None:
    model = Witnessed(checkpointing, dropout=0.5)
    recorder = Recorder(model)
    for _ in range(2):
        recorder.clear()
        torch.manual_seed(7)
        with recorder.record():
            loss_of(model, data()).backward()
    found = recorder.contributions().combine()
    torch.manual_seed(7)
    loss_of(model, data()).backward()
    for p in model.parameters():
        torch.testing.assert_close(found[p], p.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_a_lora_window_holds_no_activations_after_the_backward(checkpointing: str | None) -> None:
    from peft import LoraConfig, get_peft_model

    base = Witnessed(checkpointing)
    x = torch.randn(3, 50, 6, dtype=torch.float64)  # long rows: factors would be larger than gradients
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["first", "second", "last"]))  # type: ignore[arg-type]
    model = model.to(torch.float64)
    for extractor, alive in ((Auto(), 0), (LoRA(), 0), (Factorized(), 1)):
        base.seen.clear()
        recorder = Recorder(model, extractor=extractor, check=False)
        with recorder.record():
            loss_of(model, x).backward()
        assert base.alive() == alive
        held = [t for kept in recorder.window.pieces.values() for piece in kept for t in vars(piece).values()]
        storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if isinstance(t, Tensor)}
        gradients = 3 * 8 * sum(p.numel() for p in trainable(model).values())
        assert (sum(storage.values()) == gradients) == (alive == 0)
        recorder.close()


# -- compilation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo as dynamo

    dynamo.reset()
    yield dynamo
    dynamo.reset()


def compiled_frames() -> int:
    from torch._dynamo.utils import counters

    return int(counters["frames"]["total"])


@pytest.mark.parametrize(
    ("backend", "how", "when"),
    [
        pytest.param("eager", "function", "compiled first", marks=pytest.mark.slow),
        ("aot_eager", "function", "hooks first"),
        ("aot_eager", "method", "compiled first"),
        pytest.param("aot_eager", "method", "hooks first", marks=pytest.mark.slow),
        pytest.param("inductor", "function", "hooks first", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_is_recorded_exactly_and_lean(dynamo: Any, backend: str, how: str, when: str) -> None:
    model, twin = MLP(), MLP()
    called: Any = model
    recorder = Recorder(model) if when == "hooks first" else None
    if how == "function":
        called = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    recorder = recorder or Recorder(model)
    for step in range(4):
        x = data(4, step)
        recorder.clear()
        before = compiled_frames()
        with recorder.record():
            loss_of(called, x).backward()
            assert step == 0 or all(p.grad is None for p in model.parameters())
        assert step < 2 or compiled_frames() == before  # audited and lean steps each compile once
        assert_same_contributions(model, recorder.contributions(), per_candidate(twin, x))
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in twin.named_parameters()]
        assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())


def test_a_compiled_model_is_trained_as_if_it_were_not(dynamo: Any) -> None:
    results = []
    for compiled in (False, True):
        model = MLP()
        called: Any = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = ftw.Selector(model, optimizer, target=[data(5, 100)], loss_fn=loss_of, budget=2, warmup=1)
        weights = []
        for step in range(4):
            with selector.record():
                loss_of(called, data(6, step)).backward()
            weights.append(selector.apply().weights)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                called(data(6, step))  # evaluation between the steps records nothing
        selector.close()
        results.append((weights, [p.detach() for p in model.parameters()]))
    for first, second in zip(*results, strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compilation_and_checkpointing_together(dynamo: Any) -> None:
    model, twin = Witnessed("non-reentrant"), Witnessed(None)
    model.compile(backend="aot_eager")
    recorder = Recorder(model)
    for step in range(3):
        recorder.clear()
        with recorder.record():
            loss_of(model, data(4, step)).backward()
        assert_same_contributions(model, recorder.contributions(), per_candidate(twin, data(4, step)))


# -- distributed -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("given", ["module", "wrapper"])
def test_no_sync_around_recorded_backwards(one_process: None, given: str, accumulation: int) -> None:
    model, plain = MLP(), MLP()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, plain)]
    selector = ftw.Selector(
        model if given == "module" else ddp,
        optimizers[0],
        target=[data(3, 9)],
        loss_fn=loss_of,
        filter="all",
        solver="uniform",
        budget=1.0,
    )
    for step in range(3):
        for micro in range(accumulation):
            x = data(4, 10 * step + micro)
            with ddp.no_sync(), selector.record():
                loss_of(ddp, x).backward()
                assert step == 0 or all(p.grad is None for p in model.parameters())
            loss_of(plain, x).backward()
        assert len(selector.apply().weights) == 4 * accumulation
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-15)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-14)


# -- frozen parts, dropout, modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["first", "first.bias", "norm.weight", "root", "last.weight"])
def test_only_what_is_not_frozen_is_recorded(kept: str) -> None:
    model = MLP()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(kept))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    selector = ftw.Selector(model, optimizer, target=[data(5, 9)], loss_fn=loss_of, budget=2, warmup=1)
    for step in range(2):
        x = data(4, step)
        expected = per_candidate(model, x)
        with selector.record():
            loss_of(model, x).backward()
        selection = selector.apply()
        for name, p in model.named_parameters():
            if name.startswith(kept):
                torch.testing.assert_close(p.grad, torch.tensordot(selection.weights, expected[name], dims=1))
            else:
                assert p.grad is None
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith(kept)
        assert p.requires_grad == name.startswith(kept)


def test_frozen_below_trained_layers_under_both_kinds_of_checkpointing() -> None:
    """The checkpointed block's input needs no gradient; reentrant checkpointing then needs its input hooked."""
    for reentrant in (False, True):
        model = half_frozen()
        expected = copy.deepcopy(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        if reentrant:
            model.enable_input_require_grads()  # type: ignore[operator]
        recorder = Recorder(model)
        for _ in range(2):
            recorder.clear()
            with recorder.record():
                token_mean(model, batch_of(3)).backward()
        found = recorder.contributions().combine()
        token_mean(expected, batch_of(3)).backward()
        values = dict(expected.named_parameters())
        assert set(found) == set(trainable(model).values())
        for name, p in trainable(model).items():
            torch.testing.assert_close(found[p], values[name].grad, rtol=1e-10, atol=1e-14)


def test_train_and_eval_may_alternate_and_are_left_as_they_were() -> None:
    model = Witnessed(None, dropout=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = ftw.Selector(model, optimizer, target=[data(5, 9)], loss_fn=loss_of, budget=1.0, filter="all")
    for step, training in enumerate([True, False, True, False]):
        model.train(training)
        torch.manual_seed(step)
        with selector.record():
            loss_of(model, data(4, step)).backward()
        after = torch.rand(())
        contributions = selector._recorder.contributions().combine()
        selector.apply()
        assert all(module.training == training for module in model.modules())
        model.zero_grad()
        torch.manual_seed(step)
        loss_of(model, data(4, step)).backward()
        assert torch.equal(after, torch.rand(()))  # recording draws nothing from the trainer's random numbers
        for p in model.parameters():
            torch.testing.assert_close(contributions[p], p.grad, rtol=1e-12, atol=1e-15)
        model.zero_grad()


def test_operations_in_place_on_a_layers_output() -> None:
    class InPlace(MLP):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            hidden += x[..., :5]
            hidden = self.norm(nn.functional.relu_(hidden))
            hidden.mul_(0.5).tanh_()
            result: Tensor = self.last(self.root(hidden)).add_(1.0)
            return result

    model, twin = InPlace(), InPlace()
    recorder = Recorder(model)
    for step in range(2):
        recorder.clear()
        with recorder.record():
            loss_of(model, data(4, step)).backward()
        assert_same_contributions(model, recorder.contributions(), per_candidate(twin, data(4, step)))


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_several_forwards_and_their_backwards_in_any_order(order: str) -> None:
    model, batch = tiny_llama(), batch_of(6)
    parts = [{k: v[s] for k, v in batch.items()} for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    total = label_tokens(batch).sum()
    recorder = Recorder(model)
    for _ in range(2):
        recorder.clear()
        with recorder.record():
            losses = [token_mean(model, part) * label_tokens(part).sum() / total for part in parts]
            for loss in losses if order == "forwards" else losses[::-1]:
                loss.backward()
    found = recorder.contributions()
    whole = Recorder(model)
    with whole.record():
        token_mean(model, batch).backward()
    expected = whole.contributions()
    assert found.count == 6
    for p in expected.parameters:
        torch.testing.assert_close(found.per_candidate(p), expected.per_candidate(p), rtol=1e-10, atol=1e-14)
