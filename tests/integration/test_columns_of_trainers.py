"""What a filter reads of a dataset reaches it through each trainer, with no decision log, and the model never."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from ftw_integrations.columns import is_dispatched
from ftw_integrations.loop import attach, token_mean
from torch import Tensor

import ftw
from ftw.errors import ConfigurationError
from ftw.filters import Chain, Quota
from ftw.watching import read_log
from ftw.watching.log import NAME
from tests.models import batch_of, tiny_llama

STEPS = 6
QUOTA = Quota("topk", "source", at_most={"web": 0.0, "book": 0.5})
SHARES: dict[str, Any] = {"budget": 4, "warmup": 2, "solver": "uniform"}  # which drops none of the picks
SOURCES = ("web", "web", "book", "code")
"""Of samples in turn."""


def assert_shares(sources: list[list[str]], selections: list[ftw.Selection]) -> None:
    assert len(sources) == len(selections) > 0
    for names, selection in zip(sources, selections, strict=True):
        picked = [names[i] for i in selection.indices.tolist()]
        assert "web" not in picked  # half of what is on offer
        assert 1 <= len(picked) <= 4
        assert picked.count("book") <= 2


# -- Hugging Face and TRL ----------------------------------------------------------------------------------------------


def labelled(count: int, seed: int) -> list[dict[str, Any]]:
    from tests.integration.test_huggingface import rows_of

    return [{**row, "source": SOURCES[i % 4], "remark": "x"} for i, row in enumerate(rows_of(count, seed))]


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(
        [{name: value.tolist() if isinstance(value, Tensor) else value for name, value in row.items()} for row in rows]
    )


def witness(base: Any) -> Any:
    """A trainer that keeps each micro-batch with its samples' sources, what its model was given, and its choices."""
    from ftw_integrations.columns import COLUMNS

    class Witness(base):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            kept = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
            self.__dict__.setdefault("seen", []).append((kept, inputs[COLUMNS], num_items_in_batch))
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self.__dict__.setdefault("made", []).append(self.selection)
            return loss

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.__dict__.setdefault("given", set()).update(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Witness


def hugging_face(folder: Path, pool: Any, selection: dict[str, Any], model: Any = None, **changed: Any) -> Any:
    pytest.importorskip("transformers", reason="the integration is for its Trainer")
    pytest.importorskip("accelerate", reason="Trainer needs it")
    pytest.importorskip("datasets", reason="what Trainer removes columns from")
    from ftw_integrations.huggingface import SelectionArguments, SelectionTrainer

    from tests.integration.test_huggingface import arguments, model_of, rows_of

    settings = {"max_steps": STEPS, "lr_scheduler_type": "constant"}
    return witness(SelectionTrainer)(
        model_of() if model is None else model,
        arguments(folder / "out", **settings | changed),
        train_dataset=pool,
        eval_dataset=rows_of(6, 2),
        target_dataset=rows_of(10, 3),
        selection=SelectionArguments(**SHARES | {"target_batch_size": 4} | selection),
    )


def replayed(trainer: Any, model: Any, target: list[Any], accumulation: int) -> list[ftw.Selection]:
    """What a plain loop chooses from the stream that the trainer saw."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.dim() > 1) == matrices]} for matrices in (True, False)]
    epsilon = trainer.args.adam_epsilon
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.0, eps=epsilon, fused=True)
    selector = ftw.Selector(model, optimizer, target=target, filter=QUOTA, **SHARES)
    made = []
    for at in range(0, len(trainer.seen), accumulation):
        for batch, columns, items in trainer.seen[at : at + accumulation]:
            with selector.record(mass=batch["labels"][:, 1:].ne(-100).sum(1), extras={"source": columns["source"]}):
                model(**batch, num_items_in_batch=items, use_cache=False).loss.backward()
        made.append(selector.apply())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return made


def assert_same_choice(first: list[ftw.Selection], second: list[ftw.Selection]) -> None:
    assert len(first) == len(second) == STEPS
    for ours, theirs in zip(first, second, strict=True):
        assert ours.indices.tolist() == theirs.indices.tolist()
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-6)


def sources_of(trainer: Any, accumulation: int) -> list[list[str]]:
    seen = [columns["source"] for _, columns, _ in trainer.seen]
    return [
        [each for part in seen[at : at + accumulation] for each in part] for at in range(0, len(seen), accumulation)
    ]


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
def test_trainer_and_plain_loop_keep_to_the_same_quota(kind: str, tmp_path: Path) -> None:
    rows = labelled(96, 1)
    pool = rows if kind == "list" else as_dataset(rows)
    trainer = hugging_face(tmp_path, pool.to_iterable_dataset() if kind == "stream" else pool, {"filter": QUOTA})
    trainer.train()
    from tests.integration.test_huggingface import ACCUMULATION, model_of, rows_of

    known = {tuple(row["input_ids"].tolist()): row["source"] for row in rows}
    for batch, columns, _ in trainer.seen:
        assert columns == {"source": [known[tuple(ids.tolist())] for ids in batch["input_ids"]]}
    assert_shares(sources_of(trainer, ACCUMULATION), trainer.made)
    target = [trainer.data_collator(rows_of(10, 3)[at : at + 4]) for at in (0, 4, 8)]
    assert_same_choice(trainer.made, replayed(trainer, model_of(), target, ACCUMULATION))
    assert trainer.given == {"input_ids", "attention_mask", "labels"}
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_log_names_what_the_filter_reads_as_well(tmp_path: Path) -> None:
    trainer = hugging_face(tmp_path, labelled(96, 1), {"filter": QUOTA, "log": str(tmp_path), "log_text": 0})
    trainer.train()
    plain = hugging_face(tmp_path, labelled(96, 1), {"filter": QUOTA})
    plain.train()
    from tests.integration.test_huggingface import ACCUMULATION

    assert_same_choice(trainer.made, plain.made)
    logged = [entry.columns["source"] for entry in read_log(tmp_path / NAME)]
    assert logged == sources_of(plain, ACCUMULATION)


def test_numbers_stay_numbers_and_rows_without_labels_are_left_out(tmp_path: Path) -> None:
    rows = labelled(96, 1)
    for i, row in enumerate(rows):
        row |= {"loss": torch.tensor((37 * i % 96) / 7), "labels": row["labels"].clone()}
        if i % 5 == 0:
            row["labels"][:] = -100
    trainer = hugging_face(tmp_path, rows, {"preset": "max_loss", "budget": 2})
    trainer.train()
    from tests.integration.test_huggingface import ACCUMULATION

    for step, selection in enumerate(trainer.made):
        window = trainer.seen[step * ACCUMULATION : (step + 1) * ACCUMULATION]
        offered = [
            loss
            for batch, columns, _ in window
            for loss, labels in zip(columns["loss"], batch["labels"], strict=True)
            if bool((labels != -100).any())
        ]
        assert len(selection.weights) == len(offered)
        assert sorted(offered[i] for i in selection.indices.tolist()) == sorted(offered)[-2:]


def test_a_column_of_the_models_is_handed_on_and_left_to_it(tmp_path: Path) -> None:
    """What is taken off is taken off for the model's sake alone."""
    rows = labelled(96, 1)
    for i, row in enumerate(rows):
        row["position_ids"] = torch.arange(len(row["input_ids"])) + i % 2
    trainer = hugging_face(tmp_path, rows, {"filter": Quota("topk", "position_ids", at_most=0.5)}, max_steps=1)
    trainer.train()
    assert trainer.given == {"input_ids", "attention_mask", "labels", "position_ids"}
    starts = {str(torch.arange(12) + offset): offset for offset in (0, 1)}
    window = [starts[text] for _, columns, _ in trainer.seen for text in columns["position_ids"]]
    picked = [window[i] for i in trainer.made[0].indices.tolist()]
    assert sorted(picked) == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["list", "dataset", "tuples", "empty", "stream", "some"])
