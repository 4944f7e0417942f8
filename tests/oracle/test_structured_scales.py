"""The small problem under scales that are not elementwise, against naive sums over per-candidate gradients, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

import ftw
from ftw.assembly import GEOMETRIES, REFERENCES, measure
from ftw.gradients import Auto, Factorized, Full, GradientExtractor
from ftw.gradients import base as gradients_base
from ftw.gradients.blocks import FactorBlock
from ftw.gradients.recorder import Recorder
from ftw.gradients.rules import rules_for
from ftw.optim_state import Diagonal, Preconditioner, RowColumn, TwoSided, preconditioner_for
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean
from tests.muon import iterate_in_own_precision

F64 = torch.float64
Gradient = dict[Parameter, Tensor]
CANDIDATES = 5


class Stack(nn.Module):
    """Two matrices in one parameter, one for each half of the inputs, between plain layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6, dtype=F64)
        self.inner = Stacked()
        self.last = nn.Linear(8, 2, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.inner(torch.tanh(self.first(x)))))
        return result


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(2, 3, 4, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nki,kio->nko", x.unflatten(-1, (2, 3)), self.weight).flatten(1)


class Task:
    """A model and its losses; each loss is a mean over candidates (token means, for the Llamas)."""

    def __init__(self, model: nn.Module, functional: tuple[type[nn.Module], ...] = ()) -> None:
        self.model = model
        self.functional = functional
        self.text = not isinstance(model, (MLP, Stack))

    def batch(self, rows: int, seed: int) -> Any:
        if self.text:
            return batch_of(rows, seed=seed)
        return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        result: Tensor = token_mean(model, batch) if self.text else (model(batch) - 1.0).square().mean()
        return result

    def one_by_one(self, batch: Any) -> list[Gradient]:
        """c_i, each from a backward of its own."""
        if not self.text:
            return [self.gradient(batch[i : i + 1], 1 / len(batch)) for i in range(len(batch))]
        alone = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]
        total = float(label_tokens(batch).sum())
        return [self.gradient(one, float(label_tokens(one).sum()) / total) for one in alone]

    def gradient(self, batch: Any, factor: float = 1.0) -> Gradient:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.loss(self.model, batch) * factor, parameters)
        return dict(zip(parameters, found, strict=True))


def matrices_only(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and p.dim() == 2)
    return model


MODELS: dict[str, Callable[[], Task]] = {
    "mlp": lambda: Task(MLP()),
    "stack": lambda: Task(Stack(), (Stacked,)),
    "llama": lambda: Task(tiny_llama()),
    "lora llama": lambda: Task(lora_llama()),
}


def hf_adafactor(parameters: list[Parameter], **options: Any) -> Optimizer:
    module = pytest.importorskip("transformers.optimization")
    made: Optimizer = module.Adafactor(parameters, **options)
    return made


OPTIMIZERS: dict[str, Callable[[list[Parameter]], Optimizer]] = {
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.1, weight_decay=0.1),
    "hf adafactor": lambda ps: hf_adafactor(ps, beta1=0.8, weight_decay=0.1, warmup_init=True),
    "hf adafactor, manual": lambda ps: hf_adafactor(ps, lr=0.01, relative_step=False),
    "muon": lambda ps: torch.optim.Muon(ps, lr=0.02),
}


