"""The decision log: what it holds, when it is written, that it stays bounded and survives its writer."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ftw
from ftw.errors import ConfigurationError, DataError
from ftw.problem import Selection, Status
from ftw.watching import read_log
from ftw.watching.entries import LONGEST, read_header
from ftw.watching.log import NAME, SMALLEST, DecisionLog
from tests.models import MLP


def data(rows: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


class Run:
    """A model, an optimizer and a selector; `step` makes one step."""

    def __init__(self, *, fused: bool = False, **options: Any) -> None:
        self.model = MLP()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=fused)
        defaults: dict[str, Any] = {
            "target": [data(5, 100), data(7, 101)],
            "loss_fn": loss_of,
            "budget": 3,
            "warmup": 2,
        }
        self.selector = ftw.Selector(self.model, self.optimizer, **{**defaults, **options})
        self.now = 0

    def apply(self) -> Selection:
        for part in (0, 4):  # a window of two micro-batches
            ids = [8 * self.now + part + i for i in range(4)]
            columns = {"id": ids, "source": ["a", "b", "a", "c"], "text": [f"sample {i}" for i in ids]}
            with self.selector.record(extras=columns):
                loss_of(self.model, data(8, self.now)[part : part + 4]).backward()
        self.now += 1
        return self.selector.apply()

    def step(self) -> Selection:
        selection = self.apply()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return selection


def state(run: Run) -> dict[str, Any]:
    return {
        "model": {name: value.clone() for name, value in run.model.state_dict().items()},
        "optimizer": copy.deepcopy(run.optimizer.state_dict()),
        "selector": run.selector.state_dict(),
        "now": run.now,
    }


def resumed(saved: dict[str, Any], **options: Any) -> Run:
    run = Run(**options)
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.selector.load_state_dict(saved["selector"])
    run.now = saved["now"]
    return run


def made_up(n: int = 4, step: int = 1, **diagnostics: Any) -> Selection:
    weights = torch.zeros(n, dtype=torch.float64)
    weights[0] = float(n)
    found = {"step": step, "alignment": torch.ones(n), "mass": torch.ones(n), "geometry": "curvature", **diagnostics}
    return Selection(torch.tensor([0]), weights, 0.5, Status.OPTIMAL, found)


# -- what is written, and when -----------------------------------------------------------------------------------------


def test_a_line_is_the_selection_to_the_bit(tmp_path: Path) -> None:
    run = Run(log=tmp_path / "log.jsonl", watch=2)
    made, fidelities = [], []
    for _ in range(5):
        made.append(run.step())
        fidelities.append(run.selector.fidelity)
    entries = list(read_log(tmp_path / "log.jsonl"))
    assert [entry.step for entry in entries] == [1, 2, 3, 4, 5]
    for i, (entry, selection, fidelity) in enumerate(zip(entries, made, fidelities, strict=True)):
        assert entry.stepped
        assert entry.status == selection.status
        assert entry.predicted_drop == selection.predicted_drop
        found = selection.diagnostics
        for name in ("first_order", "curvature", "offset_drop", "effective_sample_size", "kkt_residual"):
            assert getattr(entry, name) == found[name]
        assert (entry.geometry, entry.candidates, entry.chosen) == (found["geometry"], 8, len(selection.indices))
        assert entry.columns["weight"] == selection.weights.tolist()
        assert entry.columns["alignment"] == found["alignment"].tolist()
        assert entry.columns["mass"] == found["mass"].tolist()
        assert entry.columns["id"] == list(range(8 * i, 8 * i + 8)) == found["columns"]["id"]
        assert entry.columns["source"] == ["a", "b", "a", "c"] * 2
        assert entry.columns["text"][3] == f"sample {8 * i + 3}"
        if i % 2:
            assert fidelity is not None
            assert entry.fidelity is not None
            assert fidelity.step == entry.step
            assert entry.fidelity["realised_drop"] == fidelity.realised_drop
            assert entry.fidelity["ratio"] == fidelity.ratio
        else:
            assert entry.fidelity is None
    assert [entry.geometry for entry in entries] == ["vanilla", "vanilla", "curvature", "curvature", "curvature"]
    assert read_header(tmp_path / "log.jsonl").about["filter"] == "Greedy"


def test_a_step_is_written_once_the_optimizer_has_made_it(tmp_path: Path) -> None:
    run = Run(log=tmp_path)
    run.apply()
    assert not (tmp_path / NAME).exists()
    run.optimizer.step()
    assert [entry.step for entry in read_log(tmp_path / NAME)] == [1]
    run.optimizer.step()  # one that was not selected for
    assert len(list(read_log(tmp_path / NAME))) == 1


def test_a_step_that_is_never_made_is_said_to_be_none(tmp_path: Path) -> None:
    run = Run(log=tmp_path)
    run.apply()
    run.optimizer.zero_grad()
    run.step()
    run.apply()
    run.selector.close()
    run.optimizer.step()
    entries = list(read_log(tmp_path / NAME))
    assert [(entry.step, entry.stepped) for entry in entries] == [(1, False), (2, True), (3, False)]
    assert [bool(entry.columns) for entry in entries] == [False, True, False]


def test_steps_that_overflow_under_a_scaler(tmp_path: Path) -> None:
    run = Run(log=tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        with run.selector.record(scaler=scaler):
            loss = loss_of(run.model, data(8, step)) * (math.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
        run.selector.apply()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
    entries = [(entry.step, entry.status, entry.stepped) for entry in read_log(tmp_path / NAME)]
    assert entries == [(1, "optimal", True), (2, "overflow", False), (2, "optimal", True), (3, "optimal", True)]


def test_a_fused_optimizer_that_steps_in_vain(tmp_path: Path) -> None:
    run = Run(log=tmp_path, fused=True)
    for found_inf in (1.0, 0.0):  # a GradScaler tells it so
        run.optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        before = [p.clone() for p in run.model.parameters()]
        run.step()
        assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True)) == bool(found_inf)
    assert [entry.stepped for entry in read_log(tmp_path / NAME)] == [False, True]


def test_the_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    runs = [Run(watch=2), Run(watch=2, log=tmp_path)]
    for _ in range(4):
        first, second = (run.step() for run in runs)
        assert torch.equal(first.weights, second.weights)
    assert all(torch.equal(p, q) for p, q in zip(*(run.model.parameters() for run in runs), strict=True))
    assert not Run().optimizer._optimizer_step_post_hooks  # off, it leaves no hook


def test_tokens_are_not_listed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="tokens are a language model's")
    assert transformers
    from tests.models import batch_of, tiny_llama

    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"granularity": "token", "filter": "topk", "solver": "uniform"}
    selector = ftw.Selector(model, optimizer, target=[batch_of(3, seed=9)], log=tmp_path, **options)
    with selector.record():
        model(**batch_of(4)).loss.backward()
    selection = selector.apply()
    optimizer.step()
    (entry,) = read_log(tmp_path / NAME)
    assert (entry.candidates, entry.columns) == (len(selection.weights), {})


def test_a_log_that_cannot_be_written_ends_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(log=tmp_path)
    run.step()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(DecisionLog, "_append", full)
        with pytest.warns(UserWarning, match="ends before step 2: .*No space left"):
            run.step()
    run.step()
    assert [entry.step for entry in read_log(tmp_path / NAME)] == [1]


def test_what_is_no_number_and_what_is_no_text(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, text=5)
    alignment = torch.tensor([math.nan, 1.0, math.inf, -1.0])
    ids = [torch.tensor(7), "x", None, ("a", 1)]
    texts = ["\ud800 lone", "line\nbreak\u2028", None, "<script>alert(1)</script>"]
    log.write(
        made_up(alignment=alignment, kkt_residual=math.nan), columns={"id": ids, "text": texts, "source": [None] * 4}
    )
    (entry,) = read_log(log.path)
    assert entry.columns["alignment"] == [None, 1.0, None, -1.0]
    assert entry.kkt_residual is None
    assert entry.columns["id"] == [7, "x", None, "('a', 1)"]
    assert entry.columns["text"] == ["\ud800 lon", "line\n", None, "<scri"]
    assert "source" not in entry.columns  # nothing is known of it

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_columns_of_another_length_are_left_out(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    log.write(made_up(4), columns={"id": [1, 2, 3]})
    (entry,) = read_log(log.path)
    assert entry.columns.keys() == {"alignment", "mass", "weight"}


# -- bounded -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=120), st.integers(0, 40))
def test_every_second_step_goes_when_the_bound_is_reached(sizes: list[int], skipped: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        log = DecisionLog(folder, max_bytes=SMALLEST)
        steps = range(1, len(sizes) + 1)
        for step, n in zip(steps, sizes, strict=True):
            log.write(made_up(n, step), stepped=step != skipped)
            assert log.path.stat().st_size <= SMALLEST
        every = read_header(log.path).every
        found = list(read_log(log.path))
        assert [entry.step for entry in found] == [step for step in steps if step % every == 0]
        assert all(entry.candidates == sizes[entry.step - 1] for entry in found)
        assert sorted(os.listdir(folder)) == [NAME]
        if every > 1:  # it was really full
            whole = sum(len(made.line()) for made in found) * 2
            assert whole > SMALLEST / 4


def test_a_long_run_is_spanned(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, max_bytes=SMALLEST)
    for step in range(1, 1001):
        log.write(made_up(16, step))
    steps = [entry.step for entry in read_log(log.path)]
    every = read_header(log.path).every
    assert every > 1
    assert steps == list(range(every, 1001, every))
    assert log.path.stat().st_size > SMALLEST / 3


def test_a_step_too_long_for_a_line_goes_without_candidates(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, max_bytes=SMALLEST)
    log.write(made_up(4000, 1), columns={"id": list(range(4000))})
    log.write(made_up(4, 2))
    first, second = read_log(log.path)
    assert (first.candidates, first.columns) == (4000, {})
    assert second.columns["weight"] == [4.0, 0.0, 0.0, 0.0]


# -- resuming, and being killed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [False, True])
def test_a_resumed_run_has_the_log_of_the_whole_one(torn: bool, tmp_path: Path) -> None:
    whole = Run(log=tmp_path / "whole", watch=3)
    for _ in range(8):
        whole.step()
    run = Run(log=tmp_path / "broken", watch=3)
    for _ in range(3):
        run.step()
    saved = state(run)
    for _ in range(3):
        run.step()
    path = tmp_path / "broken" / NAME
    if torn:
        path.write_bytes(path.read_bytes()[:-40])
        assert [entry.step for entry in read_log(path)] == [1, 2, 3, 4, 5]
    again = resumed(saved, log=tmp_path / "broken", watch=3)
    for _ in range(5):
        again.step()
    assert path.read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


def test_a_resumed_run_keeps_to_the_thinning(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, max_bytes=SMALLEST)
    for step in range(1, 301):
        log.write(made_up(16, step))
    every = read_header(log.path).every
    again = DecisionLog(tmp_path, max_bytes=SMALLEST)
    for step in range(201, 306):
        again.write(made_up(16, step))
    assert [entry.step for entry in read_log(log.path)] == list(range(every, 306, every))


def test_going_back_within_a_process(tmp_path: Path) -> None:
    run = Run(log=tmp_path)
    for _ in range(2):
        run.step()
    saved = run.selector.state_dict()
    for _ in range(2):
        run.step()
    run.selector.load_state_dict(saved)
    run.step()
    assert [entry.step for entry in read_log(tmp_path / NAME)] == [1, 2, 3]


def test_another_runs_log_is_kept_aside(tmp_path: Path) -> None:
    Run(log=tmp_path).step()
    before = (tmp_path / NAME).read_bytes()
    second = Run(log=tmp_path)
    assert (tmp_path / NAME).read_bytes() == before  # it may yet be resumed
    with pytest.warns(UserWarning, match="held the decisions of another run"):
        second.step()
    assert (tmp_path / f"{NAME}.previous").read_bytes() == before
    second.step()
    assert [entry.step for entry in read_log(tmp_path / NAME)] == [1, 2]


WRITER = """
import sys, torch
from ftw.watching import DecisionLog
from tests.unit.test_decision_log import made_up
log = DecisionLog(sys.argv[1], max_bytes=1 << 16)
print("begun", flush=True)
step = 0
while True:
    step += 1
    log.write(made_up(16, step), columns={"text": ["x" * 200] * 16})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_killed_writer_leaves_a_log_that_can_be_read(tmp_path: Path) -> None:
    import time

    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "begun\n"
    time.sleep(0.2)
    writer.kill()
    writer.wait()
    every = read_header(tmp_path / NAME).every
    steps = [entry.step for entry in read_log(tmp_path / NAME)]
    assert every > 1  # it was thinned on the way
    assert steps == list(range(every, steps[-1] + 1, every))
    again = DecisionLog(tmp_path, max_bytes=1 << 16)
    again.write(made_up(16, steps[-1]))
    assert [entry.step for entry in read_log(tmp_path / NAME)] == steps


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 1000}, "max_bytes .* is 1000; an integer of at least 65536"),
        ({"max_bytes": 1e6}, "max_bytes"),
        ({"text": -1}, "text of the decision log is -1"),
        ({"path": ""}, "log is ''"),
        ({"path": 3}, "log is 3"),
        ({"path": "folder.jsonl"}, "a folder"),
        ({"path": "data.jsonl"}, "another file is: .*data.jsonl, line 1: no head"),
    ],
)
def test_a_place_that_does_not_do(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "data.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(ConfigurationError, match=message):
        DecisionLog(**{"path": "log.jsonl", **options})
    if isinstance(path := options.get("path"), str):
        with pytest.raises(ConfigurationError, match=message):
            Run(log=path)
    assert (tmp_path / "data.jsonl").read_text() == '{"prompt": "mine"}\n'


def test_steps_are_counted_from_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="step is 0"):
        DecisionLog(tmp_path).write(made_up(step=0))


