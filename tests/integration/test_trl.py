"""TRL's SFTTrainer with selection: the untouched trainer where nothing is selected, a plain loop where it is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw.errors import CandidateLayoutError, ConfigurationError, TargetError

pytest.importorskip("transformers", reason="models and tokenizers come from it")
pytest.importorskip("peft", reason="adapters come from it")
pytest.importorskip("trl", reason="the integration is for its SFTTrainer")

import datasets
from datasets import Dataset
from ftw_integrations.trl import SelectionArguments, SelectionSFTTrainer
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.trainers import half_precision, tensorboard

datasets.disable_progress_bars()

ACCUMULATION, ROWS, STEPS = 4, 2, 20
WORDS = [f"w{i}" for i in range(50)]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} <end> {% else %}<bot> "
    "{% generation %}{{ m['content'] }} <end> {% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
UNTOUCHED = SelectionArguments(budget=1.0, filter="all", solver="uniform", target_batch_size=4)
CHOOSING = SelectionArguments(budget=3, warmup=2, target_batch_size=4)
METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens")


@functools.cache
def tokenizer() -> Any:
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<end>", "<unk>", "<user>", "<bot>", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )


def samples(count: int, seed: int, kind: str = "text") -> Dataset:
    """Samples of several lengths: plain text, prompt and completion, or talk."""
    generator = torch.Generator().manual_seed(seed)

    def words(least: int, most: int) -> str:
        number = int(torch.randint(least, most + 1, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (number,), generator=generator).tolist())

    made: list[dict[str, Any]] = []
    for _ in range(count):
        if kind == "text":
            made.append({"text": words(4, 11) + " <end>"})
        elif kind == "prompt":
            made.append({"prompt": words(2, 5), "completion": " " + words(2, 6) + " <end>"})
        else:
            turns = [
                ("user", words(2, 4)),
                ("assistant", words(1, 3)),
                ("user", words(1, 3)),
                ("assistant", words(2, 3)),
            ]
            made.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return Dataset.from_list(made)


def model_of(attention: str = "sdpa", tied: bool = False) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer()),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=tied,
            attn_implementation=attention,
        )
    )


def trainer_of(
    folder: Path,
    selection: SelectionArguments | None,
    *,
    adapters: bool | dict[str, Any] = False,
    kind: str = "text",
    model: Any = None,
    callbacks: Any = (),
    of: Any = None,
    **changed: Any,
) -> Any:
    """SFTTrainer as it is, or with selection. Gradient checkpointing is on, as TRL has it."""
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": 0.05,
        "learning_rate": 3e-3,
        "adam_epsilon": 1e-3,  # with 1e-8 the first steps are signs of what may be rounding
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "assistant_only_loss": kind == "talk",
    }
    extra = {} if selection is None else {"target_dataset": samples(10, 3, kind), "selection": selection}
    given = adapters if isinstance(adapters, dict) else {"target_modules": "all-linear"}
    lora = LoraConfig(r=3, task_type="CAUSAL_LM", **given)
    return (of or (SFTTrainer if selection is None else SelectionSFTTrainer))(
        model=model_of() if model is None else model,
        args=SFTConfig(**{**settings, **changed}),
        train_dataset=samples(96, 1, kind),
        eval_dataset=samples(6, 2, kind),
        processing_class=tokenizer(),
        peft_config=lora if adapters else None,
        callbacks=list(callbacks),
        **extra,
    )


class Choices(TrainerCallback):
    """What was chosen in every step."""

    def __init__(self) -> None:
        self.made: list[ftw.Selection] = []
        self.trainer: Any = None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.made.append(self.trainer.selection)


class Witness(SelectionSFTTrainer):
    """Keeps the stream that it trained on, window by window: an epoch cuts its last one short."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        windows = self.__dict__.setdefault("seen", {})
        windows.setdefault(self.state.global_step, []).append((kept, num_items_in_batch))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss


