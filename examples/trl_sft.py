"""TRL's SFTTrainer and LoRA, with selection and without: the loss on a test set after the same steps.

    python examples/trl_sft.py
    python examples/trl_sft.py --packing true --steps 60 --budget 0.5     # any of SelectionArguments

Generated data, a small Llama and its tokenizer built on the spot, nothing downloaded; under a minute on two cores.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets import Dataset
from ftw_integrations.trl import SelectionArguments, SelectionSFTTrainer
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import HfArgumentParser, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ftw.experiment.data import Sample, encode
from ftw.experiment.models import Pretraining, tiny
from ftw.experiment.sources import demo_data


@dataclass
class ExampleArguments:
    steps: int = field(default=30, metadata={"help": "Optimizer steps of each run."})
    pretrain_steps: int = field(default=60, metadata={"help": "Steps that make the model which is fine-tuned."})
    packing: bool = field(default=False, metadata={"help": "Pack several samples into one row."})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, after pad, end and unknown."""
    names = ["<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def prompts(samples: list[Sample]) -> Dataset:
    """Of the kind that TRL calls prompt-completion: the loss falls on the completion alone."""
    return Dataset.from_list([{"prompt": each.prompt + "\n", "completion": each.response} for each in samples])


def main(command_line: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser([ExampleArguments, SelectionArguments])
    example, selection = parser.parse_args_into_dataclasses(command_line)

    datasets.disable_progress_bars()
    data, tokenizer = demo_data(0), byte_tokenizer()
    pretraining = encode(data.generic, tokenizer, 96, loss_on_prompt=True).rows
    model, _ = tiny(pretraining, Pretraining(steps=example.pretrain_steps), cache=None)

    losses = {}
    for name in ("all of it", "selected"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                folder,
                max_steps=example.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,  # the pool: 16 candidates a step, more of them where rows are packed
                learning_rate=5e-3,
                max_length=96,
                packing=example.packing,
                eval_packing=False,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            common: dict[str, Any] = {
                "model": copy.deepcopy(model),
                "args": arguments,
                "train_dataset": prompts(data.pool),
                "eval_dataset": prompts(data.test[:64]),
                "processing_class": tokenizer,
                "peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            }
            if name == "selected":
                trainer = SelectionSFTTrainer(**common, target_dataset=prompts(data.target), selection=selection)
            else:
                trainer = SFTTrainer(**common)
            trainer.train()
            losses[name] = trainer.evaluate()["eval_loss"]
    for name, loss in losses.items():
        print(f"test loss, trained on {name}: {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
