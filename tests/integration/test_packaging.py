"""The wheels of ftw and of the example plug-in in a fresh environment: what a user gets, used by name."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "examples" / "plugin"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


@dataclass(frozen=True)
class Installed:
    """A fresh environment with both wheels in it."""

    wheels: dict[str, Path]
    bin: Path
    elsewhere: Path

    def run(self, *command: str) -> str:
        """Standard output of a program of the environment, started where no checkout is in sight."""
        return run([str(self.bin / command[0]), *command[1:]], self.elsewhere)


def run(command: Sequence[str], folder: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("packaging")
    dist, venv, elsewhere = place / "dist", place / "venv", place / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(dist)]
    run([*build, str(ROOT)], elsewhere)
    run([*build, str(PLUGIN)], elsewhere)
    wheels = {wheel.name.split("-")[0]: wheel for wheel in dist.glob("*.whl")}

    run([sys.executable, "-m", "venv", "--without-pip", str(venv)], elsewhere)
    scripts = venv / ("Scripts" if os.name == "nt" else "bin")
    install = [*pip, "--python", str(scripts / "python"), "install", "--no-deps", "--no-index"]
    run([*install, *map(str, wheels.values())], elsewhere)

    # The dependencies are borrowed from this environment. Its editable ftw is not: a folder that a .pth file
    # names is searched for packages, but the .pth files inside it, the editable one among them, are not read.
    # Written after the installation, or pip would find ftw there and leave the wheel out.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (own / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return Installed(wheels, scripts, elsewhere)


def test_the_wheel_holds_the_packages_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheels["filter_then_weight"]) as wheel:
        names = wheel.namelist()
        entry_points = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names} == {
        "ftw",
        "ftw_integrations",
        "filter_then_weight-0.1.0.dist-info",
    }
    assert {"ftw/py.typed", "ftw/testing/__init__.py", "ftw/watching/page.html", "ftw_integrations/__init__.py"} <= set(
        names
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test_" in name or name.endswith((".pyc", ".so"))]
    for group in ("ftw.gradients", "ftw.optim_state", "ftw.filters", "ftw.solvers", "console_scripts"):
        assert f"[{group}]" in entry_points


def test_every_module_of_the_checkout_is_in_the_wheel(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheels["filter_then_weight"]) as wheel:
        held = set(wheel.namelist())
    for base, package in ((ROOT, "ftw"), (ROOT / "integrations", "ftw_integrations")):
        for module in (base / package).rglob("*.py"):
            assert module.relative_to(base).as_posix() in held


def test_the_wheels_and_not_the_checkout_are_imported(installed: Installed) -> None:
    source = """
import sys
from pathlib import Path
import ftw, ftw_integrations, ftw_example_plugin, torch
for module in (ftw, ftw_integrations, ftw_example_plugin):
    assert Path(module.__file__).resolve().is_relative_to(Path(sys.prefix).resolve()), module.__file__
assert not Path(torch.__file__).resolve().is_relative_to(Path(sys.prefix).resolve())
"""
    installed.run("python", "-I", "-c", source)


def test_the_plug_in_is_listed_beside_the_built_ins(installed: Installed) -> None:
    listed = {tuple(line.split()) for line in installed.run("ftw", "list").splitlines()}
    assert {("admm", "ftw-example-plugin"), ("cosine", "ftw-example-plugin")} <= listed
    assert {("pgd", "filter-then-weight"), ("topk", "filter-then-weight")} <= listed


def test_a_training_step_uses_the_plug_in_by_name(installed: Installed) -> None:
    source = """
import sys
import torch, ftw
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))

def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

assert "ftw_example_plugin" not in sys.modules  # a plug-in is loaded when it is named
selector = ftw.Selector(
    model, optimizer, target=[(x[8:], y[8:])], loss_fn=loss_of, budget=4, filter="cosine", solver="admm"
)
calls = []
plugin = sys.modules["ftw_example_plugin"]
for cls, method in ((plugin.Cosine, "__call__"), (plugin.ADMM, "_solve")):
    def spy(self, *args, own=getattr(cls, method), name=cls.__name__):
        calls.append(name)
        return own(self, *args)
    setattr(cls, method, spy)

for step in range(3):
    with selector.record():
        loss_of(model, (x[:8], y[:8])).backward()
    selection = selector.apply()
    optimizer.step()
    optimizer.zero_grad()
    assert selection.status in ("optimal", "inaccurate"), selection.status
    assert 1 <= len(selection.indices) <= 4
    assert abs(float(selection.weights.sum()) - 8) < 1e-9
assert set(calls) == {"Cosine", "ADMM"}, calls
"""
    installed.run("python", "-I", "-c", source)


def test_the_plug_ins_own_tests_pass_there(installed: Installed) -> None:
    tests = PLUGIN / "tests"
    printed = installed.run(
        "python", "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(PLUGIN), str(tests)
    )
    assert " passed" in printed
    assert "skipped" not in printed
