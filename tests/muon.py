"""torch's Muon without the rounding to bfloat16, for tests of the map that it follows in exact arithmetic."""

from __future__ import annotations

import inspect
from typing import Any

import pytest


def iterate_in_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own Newton-Schulz iteration, line by line, in the gradient's precision. Skips where torch has no Muon."""
    module: Any = pytest.importorskip("torch.optim._muon")
    source = inspect.getsource(module._zeropower_via_newtonschulz)
    assert source.count(".bfloat16()") == 1
    scope: dict[str, Any] = dict(vars(module))
    exec(source.replace(".bfloat16()", ".clone()"), scope)
    monkeypatch.setattr(module, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])
