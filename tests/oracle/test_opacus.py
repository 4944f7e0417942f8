"""Contributions against opacus, which forms per-sample gradients by hooks and einsums of its own, in float64.

What opacus does not cover by itself: a table that is looked up once for all rows, as GPT-2 does with its positions.
Its per-sample gradient comes out as that of one candidate; with positions for each row it is covered. Layers for which
opacus has no rule (Conv1D, norms of transformers) go through its fallback, `torch.func` on the layer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.models import batch_of, label_tokens, lora_llama, tiny_gpt2, tiny_llama, token_mean
from tests.oracle.test_contributions import relative
from tests.oracle.test_gpt2 import BOUND, contributions_by_name, errors

pytest.importorskip("opacus", reason="opacus is not installed; it comes with the extra 'dev'")

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tied=True),
    "lora llama": lora_llama,
    "gpt2": tiny_gpt2,
}


def per_sample_opacus(
    model: nn.Module, batch: dict[str, Tensor], *, positions: bool = True, force_functorch: bool = False
) -> dict[str, Tensor]:
    """Every trainable parameter's `grad_sample` under the mean loss over all label tokens of the batch.

    Args:
        positions: pass a row of positions for each candidate; without it a model may look them up once for all.
        force_functorch: opacus' fallback, `torch.func` on each layer, for all layers.
    """
    from opacus import GradSampleModule

    # The loss divides by the tokens of the batch itself, so that opacus is not to undo a mean over rows.
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False, force_functorch=force_functorch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if positions:
        inputs["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    logits = wrapped(**inputs).logits
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    loss.backward()
    found = {name: p.grad_sample.detach() for name, p in model.named_parameters() if p.requires_grad}
    wrapped.to_standard_module()
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_equals_opacus(name: str) -> None:
    model, batch = MODELS[name](), batch_of(5)
    expected = per_sample_opacus(model, batch)
    found = contributions_by_name(model, batch)
    assert set(found) == set(expected)
    assert all(len(value) == 5 for value in expected.values())
    # Padding and prompts are masked differently in each row: there is something to get wrong.
    assert len(set(label_tokens(batch).tolist())) > 1
    worst = errors(found, expected)
    assert max(worst.values()) < BOUND, worst


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_opacus_by_functorch(name: str) -> None:
    model, batch = MODELS[name](), batch_of(4)
    expected = per_sample_opacus(model, batch, force_functorch=True)
    worst = errors(contributions_by_name(model, batch), expected)
    assert max(worst.values()) < BOUND, worst


def test_positions_looked_up_once_are_beyond_opacus() -> None:
    """Not beyond ftw, which agrees with the loop on them (test_gpt2.py)."""
    model, batch = tiny_gpt2(), batch_of(5)
    found, table = contributions_by_name(model, batch), "transformer.wpe.weight"
    expected = per_sample_opacus(model, batch, positions=False)
    assert [name for name, value in expected.items() if len(value) != 5] == [table]
    # What it calls the gradient of one candidate is that of the pool.
    assert relative(expected[table][0], found[table].sum(0), 0.0) < BOUND
    del expected[table]
    assert max(errors({name: found[name] for name in expected}, expected).values()) < BOUND


def test_sum_over_candidates_is_autograds_gradient() -> None:
    """That opacus and ftw are not wrong alike."""
    model, batch = lora_llama(), batch_of(5)
    found = contributions_by_name(model, batch)
    token_mean(model, batch).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            assert relative(found[name].sum(0), p.grad, 1e-12) < BOUND
