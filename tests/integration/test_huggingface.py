"""Hugging Face's Trainer with selection: the untouched trainer where nothing is selected, a plain loop where it is."""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

import ftw
from ftw.errors import CandidateLayoutError, ConfigurationError, DataError, FtwError, TargetError, UnknownComponentError

pytest.importorskip("transformers", reason="the integration is for its Trainer")
pytest.importorskip("accelerate", reason="Trainer needs it")
pytest.importorskip("peft", reason="adapters come from it")

from ftw_integrations.huggingface import STATE_NAME, SelectionArguments, SelectionTrainer
from transformers import (
    DataCollatorWithFlattening,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.trainers import half_precision, tensorboard

VOCABULARY, LENGTH, ACCUMULATION, ROWS = 61, 12, 4, 2
UNTOUCHED = SelectionArguments(budget=1.0, filter="all", solver="uniform")
CHOOSING = SelectionArguments(budget=3, warmup=2, target_batch_size=4)


def rows_of(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Samples of one length, whose label tokens are of different number."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 7] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def model_of(kind: str = "full", seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": 0.05,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **changed})


class Choices(TrainerCallback):
    """What was chosen in every step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.made: list[ftw.Selection] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.made.append(self.trainer.selection)


def selecting(folder: Path, model: Any, selection: SelectionArguments, **changed: Any) -> tuple[Any, Choices]:
    choices = Choices()
    trainer = SelectionTrainer(
        model,
        arguments(folder, **changed),
        train_dataset=rows_of(96, 1),
        eval_dataset=rows_of(6, 2),
        target_dataset=rows_of(10, 3),
        selection=selection,
        callbacks=[choices],
    )
    choices.trainer = trainer
    return trainer, choices


def untouched(folder: Path, model: Any, **changed: Any) -> Trainer:
    return Trainer(model, arguments(folder, **changed), train_dataset=rows_of(96, 1), eval_dataset=rows_of(6, 2))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(first: Any, second: Any, tolerance: float) -> None:
    named = dict(second.named_parameters())
    for name, p in first.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_all_and_uniform_is_the_untouched_trainer(kind: str, tmp_path: Path) -> None:
    plain = untouched(tmp_path, model_of(kind))
    plain.train()
    ours, choices = selecting(tmp_path, model_of(kind), UNTOUCHED)
    ours.train()
    assert len(choices.made) == 20
    assert all(len(made.weights) == ROWS * ACCUMULATION for made in choices.made)
    assert_same(plain.model, ours.model, 1e-6)
    assert losses(plain) == pytest.approx(losses(ours), abs=1e-6)
    norms = [[entry["grad_norm"] for entry in t.state.log_history if "grad_norm" in entry] for t in (plain, ours)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(norms[0]) > 0.05  # the clipping acted


class Stream(IterableDataset):
    """44 samples an epoch, five windows of 8 and half a one, whose length the trainer does not know."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows_of(44, 1))


class EndsEpochs(TrainerCallback):
    """In the middle of a window, twice."""

    seen = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += 1
        control.should_epoch_stop = self.seen in (5, 14)


@pytest.mark.parametrize("cut", ["stream", "epochs"])
def test_a_window_that_an_epoch_cuts_short_goes_on_in_the_next(cut: str, tmp_path: Path) -> None:
    """The trainer makes no step there, and keeps the gradient; at the end of an epoch it saves."""
    settings = {"max_steps": 14, "adam_epsilon": 1e-3, "save_strategy": "epoch"}
    plain, (ours, choices) = (
        untouched(tmp_path, model_of(), **settings),
        selecting(tmp_path, model_of(), UNTOUCHED, **settings),
    )
    for trainer in (plain, ours):
        if cut == "stream":
            trainer.train_dataset = Stream()
        else:
            trainer.add_callback(EndsEpochs())
        trainer.train()
    assert 12 in [len(made.weights) for made in choices.made]
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-6)
    assert_same(plain.model, ours.model, 1e-6)