def chosen(folder: Path, selection: SelectionArguments, **settings: Any) -> tuple[Any, list[ftw.Selection]]:
    """A trainer that has trained, and what it chose."""
    choices = Choices()
    trainer = trainer_of(folder, selection, callbacks=[choices], **settings)
    choices.trainer = trainer
    trainer.train()
    return trainer, choices.made


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_run(first: Any, second: Any, tolerance: float = 1e-6) -> None:
    named = dict(second.model.named_parameters())
    for name, p in first.model.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=0, atol=tolerance)
    for name in METRICS:
        assert logged(first, name) == pytest.approx(logged(second, name), abs=tolerance)


def assert_same_choice(first: list[ftw.Selection], second: list[ftw.Selection], tolerance: float = 1e-6) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.indices.tolist() == b.indices.tolist()
        torch.testing.assert_close(a.weights, b.weights, rtol=tolerance, atol=tolerance)


# -- everything chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_all_and_uniform_is_the_untouched_trainer(kind: str, layout: str, tmp_path: Path) -> None:
    settings = {"adam_epsilon": 1e-8, **({"packing": True, "max_length": 24} if layout == "packed" else {})}
    runs = [
        trainer_of(tmp_path, each, adapters=kind == "lora", model=model_of(tied=kind == "tied"), **settings)
        for each in (None, UNTOUCHED)
    ]
    for trainer in runs:
        assert trainer.args.gradient_checkpointing
        trainer.train()
    assert_same_run(*runs)
    norms = [logged(trainer, "grad_norm") for trainer in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(norms[0]) > 0.05  # the clipping acted
    assert {key for entry in runs[0].state.log_history for key in entry} <= {
        key for entry in runs[1].state.log_history for key in entry
    }


@pytest.mark.parametrize(
    "changed", [{"loss_type": "chunked_nll"}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}]
)
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_each_loss_is_the_untouched_trainers(changed: dict[str, Any], tmp_path: Path) -> None:
    runs = [
        trainer_of(tmp_path, each, max_steps=5, eval_strategy="steps", eval_steps=2, **changed)
        for each in (None, UNTOUCHED)
    ]
    for trainer in runs:
        trainer.train()
    assert_same_run(*runs)
    evaluations = [[e for e in trainer.state.log_history if "eval_loss" in e] for trainer in runs]
    for name in (
        "eval_loss",
        "eval_entropy",
        "eval_mean_token_accuracy",
        "eval_num_tokens",
    ):  # the target left no trace
        first, second = ([entry[name] for entry in each] for each in evaluations)
        assert first == pytest.approx(second, abs=1e-6)


def heads(name: str) -> Any:
    """Models that change what their head says, share its weight, or add a loss of their own."""
    import transformers

    torch.manual_seed(0)
    size: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    size |= {"vocab_size": len(tokenizer()), "hidden_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if name == "GPT2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**size, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        )
    size |= {"intermediate_size": 24, "num_key_value_heads": 2}
    if name == "Cohere":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**size, logit_scale=0.3))
    mixtral = transformers.MixtralConfig(
        **size, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1
    )
    return transformers.MixtralForCausalLM(mixtral)


@pytest.mark.parametrize("name", ["GPT2", "Cohere", "Mixtral", "lm_head saved"])
def test_other_heads(name: str, tmp_path: Path) -> None:
    adapters: Any = False
    if name == "lm_head saved":
        adapters = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    runs = [
        trainer_of(tmp_path, each, model=None if adapters else heads(name), adapters=adapters, max_steps=3)
        for each in (None, UNTOUCHED)
    ]
    for trainer in runs:
        trainer.train()
    assert_same_run(*runs)
    assert (name == "Mixtral") == ("aux_loss" in runs[1].state.log_history[0])
    if name == "Mixtral":
        assert logged(runs[0], "aux_loss") == pytest.approx(logged(runs[1], "aux_loss"), abs=1e-6)


# -- selection on ------------------------------------------------------------------------------------------------------