def test_a_column_that_is_missing_is_refused(kind: str, tmp_path: Path) -> None:
    """At once where the dataset can be looked at, else with its first batch."""
    rows: Any = labelled(96, 1)
    inner = Chain([Quota("random", "language", at_most=0.5), "greedy"], keep=[6])
    missing = r"reads the column 'language'.* has input_ids, attention_mask, labels"
    if kind in ("stream", "some"):

        class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
            def __iter__(self) -> Any:
                return iter(rows)

        if kind == "some":
            for row in rows[:95]:
                row["language"] = "en"
        trainer = hugging_face(tmp_path, Stream() if kind == "stream" else rows, {"filter": inner}, max_steps=12)
        with pytest.raises(ConfigurationError, match=missing):
            trainer.train()
        return
    pool = {"list": rows, "dataset": as_dataset(rows), "tuples": [tuple(row) for row in rows], "empty": rows[:0]}[kind]
    if kind in ("tuples", "empty"):
        missing = "reads the column 'language'.* has no columns"
    with pytest.raises(ConfigurationError, match=missing):
        hugging_face(tmp_path, pool, {"filter": inner})


def test_names_and_presets_say_what_they_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the integration is for its Trainer")
    from ftw_integrations.huggingface import SelectionArguments
    from transformers import HfArgumentParser

    (parsed,) = HfArgumentParser([SelectionArguments]).parse_args_into_dataclasses(["--filter", "quota"])
    assert parsed.columns == ("source",)
    assert SelectionArguments(filter=Quota("rho_loss", "language")).columns == ("language", "loss", "reference_loss")
    assert SelectionArguments(preset="greats").columns == ()  # "learning_rate" is no column of the dataset's
    assert SelectionArguments(preset="ifd", filter="topk").columns == ()
    with pytest.raises(ConfigurationError, match="reads the columns 'loss_with_prompt', 'loss_without_prompt'"):
        hugging_face(tmp_path, labelled(96, 1), {"preset": "ifd"})


