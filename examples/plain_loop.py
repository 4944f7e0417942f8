"""A plain loop with selection: three lines more with `record()` and `apply()`, or none at all with `attach()`.

    python examples/plain_loop.py            # also --steps and --pretrain-steps

Generated data, a small Llama built on the spot, nothing downloaded; under a minute on two cores.
"""

from __future__ import annotations

import argparse
import copy

import torch
from ftw_integrations.loop import attach, token_mean
from torch import nn

import ftw
from ftw.experiment.data import batches, collate, encode, label_tokens, pool_order
from ftw.experiment.models import Pretraining, tiny, tiny_tokenizer
from ftw.experiment.sources import demo_data


def main(command_line: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pretrain-steps", type=int, default=60)
    given = parser.parse_args(command_line)

    data, tokenizer = demo_data(0), tiny_tokenizer()
    pad = tokenizer.pad_token_id
    pool, target, test = (encode(part, tokenizer, 96).rows for part in (data.pool, data.target, data.test[:64]))
    pretraining = encode(data.generic, tokenizer, 96, loss_on_prompt=True).rows
    start, _ = tiny(pretraining, Pretraining(steps=given.pretrain_steps), cache=None)
    order = pool_order(len(pool), 16, given.steps, seed=0).tolist()
    loader = [collate([pool[i] for i in step], pad) for step in order]
    target_batches = batches(target, 8, pad)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def recorded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        selector = ftw.Selector(model, optimizer, target=target_batches, budget=0.25)
        for batch in loader:
            with selector.record(mass=label_tokens(batch)):
                model(**batch).loss.backward()
            selector.apply()
            optimizer.step()
            optimizer.zero_grad()
        selector.close()

    def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with attach(model, optimizer, target=target_batches, budget=0.25, mass=token_mean):
            plain(model, optimizer)

    losses = {}
    for loop in (plain, recorded, attached):
        model = copy.deepcopy(start).train()
        loop(model, optimizer_of(model))
        model.eval()
        with torch.no_grad():
            losses[loop.__name__] = float(model(**collate(test, pad)).loss)
        print(f"test loss, {loop.__name__} loop: {losses[loop.__name__]:.3f}")
    return losses


if __name__ == "__main__":
    main()
