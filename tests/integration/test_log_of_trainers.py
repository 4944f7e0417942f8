"""The decision log of Hugging Face's Trainer and of TRL's: names and texts of the samples that each step was on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftw.errors import ConfigurationError
from ftw.watching import Entry, read_log
from ftw.watching.entries import NAMES
from ftw.watching.log import NAME

pytest.importorskip("transformers", reason="the integration is for its Trainer")
pytest.importorskip("accelerate", reason="Trainer needs it")
pytest.importorskip("peft", reason="adapters come from it")
pytest.importorskip("datasets", reason="what Trainer removes columns from")

import datasets
from ftw_integrations.columns import is_dispatched
from ftw_integrations.huggingface import SelectionArguments, SelectionTrainer
from transformers import HfArgumentParser, TrainerCallback

from tests.integration.test_huggingface import arguments, model_of, rows_of

POOL = 24
SETTINGS: dict[str, Any] = {"budget": 3, "warmup": 2, "target_batch_size": 4}


def named(count: int, seed: int, *, lists: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = rows_of(count, seed)
    if lists:
        rows = [{name: value.tolist() for name, value in row.items()} for row in rows]
    extra = ({"id": i, "source": f"source {i % 3}", "text": f"text {i}", "remark": "x"} for i in range(count))
    return [{**row, **each} for row, each in zip(rows, extra, strict=True)]


def trainer_of(folder: Path, pool: Any, log: Any = None, kind: Any = SelectionTrainer, **changed: Any) -> Any:
    own = {name: changed.pop(name) for name in ("processing_class", "data_collator", "callbacks") if name in changed}
    options = {name: changed.pop(name) for name in ("log_text", "filter", "watch") if name in changed}
    settings = arguments(folder / "out", max_steps=3, **changed)
    selection = SelectionArguments(**SETTINGS, log=log, **options)
    eval_dataset = pool if isinstance(pool, datasets.Dataset) else named(6, 2)
    return kind(
        model_of(),
        settings,
        train_dataset=pool,
        eval_dataset=eval_dataset,
        target_dataset=named(10, 3),
        selection=selection,
        **own,
    )


def _numbers(batch: Any, pool: list[dict[str, Any]]) -> list[int]:
    known = {tuple(row["input_ids"].tolist()): i for i, row in enumerate(pool)}
    return [known[tuple(ids.tolist())] for ids in batch["input_ids"]]


class Inputs(SelectionTrainer):
    """Keeps what its model was called with."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("seen", []).append((model.training, {**inputs}))
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("pool", ["list", "dataset", "all columns"])
def test_samples_are_named_by_the_datasets_columns(pool: str, tmp_path: Path) -> None:
    rows = named(POOL, 1)
    given: Any = rows
    changed: dict[str, Any] = {}
    if pool != "list":
        given = datasets.Dataset.from_list(named(POOL, 1, lists=True))
    if pool == "all columns":  # the collator takes what it can of them, and the model ignores none
        given = given.remove_columns("remark")
        changed = {"remove_unused_columns": False, "data_collator": collate_all}
    trainer = trainer_of(tmp_path, given, tmp_path / "log", Inputs, **changed)
    trainer.train()
    entries = list(read_log(tmp_path / "log" / NAME))
    assert [entry.step for entry in entries] == [1, 2, 3]
    for entry in entries:
        ids = entry.columns["id"]
        assert entry.columns["source"] == [f"source {i % 3}" for i in ids]
        assert entry.columns["text"] == [f"text {i}" for i in ids]
    whole = [i for entry in entries for i in entry.columns["id"]]
    called = [i for training, inputs in trainer.seen if training for i in _numbers(inputs, rows)]
    assert whole == called
    assert sorted(whole) == list(range(POOL))
    if pool != "all columns":
        assert all(set(inputs) == {"input_ids", "attention_mask", "labels"} for _, inputs in trainer.seen)


def collate_all(features: list[dict[str, Any]]) -> dict[str, Any]:
    assert all({"id", "source", "text"} <= each.keys() for each in features)  # as without a log
    return {
        name: torch.stack([torch.as_tensor(each[name]) for each in features])
        for name in ("input_ids", "attention_mask", "labels")
    }