@pytest.mark.parametrize("rows", [3, 2], ids=["last window short", "even"])
def test_means_of_micro_batches_are_kept_too(rows: int, tmp_path: Path) -> None:
    """A trainer whose loss is a mean of means, over windows that the epoch cuts short."""
    runs = []
    for kind in (Trainer, SelectionTrainer):
        extra = {"target_dataset": rows_of(4, 3), "selection": UNTOUCHED} if kind is SelectionTrainer else {}
        settings = arguments(tmp_path, per_device_train_batch_size=rows, max_steps=8)
        trainer = kind(model_of(), settings, train_dataset=rows_of(20, 1), **extra)
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        runs.append(trainer)
    assert_same(runs[0].model, runs[1].model, 1e-6)


def test_rows_without_labels_are_no_candidates(tmp_path: Path) -> None:
    data = rows_of(16, 1)
    for i in (0, 3, 4, 5, 6, 7):
        data[i]["labels"] = torch.full_like(data[i]["labels"], -100)
    runs = []
    for kind in (Trainer, SelectionTrainer):
        extra = {"target_dataset": rows_of(4, 3), "selection": UNTOUCHED} if kind is SelectionTrainer else {}
        trainer = kind(model_of(), arguments(tmp_path, max_steps=4, data_seed=1), train_dataset=data, **extra)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        trainer.train()
        runs.append(trainer)
    assert_same(runs[0].model, runs[1].model, 1e-6)
    counts = [entry["ftw/candidates"] for entry in runs[1].state.log_history if "ftw/candidates" in entry]
    assert counts == [2, 8, 2, 8]


# -- selection on ------------------------------------------------------------------------------------------------------


