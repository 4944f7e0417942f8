"""A LightningModule that knows of no selection, trained with the callback and without: the loss on a test set.

    python examples/lightning_module.py            # also --steps, --pretrain-steps and --budget

Generated data, a small Llama built on the spot, nothing downloaded; under a minute on two cores.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from typing import Any

import lightning as L
import torch
from ftw_integrations.lightning import SelectionCallback, token_mean
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ftw.experiment.data import batches, collate, encode, pool_order
from ftw.experiment.models import Pretraining, tiny, tiny_tokenizer
from ftw.experiment.sources import demo_data


class FineTuning(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(command_line: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pretrain-steps", type=int, default=60)
    parser.add_argument("--budget", type=float, default=0.25, help="share of the pool that is kept")
    given = parser.parse_args(command_line)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    data, tokenizer = demo_data(0), tiny_tokenizer()
    pad = tokenizer.pad_token_id
    pool, target, test = (encode(part, tokenizer, 96).rows for part in (data.pool, data.target, data.test[:64]))
    pretraining = encode(data.generic, tokenizer, 96, loss_on_prompt=True).rows
    start, _ = tiny(pretraining, Pretraining(steps=given.pretrain_steps), cache=None)
    order = pool_order(len(pool), 16, given.steps, seed=0).flatten().tolist()
    micro_batches = [collate([pool[i] for i in order[at : at + 4]], pad) for at in range(0, len(order), 4)]

    selection = SelectionCallback(batches(target, 8, pad), mass=token_mean, budget=given.budget)
    losses = {}
    for name, callbacks in (("all of it", []), ("selected", [selection])):
        module = FineTuning(copy.deepcopy(start))
        settings: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False}
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=given.steps,
            accumulate_grad_batches=4,  # the pool: 16 candidates a step
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            callbacks=callbacks,
            **settings,
        )
        trainer.fit(module, DataLoader(micro_batches, batch_size=None))
        (found,) = trainer.test(module, DataLoader([collate(test, pad)], batch_size=None), verbose=False)
        losses[name] = found["test_loss"]
        print(f"test loss, trained on {name}: {losses[name]:.3f}")
    return losses


if __name__ == "__main__":
    main()