def test_training_and_evaluation_are_the_same_with_and_without(tmp_path: Path) -> None:
    runs = []
    for log in (None, tmp_path / "log"):
        pool = datasets.Dataset.from_list(named(POOL, 1, lists=True))
        trainer = trainer_of(tmp_path, pool, log, eval_strategy="steps", eval_steps=2)
        trainer.train()
        history = [
            {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
        ]
        runs.append((trainer, history))
    (first, one), (second, other) = runs
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert one == other
    assert any("eval_loss" in entry for entry in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


def test_rows_without_labels_are_not_listed(tmp_path: Path) -> None:
    rows = named(16, 1)
    for i in (0, 3, 4, 5):
        rows[i]["labels"] = torch.full_like(rows[i]["labels"], -100)
    trainer = trainer_of(tmp_path, rows, tmp_path, filter="topk")
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    entries = list(read_log(tmp_path / NAME))
    assert [entry.columns["id"] for entry in entries[:2]] == [[1, 2, 6, 7], list(range(8, 16))]
    assert [entry.columns["text"][0] for entry in entries[:2]] == ["text 1", "text 8"]


class OfIds:
    """All that the log asks of a tokenizer."""

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(str(int(token)) for token in row) for row in rows]


class Wordy(SelectionTrainer):
    def candidate_texts(self, inputs: Any, candidates: Any) -> list[str]:
        return [f"starts with {int(ids[0])}" for ids in inputs["input_ids"]]


@pytest.mark.parametrize("way", ["decoded", "own", "none"])
def test_texts_where_the_dataset_has_none(way: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = rows_of(POOL, 1)
    for i, row in enumerate(rows):
        row["attention_mask"][: i % 3] = 0
        row["id"] = torch.tensor(i)
    changed: dict[str, Any] = {"log_text": 0} if way == "none" else {"log_text": 17}
    kind = Wordy if way == "own" else SelectionTrainer
    trainer = trainer_of(tmp_path, rows, tmp_path, kind, **changed)
    trainer.processing_class = OfIds()
    trainer.train()
    for entry in read_log(tmp_path / NAME):
        ids = entry.columns["id"]
        if way == "none":
            assert "text" not in entry.columns
        elif way == "own":
            assert entry.columns["text"] == [f"starts with {int(rows[i]['input_ids'][0])}"[:17] for i in ids]
        else:
            words = [" ".join(map(str, rows[i]["input_ids"][i % 3 :].tolist())) for i in ids]
            assert entry.columns["text"] == [each[:17] for each in words]
        assert "source" not in entry.columns


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_datasets_and_workers(workers: int, tmp_path: Path) -> None:
    rows = named(POOL, 1, lists=True)
    pool: Any = datasets.Dataset.from_list(rows)
    if not workers:
        pool = pool.to_iterable_dataset()
    trainer = trainer_of(tmp_path, pool, tmp_path, dataloader_num_workers=workers)
    trainer.train()
    ids = [i for entry in read_log(tmp_path / NAME) for i in entry.columns["id"]]
    assert sorted(ids) == list(range(POOL))


def test_a_column_that_only_some_samples_have(tmp_path: Path) -> None:
    rows = named(POOL, 1)
    for row in rows[8:]:
        del row["source"]
    trainer = trainer_of(tmp_path, rows, tmp_path)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    entries = list(read_log(tmp_path / NAME))
    assert entries[0].columns["source"][:2] == ["source 0", "source 1"]
    assert all("source" not in entry.columns for entry in entries[1:])


def test_a_column_that_comes_late_is_left_out_and_said_so_once(tmp_path: Path) -> None:
    rows = named(POOL, 1)
    for row in rows[:8]:
        del row["source"]
    trainer = trainer_of(tmp_path, rows, tmp_path)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    with pytest.warns(UserWarning, match="the first samples have no source") as warned:
        trainer.train()
    assert sum("first samples" in str(each.message) for each in warned) == 1
    assert [set(entry.columns) & {*NAMES} for entry in read_log(tmp_path / NAME)] == [{"id", "text"}] * 3


@pytest.mark.parametrize("streamed", [False, True])
def test_batches_that_one_process_loads_for_several_carry_tensors_alone(streamed: bool) -> None:
    pool: Any = datasets.Dataset.from_list([{"id": 1}])
    for processes, asked in ((1, True), (2, False), (2, None), (2, True)):
        accelerator = SimpleNamespace(num_processes=processes, dispatch_batches=asked)
        dispatched = processes == 2 and (asked or (asked is None and streamed))
        context = pytest.warns(UserWarning, match="'dispatch_batches': False") if dispatched else nullcontext()
        with context:
            assert is_dispatched(accelerator, pool.to_iterable_dataset() if streamed else pool) == dispatched


def test_whatever_the_columns_hold_is_named(tmp_path: Path) -> None:
    rows = named(POOL, 1)
    for i, row in enumerate(rows):
        row |= {"id": torch.tensor([i, i + 1]), "source": [None, 0.5, ("a", 1)][i % 3]}
    trainer = trainer_of(tmp_path, rows, tmp_path)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    first = next(read_log(tmp_path / NAME)).columns
    assert first["id"][:2] == ["tensor([0, 1])", "tensor([1, 2])"]
    assert first["source"][:3] == [None, "0.5", "('a', 1)"]


def test_training_twice_begins_the_log_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, named(POOL, 1), tmp_path)
    trainer.train()
    before = (tmp_path / NAME).read_bytes()
    with pytest.warns(UserWarning, match="of another run"):
        trainer.train()
    assert (tmp_path / f"{NAME}.previous").read_bytes() == before
    assert [entry.step for entry in read_log(tmp_path / NAME)] == [1, 2, 3]


def test_arguments_of_the_log(tmp_path: Path) -> None:
    parser = HfArgumentParser([SelectionArguments])
    line = ["--log", str(tmp_path / "x.jsonl"), "--log_bytes", "70000", "--log_text", "9"]
    (selection,) = parser.parse_args_into_dataclasses(line)
    log = selection.for_selector()["log"]
    assert (log.path, log.max_bytes, log.text) == (tmp_path / "x.jsonl", 70000, 9)
    assert SelectionArguments().for_selector()["log"] is None
    with pytest.raises(ConfigurationError, match="log_text is 3, and there is no log"):
        SelectionArguments(log_text=3)
    with pytest.raises(ConfigurationError, match="max_bytes of the decision log is 5"):
        SelectionArguments(log=str(tmp_path), log_bytes=5)


# -- resuming ----------------------------------------------------------------------------------------------------------


class Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(folder: str, *callbacks: Any) -> Any:
    changed = {"save_strategy": "steps", "save_steps": 5, "watch": 4, "callbacks": list(callbacks)}
    trainer = trainer_of(Path(folder), named(96, 1), Path(folder) / "log.jsonl", **changed)
    trainer.args.max_steps = 12
    return trainer


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_the_log_of_a_killed_run_that_resumed_is_that_of_the_whole(tmp_path: Path) -> None:
    resumable(str(tmp_path / "whole")).train()
    source = (
        "import sys; from tests.integration.test_log_of_trainers import Killed, resumable\n"
        "resumable(sys.argv[1], Killed()).train()"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "killed")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [entry.step for entry in read_log(tmp_path / "killed" / "log.jsonl")] == list(range(1, 9))
    resumable(str(tmp_path / "killed")).train(resume_from_checkpoint=True)
    whole, resumed = (tmp_path / name / "log.jsonl" for name in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()
    entries = list(read_log(whole))
    assert [entry.step for entry in entries] == list(range(1, 13))
    assert [entry.step for entry in entries if entry.fidelity is not None] == [4, 8, 12]


# -- TRL ---------------------------------------------------------------------------------------------------------------


def logged_by_trl(folder: Path, **changed: Any) -> tuple[list[Entry], Any]:
    pytest.importorskip("trl", reason="the integration is for its SFTTrainer")
    from tests.integration import test_trl as trl

    dataset = trl.samples(96, 1)
    dataset = dataset.add_column("id", [f"n{i}" for i in range(len(dataset))])
    dataset = dataset.add_column("source", [f"s{i % 2}" for i in range(len(dataset))])
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "report_to": [], "use_cpu": True}
    trainer = trl.SelectionSFTTrainer(
        model=trl.model_of(attention="eager"),
        args=trl.SFTConfig(str(folder / "out"), max_steps=3, bf16=False, disable_tqdm=True, **settings, **changed),
        train_dataset=dataset,
        target_dataset=trl.samples(10, 3),
        processing_class=trl.tokenizer(),
        selection=SelectionArguments(**SETTINGS, log=str(folder)),
    )
    trainer.train()
    return list(read_log(folder / NAME)), dataset


@pytest.mark.parametrize("padding_free", [False, True])
def test_trls_samples_are_named(padding_free: bool, tmp_path: Path) -> None:
    entries, dataset = logged_by_trl(tmp_path, padding_free=padding_free, max_length=None)
    texts = dict(zip(dataset["id"], dataset["text"], strict=True))
    for entry in entries:
        assert entry.candidates == 8
        for number, source, text in zip(*(entry.columns[name] for name in ("id", "source", "text")), strict=True):
            assert source == f"s{int(number[1:]) % 2}"
            assert text == texts[number]
    assert len({number for entry in entries for number in entry.columns["id"]}) == 24


def test_texts_of_trls_packed_samples(tmp_path: Path) -> None:
    entries, dataset = logged_by_trl(tmp_path, packing=True, max_length=24)
    known = {text.removesuffix(" <end>") for text in dataset["text"]}
    for entry in entries:
        assert entry.candidates > 8
        assert len(entry.columns["text"]) == entry.candidates
        assert set(entry.columns["text"]) <= known
