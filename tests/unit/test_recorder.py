"""What the recorder refuses, and in what state it leaves the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftw.errors import (
    CandidateLayoutError,
    CompletenessError,
    ConfigurationError,
    CoverageError,
    RecordingError,
)
from ftw.gradients import LoRA, Recorder
from tests.models import MLP, batch_of, lora_llama, tiny_llama, token_mean


def data(rows: int = 4) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x).square().mean()
    return result


def test_lean_leaves_p_grad_alone_and_close_removes_all_hooks() -> None:
    model = MLP()
    recorder = Recorder(model)
    for _ in range(2):
        with recorder.record():
            loss_of(model, data()).backward()
        assert all(p.grad is None for p in model.parameters())
        recorder.clear()
    recorder.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert recorder.contributions().parameters == []
    with pytest.raises(RecordingError, match="closed"), recorder.record():
        pass


def test_not_lean_leaves_the_trainers_gradient() -> None:
    model, x = MLP(), data()
    recorder = Recorder(model, lean=False)
    for _ in range(2):
        with recorder.record():
            loss_of(model, x).backward()
        with recorder.record():
            loss_of(model, x).backward()
        found = [p.grad for p in model.parameters()]
        expected = torch.autograd.grad(2 * loss_of(model, x), list(model.parameters()))
        for grad, value in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, value)
        recorder.clear()
        model.zero_grad()


def test_a_backward_that_raises_leaves_everything_as_it_was() -> None:
    model, x = MLP(), data()
    zeros = {p: torch.zeros_like(p) for p in model.parameters()}
    for p, zero in zeros.items():
        p.grad = zero
    recorder = Recorder(model)
    with recorder.record():
        loss_of(model, x).backward()
    before = recorder.contributions().combine()

    def explode(grads: object) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), recorder.record():
        model(x).sum().backward()
        output = model(x)
        output.grad_fn.next_functions[0][0].register_prehook(explode)  # type: ignore[union-attr]
        output.sum().backward()
    assert recorder.contributions().count == 4
    for p, value in recorder.contributions().combine().items():
        assert torch.equal(value, before[p])
    for p, zero in zeros.items():
        assert p.grad is zero
        assert not zero.any()
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())


def test_a_forward_that_raises_puts_the_parameters_back() -> None:
    model = MLP()
    recorder = Recorder(model, check=False)
    with pytest.raises(RuntimeError), recorder.record():
        model(torch.randn(4, 5, dtype=torch.float64))
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())
    with recorder.record():
        loss_of(model, data()).backward()
    assert recorder.contributions().count == 4


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda model: None, "no forward"),
        (lambda model: model(data()), "no backward"),
        (lambda model: loss_of(model.last, torch.randn(3, 5, dtype=torch.float64)), "outside a forward"),
    ],
)
def test_misuse(body: Callable[[nn.Module], object], message: str) -> None:
    model = MLP()
    recorder = Recorder(model)
    with pytest.raises(RecordingError, match=message), recorder.record():
        body(model)
    assert recorder.count == 0


def test_a_forward_without_gradients_is_no_candidate() -> None:
    model = MLP()
    recorder = Recorder(model)
    with recorder.record():
        with torch.no_grad():
            model(data(7))
        loss_of(model, data()).backward()
    assert recorder.count == 4


def test_nested_record_and_clear_inside() -> None:
    model = MLP()
    recorder = Recorder(model)
    with pytest.raises(RecordingError, match="inside record"), recorder.record(), recorder.record():
        pass
    with pytest.raises(RecordingError, match="cleared inside"), recorder.record():
        recorder.clear()


def test_backward_after_the_block() -> None:
    model = MLP()
    recorder = Recorder(model)
    kept = []
    with recorder.record():
        loss_of(model, data()).backward()
        with torch.no_grad():
            kept.append(model(data()))
    with pytest.raises(RecordingError, match="no backward"), recorder.record():
        kept.append(loss_of(model, data()))
    with pytest.raises(RecordingError, match="after record"):
        kept[-1].backward()


def test_stale_gradient_is_refused_or_kept() -> None:
    model, x = MLP(), data()
    loss_of(model, x).backward()
    before = {p: p.grad for p in model.parameters()}
    with pytest.raises(RecordingError, match="zero_grad"), Recorder(model).record():
        pass
    assert all(p.grad is before[p] for p in model.parameters())
    recorder = Recorder(model, residual="keep")
    with recorder.record():
        loss_of(model, x).backward()
    for p, value in before.items():
        assert value is not None
        assert torch.equal(recorder.residual[p], value)


class Regularised(MLP):
    """Adds a term that no candidate owns."""

    def penalty(self) -> Tensor:
        return 0.1 * self.first.weight.square().sum()


@pytest.mark.parametrize("audited", [True, False])
def test_gradient_without_owner(audited: bool) -> None:
    model, x = Regularised(), data()
    recorder = Recorder(model, check=audited)
    with pytest.raises(CompletenessError, match=r"first\.weight.*residual='keep'"), recorder.record():
        (loss_of(model, x) + model.penalty()).backward()
    assert all(p.grad is None for p in model.parameters())
    keeping = Recorder(model, check=audited, residual="keep")
    with keeping.record():
        (loss_of(model, x) + model.penalty()).backward()
    assert set(keeping.residual) == {model.first.weight}
    torch.testing.assert_close(keeping.residual[model.first.weight], 0.2 * model.first.weight.detach())
    assert all(p.grad is None for p in model.parameters())


class Functional(MLP):
    """Uses a weight outside its layer's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.first.weight), self.last.weight)