class Witness(SelectionTrainer):
    """Keeps the stream that it trained on."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.__dict__.setdefault("seen", []).append(({k: v.clone() for k, v in inputs.items()}, num_items_in_batch))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_trainer_and_plain_loop_choose_the_same(kind: str, tmp_path: Path) -> None:
    choices = Choices()
    trainer = Witness(
        model_of(kind),
        arguments(tmp_path, lr_scheduler_type="constant", max_steps=10),
        train_dataset=rows_of(96, 1),
        target_dataset=rows_of(10, 3),
        selection=CHOOSING,
        callbacks=[choices],
    )
    choices.trainer = trainer
    trainer.train()

    model = model_of(kind)
    # Trainer's groups (and its fused AdamW), so that sums run in one order: a first step of Adam magnifies rounding.
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.dim() > 1) == matrices]} for matrices in (True, False)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-3, weight_decay=0.0, fused=True)
    target = [trainer.data_collator(rows_of(10, 3)[at : at + 4]) for at in (0, 4, 8)]
    selector = ftw.Selector(model, optimizer, target=target, budget=3, warmup=2)
    for step in range(10):
        for batch, items in trainer.seen[step * ACCUMULATION : (step + 1) * ACCUMULATION]:
            with selector.record(mass=batch["labels"][:, 1:].ne(-100).sum(1)):
                model(**batch, num_items_in_batch=items).loss.backward()
        selection, theirs = selector.apply(), choices.made[step]
        assert selection.indices.tolist() == theirs.indices.tolist()
        torch.testing.assert_close(selection.weights, theirs.weights, rtol=0, atol=1e-6)
        assert 1 <= len(theirs.indices) <= 3
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, trainer.model, 1e-6)


def test_metrics_are_logged_and_evaluation_is_untouched(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    settings["report_to"] = ["tensorboard"]
    trainer, choices = selecting(tmp_path, model_of(), CHOOSING, **settings)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["ftw/candidates"] for entry in logged] == [8, 8]
    drops = [sum(made.predicted_drop for made in choices.made[at : at + 3]) / 3 for at in (0, 3)]
    assert [entry["ftw/predicted_drop"] for entry in logged] == pytest.approx(drops)
    assert all(entry["ftw/chosen"] <= 3 for entry in logged)
    written = tensorboard(tmp_path)
    for name in [key for key in logged[0] if key.startswith("ftw/")]:
        assert [step for step, _ in written[f"train/{name}"]] == [3, 6]
        assert [value for _, value in written[f"train/{name}"]] == pytest.approx([e[name] for e in logged], rel=1e-6)
    assert not any(tag.startswith("eval/ftw") for tag in written)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3
    assert not any(key.startswith("ftw/") for entry in evaluations for key in entry)

    model = model_of()
    model.load_state_dict(trainer.model.state_dict())
    assert untouched(tmp_path, model).evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == evaluations[-1]["eval_loss"]
    assert not any(module._forward_hooks for module in trainer.model.modules())  # the hooks went with the training


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("changed", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_bf16_and_checkpointing_select(kind: str, changed: dict[str, Any], tmp_path: Path) -> None:
    trainer, choices = selecting(tmp_path, model_of(kind), CHOOSING, max_steps=6, **changed)
    trainer.train()
    assert len(choices.made) == 6
    assert all(1 <= len(made.indices) <= 3 for made in choices.made)
    if "bf16" not in changed:
        twin, same = selecting(tmp_path, model_of(kind), CHOOSING, max_steps=6)
        twin.train()
        for a, b in zip(choices.made, same.made, strict=True):
            assert a.indices.tolist() == b.indices.tolist()
        assert_same(trainer.model, twin.model, 1e-6)


@pytest.mark.parametrize("changed", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_bf16_and_checkpointing_with_everything_chosen(changed: dict[str, Any], tmp_path: Path) -> None:
    plain = untouched(tmp_path, model_of(), max_steps=6, **changed)
    plain.train()
    ours, _ = selecting(tmp_path, model_of(), UNTOUCHED, max_steps=6, **changed)
    ours.train()
    assert losses(plain) == pytest.approx(losses(ours), abs=2e-3 if "bf16" in changed else 1e-6)


# -- packed rows -------------------------------------------------------------------------------------------------------


def flattening(folder: Path, model: Any, collate: Any, **changed: Any) -> tuple[Any, list[ftw.Selection]]:
    """A run over the samples, one of them without labels, and what was chosen; padded where no collator is given."""
    data, target = (
        [{k: v.tolist() for k, v in row.items() if k != "attention_mask"} for row in rows_of(*given)]
        for given in ((96, 1), (10, 3))
    )
    data[5]["labels"] = [-100] * LENGTH
    # With Adam's own epsilon the first steps are signs of what may be rounding.
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "adam_epsilon": 1e-3,
        "train_sampling_strategy": "sequential",
    }
    choices = Choices()
    trainer = SelectionTrainer(
        model,
        arguments(folder, **{**settings, **changed}),
        train_dataset=data,
        target_dataset=target,
        data_collator=collate,
        selection=CHOOSING,
        callbacks=[choices],
    )
    choices.trainer = trainer
    trainer.train()
    return trainer, choices.made


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_are_the_candidates(kind: str, attention: str, tmp_path: Path) -> None:
    runs = []
    for collate in (None, DataCollatorWithFlattening(), DataCollatorWithFlattening(return_flash_attn_kwargs=True)):
        model = model_of(kind)
        model.set_attn_implementation(attention)
        runs.append(flattening(tmp_path, model, collate))
    assert [len(made.weights) for made in runs[0][1]] == [15, 16, 16, 16, 16, 16]
    for trainer, found in runs[1:]:
        for expected, made in zip(runs[0][1], found, strict=True):
            assert expected.indices.tolist() == made.indices.tolist()
            torch.testing.assert_close(expected.weights, made.weights, rtol=1e-6, atol=1e-6)
        assert_same(runs[0][0].model, trainer.model, 1e-6)


@pytest.mark.parametrize("leak", ["attention_mask", "cache"])
def test_packed_samples_that_see_one_another_are_refused(leak: str, tmp_path: Path) -> None:
    def collate(features: Any) -> Any:
        batch = DataCollatorWithFlattening()(features)
        if leak == "attention_mask":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    with pytest.raises(CandidateLayoutError, match="packed into one row must not see one another"):
        flattening(tmp_path, model_of(), collate, use_cache=leak == "cache")


# -- resuming ----------------------------------------------------------------------------------------------------------

RESUMED = SelectionArguments(budget=0.5, filter="greedy", warmup=2, refresh=2, ema=0.3, target_batch_size=4, watch=4)
SAVING = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "logging_steps": 4}


def dropping(kind: str) -> Any:
    """A model that draws dropout, so that the generators' state matters as well."""
    model = model_of(kind)
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            module.attention_dropout = 0.1
    return model


class Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(folder: str, kind: str) -> None:
    """In a process of its own."""
    trainer, _ = selecting(Path(folder), dropping(kind), RESUMED, **SAVING)
    trainer.add_callback(Killed())
    trainer.train()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_run_resumes_bitwise(kind: str, tmp_path: Path) -> None:
    whole, choices = selecting(tmp_path / "whole", dropping(kind), RESUMED, **SAVING)
    whole.train()

    source = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_huggingface as t; t.run_until_killed(*sys.argv[2:])"
    )
    command = [sys.executable, "-c", source, str(Path(__file__).parent), str(tmp_path / "killed"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["checkpoint-5"]

    resumed, rest = selecting(tmp_path / "killed", dropping(kind), RESUMED, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert len(rest.made) == 7
    for expected, found in zip(choices.made[5:], rest.made, strict=True):
        assert torch.equal(expected.indices, found.indices)
        assert torch.equal(expected.weights, found.weights)
        assert expected.predicted_drop == found.predicted_drop
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_the_state_in_a_checkpoint_is_plain_data(tmp_path: Path) -> None:
    trainer, _ = selecting(tmp_path, model_of(), RESUMED, **{**SAVING, "max_steps": 5})
    trainer.train()
    state = torch.load(tmp_path / "checkpoint-5" / STATE_NAME, weights_only=True)
    assert state["step"] == 5


def test_a_checkpoint_without_the_state_is_named(tmp_path: Path) -> None:
    untouched(tmp_path, model_of(), **{**SAVING, "max_steps": 5}).train()
    trainer, choices = selecting(tmp_path, model_of(), RESUMED, **{**SAVING, "max_steps": 7})
    with pytest.warns(UserWarning, match=f"no {STATE_NAME}"):
        trainer.train(resume_from_checkpoint=True)
    assert len(choices.made) == 2


class Foreign:
    """Anything but plain data."""


@pytest.mark.parametrize("damage", ["cut short", "empty", "foreign"])
def test_a_state_that_cannot_be_read_is_named(damage: str, tmp_path: Path) -> None:
    selecting(tmp_path, model_of(), RESUMED, **{**SAVING, "max_steps": 5})[0].train()
    path = tmp_path / "checkpoint-5" / STATE_NAME
    if damage == "foreign":
        torch.save({"step": Foreign()}, path)
    else:
        path.write_bytes(path.read_bytes()[: 200 if damage == "cut short" else 0])
    trainer, _ = selecting(tmp_path, model_of(), RESUMED, **{**SAVING, "max_steps": 7})
    with pytest.raises(DataError, match=f"{STATE_NAME} cannot be read"):
        trainer.train(resume_from_checkpoint=True)


def test_training_twice_begins_a_new_selector(tmp_path: Path) -> None:
    trainer, choices = selecting(tmp_path, model_of(), CHOOSING, max_steps=2)
    trainer.train()
    first = trainer.selector
    trainer.train()
    assert trainer.selector is not first
    assert len(choices.made) == 4


class Interrupts(TrainerCallback):
    """In the middle of the third window, once."""

    seen = 0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen == 8:
            raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer, choices = selecting(tmp_path, model_of(), dataclasses.replace(CHOOSING, watch=1), max_steps=4)
    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in trainer.model.modules())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.selector.state_dict()["step"] == len(choices.made) == 2  # its window is released
    trainer.train()
    assert [len(made.weights) for made in choices.made] == [8] * 6


class Breaks(TrainerCallback):
    """Ends training in the middle of the third window, once."""

    seen = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += 1
        control.should_training_stop = self.seen == 8


def test_a_window_that_was_broken_off_is_forgotten(tmp_path: Path) -> None:
    trainer, choices = selecting(tmp_path, model_of(), CHOOSING, max_steps=4)
    trainer.add_callback(Breaks())
    trainer.train()
    assert len(choices.made) == 2
    trainer.train()
    assert [len(made.weights) for made in choices.made] == [8] * 6


# -- loss scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_scale", [2.0**7, 2.0**40], ids=["fits", "overflows at first"])
def test_a_gradient_scaler(init_scale: float, tmp_path: Path) -> None:
    with half_precision() as scaled:
        ours, choices = selecting(tmp_path, model_of(), UNTOUCHED, max_steps=30)
        scaled(ours, init_scale).train()
        plain = scaled(untouched(tmp_path, model_of(), max_steps=30), init_scale)
        plain.train()
    assert ours.accelerator.scaler.get_scale() == plain.accelerator.scaler.get_scale()
    overflows = [made.status == "overflow" for made in choices.made]
    assert overflows[0] == (init_scale == 2.0**40)
    assert not overflows[-1]
    assert losses(plain) == pytest.approx(losses(ours), abs=2e-2)  # they are in half precision
    assert ours.selector.state_dict()["step"] == overflows.count(False)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", {"budget": 0.25, "trust": 1.0, "target_batches": 1, "preset": "ours", "filter": None, "check": True}),
        ("--budget 4", {"budget": 4}),
        ("--budget 0.5 --filter topk --solver uniform", {"budget": 0.5, "filter": "topk", "solver": "uniform"}),
        ("--objective utility --trust adaptive --target_batches all", {"trust": "adaptive", "target_batches": "all"}),
        ("--memory_cap 1000000 --reference target --no_check", {"memory_cap": 1000000, "check": False}),
        ("--relinearise --ema 0.5 --cap 2 --geometry update", {"relinearise": True, "ema": 0.5, "cap": 2.0}),
    ],
)
def test_the_command_line(line: str, found: dict[str, Any]) -> None:
    (made,) = HfArgumentParser([SelectionArguments]).parse_args_into_dataclasses(line.split())
    assert {name: getattr(made, name) for name in found} == found
    assert all(type(getattr(made, name)) is type(value) for name, value in found.items())


