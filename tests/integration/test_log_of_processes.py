"""The decision log where several processes train: the first writes, and knows the candidates of all in a global pool.

This file is the program of those processes as well; see `tests.gloo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ftw
from ftw.watching import read_log
from tests.gloo import needs_gloo, run, serve
from tests.models import MLP

pytestmark = needs_gloo

ROWS = 3


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


def rows(seed: int) -> Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logged(rank: int, pool: str) -> dict[str, Any]:
    model = DistributedDataParallel(MLP())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options: dict[str, Any] = {"budget": 2, "warmup": 0, "watch": int(pool == "global")}
    selector = ftw.Selector(
        model, optimizer, target=[rows(9)], loss_fn=loss_of, pool=pool, log=f"{rank}.jsonl", **options
    )
    made, realised = [], []
    for step in range(2):
        ids = [f"{step}, {rank}, {i}" for i in range(ROWS)]
        with selector.record(extras={"id": ids}):
            loss_of(model, rows(2 * step + rank)).backward()
        made.append(selector.apply().weights.tolist())
        optimizer.step()
        optimizer.zero_grad()
        realised.append(selector.fidelity and selector.fidelity.realised_drop)
    exists = Path(f"{rank}.jsonl").exists()
    entries = list(read_log(Path(f"{rank}.jsonl"))) if exists else []
    return {
        "exists": exists,
        "weights": [made, [entry.columns["weight"] for entry in entries]],
        "ids": [entry.columns["id"] for entry in entries],
        "realised": [realised, [entry.fidelity and entry.fidelity["realised_drop"] for entry in entries]],
    }


@pytest.mark.parametrize("pool", ["global", "local"])
def test_the_first_process_writes(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = run(__file__, pool, tmp_path)
    assert first["exists"]
    assert not second["exists"]
    assert first["weights"][0] == first["weights"][1]
    assert first["realised"][0] == first["realised"][1]
    ranks = range(2 if pool == "global" else 1)
    assert first["ids"] == [[f"{step}, {rank}, {i}" for rank in ranks for i in range(ROWS)] for step in range(2)]


if __name__ == "__main__":
    serve({pool: lambda rank, pool=pool: logged(rank, pool) for pool in ("global", "local")})  # type: ignore[misc]
