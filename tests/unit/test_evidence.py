"""The evidence harness: cells that are the same every time, a store that survives being killed, decoding, tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the harness trains transformers' Llama")

from evidence import cells, figures, grids, material, runner, settings, tables, training
from evidence.decoding import greedy, same_number
from evidence.grids import CORE
from evidence.methods import METHODS
from evidence.settings import TARGETS, Cell, Setting, filtered, key_of
from evidence.store import Store

from ftw.errors import ConfigurationError, DataError, FtwError
from ftw.experiment import data
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


UNLIKE = (
    *("ours", "token_level", "max_loss", "random", "logit_utility", "mixture"),
    *("ours_with_target", "ours_warm", "ours (blocks 4)"),
)
"""Methods with code of their own; the others differ from these by a preset."""


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in UNLIKE else pytest.mark.slow) for name in METHODS]
)
def test_a_cell_run_again_gives_the_same_figures(method: str, folder: Path, tmp_path: Path) -> None:
    cell = Cell(method, "svamp", 0, TINY)
    first = cells.run_cell(cell, folder, tmp_path / "cache")  # pre-trains
    torch.randn(7)  # whatever else draws from the global generator
    second = cells.run_cell(cell, folder, tmp_path / "cache")  # loads
    assert first["figures"] == second["figures"]
    assert first["key"] == second["key"]
    figures = first["figures"]
    assert (figures["curve"]["step"][0] == 0) == (method != "ours_warm")
    assert len(figures["curve"]["dev"]) == len(first["clock"]["wall"])
    assert figures["best"]["dev"] == min(figures["curve"]["dev"])
    assert 0 <= figures["final"]["number"] <= 1
    json.dumps(first, allow_nan=False)


def test_a_warm_start_goes_on_from_where_target_only_was_best(folder: Path, tmp_path: Path) -> None:
    warm, alone = (
        cells.run_cell(Cell(method, "svamp", 2, TINY), folder, tmp_path)["figures"]
        for method in ("ours_warm", "target_only")
    )
    assert warm["curve"]["test"][0] == alone["curve"]["test"][alone["curve"]["dev"].index(alone["best"]["dev"])]
    assert warm["curve"]["step"][0] == warm["before"]["step"] == alone["best"]["step"] > 0
    assert warm["before"]["trial"] == alone["trial"]
    assert warm["curve"]["trained"][0] > 0
    assert warm["tuning"]["passed"] == alone["tuning"]["passed"] + 4 * (8 + 4)  # candidates and a target batch


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


@pytest.mark.parametrize("seed", range(4))
def test_the_corrupted_share_is_that_of_the_candidates_offered(seed: int) -> None:
    pool = [Sample(f"p{i}", f"r{i}", "s") for i in range(4000)]
    found = material.corrupted(pool, 0.3, seed)
    offered = data.pool_order(len(pool), 16, 50, seed).flatten().tolist()
    share = sum(found[i] != pool[i] for i in offered) / len(offered)
    assert abs(share - 0.3) < 0.07  # 4.3 standard deviations of a draw of 800 of 4000


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


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_cell_that_fails_is_said_and_the_others_are_stored(jobs: int, folder: Path, tmp_path: Path) -> None:
    bad = Cell("ours", "svamp", 0, settings.varied(TINY, optimizer="none"))
    store = Store(tmp_path / "cells.jsonl")
    with pytest.raises(
        FtwError, match=r"1 of 2 cells failed, the first: ours on svamp, seed 0 failed:\n(?s:.)*is 'none'"
    ):
        runner.run([bad, GRID[1]], folder, store, cache=tmp_path, jobs=jobs, say=lambda line: None)
    assert [record["configuration"]["method"]["name"] for record in store.records.values()] == ["random"]


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
    named = [Cell(name, "svamp", 0, CORE) for name in METHODS if "," in name]
    assert named
    assert filtered([*GRID, *named], [f"method={named[0].method}"]) == [named[0]]
    with pytest.raises(ConfigurationError, match="not understood"):
        filtered(GRID, ["colour=red"])
    with pytest.raises(ConfigurationError, match="no cell of the grid meets"):
        filtered(GRID, ["method=full"])


def test_run_again_a_cell_that_differs_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = Store(tmp_path / "cells.jsonl"), cells.run_cell
    options = {"cache": None, "say": lambda line: None}
    runner.run(GRID[1:2], folder, store, **options)
    runner.run(GRID[1:2], folder, store, again=True, **options)
    assert not store.conflicts

    def other(*arguments: object) -> dict[str, object]:
        record = real(*arguments)
        record["figures"]["final"]["loss"] += 1e-12
        return record

    monkeypatch.setattr(cells, "run_cell", other)
    runner.run(GRID[1:2], folder, store, again=True, **options)
    assert store.conflicts == list(store.records)


# -- methods ----------------------------------------------------------------------------------------------------------


def test_every_preset_named_by_a_method_exists_and_every_method_says_its_data() -> None:
    for method in METHODS.values():
        assert method.budget
        assert (method.kind == "select") == bool(method.preset)
        assert not method.preset or method.preset in PRESETS


def test_a_variant_is_another_cell_with_figures_of_its_own(folder: Path, tmp_path: Path) -> None:
    plain, whole = (
        cells.run_cell(Cell(method, "svamp", 0, TINY), folder, tmp_path) for method in ("ours", "ours (whole target)")
    )
    assert "options" not in plain["configuration"]["method"]  # so that no key changed when variants came
    assert whole["key"] != plain["key"]
    assert whole["figures"]["curve"]["test"] != plain["figures"]["curve"]["test"]
    assert whole["figures"]["tuning"]["passed"] - plain["figures"]["tuning"]["passed"] == 4 * 4  # a second batch a step


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


# -- tables and figures -----------------------------------------------------------------------------------------------


def record(
    method: str, seed: int, loss: float | None, *, target: str = "svamp", lr: float = CORE.lr, **more: object
) -> dict:
    """A record as the harness makes it, with a curve that falls to `loss` by halves."""
    cell = Cell(method, target, seed, settings.varied(CORE, lr=lr, corrupted=more.pop("corrupted", 0.0)))
    config = cell.configuration(METHODS[method].configuration(), str(more.pop("data", "d")), {"torch": "1"})
    test = [4.0, None if loss is None else (4.0 + loss) / 2, loss]
    figures = {
        "final": {"loss": loss},
        "best": {"loss": 4.0 if loss is None else loss, "step": 20, "dev": more.pop("dev", 1.0)},
        "curve": {
            "step": [0, 10, 20],
            "test": test,
            "dev": [4.0, 3.0, 2.0],
            "trained": [0, 40, 80],
            "passed": [0, 1, 2],
        },
        "tuning": {"passed": 480, "trained": 80},
        "trial": {"lr": lr, "steps": 150},
        "weight": {"svamp": 1.0, "svamp (corrupted)": 3.0},
        "pool_share": {"svamp": 0.7, "svamp (corrupted)": 0.3},
        **more,
    }
    clock = {"processor": [0.0, 1.0, 2.0], "wall": [0.0, 1.0, 2.0], "processor_all_trials": 2.0, "total": 3.0}
    return {"key": key_of(config), "configuration": config, "figures": figures, "clock": clock}


def test_intervals_and_paired_differences() -> None:
    mean, half = tables.interval([1.0, 2.0, 4.0])
    # t(0.975, 2) = 4.30265; the standard deviation of 1, 2, 4 is sqrt(7/3).
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302652729911275 * (7 / 3) ** 0.5 / 3**0.5)
    mean, half = tables.paired({0: 1.0, 1: 3.0, 2: 9.0}, {0: 0.5, 1: 2.5, 3: 7.0})  # seed 2 and seed 3 have no partner
    assert (mean, half) == (0.5, pytest.approx(0.0))
    assert tables.shown(tables.interval([1.5])) == "1.500"
    assert tables.shown(tables.interval([])) == "-"
    assert tables.shown((float("inf"), float("nan"))) == "not finite"


def test_a_table_says_what_its_records_say() -> None:
    records = [record("ours", seed, loss) for seed, loss in enumerate((1.0, 1.2, 1.4))]
    records += [record("random", seed, loss) for seed, loss in enumerate((2.0, 2.2, 2.4))]
    records += [record("full", 0, 1.5), record("greats", 0, None)]
    groups, notes = tables.collect(records)
    assert not notes
    ((setting, target),) = groups
    assert (setting, target) == (CORE, "svamp")
    lines = tables.by_method(groups[setting, target])
    cells_of = {line.split("|")[1].strip(): [each.strip() for each in line.split("|")[1:-1]] for line in lines}
    assert cells_of["`ours`"][1:6] == ["3", "1.200 ± 0.497", "", "1.200 ± 0.497", ""]
    assert cells_of["`random`"][1:6] == ["3", "2.200 ± 0.497", "+1.000 ± 0.000", "2.200 ± 0.497", "+1.000 ± 0.000"]
    assert cells_of["`full`"][1:4] == ["1", "1.500", "+0.500"]
    assert cells_of["`greats`"][4] == "not finite"
    assert [line.split("`")[1] for line in lines[2:]] == ["ours", "full", "random", "greats"]
    text = tables.report(records)
    assert "\n".join(lines) in text
    assert "8 cells in 0.01 hours" in text


def test_settings_at_a_glance_compare_paired_with_ours() -> None:
    records = [
        *(record("ours", seed, 1.0 + seed) for seed in (0, 1)),
        *(record("full", seed, 1.5 + seed) for seed in (0, 1)),
        record("full", 0, 2.0, corrupted=0.3),
    ]
    groups, _ = tables.collect(records)
    first, second = tables.at_a_glance(groups)[2:]
    assert first.split(" | ")[:4] == ["| Core", "svamp", "2", "1.500 ± 6.353"]
    assert "2.000 ± 6.353 (+0.500 ± 0.000)" in first
    assert second.startswith("| corrupted=0.3 | svamp | 0 | - |")
    assert "| 2.000 |" in second
    assert "## At a glance" in tables.report(records)
    assert "## At a glance" not in tables.report(records[:2])


def test_what_a_method_ignores_is_not_run_again_but_shown() -> None:
    noisy = settings.varied(CORE, corrupted=0.3)
    axes = grids.grid("axes", [0])
    assert Cell("ours", "svamp", 0, noisy) in axes
    assert Cell("target_only", "svamp", 0, noisy) not in axes
    assert Cell("target_only", "svamp", 0, CORE) in axes
    records = [record("ours", 0, 1.0), record("target_only", 0, 1.5), record("full", 0, 2.0)]
    groups, _ = tables.collect([*records, record("ours", 0, 1.2, corrupted=0.3)])
    assert groups[noisy, "svamp"].keys() == {"ours", "target_only"}
    assert groups[noisy, "svamp"]["target_only"] == groups[CORE, "svamp"]["target_only"]


CHANGES = {"corrupted": 0.3, "budget": 3, "pool_size": 6, "target_samples": 6}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in ("target_only", "full", "random", "logit_utility")
        for name in METHODS[method].ignored
    ],
)
def test_what_a_method_is_said_to_ignore_changes_no_loss(method: str, name: str, folder: Path) -> None:
    plain, other = (
        cells.run_cell(Cell(method, "svamp", 0, setting), folder, None)["figures"]
        for setting in (TINY, settings.varied(TINY, **{name: CHANGES[name]}))
    )
    for figure in ("final", "best", "curve", "trials", "tuning"):
        assert plain[figure] == other[figure]


def test_utility_is_the_nuclear_norm_of_the_logits_that_predict_the_response(folder: Path) -> None:
    pool = material.material(folder, Cell("logit_utility", "svamp", 0, TINY), TARGETS["svamp"]).candidates[0]
    table, rows = torch.randn(300, 20), training.ordered(pool)

    def model(input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return SimpleNamespace(logits=table[input_ids])

    for row, found in zip(rows, training.utilities(model, rows).tolist(), strict=True):
        batch = training.batch_of([row])
        first = int((batch["labels"][0] != data.IGNORED).nonzero()[0])
        logits = table[batch["input_ids"][0, first - 1 : -1]]
        assert found == pytest.approx(float(torch.linalg.svdvals(logits.double()).sum()), rel=1e-4)


def test_when_the_loss_of_full_is_reached() -> None:
    runs = tables.collect([record("ours", 0, 0.5), record("random", 0, 3.0), record("full", 0, 2.5)])[0][CORE, "svamp"]
    lines = {line.split("`")[1]: line for line in tables.reaching(runs)[2:]}
    assert lines["ours"] == "| `ours` | 1 of 1 | 0.50 | 0.50 | 0.50 |"  # 2.25 at step 10 of 20
    assert lines["random"] == "| `random` | 0 of 1 | - | - | - |"


def test_the_learning_rate_that_dev_chooses_is_shown_and_not_the_best() -> None:
    groups, _ = tables.collect(
        [
            record("ours", 0, 1.0, lr=2e-3, dev=2.0),
            record("ours", 0, 1.3, lr=6e-3, dev=1.0),
            record("full", 0, 1.8, lr=2e-3, dev=1.0),
            record("full", 0, 1.7, lr=6e-3, dev=2.0),
            record("greats", 0, 1.0, lr=6e-3),
            record("target_only", 0, 1.1, lr=2e-3, trial={"lr": 5e-4, "steps": 40}),
        ]
    )
    lines = tables.chosen_rates(groups)
    assert "| `ours` | 1.300 |  | 0.006 |" in lines
    assert "| `full` | 1.800 | +0.500 | 0.002 |" in lines
    assert "| `target_only` | 1.100 | -0.200 | 0.0005 |" in lines  # tuned within its cell
    assert not any("greats" in line for line in lines)  # not run at every rate


def test_the_share_of_the_weight_on_corrupted_samples() -> None:
    groups, _ = tables.collect([record("ours", seed, 1.0, corrupted=0.3) for seed in (0, 1)])
    ((_, runs),) = groups.items()
    assert tables.on_corrupted(runs)[2] == "| `ours` | 0.750 ± 0.000 | 0.300 |"


def test_records_of_other_data_are_left_out_and_said() -> None:
    groups, notes = tables.collect([record("ours", 0, 1.0, data="old"), record("ours", 0, 2.0, data="new")])
    assert tables.end(groups[CORE, "svamp"]["ours"][0]) == 2.0
    assert notes == ["1 records of other data, versions or components were left out."]


def test_pictures_are_drawn_and_bands_are_means(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra plot")
    assert figures.band([([0.0, 2.0], [1.0, 3.0]), ([0.0, 4.0, 9.0], [2.0, 5.0, 9.0])]) == (
        [0.0, 3.0],
        [1.0, 3.0],
        [1.5, 4.0],
        [2.0, 5.0],
    )
    records = [record(method, seed, 1.0) for method in ("ours", "opus") for seed in (0, 1)]
    (path,) = figures.write(records, tmp_path)
    assert path.name == "core-svamp.png"
    assert path.read_bytes().startswith(b"\x89PNG")