@pytest.fixture(autouse=True)
def muon_in_float64(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "muon" in request.node.name:
        iterate_in_own_precision(monkeypatch)


def prepared(model: str, optimizer: str, steps: int = 3) -> tuple[Task, Optimizer]:
    """A task after a few real steps."""
    task = MODELS[model]()
    if optimizer == "muon":
        matrices_only(task.model)
    made = OPTIMIZERS[optimizer]([p for p in task.model.parameters() if p.requires_grad])
    for seed in range(steps):
        for p, value in task.gradient(task.batch(6, 50 + seed)).items():
            p.grad = value
        made.step()
    made.zero_grad()
    return task, made


class Naive:
    """b, K and the rest as DESIGN writes them, every M applied to every whole gradient."""

    def __init__(
        self, task: Task, optimizer: Optimizer, preconditioner: Preconditioner, batch: Any, g: Gradient, reference: str
    ) -> None:
        each = task.one_by_one(batch)
        pool = {p: torch.stack([c[p] for c in each]).sum(0) for p in each[0]}
        self.update = preconditioner.linearise(optimizer, {"pool": pool, "target": g, "previous": None}[reference])
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        zero = torch.zeros((), dtype=F64)
        n = len(each)
        self.alignment, self.gram = {}, {}
        for name in GEOMETRIES:
            self.alignment[name], self.gram[name] = zero.new_zeros(n), zero.new_zeros(n, n)
        self.gained, self.coupling = zero.new_zeros(n, n), zero.new_zeros(n)
        self.offset_drop, self.offset_curvature, self.target = zero, zero, zero
        for p in pool:
            M, o, kappa = self.update.scale[p], self.update.offset[p], self.update.gain[p]
            lr = groups[p]["lr"]
            for name, act in (
                ("curvature", M.apply),
                ("update", lambda x, M=M: M.apply(M.apply(x))),
                ("vanilla", lambda x, lr=lr: x * (1.0 if lr is None else lr)),
            ):
                moved = [act(c[p]) for c in each]
                self.alignment[name] += torch.stack([(m * g[p]).sum() for m in moved])
                self.gram[name] += torch.stack([torch.stack([(m * c[p]).sum() for c in each]) for m in moved])
            moved = [M.apply(c[p]) for c in each]
            self.gained += kappa * torch.stack([torch.stack([(m * c[p]).sum() for c in each]) for m in moved])
            self.coupling += kappa * torch.stack([(c[p] * o).sum() for c in each])
            self.offset_drop = self.offset_drop + (g[p] * o).sum()
            self.offset_curvature = self.offset_curvature + kappa / 2 * (o * M.solve(o)).sum()
            self.target = self.target + (g[p] * M.apply(g[p])).sum()


def recorded(task: Task, batch: Any, extractor: GradientExtractor) -> Recorder:
    recorder = Recorder(
        task.model,
        lambda: [p for p in task.model.parameters() if p.requires_grad],
        extractor,
        rules=rules_for(task.functional),
    )
    with recorder.record():
        task.loss(task.model, batch).backward()
    return recorder


def close(found: Tensor, expected: Tensor, what: str) -> None:
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
    assert error < 1e-10, f"{what} is off by {error:.1e}"


CASES = [(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS if (model, optimizer) != ("stack", "muon")]


FORMS: dict[str, tuple[type[GradientExtractor], bool]] = {  # and whether factors are preferred where they are kept
    "full": (Full, False),
    "factorized, written out": (Factorized, False),
    "factorized, by factors": (Factorized, True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("model", "optimizer"), CASES)
def test_the_small_problem_against_naive_sums(
    model: str, optimizer: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, factors = FORMS[form]
    monkeypatch.setattr(gradients_base, "prefers_factors", lambda *_: factors)
    task, made = prepared(model, optimizer)
    preconditioner = preconditioner_for(made)
    batch, g = task.batch(CANDIDATES, 7), task.gradient(task.batch(3, 8))
    expected = Naive(task, made, preconditioner, batch, g, "pool")
    recorder = recorded(task, batch, extractor())
    for geometry in GEOMETRIES:
        contributions = recorder.contributions()
        contributions.block_bytes = 2048  # many blocks, so that scales are cut
        found = measure(contributions, made, preconditioner, g, {}, geometry)
        close(found.true.alignment, expected.alignment["curvature"], "b")
        close(found.true.gram, expected.gram["curvature"], "K")
        close(found.true.target, expected.target, "g'Mg")
        close(found.chosen.alignment, expected.alignment[geometry], f"b of {geometry}")
        close(found.chosen.gram, expected.gram[geometry], f"K of {geometry}")
        close(found.gained, expected.gained, "the curvature")
        close(found.coupling, expected.coupling, "the coupling")
        close(found.offset_drop, expected.offset_drop, "g'o")
        close(found.offset_curvature, expected.offset_curvature, "o'P^-1 o")
    recorder.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_factors_are_read_under_separable_scales(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the third form above is the second."""
    monkeypatch.setattr(gradients_base, "prefers_factors", lambda *_: True)
    task, made = prepared("mlp", optimizer)
    preconditioner, batch = preconditioner_for(made), task.batch(CANDIDATES, 7)
    recorder = recorded(task, batch, Factorized())
    read: list[tuple[int, ...]] = []
    products = FactorBlock.products

    def spy(self: FactorBlock, *args: Any, **options: Any) -> Any:
        read.append(self.pieces[0].shape)
        return products(self, *args, **options)

    monkeypatch.setattr(FactorBlock, "products", spy)
    measure(recorder.contributions(), made, preconditioner, task.gradient(batch), {}, "curvature")
    assert sorted(read) == [(2, 5), (5, 6)]
    recorder.close()


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_reference(optimizer: str, reference: str) -> None:
    task, made = prepared("llama", optimizer)
    preconditioner = preconditioner_for(made)
    batch, g = task.batch(CANDIDATES, 7), task.gradient(task.batch(3, 8))
    expected = Naive(task, made, preconditioner, batch, g, reference)
    recorder = recorded(task, batch, Auto())
    found = measure(recorder.contributions(), made, preconditioner, g, {}, "curvature", reference)
    close(found.true.alignment, expected.alignment["curvature"], "b")
    close(found.true.gram, expected.gram["curvature"], "K")
    close(found.offset_drop, expected.offset_drop, "g'o")
    recorder.close()


def test_the_cases_meet_every_kind_of_scale() -> None:
    """Or else the comparison above would say less than it seems to."""
    met = set()
    for model, optimizer in CASES:
        if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            continue
        task, made = prepared(model, optimizer)
        scales = preconditioner_for(made).linearise(made, task.gradient(task.batch(CANDIDATES, 7))).scale
        met |= {(type(M), M.separable, M.mixes_rows) for M in scales.values()}
    assert {(Diagonal, False, False), (RowColumn, True, False), (RowColumn, False, False)} <= met
    if hasattr(torch.optim, "Muon"):
        assert {(TwoSided, True, True), (TwoSided, True, False)} <= met


@pytest.mark.parametrize(("model", "optimizer"), CASES)
def test_weights_of_one_move_as_predicted(model: str, optimizer: str) -> None:
    """Then the reference is the gradient used, and the predicted displacement is that of the step."""
    task, made = prepared(model, optimizer)
    selector = ftw.Selector(
        task.model,
        made,
        target=[task.batch(3, 8)],
        loss_fn=task.loss,
        filter="all",
        solver="uniform",
        budget=1.0,
        warmup=0,
        watch=1,
        functional=task.functional,
    )
    for seed in range(3):
        batch = task.batch(CANDIDATES, seed)
        with selector.record():
            task.loss(task.model, batch).backward()
        selection = selector.apply()
        assert torch.equal(selection.weights, torch.ones(CANDIDATES, dtype=F64))
        made.step()
        made.zero_grad()
        assert selector.fidelity is not None
        assert selector.fidelity.displacement_error < 1e-10
        assert selector.fidelity.cosine == pytest.approx(1.0, abs=1e-12)
    selector.close()


@pytest.mark.parametrize("objective", ["match", "utility"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "llama"])
def test_a_selected_step_writes_the_weighted_gradient(model: str, optimizer: str, objective: str) -> None:
    task, made = prepared(model, optimizer)
    selector = ftw.Selector(
        task.model,
        made,
        target=[task.batch(3, 8)],
        loss_fn=task.loss,
        budget=2,
        warmup=0,
        objective=objective,
    )
    for seed in range(2):
        batch = task.batch(CANDIDATES, seed)
        with selector.record():
            task.loss(task.model, batch).backward()
        selection = selector.apply()
        assert 0 < len(selection.indices) <= 2
        for p, each in _stacked(task.one_by_one(batch)).items():
            assert p.grad is not None
            expected = torch.tensordot(selection.weights, each, dims=1)
            torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-13)
        made.step()
        made.zero_grad()
    selector.close()


def _stacked(each: list[Gradient]) -> Gradient:
    return {p: torch.stack([c[p] for c in each]) for p in each[0]}


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_a_faulty_candidate_is_left_out(optimizer: str) -> None:
    """NaN in the pool reaches the reference of a whole parameter first; the assembly must get to see it."""
    task, made = prepared("mlp", optimizer)
    batch = task.batch(CANDIDATES, 7)
    batch[2] = float("nan")
    selector = ftw.Selector(
        task.model, made, target=[task.batch(3, 8)], loss_fn=task.loss, budget=2, warmup=0, check=False
    )
    with selector.record():
        task.loss(task.model, batch).backward()
    selection = selector.apply()
    assert selection.weights[2] == 0.0
    assert all(bool(torch.isfinite(p.grad).all()) for p in task.model.parameters() if p.grad is not None)
    selector.close()