@pytest.mark.parametrize("audited", [True, False])
def test_a_weight_used_outside_its_layer_is_found(audited: bool) -> None:
    model = Functional()
    with pytest.raises(CompletenessError, match=r"first\.weight"), Recorder(model, check=audited).record():
        loss_of(model, data()).backward()


class TimeFirst(MLP):
    def forward(self, x: Tensor) -> Tensor:  # (B, T, d)
        return super().forward(x.transpose(0, 1))


class Flattened(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1))


class Permuted(MLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        swapped = hidden[[1, 0, *range(2, len(x))]]
        return self.last(self.root(swapped))  # type: ignore[no-any-return]


class Mixed(MLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        return self.last(self.root(hidden - hidden.mean(0)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (TimeFirst, (4, 3, 6)),
        (TimeFirst, (4, 4, 6)),
        (Flattened, (4, 3, 6)),
        (Permuted, (5, 6)),
        (Mixed, (4, 6)),
    ],
)
def test_rows_that_are_not_the_candidates(kind: type[MLP], shape: tuple[int, ...]) -> None:
    model = kind()
    recorder = Recorder(model)
    with pytest.raises(CandidateLayoutError, match="layer"), recorder.record():
        loss_of(model, torch.randn(shape, dtype=torch.float64)).backward()
    assert recorder.count == 0
    assert all(p.grad is None for p in model.parameters())


def test_packed_rows_are_refused() -> None:
    model, batch = tiny_llama(), batch_of(2, length=8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    with pytest.raises(CandidateLayoutError, match="restart"), Recorder(model).record():
        model(input_ids=batch["input_ids"], position_ids=positions).logits.sum().backward()
    lengths = torch.tensor([0, 4, 8])
    with pytest.raises(CandidateLayoutError, match="cu_seq_lens"), Recorder(model).record():
        model(input_ids=batch["input_ids"], cu_seq_lens_q=lengths).logits.sum().backward()


def test_left_padding_is_no_restart() -> None:
    model = tiny_llama()
    ids = torch.randint(1, 61, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for arguments in ({"attention_mask": mask}, {}):
        recorder = Recorder(model)
        with recorder.record():
            model(input_ids=ids, position_ids=positions, **arguments).logits.square().mean().backward()
        assert recorder.count == 2


def test_audit_restores_modes_and_random_state() -> None:
    model = lora_llama(dropout=0.5)
    model.get_submodule("base_model.model.model.layers.0").eval()
    modes = [m.training for m in model.modules()]
    recorder = Recorder(model)
    torch.manual_seed(5)
    with recorder.record():
        token_mean(model, batch_of(3)).backward()
    after = torch.rand(())
    torch.manual_seed(5)
    token_mean(model, batch_of(3))
    assert torch.equal(after, torch.rand(()))
    assert modes == [m.training for m in model.modules()]


def test_uncovered_parameters_are_named_with_ways_out() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)
            self.last = nn.Linear(2, 1)

    with pytest.raises(CoverageError, match=r"conv\.weight \(Conv1d\).*freeze"):
        Recorder(Convolution())
    model = Convolution()
    model.conv.requires_grad_(False)
    Recorder(model)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(CoverageError, match="no trainable parameter"):
        Recorder(model)
    with pytest.raises(CoverageError, match="not parameters of the model"):
        Recorder(MLP(), lambda: [nn.Parameter(torch.zeros(2))])


def test_a_layer_without_a_rule_is_refused_with_the_ways_out() -> None:
    class Convolving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Conv1d(4, 4, 1)

    with pytest.raises(CoverageError, match=r"inside\.weight \(Conv1d\).*functional=\["):
        Recorder(Convolving())


def test_lora_extractor_refuses_other_parameters() -> None:
    with pytest.raises(CoverageError, match="no adapter"):
        Recorder(tiny_llama(), extractor=LoRA())
    Recorder(lora_llama(), extractor=LoRA())


def test_freezing_between_steps_is_noticed() -> None:
    model = MLP()
    recorder = Recorder(model)
    model.first.weight.requires_grad_(False)
    with recorder.record():
        loss_of(model, data()).backward()
    assert model.first.weight not in set(recorder.contributions().parameters)
    model.first.weight.requires_grad_(True)
    with pytest.raises(RecordingError, match="middle of a window"), recorder.record():
        pass
    recorder.clear()
    with recorder.record():
        loss_of(model, data()).backward()
    assert model.first.weight in set(recorder.contributions().parameters)


def test_copies_of_the_model_are_inert() -> None:
    model = MLP()
    recorder = Recorder(model)
    twin = copy.deepcopy(model)
    with recorder.record():
        loss_of(model, data()).backward()
        loss_of(twin, data()).backward()
    assert recorder.count == 4
    assert all(p.grad is not None for p in twin.parameters())


def test_audit_is_repeated_until_it_saw_finite_numbers() -> None:
    model = Functional()
    recorder = Recorder(model)
    bad = data()
    bad[1] = float("nan")
    with recorder.record():
        loss_of(model, bad).backward()
    recorder.clear()
    with pytest.raises(CompletenessError), recorder.record():
        loss_of(model, data()).backward()


def test_checkpointing_with_several_waiting_forwards_is_refused() -> None:
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    recorder = Recorder(model)
    for check in (True, False):  # with equal sizes nothing else would notice
        recorder = Recorder(model, check=check)
        with pytest.raises(RecordingError, match="recomputed"), recorder.record():
            (token_mean(model, batch_of(2)) + token_mean(model, batch_of(2, seed=1))).backward()
        recorder.close()


def test_bad_residual_policy() -> None:
    with pytest.raises(ConfigurationError, match="residual"):
        Recorder(MLP(), residual="drop")


def test_an_interrupt_leaves_no_detached_parameters() -> None:
    model = MLP()
    recorder = Recorder(model, check=False)

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    model.first.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), recorder.record():
        model(data())
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())


@pytest.mark.parametrize("first", [data(1), torch.ones(4, 6, dtype=torch.float64)], ids=["one row", "constant rows"])
def test_identity_is_audited_until_it_is_proved(first: Tensor) -> None:
    model = Mixed()
    recorder = Recorder(model)
    with recorder.record():
        loss_of(model, first).backward()
    recorder.clear()
    with pytest.raises(CandidateLayoutError), recorder.record():
        loss_of(model, data()).backward()


def test_identity_that_cannot_be_proved_ends_with_a_warning() -> None:
    model = MLP()
    recorder = Recorder(model)
    for _ in range(4):
        with recorder.record():
            loss_of(model, torch.ones(3, 6, dtype=torch.float64)).backward()
    with pytest.warns(UserWarning, match="given up"), recorder.record():
        loss_of(model, torch.ones(3, 6, dtype=torch.float64)).backward()


def test_the_count_of_attempts_begins_anew_with_other_layers() -> None:
    model, constant = MLP(), torch.ones(3, 6, dtype=torch.float64)
    recorder = Recorder(model)
    for thawed in (True, False):
        model.first.bias.requires_grad_(thawed)
        for _ in range(4):
            with recorder.record():
                loss_of(model, constant).backward()
        with pytest.warns(UserWarning, match="given up"), recorder.record():
            loss_of(model, constant).backward()
        recorder.clear()


def test_duplicate_rows_are_still_told_apart() -> None:
    """Each row is exchanged for its neighbour; where that is its twin, for itself reversed."""
    model, x = Permuted(), data(2).repeat_interleave(2, 0)
    with pytest.raises(CandidateLayoutError), Recorder(model).record():
        loss_of(model, torch.cat([x[1:], x[:1]])).backward()


def test_layers_tapped_later_are_audited_too() -> None:
    model = Mixed()
    for p in (*model.root.parameters(), *model.last.parameters()):
        p.requires_grad_(False)
    recorder = Recorder(model)
    with recorder.record():
        loss_of(model, data()).backward()
    recorder.clear()
    model.requires_grad_(True)
    with pytest.raises(CandidateLayoutError), recorder.record():
        loss_of(model, data()).backward()


def test_batch_norm_in_training_mode_mixes_candidates() -> None:
    class Normed(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.batch = nn.BatchNorm1d(5, affine=False, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.root(self.batch(self.first(x))))  # type: ignore[no-any-return]

    model = Normed()
    recorder = Recorder(model)
    with pytest.raises(CandidateLayoutError, match="batch"), recorder.record():
        loss_of(model, data()).backward()
    model.batch.eval()
    with recorder.record():
        loss_of(model, data()).backward()
    model.batch.train()  # after the audit
    with pytest.raises(CandidateLayoutError, match="batch"), recorder.record():
        loss_of(model, data()).backward()


def test_a_parameter_without_a_rule_may_be_thawed_and_frozen_again() -> None:
    class Scaled(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    model = Scaled()
    recorder = Recorder(model)
    for _ in range(2):
        model.scale.requires_grad_(True)
        with pytest.raises(CoverageError, match="scale"), recorder.record():
            pass
        model.scale.requires_grad_(False)
        with recorder.record():
            loss_of(model, data()).backward()
        recorder.clear()


def test_a_head_called_outside_the_model_is_refused() -> None:
    model = MLP()
    recorder = Recorder(model)
    with pytest.raises(RecordingError, match="outside a forward"), recorder.record():
        model.last(torch.tanh(model(data()).repeat(1, 3)[:, :5].flip(0))).square().mean().backward()


def test_gradient_hooks_are_refused() -> None:
    model = MLP()
    recorder = Recorder(model)
    handle = model.first.weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(RecordingError, match=r"first\.weight has gradient hooks"), recorder.record():
        pass
    handle.remove()
    with recorder.record():
        loss_of(model, data()).backward()


def test_a_vector_as_long_as_the_batch_is_no_batch() -> None:
    class Positioned(MLP):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().forward(x + positions[:, None])  # (B, T, d) + (T, 1)

    model, x = Positioned(), torch.randn(4, 4, 6, dtype=torch.float64)
    recorder = Recorder(model)
    with recorder.record():
        model(x, torch.arange(4).double()).square().mean().backward()
    assert recorder.count == 4


def test_a_term_that_vanishes_is_no_residual() -> None:
    model = MLP()
    recorder = Recorder(model)
    for _ in range(2):
        with recorder.record():
            (loss_of(model, data()) + 0.0 * sum(p.sum() for p in model.parameters())).backward()
        recorder.clear()


@pytest.mark.parametrize("lean", [True, False])
def test_a_term_added_later_is_found(lean: bool) -> None:
    model = Regularised()
    recorder = Recorder(model, lean=lean)
    with recorder.record():
        loss_of(model, data()).backward()
    recorder.clear()
    model.zero_grad()
    with pytest.raises(CompletenessError, match=r"first\.weight"), recorder.record():
        (loss_of(model, data()) + model.penalty()).backward()


def test_gradients_of_gradients_are_refused_in_any_block() -> None:
    model, x = MLP(), data().requires_grad_()
    recorder = Recorder(model)
    for penalised in (False, True):
        with pytest.raises(RecordingError, match="create_graph") if penalised else nullcontext(), recorder.record():
            loss = loss_of(model, x)
            if penalised:
                loss = loss + torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
            loss.backward()
    assert recorder.count == 4


def test_stale_gradient_without_lean_mode() -> None:
    model = MLP()
    recorder = Recorder(model, lean=False, check=False)
    loss_of(model, data()).backward()
    with pytest.raises(RecordingError, match="zero_grad"), recorder.record():
        loss_of(model, data()).backward()


def test_reparametrised_layers_are_refused() -> None:
    model = MLP()
    nn.utils.parametrizations.weight_norm(model.first)
    with pytest.raises(CoverageError, match="Parametrization"):
        Recorder(model)


def test_an_empty_batch_is_refused() -> None:
    model = MLP()
    with pytest.raises(CandidateLayoutError, match="rows"), Recorder(model).record():
        loss_of(model, data(0)).backward()


def test_half_precision_under_autocast() -> None:
    """bfloat16 parameters and float32 norms: neither audit nor target may leave the forward's autocast."""
    model = MLP(dtype=torch.float32)
    model.first.to(torch.bfloat16)
    model.last.to(torch.bfloat16)
    recorder = Recorder(model)
    for _ in range(2):
        recorder.clear()
        with recorder.record():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, data().float())
            loss.backward()
    found = recorder.contributions().combine()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, data().float())
    loss.backward()
    for p in model.parameters():
        assert p.grad is not None
        assert found[p].dtype == p.dtype
        assert float((found[p].float() - p.grad.float()).norm()) < 0.01 * float(p.grad.float().norm())
