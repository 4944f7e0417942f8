"""The evidence harness: cells that are the same every time, a store that survives being killed, decoding, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the harness trains transformers' Llama")

from evidence import cells, material, runner, settings
from evidence.decoding import greedy, same_number
from evidence.methods import METHODS
from evidence.settings import TARGETS, Cell, Setting, filtered, key_of
from evidence.store import Store

from ftw.errors import ConfigurationError, DataError, FtwError
from ftw.experiment.data import Sample
from ftw.presets import PRESETS
from tests.models import tiny_llama

TINY = Setting(
    steps=4,
    eval_every=2,
    pool_size=8,
    budget=2,
    target_samples=8,
    target_batch=4,
    dev_samples=4,
    test_samples=12,
    curve_samples=6,
    decode_samples=3,
    width=16,
    layers=1,
    heads=2,
    max_length=48,
    response_room=16,
    pretrain_steps=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of the sources that the harness reads."""
    here = tmp_path_factory.mktemp("data")
    for source in (*settings.POOL_SOURCES,):
        for part, count in (("train", 12), ("dev", 20), ("test", 16)):
            lines = [
                json.dumps(
                    {"prompt": f"{source} {part} {i}: {i} + 1?", "response": f"( {i} ) = {i + 1}", "source": source}
                )
                for i in range(count)
            ]
            (here / f"{source}.{part}.jsonl").write_text("\n".join(lines) + "\n")
    return here


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_run_again_gives_the_same_figures(method: str, folder: Path, tmp_path: Path) -> None:
    cell = Cell(method, "svamp", 0, TINY)
    first = cells.run_cell(cell, folder, tmp_path / "cache")  # pre-trains
    torch.randn(7)  # whatever else draws from the global generator
    second = cells.run_cell(cell, folder, tmp_path / "cache")  # loads
    assert first["figures"] == second["figures"]
    assert first["key"] == second["key"]
    figures = first["figures"]
    assert figures["curve"]["step"][0] == 0
    assert len(figures["curve"]["dev"]) == len(first["clock"]["wall"])
    assert figures["best"]["dev"] == min(figures["curve"]["dev"])
    assert 0 <= figures["final"]["number"] <= 1
    json.dumps(first, allow_nan=False)


@pytest.mark.parametrize("changes", [{"tuning": "lora"}, {"optimizer": "sgd"}, {"corrupted": 0.3}])
def test_settings_change_the_key_and_the_figures(changes: dict[str, object], folder: Path) -> None:
    plain, other = (
        cells.run_cell(Cell("ours", "gsm8k_absent", 1, each), folder, None)
        for each in (TINY, settings.varied(TINY, **changes))
    )
    assert plain["key"] != other["key"]
    assert plain["figures"]["final"] != other["figures"]["final"]


def test_the_key_follows_the_data(folder: Path, tmp_path: Path) -> None:
    cell = Cell("ours", "svamp", 0, TINY)
    before = key_of(cells.configuration(cell, folder))
    for path in folder.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert key_of(cells.configuration(cell, tmp_path)) == before
    with (tmp_path / "wiki.train.jsonl").open("a") as file:
        file.write('{"prompt": "a", "response": "b", "source": "wiki"}\n')
    assert key_of(cells.configuration(cell, tmp_path)) != before


@pytest.mark.parametrize("setting", [TINY, settings.varied(TINY, corrupted=0.5)])
def test_roles_are_disjoint_and_the_absent_source_is_absent(folder: Path, setting: Setting) -> None:
    target = TARGETS["gsm8k_absent"]
    found = material.material(folder, Cell("ours", target.name, 3, setting), target)
    steering, dev = ({tuple(row.input_ids) for row in rows} for rows in (found.target, found.dev))
    assert len(steering) == 8
    assert len(dev) == 4
    assert not steering & dev
    assert not any("gsm8k" in source for source in found.pool_share)
    general = {tuple(row.input_ids) for row in material.general(folder, setting)}
    assert general
    assert not general & {tuple(row.input_ids) for step in found.candidates for row in step}
    other = material.material(folder, Cell("ours", target.name, 4, setting), target)
    assert [row.input_ids for row in other.test] == [row.input_ids for row in found.test]
    assert other.candidates != found.candidates


def test_corrupted_responses_are_others() -> None:
    pool = [Sample(f"p{i}", f"r{i}", "s") for i in range(40)]
    found = material.corrupted(pool, 0.3, seed=1)
    moved = [i for i in range(40) if found[i] != pool[i]]
    assert len(moved) == 12
    assert all(found[i].source == "s (corrupted)" and found[i].response != pool[i].response for i in moved)
    assert sorted(each.response for each in found) == sorted(each.response for each in pool)
    assert [each.prompt for each in found] == [each.prompt for each in pool]
    assert material.corrupted(pool, 0.3, seed=1) == found


def test_a_long_prompt_loses_its_beginning_and_no_letter_is_cut() -> None:
    setting = settings.varied(TINY, max_length=32, response_room=8)
    kept = material.fitted(Sample("ä" * 40, "x" * 20, "s"), setting)
    assert kept.prompt == "ä" * 11  # 32 less 8 of the response and the line break: 23 bytes
    assert kept.response == "x" * 20
    short = Sample("prompt", "answer", "s")
    assert material.fitted(short, setting) == short


