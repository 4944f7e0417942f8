"""GPT-2 against naive references in float64: Conv1D, a tied head, position embeddings, attention in one projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftw.gradients import Auto, Recorder
from tests.models import batch_of, label_tokens, tiny_gpt2, token_mean
from tests.oracle.test_contributions import (
    EXTRACTORS,
    per_sample_loop,
    per_sample_vmap,
    recorded,
    relative,
)

BOUND = 1e-12
"""Relative; rounding is some 1e-15 an operation."""


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each parameter's (n, *shape); norms count as a thousandth of the largest one at least."""
    floor = 1e-3 * max(float(value.norm()) for value in expected.values())
    return {name: relative(found[name], value, floor) for name, value in expected.items()}


def contributions_by_name(model: nn.Module, batch: dict[str, Tensor], extractor: str = "auto") -> dict[str, Tensor]:
    """c_i of every parameter that ftw recorded."""
    contributions = recorded(model, EXTRACTORS[extractor](), batch).contributions()
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: contributions.per_candidate(p) for p in contributions.parameters}


def test_is_what_it_says_it_is() -> None:
    from transformers.pytorch_utils import Conv1D

    model = tiny_gpt2()
    kinds = {type(module) for module in model.modules()}
    assert {Conv1D, nn.LayerNorm, nn.Embedding, nn.Linear} <= kinds
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_rounding_is_that_of_float64() -> None:
    """A softmax or norm in float32 would show in the outputs' dtypes, or as a loss that depends on the batch's rows."""
    model, batch = tiny_gpt2(), batch_of(3)
    seen: list[torch.dtype] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                seen.append(tensor.dtype)

    handles = [module.register_forward_hook(note) for module in model.modules() if not list(module.children())]
    with torch.no_grad():
        single = [token_mean(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(3)]
        together = token_mean(model, batch)
    for handle in handles:
        handle.remove()
    counts = label_tokens(batch)
    mean = sum(loss * count for loss, count in zip(single, counts, strict=True)) / counts.sum()
    assert set(seen) == {torch.float64}
    torch.testing.assert_close(together, mean, rtol=1e-14, atol=0)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_equals_per_sample_loop(extractor: str) -> None:
    model, batch = tiny_gpt2(), batch_of(5)
    names = {p: name for name, p in model.named_parameters()}
    expected = {names[p]: value for p, value in per_sample_loop(model, batch).items()}
    found = contributions_by_name(model, batch, extractor)
    assert set(found) == set(expected)
    worst = errors(found, expected)
    assert max(worst.values()) < BOUND, worst


def test_equals_vmap() -> None:
    model, batch = tiny_gpt2(), batch_of(4)
    expected = per_sample_vmap(model, batch)
    found = contributions_by_name(model, batch)
    assert set(found) == set(expected)
    worst = errors(found, expected)
    assert max(worst.values()) < BOUND, worst


def test_position_embeddings_are_each_rows_own() -> None:
    """GPT-2 looks positions up once for all rows; the table's gradient is divided among the candidates all the same."""
    model, batch = tiny_gpt2(), batch_of(4)
    shared = recorded(model, Auto(), batch).contributions()
    recorder = Recorder(model)
    positions = torch.arange(11).expand(4, -1)
    with recorder.record():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions)
        labels = batch["labels"][:, 1:].flatten()
        nn.functional.cross_entropy(logits.logits[:, :-1].flatten(0, 1), labels, ignore_index=-100).backward()
    own = recorder.contributions()
    table = model.transformer.wpe.weight
    torch.testing.assert_close(shared.per_candidate(table), own.per_candidate(table), rtol=1e-12, atol=1e-15)
