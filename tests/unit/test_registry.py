"""Look-up by name, class and instance; faults are named by distribution and hurt nobody else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftw import registry
from ftw.errors import (
    BrokenPluginError,
    ConfigurationError,
    DuplicateComponentError,
    FtwError,
    MissingDependencyError,
    UnknownComponentError,
)
from ftw.filters.base import Filter
from ftw.optim_state import SGD, AdamW, Identity

GOOD = """
from ftw.filters.base import Filter

class Chosen(Filter):
    def __init__(self, share=1.0):
        self.share = share

    def __call__(self, problem):
        raise NotImplementedError
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution on the path, as pip would: its modules and a dist-info folder with entry points."""
    before = set(sys.modules)

    def install(distribution: str, group: str, entries: dict[str, str], **modules: str) -> None:
        place = tmp_path / distribution
        info = place / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"[ftw.{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for name, source in modules.items():
            (place / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(place))

    yield install
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]


class TestWhatMayBeGiven:
    def test_a_name_a_class_or_an_instance(self) -> None:
        ready = AdamW(floor=0.25)
        assert type(registry.resolve("optim_state", "adamw")) is AdamW
        assert type(registry.resolve("optim_state", AdamW)) is AdamW
        assert registry.resolve("optim_state", ready) is ready

    def test_options_go_with_a_name_or_a_class(self) -> None:
        assert registry.resolve("optim_state", "adamw", floor=0.5).floor == 0.5
        assert registry.resolve("optim_state", AdamW, floor=0.5).floor == 0.5
        with pytest.raises(ConfigurationError, match=r"options \['floor'\] were given with a ready AdamW"):
            registry.resolve("optim_state", AdamW(), floor=0.5)
        with pytest.raises(ConfigurationError, match=r"SGD cannot be made with options .*'floor'.* instance"):
            registry.resolve("optim_state", "sgd", floor=0.5)

    @pytest.mark.parametrize("given", [object(), 3, None, dict, SGD, SGD()])
    def test_anything_else_is_refused_with_the_interface_and_the_names(self, given: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"is no filter; allowed .*topk.* subclass of Filter"):
            registry.resolve("filters", given)

    def test_an_interface_itself_cannot_be_made(self) -> None:
        with pytest.raises(ConfigurationError, match="Filter cannot be made"):
            registry.resolve("filters", Filter)

    def test_an_unknown_group(self) -> None:
        with pytest.raises(ConfigurationError, match=r"unknown group 'samplers'; allowed are gradients, optim_state"):
            registry.resolve("samplers", "x")

    @pytest.mark.parametrize("group", registry.NOUNS)
    def test_every_built_in_resolves_by_its_name(self, group: str) -> None:
        found = registry.available(group)
        built_in = [name for name, by in found.items() if "filter-then-weight" in by]
        assert built_in
        for name in built_in:
            assert isinstance(registry.load(group, name), type)


class TestUnknownNames:
    def test_the_nearest_spelling_is_offered(self) -> None:
        names = registry.available("solvers")
        assert {"closed_form", "pgd", "qp", "uniform"} <= set(names)
        with pytest.raises(UnknownComponentError) as caught:
            registry.resolve("solvers", "pdg")
        assert str(caught.value) == (
            f"unknown solver 'pdg'; did you mean 'pgd'? available: {', '.join(names)}. "
            "Plug-ins register under entry-point group 'ftw.solvers'."
        )

    def test_nothing_is_offered_where_nothing_is_near(self) -> None:
        with pytest.raises(UnknownComponentError) as caught:
            registry.resolve("optim_state", "zzzz")
        names = ", ".join(registry.available("optim_state"))
        assert str(caught.value).startswith(f"unknown preconditioner 'zzzz'; available: {names}. Plug-ins ")
        assert "did you mean" not in str(caught.value)

    def test_it_is_a_lookup_error_and_ours(self) -> None:
        with pytest.raises(LookupError) as caught:
            registry.resolve("filters", "")
        assert isinstance(caught.value, FtwError)


class TestPlugins:
    def test_a_plug_in_is_on_a_par_with_the_built_ins(self, install: Install) -> None:
        install("fake-good", "filters", {"chosen": "fake_good:Chosen"}, fake_good=GOOD)
        assert registry.available("filters")["chosen"] == ["fake-good"]
        chosen = registry.resolve("filters", "chosen", share=0.5)
        assert isinstance(chosen, Filter)
        assert chosen.share == 0.5  # type: ignore[attr-defined]

    def test_listing_imports_nothing(self, install: Install) -> None:
        install("fake-loud", "filters", {"loud": "fake_loud:X"}, fake_loud="raise SystemExit('imported')")
        assert "loud" in registry.available("filters")
        with pytest.raises(UnknownComponentError, match="did you mean 'loud'"):
            registry.resolve("filters", "lound")
        registry.resolve("filters", "topk")
        assert "fake_loud" not in sys.modules

    def test_one_name_by_two_distributions(self, install: Install) -> None:
        install("fake-one", "filters", {"chosen": "fake_one:Chosen"}, fake_one=GOOD)
        install("fake-two", "filters", {"chosen": "fake_two:Chosen"}, fake_two=GOOD)
        with pytest.raises(DuplicateComponentError) as caught:
            registry.resolve("filters", "chosen")
        assert "fake-one (fake_one:Chosen), fake-two (fake_two:Chosen)" in str(caught.value)
        assert sorted(registry.available("filters")["chosen"]) == ["fake-one", "fake-two"]
        assert "fake_one" not in sys.modules
        registry.resolve("filters", "topk")

    def test_a_plug_in_cannot_take_a_built_ins_name_unseen(self, install: Install) -> None:
        install("fake-thief", "filters", {"topk": "fake_thief:Chosen"}, fake_thief=GOOD)
        with pytest.raises(DuplicateComponentError, match=r"fake-thief .*filter-then-weight"):
            registry.resolve("filters", "topk")

    def test_one_distribution_seen_twice_is_no_conflict(self, install: Install, tmp_path: Path) -> None:
        install("fake-good", "filters", {"chosen": "fake_good:Chosen"}, fake_good=GOOD)
        twin = tmp_path / "twin"
        twin.mkdir()
        (tmp_path / "fake-good" / "fake_good-1.0.dist-info").rename(twin / "fake_good-0.9.dist-info")
        install_again = tmp_path / "fake-good"
        (install_again / "fake_good-1.0.dist-info").mkdir()
        for name in ("METADATA", "entry_points.txt"):
            text = (twin / "fake_good-0.9.dist-info" / name).read_text()
            (install_again / "fake_good-1.0.dist-info" / name).write_text(text)
        sys.path.insert(0, str(twin))
        try:
            assert registry.available("filters")["chosen"] == ["fake-good"]
            assert isinstance(registry.resolve("filters", "chosen"), Filter)
        finally:
            sys.path.remove(str(twin))

    @pytest.mark.parametrize(
        ("value", "source", "cause"),
        [
            ("fake_broken:Chosen", "import a_module_that_is_nowhere", "ModuleNotFoundError"),
            ("fake_broken:Chosen", "1 / 0", "ZeroDivisionError"),
            ("fake_broken:Chosen", "def (", "SyntaxError"),
            ("fake_broken:Missing", GOOD, "AttributeError"),
            ("fake_absent:Chosen", GOOD, "ModuleNotFoundError"),
        ],
    )
    def test_a_broken_one_is_named_and_breaks_nobody_else(
        self, install: Install, value: str, source: str, cause: str
    ) -> None:
        install("fake-broken", "filters", {"broken": value}, fake_broken=source)
        install("fake-good", "filters", {"chosen": "fake_good:Chosen"}, fake_good=GOOD)
        with pytest.raises(BrokenPluginError) as caught:
            registry.resolve("filters", "broken")
        for part in ("'broken'", "distribution fake-broken", repr(value), cause, "reinstall or remove"):
            assert part in str(caught.value)
        assert caught.value.__cause__ is not None
        assert isinstance(registry.resolve("filters", "chosen"), Filter)
        registry.resolve("filters", "topk")

    @pytest.mark.parametrize("source", ["class Chosen: pass", "Chosen = 3", "def Chosen(): pass"])
    def test_one_that_is_not_of_the_interface_is_its_authors_fault(self, install: Install, source: str) -> None:
        install("fake-wrong", "filters", {"wrong": "fake_wrong:Chosen"}, fake_wrong=source)
        with pytest.raises(BrokenPluginError, match=r"fake-wrong is .* subclass of Filter is needed"):
            registry.resolve("filters", "wrong")

    def test_a_missing_optional_dependency_is_no_broken_plug_in(self, install: Install) -> None:
        source = "from ftw.errors import MissingDependencyError\nraise MissingDependencyError('install extra x')"
        install("fake-needy", "filters", {"needy": "fake_needy:Chosen"}, fake_needy=source)
        with pytest.raises(MissingDependencyError, match=r"^install extra x$"):
            registry.resolve("filters", "needy")

    def test_a_half_removed_distribution_breaks_nobody(self, install: Install, tmp_path: Path) -> None:
        install("fake-rest", "filters", {"rest": "fake_rest:Chosen"})
        (tmp_path / "fake-rest" / "fake_rest-1.0.dist-info" / "METADATA").unlink()
        assert registry.available("filters")["rest"] == ["an unnamed distribution"]
        with pytest.raises(BrokenPluginError, match="of distribution an unnamed distribution cannot be imported"):
            registry.resolve("filters", "rest")
        registry.resolve("filters", "topk")

    def test_groups_do_not_mix(self, install: Install) -> None:
        install("fake-good", "solvers", {"chosen": "fake_good:Chosen"}, fake_good=GOOD)
        assert "chosen" not in registry.available("filters")
        with pytest.raises(BrokenPluginError, match="subclass of WeightSolver is needed"):
            registry.resolve("solvers", "chosen")


def test_identity_is_to_be_had_by_the_name_that_messages_give() -> None:
    assert isinstance(registry.resolve("optim_state", "identity"), Identity)