def test_every_argument_has_a_help_text_and_is_one_of_the_selectors() -> None:
    known = inspect.signature(ftw.Selector).parameters
    for each in dataclasses.fields(SelectionArguments):
        assert each.metadata["help"]
        name = {"selection_seed": "seed"}.get(each.name, each.name)
        assert name in known or each.name in ("target_batch_size", "log_bytes", "log_text")
        if name in known:
            assert each.default == known[name].default


@pytest.mark.parametrize("of_trl", [False, True])
def test_one_parser_for_the_trainers_arguments_and_these(of_trl: bool, tmp_path: Path) -> None:
    kinds: list[Any] = [TrainingArguments]
    if of_trl:
        trl = pytest.importorskip("trl", reason="its configurations are parsed")
        kinds = [trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig]
    cpu = f"--output_dir {tmp_path} --use_cpu --bf16 false"
    line = f"{cpu} --seed 3 --selection-seed 4 --budget 2 --logging_steps 7 --log {tmp_path / 'log'}"
    *theirs, ours = HfArgumentParser([*kinds, SelectionArguments]).parse_args_into_dataclasses(line.split())
    settings = theirs[1 if of_trl else 0]
    assert (settings.seed, settings.logging_steps, settings.log_level) == (3, 7, "passive")
    assert (ours.selection_seed, ours.budget, ours.log) == (4, 2, str(tmp_path / "log"))
    assert ours.for_selector()["seed"] == 4
    ours, *_ = HfArgumentParser([SelectionArguments, *kinds]).parse_args_into_dataclasses([*cpu.split(), "--seed", "3"])
    assert ours.for_selector()["seed"] == 0


