"""Every test that docs/integrations.md names in its table is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_names_tests() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    rows = page[page.index("| feature |") :].split("\n\n")[0].splitlines()[2:]
    named = {name for row in rows for cell in row.split("|")[2:] for name in re.findall(r"`(\w+)`", cell)}
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "integration").glob("*.py"))
    known = {name for source in sources for name in re.findall(r"def test_(\w+)", source)}
    assert len(named) > 20
    assert named - known == set()