def test_too_few_samples_and_a_missing_file_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"svamp\.dev\.jsonl holds 20 samples; target_samples=30"):
        cells.run_cell(Cell("ours", "svamp", 0, settings.varied(TINY, target_samples=30)), folder, None)
    with pytest.raises(DataError, match=r"lacks aqua\.train\.jsonl"):
        cells.configuration(Cell("ours", "svamp", 0, TINY), tmp_path)


# -- the store and the runner -----------------------------------------------------------------------------------------


GRID = [Cell(method, "svamp", seed, TINY) for seed in (0, 1) for method in ("ours", "random")]


def test_a_run_that_is_killed_goes_on_with_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"cache": tmp_path / "cache", "say": lambda line: None}
    whole = Store(tmp_path / "whole.jsonl")
    assert runner.run(GRID, folder, whole, **options) == 0

    path, real, ran = tmp_path / "cells.jsonl", cells.run_cell, []

    def dies(cell: Cell, *rest: object) -> dict[str, object]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell)
        return real(cell, *rest)

    monkeypatch.setattr(cells, "run_cell", dies)
    with pytest.raises(KeyboardInterrupt):
        runner.run(GRID, folder, Store(path), **options)
    with path.open("ab") as file:
        file.write(b'{"key": "torn')  # killed in the middle of a line

    again: list[Cell] = []
    monkeypatch.setattr(cells, "run_cell", lambda cell, *rest: again.append(cell) or real(cell, *rest))
    store = Store(path)
    assert (len(store.records), store.broken) == (2, 1)
    assert runner.run(GRID, folder, store, **options) == 0
    assert again == GRID[2:]
    read = Store(path)
    assert {key: each["figures"] for key, each in read.records.items()} == {
        key: each["figures"] for key, each in whole.records.items()
    }
    assert not read.conflicts


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder: Path, tmp_path: Path) -> None:
    stores = [Store(tmp_path / f"{jobs}.jsonl") for jobs in (1, 2)]
    for jobs, store in enumerate(stores, start=1):
        assert runner.run(GRID, folder, store, cache=tmp_path / "cache", jobs=jobs, say=lambda line: None) == 0
    one, two = ({key: each["figures"] for key, each in store.records.items()} for store in stores)
    assert one == two


@pytest.mark.slow
def test_what_fails_in_a_worker_is_said_here(folder: Path, tmp_path: Path) -> None:
    bad = [Cell("ours", "svamp", 0, settings.varied(TINY, optimizer="none"))]
    with pytest.raises(FtwError, match="ours on svamp, seed 0 failed"):
        runner.run(bad, folder, Store(tmp_path / "a"), cache=tmp_path, jobs=2, say=lambda line: None)


def test_no_cell_is_begun_after_the_budget(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "cells.jsonl")
    assert runner.run(GRID, folder, store, cache=None, budget_minutes=0.0, say=lambda line: None) == len(GRID)
    assert not store.records


def test_records_that_differ_under_one_key_are_reported(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells.jsonl")
    for loss in (1.0, 1.0, 2.0):
        store.append({"key": "k", "figures": {"loss": loss}})
    assert store.conflicts == ["k"]
    assert store.records["k"]["figures"] == {"loss": 1.0}
    assert Store(store.path).conflicts == ["k"]
    with pytest.raises(DataError, match="not finite"):
        store.append({"key": "n", "figures": {"loss": float("nan")}})


def test_only_keeps_the_cells_that_meet_every_condition() -> None:
    assert filtered(GRID, ["method=ours", "seed=1"]) == [GRID[2]]
    with pytest.raises(ConfigurationError, match="not understood"):
        filtered(GRID, ["colour=red"])
    with pytest.raises(ConfigurationError, match="no cell of the grid meets"):
        filtered(GRID, ["method=full"])


# -- methods ----------------------------------------------------------------------------------------------------------


def test_every_preset_named_by_a_method_exists_and_every_method_says_its_data() -> None:
    for method in METHODS.values():
        assert method.budget
        assert (method.kind == "select") == bool(method.preset)
        assert not method.preset or method.preset in PRESETS


# -- decoding ---------------------------------------------------------------------------------------------------------


def test_greedy_decoding_is_that_of_one_prompt_at_a_time() -> None:
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in (2, 9, 5)]
    end = 7
    expected = []
    for prompt in prompts:  # without padding, without kept keys
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == end:
                break
            ids.append(token)
        expected.append(ids[len(prompt) :])
    mode = model.training
    assert greedy(model, prompts, 12, end) == expected
    assert model.training == mode
    # With an end that is met, an answer ends before it and the others go on.
    met = expected[1][3]
    cut = [each[: each.index(met)] if met in each else each for each in expected]
    assert greedy(model, prompts, 12, met) == cut


@pytest.mark.parametrize(
    ("said", "right", "same"),
    [
        ("( 10.0 + 8.0 ) = 18", "( 8.0 + 10.0 ) = 18.0", True),
        ("( 10.0 + 8.0 ) = 1", "( 10.0 + 8.0 ) = 18", False),
        ("( 1.0 - 3.0 ) = -2", "= -2", True),
        ("none", "= 2", False),
        ("", "= 2", False),
    ],
)
def test_the_last_number_counts(said: str, right: str, same: bool) -> None:
    assert same_number(said, right) is same