def test_batches_that_one_process_loads_for_several_bring_no_columns() -> None:
    from types import SimpleNamespace

    accelerator = SimpleNamespace(num_processes=2, dispatch_batches=True)
    with pytest.raises(ConfigurationError, match=r"reads the dataset's source.*'dispatch_batches': False"):
        is_dispatched(accelerator, [], ("source",))


def test_a_collator_that_changes_the_samples_number_is_refused(tmp_path: Path) -> None:
    trainer = hugging_face(tmp_path, labelled(96, 1), {"filter": QUOTA})
    collate = trainer.data_collator
    trainer.data_collator = lambda features: collate([*features, *features])
    with pytest.raises(ConfigurationError, match="a micro-batch of 4 samples, as its collator and loader leave it"):
        trainer.train()


@pytest.mark.parametrize("padding_free", [False, True])
def test_trl_and_plain_loop_keep_to_the_same_quota(padding_free: bool, tmp_path: Path) -> None:
    trainer, dataset = of_trl(tmp_path, padding_free=padding_free, max_length=None)
    trainer.train()
    from tests.integration import test_trl as trl

    known = {
        tuple(trl.tokenizer()(text)["input_ids"]): source
        for text, source in zip(dataset["text"], dataset["source"], strict=True)
    }
    if not padding_free:
        for batch, columns, _ in trainer.seen:
            ids = [
                tuple(row[seen.bool()].tolist())
                for row, seen in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            assert columns == {"source": [known[each] for each in ids]}
        target = trainer._target_batches(4)
        assert_same_choice(trainer.made, replayed(trainer, trl.model_of(), target, trl.ACCUMULATION))
    assert_shares(sources_of(trainer, trl.ACCUMULATION), trainer.made)
    assert "source" not in trainer.given
    assert "labels" in trainer.given


def test_packing_takes_trls_columns_away(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"reads the column 'source'.*pack no samples"):
        of_trl(tmp_path, packing=True, max_length=24)


def of_trl(folder: Path, **changed: Any) -> Any:
    pytest.importorskip("trl", reason="the integration is for its SFTTrainer")
    pytest.importorskip("peft", reason="adapters come from it")
    from ftw_integrations.trl import SelectionArguments, SelectionSFTTrainer

    from tests.integration import test_trl as trl

    dataset = trl.samples(96, 1)
    dataset = dataset.add_column("source", [SOURCES[i % 4] for i in range(len(dataset))])
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": trl.ROWS,
        "gradient_accumulation_steps": trl.ACCUMULATION,
        "max_grad_norm": 0.05,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = witness(SelectionSFTTrainer)(
        model=trl.model_of(),
        args=trl.SFTConfig(**settings | changed),
        train_dataset=dataset,
        target_dataset=trl.samples(10, 3),
        processing_class=trl.tokenizer(),
        selection=SelectionArguments(filter=QUOTA, target_batch_size=4, **SHARES),
    )
    return trainer, dataset


# -- Lightning, accelerate and attach ----------------------------------------------------------------------------------


def sourced(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Batches as a collator makes them that leaves text as it is."""
    return [{**batch_of(4, seed=seed + i), "source": list(SOURCES)} for i in range(count)]


def plainly(data: list[dict[str, Any]]) -> list[ftw.Selection]:
    """An explicit loop's choices, two micro-batches a step."""
    model = tiny_llama(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    selector = ftw.Selector(model, optimizer, target=[batch_of(4, seed=900)], filter=QUOTA, **SHARES)
    made = []
    for at in range(0, len(data), 2):
        for batch in data[at : at + 2]:
            inputs = {name: value for name, value in batch.items() if name != "source"}
            with selector.record(mass=token_mean(inputs), extras={"source": batch["source"]}):
                (model(**inputs).loss / 2).backward()
        made.append(selector.apply())
        optimizer.step()
        optimizer.zero_grad()
    return made


def test_lightning_keeps_to_the_same_quota(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the integration is for its Trainer")
    from ftw_integrations.lightning import SelectionCallback

    from tests.lightning_runs import Module, fit, single

    class Sourced(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step({k: v for k, v in batch.items() if k != "source"}, batch_idx)

    made: list[ftw.Selection] = []
    given: dict[str, Any] = {"mass": token_mean, "filter": QUOTA, **SHARES}
    target, data = [batch_of(4, seed=900)], sourced(2 * STEPS)
    settings: dict[str, Any] = {"max_steps": STEPS, "accumulate_grad_batches": 2, "gradient_clip_val": None}
    callback = SelectionCallback(target, extras=lambda batch: {"source": batch["source"]}, told=made.append, **given)
    fit(tmp_path, Sourced(single(tiny_llama)), data, callback, **settings)
    assert_same_choice(made, plainly(data))
    assert_shares([[*SOURCES, *SOURCES]] * STEPS, made)
    with pytest.raises(ConfigurationError, match=r"\['source'\] are missing among \['learning_rate'\]"):
        fit(tmp_path, Sourced(single(tiny_llama)), data, SelectionCallback(target, **given), **settings)
    other = SelectionCallback(target, extras=lambda batch: {"language": batch["source"]}, **given)
    with pytest.raises(ConfigurationError, match=r"missing among \['language', 'learning_rate'\]"):
        fit(tmp_path, Sourced(single(tiny_llama)), data, other, **settings)


@pytest.mark.parametrize("accelerated", [False, True])
def test_an_attached_loop_keeps_to_the_same_quota(accelerated: bool) -> None:
    data, made = sourced(2 * STEPS), []
    model: Any = tiny_llama(torch.float32)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=None, shuffle=False)  # type: ignore[arg-type]
    if accelerated:
        accelerate = pytest.importorskip("accelerate", reason="its loop is under test")
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    given: dict[str, Any] = {"target": [batch_of(4, seed=900)], "mass": token_mean, "filter": QUOTA, **SHARES}
    with pytest.raises(ConfigurationError, match=r"\['source'\] are missing"):
        attach(model, optimizer, **given)
    now: dict[str, Any] = {}
    attached: AbstractContextManager[Any] = attach(
        model, optimizer, extras=lambda inputs: dict(now), told=made.append, **given
    )
    with attached:
        for number, batch in enumerate(loader):
            now["source"] = batch.pop("source")
            (model(**batch).loss / 2).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    if accelerated:
        accelerate.state.AcceleratorState._reset_state(True)
    assert_same_choice(made, plainly(sourced(2 * STEPS)))
    assert_shares([[*SOURCES, *SOURCES]] * STEPS, made)
