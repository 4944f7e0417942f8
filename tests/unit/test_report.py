"""`ftw report`: what the logs add up to, a page that holds nothing of others but text, and every wrong input."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftw import cli
from ftw.errors import DataError
from ftw.watching import Entry, read_log
from ftw.watching.digest import MOST, WATCHED, digest
from ftw.watching.entries import Header
from ftw.watching.log import NAME
from ftw.watching.summary import shares, terminal
from tests.unit.test_decision_log import Run


def entry(step: int, **changed: Any) -> Entry:
    columns = {
        "id": ["a", "b", "c"],
        "source": ["x", "y", "x"],
        "text": ["text a", "text b", "text c"],
        "alignment": [0.2, -0.1, 0.3],
        "mass": [1.0, 1.0, 1.0],
        "weight": [1.0, 0.0, 2.0],
    }
    given: dict[str, Any] = {
        "status": "optimal",
        "stepped": True,
        "geometry": "curvature",
        "candidates": 3,
        "chosen": 2,
        "quarantined": 0,
        "predicted_drop": 0.5,
        "effective_sample_size": 1.8,
        "columns": columns,
    }
    return Entry(step=step, **{**given, **changed})


def write(path: Path, *entries: Entry, every: int = 1, **about: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Header(every, about).line() + b"".join(each.line() for each in entries))
    return path


def random_entry(rng: random.Random, step: int) -> Entry:
    n = rng.randrange(1, 6)
    names = [rng.choice([None, 1, 2, "3", "4"]) for _ in range(n)]
    columns: dict[str, Any] = {
        "id": names,
        "source": [rng.choice([None, "x", "y", 7]) for _ in names],
        "text": [rng.choice([None, f"text {name}"]) for name in names],
        "alignment": [rng.choice([None, rng.gauss(0, 1)]) for _ in names],
        "mass": [rng.choice([None, rng.random()]) for _ in names],
        "weight": [rng.choice([0.0, rng.random()]) for _ in names],
    }
    watched = {"predicted_drop": rng.gauss(0, 1), "realised_drop": rng.choice([None, 1.0])}
    return entry(
        step,
        stepped=rng.random() < 0.9,
        status=rng.choice(["optimal", "overflow", "new word"]),
        geometry=rng.choice(["vanilla", "curvature"]),
        candidates=n,
        chosen=rng.randrange(n + 1),
        quarantined=rng.randrange(2),
        predicted_drop=rng.choice([None, rng.gauss(0, 1)]),
        effective_sample_size=rng.choice([None, rng.random()]),
        fidelity=rng.choice([None, watched]),
        columns=columns if rng.random() < 0.9 else {},
    )


# -- what a log adds up to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("steps", [1, 2 * MOST + 3, 5 * MOST])
def test_the_digest_is_the_naive_sum(seed: int, steps: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    entries = [random_entry(rng, step) for step in range(1, steps + 1)]
    entries.append(entry(steps + 1))
    found = digest(write(tmp_path / "log.jsonl", *entries))
    made = [each for each in entries if each.stepped]
    assert (found.decisions[True], found.decisions[False]) == (len(made), len(entries) - len(made))
    assert found.statuses == Counter(each.status for each in entries)
    assert found.geometries == Counter(each.geometry for each in made)
    assert (found.candidates, found.quarantined) == (
        sum(each.candidates for each in made),
        sum(each.quarantined for each in made),
    )
    assert (found.first, found.last, found.overall.steps) == (1, steps + 1, len(made))
    sizes = [each.effective_sample_size for each in made if each.effective_sample_size is not None]
    assert found.overall.sizes.mean == pytest.approx(sum(sizes) / len(sizes), abs=1e-12)
    assert (found.overall.sizes.smallest, found.overall.sizes.largest) == (min(sizes), max(sizes))

    pool: dict[Any, float] = defaultdict(float)
    weight: dict[Any, float] = defaultdict(float)
    usefulness: dict[Any, list[float]] = defaultdict(list)
    for each in made:
        columns = each.columns
        known = [abs(b) for b in columns.get("alignment", []) if b is not None]
        for i in range(len(columns.get("mass", []))):
            mass, b = columns["mass"][i], columns["alignment"][i]
            if mass is not None:
                pool[columns["source"][i]] += mass
                weight[columns["source"][i]] += mass * columns["weight"][i]
            key = ("id", columns["id"][i]) if columns["id"][i] is not None else ("text", columns["text"][i])
            if b is not None and key[1] is not None:
                usefulness[key].append(b * len(known) / sum(known))
    for name, of_pool, of_weight in shares(found):
        assert of_pool == pytest.approx(pool[name] / sum(pool.values()), abs=1e-12)
        assert of_weight == pytest.approx(weight[name] / sum(weight.values()), abs=1e-12)
    assert [name for name, _, _ in shares(found)] == sorted(pool, key=lambda name: -pool[name])
    assert found.samples.keys() == usefulness.keys()
    for key, sample in found.samples.items():
        assert sample.offered == len(usefulness[key])
        assert sample.usefulness == pytest.approx(sum(usefulness[key]) / sample.offered, abs=1e-12)
    ordered = [sample.usefulness for sample in found.ranked()]
    assert ordered == sorted(ordered, reverse=True)

    assert len(found.intervals) <= MOST
    for number, interval in found.intervals.items():
        inside = [each for each in made if (each.step - 1) // found.width == number]
        assert (interval.steps, interval.chosen) == (len(inside), sum(each.chosen for each in inside))
        drops = [each.predicted_drop for each in inside if each.predicted_drop is not None]
        assert interval.drops.count == len(drops)
        assert interval.drops.total == pytest.approx(sum(drops), abs=1e-12)
    assert sum(interval.steps for interval in found.intervals.values()) == len(made)


def test_watched_steps_are_thinned_and_counted(tmp_path: Path) -> None:
    count = 2 * WATCHED + 5
    fidelity = {"predicted_drop": 1.0, "realised_drop": 0.5}
    small: dict[str, Any] = {"columns": {}, "fidelity": fidelity}
    found = digest(write(tmp_path / "log.jsonl", *(entry(step, **small) for step in range(1, count + 1))))
    assert found.watched_steps == count
    assert found.watched == [(step, 1.0, 0.5) for step in range(1, count + 1, found.thinned)]
    assert len(found.watched) <= WATCHED


def test_logs_of_several_processes_are_merged(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path / f"{rank}" / NAME, *(entry(step, chosen=rank + 1) for step in (1, 2)), filter="TopK")
    (tmp_path / "0" / "pool.jsonl").write_text('{"prompt": "a foreign file"}\n')
    found = digest(tmp_path)
    assert [path.parent.name for path in found.paths] == ["0", "1"]
    assert (found.decisions[True], found.overall.chosen, found.last) == (4, 6, 2)
    assert found.samples["id", "a"].offered == 4
    assert [note for note in found.notes if "pool.jsonl" in note] == [
        f"{tmp_path / '0' / 'pool.jsonl'} passed over: no decision log."
    ]
    write(tmp_path / "1" / NAME, entry(1), filter="Greedy")
    with pytest.raises(DataError, match="runs that differ in filter"):
        digest(tmp_path)
    assert digest(tmp_path / "1").about == {"filter": "Greedy"}


def test_a_thinned_log_has_no_gaps(tmp_path: Path) -> None:
    found = digest(write(tmp_path / "log.jsonl", *(entry(4 * i) for i in range(1, 11)), every=4))
    assert sorted(found.intervals) == list(range(10))
    assert any("every 4th step" in note for note in found.notes)


def test_the_last_line_of_a_killed_run_is_left_out_and_said_so(tmp_path: Path) -> None:
    path = write(tmp_path / NAME, entry(1), entry(2))
    assert digest(path).notes == []
    path.write_bytes(path.read_bytes()[:-9])
    found = digest(tmp_path)
    assert found.last == 1
    assert any("cut short" in note for note in found.notes)


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.labels: list[str] = []
        self.said: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "svg":
            self.labels.append(dict(attrs)["aria-label"] or "")

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def made_page(run: Path) -> Page:
    pytest.importorskip("matplotlib", reason="the figures are its")
    assert cli.main(["report", str(run)]) == 0
    return Page(run / "report.html")


EVIL = '</title><script>alert("1")</script><img src=x onerror=alert(2)>&\x1b[31m$where\ud800'


def test_nothing_of_a_log_is_more_than_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = dict(entry(1).columns) | {name: [EVIL, "b", "c"] for name in ("id", "source", "text")}
    drops = {EVIL: 1.0}
    run = tmp_path / "<script>&"
    write(run / NAME, entry(1, columns=columns, status=EVIL, geometry=EVIL, predicted_drops=drops), filter=EVIL)
    page = made_page(run)
    assert page.tags["script"] == page.tags["img"] == 0
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count('<script>alert("1")</script><img src=x onerror=alert(2)>& [31m$where') >= 6
    assert "<script>&" in page.text
    assert "\x1b" not in page.source
    assert "\x1b" not in capsys.readouterr().out


def test_integers_that_no_product_fits(tmp_path: Path) -> None:
    columns = dict(entry(1).columns) | dict.fromkeys(("alignment", "mass", "weight"), [10**299] * 3)
    write(tmp_path / NAME, entry(1, columns=columns, fidelity={"predicted_drop": 10**299, "realised_drop": 1}))
    assert cli.main(["report", str(tmp_path), "--terminal"]) == 0


def test_the_page_stands_alone(tmp_path: Path) -> None:
    run = Run(log=tmp_path, watch=1)
    for _ in range(6):
        run.step()
    before = (tmp_path / NAME).read_bytes()
    page = made_page(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "report.html"]
    assert (tmp_path / NAME).read_bytes() == before
    assert page.tags.keys() & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    assert {value[0] for name, value in page.attributes if name in ("src", "href", "xlink:href")} == {"#"}
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}
    assert "@import" not in page.source
    assert "default-src 'none'" in page.source
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [value[1:] for name, value in page.attributes if name == "xlink:href"] + re.findall(
        r"url\(#([^)]*)", page.source
    )
    assert set(used) <= set(ids)
    assert len(page.labels) == page.tags["svg"] == 4
    assert all(len(label) > 40 for label in page.labels)


def test_the_page_says_what_the_log_holds(tmp_path: Path) -> None:
    run = Run(log=tmp_path, watch=2)
    for _ in range(8):
        run.step()
    page = made_page(tmp_path)
    entries = list(read_log(tmp_path / NAME))
    scaled = {}
    for each in entries:
        scale = sum(map(abs, each.columns["alignment"])) / 8
        scaled |= {text: b / scale for text, b in zip(each.columns["text"], each.columns["alignment"], strict=True)}
    best = sorted(scaled, key=lambda text: -scaled[text])
    most, least = page.text.split("Most useful")[1].split("Least useful")
    assert [most.count(f"{text} chosen") for text in best[:10]] == [1] * 10
    assert [least.count(f"{text} chosen") for text in best[-10:]] == [1] * 10
    positions = [most.index(f"{text} chosen") for text in best[:10]]
    assert positions == sorted(positions)
    assert f"{scaled[best[0]]:+.2f}" in most
    assert "4 watched steps" in page.text
    residuals = [each.kkt_residual for each in entries if each.kkt_residual is not None]
    assert f"KKT residual, largest {max(residuals):.3g}" in page.text
    assert "steps in vanilla geometry 2" in page.text
    mean = sum(each.effective_sample_size or 0.0 for each in entries) / 8
    assert f"effective sample size, mean {mean:.3g}" in page.text


def test_more_sources_than_colours(tmp_path: Path) -> None:
    n = 12
    columns = {
        "source": [f"s{i}" for i in range(n)],
        "alignment": [0.0] * n,
        "mass": [float(n - i) for i in range(n)],
        "weight": [1.0] * n,
    }
    write(tmp_path / NAME, entry(1, candidates=n, columns=columns))
    page = made_page(tmp_path)
    assert "s5" in page.text
    assert "s6" not in page.text
    assert "6 further sources 26.9%" in page.text  # 21 of 78


BARE = {"effective_sample_size": None, "predicted_drop": None, "columns": {}}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry(1, **BARE)], ["names no sources", "names no samples", "too long: 1; shares and samples"]),
        ([entry(1, **BARE, stepped=False, status="overflow")], ["status overflow 1", "steps that were not made 1"]),
        ([entry(1, status="nothing_useful", columns={**entry(1).columns, "weight": [0.0] * 3})], ["x 66.7%", "0.0%"]),
        ([entry(1)], ["No step was watched", "x 66.7% 100.0% 1.5"]),
        ([entry(1, columns={k: v for k, v in entry(1).columns.items() if k != "id"})], ["log has no ids"]),
        ([entry(1, predicted_drops={"maths": 0.25, "code": None})], ["maths 0.25 0.25 0.25", "code - - -"]),
        ([entry(1), entry(10**9)], ["steps 2, 1 to 1000000000"]),
        (
            [
                entry(i, predicted_drop=drop, fidelity={"predicted_drop": drop, "realised_drop": -drop})
                for i, drop in enumerate([1e299, -1e299, 1e-300, 0.0, 1.0], start=1)
            ],
            ["5 watched steps", "realised drop is -1 times"],
        ),
        (
            [
                entry(
                    1,
                    columns={**entry(1).columns, "mass": [1e299] * 3, "alignment": [9e299] * 3, "weight": [1e299] * 3},
                )
            ],
            ["x 66.7%"],
        ),
        ([entry(1, columns={**entry(1).columns, "mass": [None] * 3, "alignment": [None] * 3})], ["names no sources"]),
    ],
)
def test_logs_that_lack_something(entries: list[Entry], said: list[str], tmp_path: Path) -> None:
    write(tmp_path / NAME, *entries)
    page = made_page(tmp_path)
    for each in said:
        assert each in page.text


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_terminal_needs_no_page_and_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write(tmp_path / NAME, entry(1), entry(2, status="inaccurate", quarantined=1))
    assert cli.main(["report", str(tmp_path), "--terminal"]) == 0
    said = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    for each in (
        "  steps                        2",
        "66.7% 100.0%",
        "text c",
        "status inaccurate",
        "candidates quarantined",
    ):
        assert each in said
    assert max(map(len, said.splitlines()[1:])) <= 120
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "pip install 'filter-then-weight[plot]', or give --terminal" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_where_the_page_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the figures are its")
    log = write(tmp_path / "run.jsonl", entry(1))
    for arguments, path in (
        ([], tmp_path / "run.html"),
        (["--out", str(tmp_path / "new" / "x.html")], tmp_path / "new" / "x.html"),
    ):
        assert cli.main(["report", str(log), *arguments]) == 0
        assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        assert f"The page is {path}" in capsys.readouterr().out
    for out, message in (
        (log, "is the log itself"),
        (tmp_path / "new", "cannot write the page to"),
        (log / "x.html", "cannot write"),
    ):
        assert cli.main(["report", str(log), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert next(read_log(log)).step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run.html", "run.jsonl"]
    assert cli.main(["report", str(log), "--out", "x.html", "--terminal"]) == 2


HEAD = '{"ftw_decisions":1,"every":1,"about":{}}\n'


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        ({}, "missing", "cannot read"),
        ({}, ".", "hold no decision log (decisions.jsonl)"),
        ({"pool.jsonl": '{"prompt": "x"}\n', "notes.txt": HEAD}, ".", "hold no decision log"),
        ({"pool.jsonl": '{"prompt": "x"}\n'}, "pool.jsonl", "line 1: no head of a decision log"),
        ({NAME: ""}, NAME, "line 1: no head of a decision log"),
        ({NAME: ""}, ".", "line 1: no head of a decision log"),
        ({NAME: "\x00\x01"}, ".", "line 1: no head of a decision log"),
        ({NAME: HEAD}, ".", "no step is written yet"),
        ({NAME: HEAD + '{"step":1,'}, ".", "no step is written yet"),
        ({"mine.jsonl": HEAD.replace("1", "2", 1)}, ".", "a decision log of version 2; this release reads 1"),
        ({NAME: HEAD + "nonsense\n" + entry(1).line().decode()}, ".", "line 2: not valid JSON"),
        ({NAME: HEAD + '{"step": "one"}\n'}, ".", "line 2: step is 'one'"),
    ],
)
def test_what_is_no_log(
    files: dict[str, str], named: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for arguments in ([], ["--terminal"]):
        assert cli.main(["report", str(tmp_path / named), *arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.startswith("ftw: error: ")
        assert len(said.err.splitlines()) == 1
        assert said.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_a_terminal_that_knows_ascii_alone(tmp_path: Path) -> None:
    columns = dict(entry(1).columns) | {"text": ["naïve\x1b]0;title\x07\n\u202etext", "日本", "\ud800"]}
    found = digest(write(tmp_path / NAME, entry(1, columns=columns)))
    said = terminal(found)
    assert "naïve ]0;title   text" in said
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert json.dumps(said)