def unpacked(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The samples of a micro-batch that have labels as rows of their own, padded; as it is, where they are."""
    if "position_ids" not in batch:
        return batch
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    pairs = [(a, b) for a, b in pairwise(starts) if bool((batch["labels"][0, a + 1 : b] != -100).any())]
    shape = (len(pairs), max(b - a for a, b in pairs))
    rows = {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, -100)}
    rows["attention_mask"] = torch.zeros(shape, dtype=torch.long)
    for row, (a, b) in enumerate(pairs):
        for name in ("input_ids", "labels"):
            rows[name][row, : b - a] = batch[name][0, a:b]
        rows["attention_mask"][row, : b - a] = 1
    return rows


def plain_loop(model: nn.Module, trainer: Any) -> list[ftw.Selection]:
    """The stream that the trainer saw, unpacked, in a loop of its own; losses and logits are the model's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.dim() > 1) == matrices]} for matrices in (True, False)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-3, eps=1e-3, weight_decay=0.0, fused=True)
    rows = list(trainer._target_dataset.select_columns(["input_ids", "labels"]))
    collate = type(trainer.data_collator)(pad_token_id=0)
    target = [collate(rows[at : at + 4]) for at in range(0, len(rows), 4)]
    selector = ftw.Selector(model, optimizer, target=target, budget=3, warmup=2)
    made = []
    for window in trainer.seen.values():
        for seen, items in window:
            batch = unpacked(seen)
            with selector.record(mass=batch["labels"][:, 1:].ne(-100).sum(1)):
                model(**batch, num_items_in_batch=items).loss.backward()
        made.append(selector.apply())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    selector.close()
    return made


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("text", {}),
        ("prompt", {}),
        ("talk", {}),
        ("text", {"packing": True, "max_length": 24}),
        ("prompt", {"packing": True, "max_length": 24}),
        ("text", {"packing": True, "max_length": 8, "packing_strategy": "bfd_split"}),
        ("text", {"packing": True, "max_length": 12, "packing_strategy": "wrapped"}),
        ("text", {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8}),
    ],
    ids=["text", "completion", "assistant", "bfd", "bfd completion", "bfd_split", "wrapped", "padding_free"],
)
def test_trainer_and_plain_loop_choose_the_same(
    kind: str, changed: dict[str, Any], adapters: bool, tmp_path: Path
) -> None:
    """Completion-only losses and packing among them: the plain loop has one row a sample and the model's own loss."""
    settings = {"max_steps": 6, "lr_scheduler_type": "constant", **changed}
    trainer, made = chosen(tmp_path, CHOOSING, adapters=adapters, kind=kind, of=Witness, **settings)
    fresh = trainer_of(tmp_path, None, adapters=adapters, kind=kind).model
    assert_same_choice(made, plain_loop(fresh, trainer))
    named = dict(fresh.named_parameters())
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=0, atol=1e-6)
    assert all(1 <= len(each.indices) <= 3 for each in made)
    labels = [batch["labels"] for window in trainer.seen.values() for batch, _ in window]
    if kind != "text":
        assert all(0.1 < float((each == -100).float().mean()) < 0.9 for each in labels)  # the prompts have none
    if changed.get("packing_strategy") == "wrapped":  # cut anywhere: the pieces are the candidates
        assert {len(each.weights) for each in made} == {ROWS * ACCUMULATION}
    elif "packing" in changed:
        assert max(len(each.weights) for each in made) > ROWS * ACCUMULATION


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_packed_samples_with_eager_attention(adapters: bool, tmp_path: Path) -> None:
    """And where the model would use a cache, which TRL forbids it in training and we for the target."""
    settings = {"packing": True, "max_length": 24, "max_steps": 4, "adapters": adapters}
    settings["gradient_checkpointing"] = False  # which would forbid the cache as well
    first, second = (
        chosen(tmp_path, CHOOSING, model=model_of(attention), use_cache=attention == "eager", **settings)
        for attention in ("sdpa", "eager")
    )
    assert_same_choice(first[1], second[1])


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 24}], ids=["padded", "packed"])
def test_a_frozen_head_may_be_shown_labelled_tokens_alone(
    layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As TRL does on a GPU; here on a CPU."""
    runs = []
    for alone in (False, True):
        monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device, alone=alone: alone)
        runs.append(chosen(tmp_path, CHOOSING, adapters=True, kind="prompt", max_steps=4, **layout))
    assert_same_choice(runs[0][1], runs[1][1])
    assert_same_run(runs[0][0], runs[1][0])


@pytest.fixture
def unmasked() -> Iterator[str]:
    """An attention that is causal and knows no borders, as one without a mask function of its own is."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("unmasked", sdpa_attention_forward)
    yield "unmasked"
    del ALL_ATTENTION_FUNCTIONS._global_mapping["unmasked"]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_packed_samples_that_see_one_another_are_refused(adapters: bool, unmasked: str, tmp_path: Path) -> None:
    settings = {"packing": True, "max_length": 24, "max_steps": 2, "adapters": adapters}
    trainer = trainer_of(tmp_path, CHOOSING, model=model_of(unmasked), **settings)
    with pytest.raises(CandidateLayoutError, match="packed into one row must not see one another"):
        trainer.train()
    trainer = trainer_of(tmp_path, CHOOSING, model=model_of(unmasked), **{**settings, "packing": False})
    trainer.train()  # alone in their rows they may


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 24}], ids=["padded", "packed"])
def test_a_capped_window_chooses_the_same(layout: dict[str, Any], adapters: bool, tmp_path: Path) -> None:
    """Candidates run again through the per-token losses that TRL's head returns, which are one fewer than tokens."""
    given = {"budget": 3, "reference": "previous", "target_batch_size": 4, "warmup": 2}
    runs = [
        chosen(tmp_path, SelectionArguments(**given, memory_cap=cap), adapters=adapters, max_steps=4, **layout)
        for cap in (None, 40_000 if adapters else 60_000)
    ]
    assert all(each.diagnostics["replays"] > 0 for each in runs[1][1])
    assert_same_choice(runs[0][1], runs[1][1])
    assert_same_run(runs[0][0], runs[1][0])


