"""The study of long contexts: approximate representations against naive formulas, and its records."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="the harness trains transformers' Llama")

from evidence import __main__ as command
from evidence import context, representations
from evidence.context import Study, run_study

from ftw.assembly import measure
from ftw.gradients import Recorder
from ftw.gradients.factorized import Factorized
from ftw.optim_state.adam import AdamW
from ftw.optim_state.operators import RowColumn
from tests.models import batch_of, tiny_llama, token_mean

SMALL = Study(24, 0, candidates=4, width=16, layers=1, pretrain_steps=2, first_steps=2, short=16)


@pytest.mark.parametrize("size", [1, 3, representations.WHOLE])
def test_blocks_are_products_of_sums_and_the_gradient_written_stays_exact(size: int) -> None:
    model = tiny_llama()
    recorder = Recorder(model, extractor=Factorized())
    with recorder.record():
        token_mean(model, batch_of(4)).backward()
    exact = recorder.contributions()
    found = representations.TokenBlocks(size).contributions(exact._pieces, exact.count)
    p = model.model.layers[0].mlp.up_proj.weight
    ((piece,), (block,)) = exact._pieces[p], list(found.blocks(p, split=False))
    for i, (first, last) in enumerate(zip(piece.bounds, piece.bounds[1:], strict=False)):
        expected = torch.zeros_like(p)
        for start in range(first, last, size):
            tokens = slice(start, min(start + size, last))
            expected += torch.outer(piece.grads[tokens].sum(0), piece.inputs[tokens].mean(0))
        torch.testing.assert_close(block.values[i], expected, rtol=1e-10, atol=1e-14)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    for q, gradient in exact.combine(weights).items():
        torch.testing.assert_close(found.combine(weights)[q], gradient, rtol=0, atol=0)
    assert found.numel() == exact.numel() if size == 1 else found.numel() < exact.numel()


def test_a_second_moment_of_rank_one_is_met_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
    root = torch.rand(5, 1, generator=generator, dtype=torch.float64) + 0.1
    reference = root @ (torch.rand(1, 7, generator=generator, dtype=torch.float64) + 0.1)
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-12, "weight_decay": 0.0, "amsgrad": False}
    right, found = (kind().linearise_tensor(theta, group, {}, reference) for kind in (AdamW, representations.Separable))
    assert isinstance(found.scale, RowColumn)
    ones = torch.ones_like(theta)
    torch.testing.assert_close(found.scale.apply(ones), right.scale.apply(ones), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.offset, right.offset, rtol=0, atol=0)


def test_the_exact_form_under_row_by_column_is_that_of_its_scale() -> None:
    """b and K of the factors' products agree with the written-out sums under the same scale."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder = Recorder(model, extractor=Factorized())
    for seed in (0, 1):
        recorder.clear()
        with recorder.record():
            token_mean(model, batch_of(4, seed=seed)).backward()
        contributions = recorder.contributions()
        if seed == 0:
            for p, gradient in contributions.combine().items():
                p.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
    g = {p: torch.randn_like(p) for p in recorder.parameters}
    preconditioner = representations.Separable()
    found = measure(contributions, optimizer, preconditioner, g, {}, "curvature", "pool").true
    scale = preconditioner.linearise(optimizer, contributions.combine()).scale
    torch.testing.assert_close(found.gram, contributions.gram(scale), rtol=1e-9, atol=1e-16)
    direction = {p: scale[p].apply(g[p]) for p in g}
    torch.testing.assert_close(found.alignment, contributions.alignment(direction), rtol=1e-9, atol=1e-16)


def test_a_record_is_the_same_every_time_and_exact_where_nothing_is_sketched() -> None:
    first, second = (run_study(SMALL, None, None) for _ in range(2))
    assert first["figures"] == second["figures"]
    assert first["key"] == second["key"]
    json.dumps(first, allow_nan=False)
    for name in context.REPRESENTATIONS:
        figures = first["figures"][name]
        assert 0 <= figures["jaccard"] <= 1
        assert figures["alignment"] >= 0
    # Sketches of 16384 numbers are larger than any parameter of this model: nothing is sketched.
    assert first["figures"]["projection 16384"]["gram"] == 0.0
    assert first["figures"]["projection 16384"]["match"] == pytest.approx(1.0, abs=1e-12)
    assert first["figures"]["projection 64"]["gram"] > 0.01
    assert first["figures"]["projection 64"]["alignment"] < 1e-5
    assert first["figures"]["blocks all"]["gram"] > first["figures"]["blocks 4"]["gram"] > 0.01


def test_the_command_resumes_and_writes_tables(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra plot")
    monkeypatch.setattr(context, "Study", lambda length, pool: Study(**{**vars(SMALL), "length": length, "pool": pool}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["context", "--pools", "2", "--lengths", "16", "24", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    stored = (tmp_path / "context.jsonl").read_bytes()
    assert stored.count(b"\n") == 4
    assert command.main(arguments) == 0
    assert (tmp_path / "context.jsonl").read_bytes() == stored
    text = (tmp_path / "context.md").read_text()
    assert "| representation | 16 | 24 |" in text
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
