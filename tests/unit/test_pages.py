"""The Python blocks of the documentation's pages run as they stand, and the tests in them pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ftw
from tests.models import MLP

ROOT = Path(__file__).parents[2]


class Output(NamedTuple):
    loss: Tensor


class Model(MLP):
    """Called as a language model is: `model(**batch).loss`."""

    def forward(self, rows: Tensor) -> Any:
        return Output((super().forward(rows) - 1.0).square().mean())


def taken_for_granted(block: str) -> dict[str, Any]:
    """The names that the pages use and do not make."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = {"rows": torch.randn(8, 6, dtype=torch.float64)}
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    C = torch.randn(20, 8, dtype=torch.float64)
    targets = [{"rows": torch.randn(4, 6, dtype=torch.float64)}]
    names = {
        "ftw": ftw,
        "torch": torch,
        "model": model,
        "parameters": list(model.parameters()),
        "optimizer": optimizer,
        "loader": [batch],
        "batch": batch,
        "loss_of": lambda model, batch: model(**batch).loss,
        "target_batches": targets,
        "target": targets,
        "losses": torch.rand(8),
        "reference": torch.rand(8),
        "quality": torch.rand(8),
        "sources": ["web", "code"] * 4,
        "K": C.T @ C,
        "b": C.T @ torch.ones(20, dtype=torch.float64),
        "constraints": ftw.solvers.CappedCone(4.0),
        "weights": torch.ones(8, dtype=torch.float64),
    }
    if "selector" in block and "ftw.Selector(" not in block:
        names["selector"] = ftw.Selector(model, optimizer, target=targets)
    return names


PAGES = ("README", "docs/filters", "docs/solvers", "docs/presets", "docs/selector", "docs/optimizer-state")
FRAGMENTS = ("docs/contributions",)
"""Pages of which only the blocks with a test are whole."""


def blocks() -> Iterator[Any]:
    for page in (*PAGES, *FRAGMENTS):
        text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
        for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            if page in FRAGMENTS and "def test_" not in found[1]:
                continue
            yield pytest.param(found[1], id=f"{page}:{text[: found.start()].count(chr(10)) + 2}")


@pytest.mark.parametrize("block", list(blocks()))
def test_a_block_runs(block: str) -> None:
    scope = taken_for_granted(block)
    exec(block.replace("(..., ", "(model, optimizer, target=target, "), scope)
    for name in [each for each in scope if each.startswith("test_")]:
        scope[name]()
