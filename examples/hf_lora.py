"""Hugging Face's Trainer and LoRA, with selection and without: the loss on a test set after the same steps.

    python examples/hf_lora.py
    python examples/hf_lora.py --steps 60 --budget 0.5 --filter topk      # any of SelectionArguments
    python examples/hf_lora.py --log runs/lora --watch 5 && ftw report runs/lora

Generated data, a small Llama built on the spot, nothing downloaded; under a minute on two cores.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from typing import Any

from ftw_integrations.huggingface import SelectionArguments, SelectionTrainer
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Trainer, TrainingArguments

from ftw.experiment.data import Row, encode
from ftw.experiment.models import Pretraining, add_lora, tiny, tiny_tokenizer
from ftw.experiment.sources import demo_data


@dataclass
class ExampleArguments:
    steps: int = field(default=30, metadata={"help": "Optimizer steps of each run."})
    pretrain_steps: int = field(default=60, metadata={"help": "Steps that make the model which is fine-tuned."})


def rows(encoded: list[Row]) -> list[dict[str, Any]]:
    """The model's inputs, and what the decision log calls the samples."""
    return [
        {"input_ids": row.input_ids, "labels": row.labels, "id": number, "source": row.source}
        for number, row in enumerate(encoded)
    ]


def main(command_line: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser([ExampleArguments, SelectionArguments])
    example, selection = parser.parse_args_into_dataclasses(command_line)

    data, tokenizer = demo_data(0), tiny_tokenizer()
    pool, target, test = (rows(encode(part, tokenizer, 96).rows) for part in (data.pool, data.target, data.test[:64]))
    pretraining = encode(data.generic, tokenizer, 96, loss_on_prompt=True).rows
    model, _ = tiny(pretraining, Pretraining(steps=example.pretrain_steps), cache=None)

    losses = {}
    for name in ("all of it", "selected"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=example.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,  # the pool: 16 candidates a step
                learning_rate=5e-3,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            common: dict[str, Any] = {
                "model": add_lora(copy.deepcopy(model), rank=8, seed=0),
                "args": arguments,
                "train_dataset": pool,
                "eval_dataset": test,
                "data_collator": DataCollatorForSeq2Seq(tokenizer),
                "processing_class": tokenizer,  # decodes texts for the log
            }
            if name == "selected":
                trainer = SelectionTrainer(**common, target_dataset=target, selection=selection)
            else:
                trainer = Trainer(**common)
            trainer.train()
            losses[name] = trainer.evaluate()["eval_loss"]
    for name, loss in losses.items():
        print(f"test loss, trained on {name}: {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