HEAD = '{"ftw_decisions":1,"every":1,"about":{}}\n'


def a_line(**changed: Any) -> str:
    made = {"step": 1, "status": "optimal", "stepped": True, "geometry": "curvature", "candidates": 2, "chosen": 1}
    columns = {"alignment": [1.0, 2], "mass": [1, 1], "weight": [0.0, None]}
    return json.dumps({**made, "quarantined": 0, **columns, **changed}) + "\n"


def test_the_line_that_the_others_are_spoilt_copies_of_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(HEAD + a_line() + a_line(step=2, further="unknown"))
    assert [entry.columns["weight"] for entry in read_log(tmp_path / "log.jsonl")] == [[0.0, None]] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense\n", "not valid JSON"),
        ("[" * 100_000 + "\n", "not valid JSON"),
        ("9" * 10_000 + "\n", "not valid JSON"),
        ("[1]\n", "a JSON list"),
        (a_line(step=None), "step is None; a count"),
        (a_line(step=True), "step is True; a count"),
        (a_line(step=10**30), "step is 1000"),
        (a_line(status=3), "status is 3; text"),
        (a_line(stepped=1), "stepped is 1; true or false"),
        (a_line(kkt_residual="x"), "kkt_residual is 'x'; a number"),
        (a_line(predicted_drop=math.nan), "predicted_drop is nan; a number"),
        (a_line(fidelity=[1]), r"fidelity is \[1\]; an object"),
        (a_line(fidelity={"ratio": "x"}), "fidelity is .*; an object of numbers"),
        (a_line(weight=[1.0]), "columns have"),
        (a_line(weight=1.0), "columns have"),
        (a_line(id=["x"]), "columns have"),
        (a_line(candidates=3), "for 3 candidates"),
        (a_line(mass=[1.0, "x"]), "mass holds 'x'"),
        (a_line(mass=[1.0, 10**400]), "mass holds 1000"),
        (a_line(text=["x" * LONGEST, "y"]), "longer than"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(HEAD + a_line() + line + a_line(step=3))
    with pytest.raises(DataError, match=r"log\.jsonl, line 3: ") as caught:
        list(read_log(path))
    assert caught.match(message)
    assert "\n" not in str(caught.value)[:400]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(HEAD.encode() + b'{"step": \xff\xfe}\n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        list(read_log(tmp_path / "log.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: no head"),
        ("{}\n", "line 1: no head"),
        ("[]\n", "line 1: no head"),
        ('{"ftw_decisions":2,"every":1,"about":{}}\n', "version 2; this release reads 1"),
        ('{"ftw_decisions":1,"every":0,"about":{}}\n', "every=0"),
        ('{"ftw_decisions":1,"every":1,"about":[]}\n', r"about=\[\]"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_no_log(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_log(path))


def test_a_log_whose_old_lines_are_spoilt_ends_with_a_warning(tmp_path: Path) -> None:
    run = Run(log=tmp_path)
    run.step()
    saved = state(run)
    with (tmp_path / NAME).open("a") as file:
        file.write("nonsense\n")
    again = resumed(saved, log=tmp_path)
    with pytest.warns(UserWarning, match="ends before step 2: .*line 3: not valid JSON"):
        again.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.step()
