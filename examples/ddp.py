"""Two processes with a replica each: one pool over both, selected together.

    torchrun --standalone --nproc_per_node 2 examples/ddp.py          # also --steps and --pretrain-steps

Generated data, a small Llama built on the spot, nothing downloaded; under a minute on two cores. Where gloo cannot look
up this machine's own name, put GLOO_SOCKET_IFNAME=lo before the command.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import ftw
from ftw.experiment.data import batches, collate, encode, label_tokens, pool_order
from ftw.experiment.models import Pretraining, tiny, tiny_tokenizer
from ftw.experiment.sources import demo_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pretrain-steps", type=int, default=60)
    given = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data, tokenizer = demo_data(0), tiny_tokenizer()
    pad = tokenizer.pad_token_id
    pool, target, test = (encode(part, tokenizer, 96).rows for part in (data.pool, data.target, data.test[:64]))
    pretraining = encode(data.generic, tokenizer, 96, loss_on_prompt=True).rows
    # The first process makes the weights; DistributedDataParallel hands them to the others.
    start, _ = tiny(pretraining, Pretraining(steps=given.pretrain_steps if rank == 0 else 1), cache=None)
    order = pool_order(len(pool), 16, given.steps, seed=0)[:, rank::world].tolist()  # each has its part of the pool

    losses, sent = {}, 0
    begin = {name: value.clone() for name, value in start.state_dict().items()}
    for name in ("all of it", "selected"):
        start.load_state_dict(begin)
        model = DistributedDataParallel(start.train())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        selector = None
        if name == "selected":  # its part of the target, too: gradients are averaged
            own = [batch for i, batch in enumerate(batches(target, 4, pad)) if i % world == rank]
            selector = ftw.Selector(model, optimizer, target=own, budget=0.25, filter="chain")
        for step in order:
            batch = collate([pool[i] for i in step], pad)
            if selector is None:
                model(**batch).loss.backward()
            else:
                # The loss is a mean over the process's own tokens: a row's share of it is its tokens over theirs.
                tokens = label_tokens(batch)
                with selector.record(mass=tokens / tokens.sum()):
                    model(**batch).loss.backward()
                sent += selector.apply().diagnostics["sent_bytes"]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if selector is not None:
            selector.close()
        start.eval()
        with torch.no_grad():
            losses[name] = float(start(**collate(test, pad)).loss)
    if rank == 0:
        for name, loss in losses.items():
            print(f"test loss, {name}: {loss:.3f}")
        print(f"sent by each process in a step: {sent / given.steps / 1e6:.2f} MB")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
