"""Contributions against naive references in float64, for every extractor and every kind of layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.gradients import Auto, Factorized, Full, GradientExtractor, LoRA, Recorder
from ftw.optim_state import Diagonal, Scalar
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tied=True),
    "lora llama": lora_llama,
}
EXTRACTORS: dict[str, Callable[[], GradientExtractor]] = {
    "full": Full,
    "factorized": Factorized,
    "auto": Auto,
}


def per_sample_loop(model: nn.Module, batch: dict[str, Tensor]) -> dict[Parameter, Tensor]:
    """Each candidate by itself, weighted by its share of the label tokens."""
    params = [p for p in model.parameters() if p.requires_grad]
    total = label_tokens(batch).sum()
    rows = []
    for i in range(len(batch["input_ids"])):
        alone = {k: v[i : i + 1] for k, v in batch.items()}
        loss = token_mean(model, alone) * label_tokens(alone).sum() / total
        rows.append(torch.autograd.grad(loss, params))
    return {p: torch.stack([row[j] for row in rows]) for j, p in enumerate(params)}


def per_sample_vmap(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`torch.func.vmap(grad)` over candidates."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    rest = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    total = label_tokens(batch).sum()

    def loss(params: dict[str, Tensor], ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "attention_mask": mask[None], "use_cache": False}
        logits = torch.func.functional_call(model, {**params, **rest}, (), inputs).logits[0, :-1]
        target = labels[1:]
        kept = (target != -100).to(logits.dtype)
        return -(logits.log_softmax(-1).gather(1, target.clamp_min(0)[:, None])[:, 0] * kept).sum() / total

    result: dict[str, Tensor] = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(
        params, batch["input_ids"], batch["attention_mask"], batch["labels"]
    )
    return result


def recorded(model: nn.Module, extractor: GradientExtractor, batch: dict[str, Tensor]) -> Recorder:
    recorder = Recorder(model, extractor=extractor)
    for _ in range(2):  # the audited block, then a lean one
        recorder.clear()
        with recorder.record():
            token_mean(model, batch).backward()
    return recorder


def relative(found: Tensor, expected: Tensor, scale: float) -> float:
    return float((found - expected).norm()) / max(float(expected.norm()), scale)


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_per_sample_loop(name: str, extractor: str) -> None:
    model, batch = MODELS[name](), batch_of(5)
    expected = per_sample_loop(model, batch)
    contributions = recorded(model, EXTRACTORS[extractor](), batch).contributions()
    largest = max(float(v.norm()) for v in expected.values())
    assert set(contributions.parameters) == set(expected)
    for p, value in expected.items():
        # Key biases have a gradient of zero in exact arithmetic; rounding of the model's scale is what is left of it.
        assert relative(contributions.per_candidate(p), value, 1e-3 * largest) < 1e-12


@pytest.mark.parametrize("name", ["llama", "lora llama"])
def test_equals_vmap(name: str) -> None:
    model, batch = MODELS[name](), batch_of(4)
    expected = per_sample_vmap(model, batch)
    contributions = recorded(model, Auto(), batch).contributions()
    largest = max(float(v.norm()) for v in expected.values())
    for key, p in model.named_parameters():
        if p.requires_grad:
            assert relative(contributions.per_candidate(p), expected[key], 1e-3 * largest) < 1e-12


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_alignment_gram_and_combination_follow_from_dense_contributions(extractor: str) -> None:
    model, batch = tiny_llama(tied=True), batch_of(5)
    contributions = recorded(model, EXTRACTORS[extractor](), batch).contributions()
    contributions.block_bytes = 4096  # many blocks
    torch.manual_seed(1)
    params = contributions.parameters
    dense = {p: contributions.per_candidate(p) for p in params}
    scale = {p: Diagonal(torch.rand_like(p)) if i % 2 else Scalar(0.3) for i, p in enumerate(params)}
    direction = {p: torch.randn_like(p) for p in params}
    weights = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.5], dtype=torch.float64)

    b = sum((dense[p].flatten(1) @ direction[p].flatten() for p in params), torch.zeros(5))
    K = sum((dense[p].flatten(1) @ scale[p].apply(dense[p]).flatten(1).T for p in params), torch.zeros(5, 5))
    torch.testing.assert_close(contributions.alignment(direction), b, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(contributions.gram(scale), K, rtol=1e-11, atol=1e-14)
    index = torch.tensor([3, 1])
    torch.testing.assert_close(contributions.gram(scale, index), K[index][:, index], rtol=1e-11, atol=1e-14)
    for p, value in contributions.combine(weights).items():
        torch.testing.assert_close(value, torch.tensordot(weights, dense[p], dims=1), rtol=1e-11, atol=1e-14)


def test_extractors_lora_and_auto_agree() -> None:
    model, batch = lora_llama(), batch_of(4)
    first = recorded(model, LoRA(), batch).contributions()
    second = recorded(model, Auto(), batch).contributions()
    for p in first.parameters:
        torch.testing.assert_close(first.per_candidate(p), second.per_candidate(p), rtol=1e-13, atol=1e-16)


def test_micro_batches_are_one_pool() -> None:
    model, batch = tiny_llama(), batch_of(6)
    together = recorded(model, Auto(), batch).contributions()
    recorder = Recorder(model, extractor=Auto())
    share = label_tokens(batch).sum()
    for part in (slice(0, 2), slice(2, 6)):
        piece = {k: v[part] for k, v in batch.items()}
        with recorder.record():
            (token_mean(model, piece) * label_tokens(piece).sum() / share).backward()
    apart = recorder.contributions()
    assert apart.count == 6
    for p in together.parameters:
        torch.testing.assert_close(apart.per_candidate(p), together.per_candidate(p), rtol=1e-11, atol=1e-15)


def test_several_forwards_before_one_backward() -> None:
    model, batch = tiny_llama(), batch_of(6)
    together = recorded(model, Auto(), batch).contributions()
    recorder = Recorder(model, extractor=Auto())
    share = label_tokens(batch).sum()
    with recorder.record():
        losses = []
        for part in (slice(0, 2), slice(2, 6)):
            piece = {k: v[part] for k, v in batch.items()}
            losses.append(token_mean(model, piece) * label_tokens(piece).sum() / share)
        sum(losses[1:], losses[0]).backward()
    apart = recorder.contributions()
    for p in together.parameters:
        torch.testing.assert_close(apart.per_candidate(p), together.per_candidate(p), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, batch = tiny_llama(), batch_of(4)
    expected = recorded(model, Auto(), batch).contributions()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    found = recorded(model, Auto(), batch).contributions()
    for p in expected.parameters:
        torch.testing.assert_close(found.per_candidate(p), expected.per_candidate(p), rtol=1e-11, atol=1e-15)


def test_dropout_is_the_trainers_own() -> None:
    model, batch = lora_llama(dropout=0.5), batch_of(4)
    recorder = Recorder(model, check=False)
    torch.manual_seed(3)
    with recorder.record():
        token_mean(model, batch).backward()
    found = recorder.contributions().combine()
    after = torch.rand(())
    torch.manual_seed(3)
    token_mean(model, batch).backward()
    assert torch.equal(after, torch.rand(()))
    for p, value in found.items():
        assert p.grad is not None
        torch.testing.assert_close(value, p.grad, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)])
def test_any_number_of_inner_dimensions(shape: tuple[int, ...]) -> None:
    model = MLP()
    x = torch.randn(shape, dtype=torch.float64)
    recorder = Recorder(model)
    for _ in range(2):
        recorder.clear()
        with recorder.record():
            model(x).square().mean().backward()
    contributions = recorder.contributions()
    params = list(model.parameters())
    for i in range(4):
        alone = torch.autograd.grad(model(x[i : i + 1]).square().mean() / 4, params)
        for p, value in zip(params, alone, strict=True):
            torch.testing.assert_close(contributions.per_candidate(p)[i], value, rtol=1e-12, atol=1e-15)


def test_a_layer_called_twice_in_one_forward() -> None:
    class Twice(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x.flip(-1))

    model, x = Twice(), torch.randn(3, 6, dtype=torch.float64)
    recorder = Recorder(model)
    with recorder.record():
        model(x).square().mean().backward()
    contributions = recorder.contributions()
    for i in range(3):
        alone = torch.autograd.grad(model(x[i : i + 1]).square().mean() / 3, list(model.parameters()))
        for p, value in zip(model.parameters(), alone, strict=True):
            torch.testing.assert_close(contributions.per_candidate(p)[i], value, rtol=1e-12, atol=1e-15)


def test_embedding_padding_index_has_no_gradient() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 3, padding_idx=0, dtype=torch.float64)

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.table(ids).sum(1)
            return result

    model, ids = Bag(), torch.tensor([[0, 1, 1], [2, 0, 6]])
    recorder = Recorder(model)
    with recorder.record():
        model(ids).square().sum().backward()
    found = recorder.contributions().per_candidate(model.table.weight)
    for i in range(2):
        (alone,) = torch.autograd.grad(model(ids[i : i + 1]).square().sum(), [model.table.weight])
        torch.testing.assert_close(found[i], alone)
    assert not found[:, 0].any()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_foreign_rms_norms(offset: float) -> None:
    """Classes of other libraries, known by name: scaling by w or by 1 + w, squaring in float32."""

    class FamilyRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            root = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
            return (self.weight + offset) * (x.float() * root).to(x.dtype)

    model, x = FamilyRMSNorm(), torch.randn(3, 4, 6, dtype=torch.float64)
    recorder = Recorder(model)
    x[0] = 0  # must not be taken for a norm that is zero at w = 0
    with recorder.record():
        (model(x) + x.sum()).pow(3).mean().backward()
    found = recorder.contributions().per_candidate(model.weight)
    rest = x.sum()
    for i in range(3):
        (alone,) = torch.autograd.grad((model(x[i : i + 1]) + rest).pow(3).mean() / 3, [model.weight])
        torch.testing.assert_close(found[i], alone, rtol=1e-12, atol=1e-15)