# -- as TRL has it -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_defaults_of_trl(adapters: bool, tmp_path: Path) -> None:
    """bf16 and checkpointing are on."""
    runs = []
    for selection in (None, UNTOUCHED, CHOOSING):
        trainer = trainer_of(tmp_path, selection, adapters=adapters, bf16=SFTConfig("", use_cpu=True).bf16, max_steps=6)
        assert trainer.args.bf16
        assert trainer.args.gradient_checkpointing
        trainer.train()
        runs.append(trainer)
    for name in METRICS:
        assert logged(runs[0], name) == pytest.approx(logged(runs[1], name), abs=5e-3)
    assert logged(runs[2], "ftw/candidates") == [8] * 6
    assert max(logged(runs[2], "ftw/chosen")) <= 3


def test_a_head_that_is_trained_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(tmp_path, CHOOSING, adapters=True)
    assert "logits" not in caplog.text
    trainer_of(tmp_path, CHOOSING)
    assert "logits (rows x length x vocabulary) are formed" in caplog.text


def test_metrics_are_logged_and_evaluation_is_untouched(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    trainer, made = chosen(tmp_path, CHOOSING, report_to=["tensorboard"], **settings)
    drops = [sum(each.predicted_drop for each in made[at : at + 3]) / 3 for at in (0, 3)]
    assert logged(trainer, "ftw/predicted_drop") == pytest.approx(drops)
    written = tensorboard(tmp_path)
    for name in ("loss", "entropy", "ftw/predicted_drop", "ftw/chosen", "ftw/effective_sample_size"):
        steps, values = zip(*written[f"train/{name}"], strict=True)
        assert steps == (3, 6)
        assert values == pytest.approx(logged(trainer, name), rel=1e-6)
    assert not any(tag.startswith("eval/ftw") for tag in written)

    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3
    assert not any(key.startswith("ftw/") for entry in evaluations for key in entry)
    model = model_of()
    model.load_state_dict(trainer.model.state_dict())
    plain = trainer_of(tmp_path, None, model=model).evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert plain[name] == trainer.evaluate()[name] == evaluations[-1][name]
    hooks = [hook for module in trainer.model.modules() for hook in module._forward_hooks.values()]
    assert not any(type(hook).__module__.startswith("ftw") for hook in hooks)  # they went with the training


class Breaks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 24}], ids=["padded", "packed"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_run_that_was_broken_off_resumes_bitwise(adapters: bool, layout: dict[str, Any], tmp_path: Path) -> None:
    given = {"budget": 0.5, "warmup": 2, "refresh": 2, "ema": 0.3, "target_batch_size": 4, "watch": 4}
    settings = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 5,
        "bf16": True,
        "adapters": adapters,
        **layout,
    }

    def trainer(folder: str, *callbacks: Any) -> tuple[Any, list[ftw.Selection]]:
        choices, model = Choices(), model_of()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1  # so that the generators' state matters as well
        made = trainer_of(
            tmp_path / folder, SelectionArguments(**given), model=model, callbacks=[choices, *callbacks], **settings
        )
        choices.trainer = made
        return made, choices.made

    whole, expected = trainer("whole")
    whole.train()
    broken, _ = trainer("broken", Breaks())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed, found = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    assert len(found) == 7
    for a, b in zip(expected[5:], found, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.weights, b.weights)
        assert a.predicted_drop == b.predicted_drop
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("init_scale", [2.0**7, 2.0**40], ids=["fits", "overflows at first"])
def test_a_gradient_scaler(init_scale: float, tmp_path: Path) -> None:
    with half_precision() as scaled:
        runs = [scaled(trainer_of(tmp_path, each, max_steps=30), init_scale) for each in (None, UNTOUCHED)]
        for trainer in runs:
            trainer.train()
    assert runs[0].accelerator.scaler.get_scale() == runs[1].accelerator.scaler.get_scale()
    overflows = sum(logged(runs[1], "ftw/overflow"))
    assert (overflows > 0) == (init_scale == 2.0**40)
    for name in ("loss", "entropy"):
        assert logged(runs[0], name) == pytest.approx(logged(runs[1], name), abs=2e-2)  # they are in half precision
    assert runs[1].selector.state_dict()["step"] == 30 - overflows


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_compiled_model_chooses_the_same(adapters: bool, tmp_path: Path) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    settings = {"max_steps": 4, "adapters": adapters}
    first, made = chosen(tmp_path, CHOOSING, torch_compile=True, torch_compile_backend="aot_eager", **settings)
    torch._dynamo.reset()
    second, same = chosen(tmp_path, CHOOSING, **settings)
    assert_same_choice(made, same, 1e-3)
    for name in METRICS:
        assert logged(first, name) == pytest.approx(logged(second, name), abs=1e-4)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (None, ConfigurationError, "target_dataset is a NoneType; a datasets.Dataset is needed"),
        ([{"text": "w1 w2"}], ConfigurationError, "target_dataset is a list"),
        (Dataset.from_list([]), TargetError, "target_dataset is empty"),
        (samples(2, 1, "prompt"), TargetError, "has a label within max_length=2"),
    ],
    ids=["none", "list", "empty", "too long"],
)
def test_bad_targets(target: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        SelectionSFTTrainer(
            model_of(),
            SFTConfig(str(tmp_path), use_cpu=True, max_length=2, report_to=[]),
            train_dataset=Dataset.from_list([{"prompt": "w1", "completion": " w2 <end>"}]),
            processing_class=tokenizer(),
            target_dataset=target,
        )
