"""`import ftw` stays light: what only some users need is imported where it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("transformers", "peft", "cvxpy", "lightning", "accelerate", "matplotlib", "rich")


@pytest.mark.parametrize("module", ["ftw", "ftw_integrations"])
def test_nothing_heavy_is_imported(module: str) -> None:
    # A fresh interpreter: this one has imported everything already.
    source = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert module in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_import_writes_nothing_and_warns_of_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error:::ftw", "-c", "import ftw"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