def test_the_seed_by_its_short_name() -> None:
    made = SelectionArguments(seed=5)
    assert made.selection_seed == made.for_selector()["seed"] == 5
    assert SelectionArguments(selection_seed=6).for_selector()["seed"] == 6
    assert SelectionArguments(seed=0, selection_seed=6).selection_seed == 0
    assert dataclasses.replace(made, budget=2).selection_seed == 5
    assert dataclasses.replace(made, seed=8).selection_seed == 8
    assert dataclasses.replace(made, selection_seed=9).selection_seed == 9


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"budget": 0}, ConfigurationError, "budget is 0"),
        ({"budget": 1.5}, ConfigurationError, "budget is 1.5"),
        ({"budget": "much"}, ConfigurationError, "budget is 'much'"),
        ({"budget": None}, ConfigurationError, "budget is None"),
        ({"budget": float("nan")}, ConfigurationError, "budget is nan"),
        ({"filter": "topkk"}, UnknownComponentError, "did you mean 'topk'"),
        ({"solver": "pdg"}, UnknownComponentError, "did you mean 'pgd'"),
        ({"gradients": "ful"}, UnknownComponentError, "did you mean 'full'"),
        ({"preset": "our"}, ConfigurationError, "did you mean 'ours'"),
        ({"preset": "token_level"}, ConfigurationError, "tokens as candidates"),
        ({"geometry": "round"}, ConfigurationError, "geometry is 'round'"),
        ({"objective": "win"}, ConfigurationError, "objective is 'win'"),
        ({"total": "some"}, ConfigurationError, "total is 'some'"),
        ({"trust": "blind"}, ConfigurationError, "trust is 'blind'"),
        ({"refresh": 0}, ConfigurationError, "refresh is 0"),
        ({"refresh": 1.5}, ConfigurationError, "refresh is 1.5"),
        ({"target_batch_size": 0}, ConfigurationError, "target_batch_size is 0"),
        ({"target_batches": "some"}, ConfigurationError, "target_batches is 'some'"),
        ({"ema": 1.0}, ConfigurationError, "ema is 1.0"),
        ({"memory_cap": 0}, ConfigurationError, "memory_cap is 0"),
        ({"warmup": -1}, ConfigurationError, "warmup is -1"),
        ({"uncovered": "no"}, ConfigurationError, "uncovered is 'no'"),
        ({"nothing_useful": "no"}, ConfigurationError, "nothing_useful is 'no'"),
        ({"reference": "no"}, ConfigurationError, "reference is 'no'"),
        ({"residual": "no"}, ConfigurationError, "residual is 'no'"),
        ({"cap": 0.5}, ConfigurationError, "cap is 0.5"),
        ({"ridge": float("inf")}, ConfigurationError, "ridge is inf"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[FtwError], message: str) -> None:
    with pytest.raises(error, match=message):
        SelectionArguments(**given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigurationError, "target_dataset is a NoneType"),
        ({"target_dataset": iter([])}, ConfigurationError, "a dataset with a length is needed"),
        ({"target_dataset": []}, TargetError, "target_dataset is empty"),
        ({"target_dataset": rows_of(2, 1), "selection": {"budget": 1}}, ConfigurationError, "selection is a dict"),
    ],
)
def test_bad_trainers(given: dict[str, Any], error: type[FtwError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        SelectionTrainer(model_of(), arguments(tmp_path), train_dataset=rows_of(8, 1), **given)


def test_sharded_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Trainer.create_accelerator_and_postprocess

    def sharding(trainer: Trainer) -> None:
        make(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharding)
    with pytest.raises(ConfigurationError, match="sharded; selection knows replicas"):
        selecting(tmp_path, model_of(), CHOOSING)


@pytest.mark.slow
def test_a_compiled_model_chooses_the_same(tmp_path: Path) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer, choices = selecting(tmp_path, model_of(), CHOOSING, max_steps=4, **settings)
    trainer.train()
    torch._dynamo.reset()
    twin, same = selecting(tmp_path, model_of(), CHOOSING, max_steps=4)
    twin.train()
    for a, b in zip(choices.made, same.made, strict=True):
        assert a.indices.tolist() == b.indices.tolist()
        torch.testing.assert_close(a.weights, b.weights, rtol=1e-3, atol=1e-3)
    assert losses(trainer) == pytest.approx(losses(twin), abs=1e-4)
