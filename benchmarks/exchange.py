"""Bytes that each process sends in a step with a global pool, beside DDP's own and beside sending everything.

    python benchmarks/exchange.py [--world 2] [--rows 8] [--budget 4] [--tokens 256] [--cases lora full] [--sharded]
        [--out f.json]

Gloo processes on this machine, a Llama with random weights. Counted is what the first process hands to the collectives,
a sum over processes as a ring sends it: `2 (W - 1) / W` of its size (`ftw.processes.group.Group.sent`). "everything,
written out" is what it would take to hand every candidate's gradient to every process, of a sharded model the rows that
each holds. Bytes do not depend on the machine.

With `--sharded` the model is in `fully_shard` (FSDP2), every decoder layer a unit. What FSDP sends by itself is not
counted: its parameters, and the target's gradient. "FSDP's gradients" are those it sends without selection.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _models import build, shape_of, token_numbers

import ftw

METHODS: dict[str, dict[str, Any]] = {
    "topk, uniform": {"filter": "topk", "solver": "uniform"},
    "topk, pgd": {"filter": "topk"},
    "topk, pgd, reference='target'": {"filter": "topk", "reference": "target"},
    "chain, pgd": {"filter": "chain"},
    "greedy, pgd": {"filter": "greedy"},
}


def process(rank: int, given: argparse.Namespace, lora: bool, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", given.world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=given.world)
    shape = shape_of(given.preset)
    model = build(shape, given.tokens, lora)
    if given.sharded:
        shard(model)
    else:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    rows = token_numbers((given.world + 1) * given.rows, given.tokens, shape["vocab_size"])
    own = rows[rank * given.rows : (rank + 1) * given.rows]
    target = [{"input_ids": rows[-given.rows :], "labels": rows[-given.rows :]}]
    part = (given.world - 1) * size // given.world
    found: dict[str, float] = {"FSDP's gradients": part} if given.sharded else {"DDP alone": 2 * part}
    for name, arguments in METHODS.items():
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        selector = ftw.Selector(model, optimizer, target=target, budget=given.budget, warmup=0, **arguments)
        for _ in range(2):  # the first has no second moment behind it
            with selector.record():
                model(input_ids=own, labels=own).loss.backward()
            selection = selector.apply()
            optimizer.step()
            optimizer.zero_grad()
        selector.close()
        found[name] = selection.diagnostics["sent_bytes"]
    if given.sharded:
        found["everything, written out"] = given.rows * part
    else:
        found["everything, written out"] = found["DDP alone"] + given.rows * size * (given.world - 1)
    if rank == 0:
        Path(f"{folder}/found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def shard(model: nn.Module) -> None:
    """Every decoder layer, and what remains."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module)
    fully_shard(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="candidates of each process")
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--cases", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--sharded", action="store_true", help="FSDP2 in place of DistributedDataParallel")
    parser.add_argument("--out", type=Path, help="write figures and arguments there, as JSON")
    given = parser.parse_args()
    figures = {}
    for case in given.cases:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, (given, case == "lora", folder), given.world)
            figures[case] = json.loads(Path(folder, "found.json").read_text())
        print(f"{case}: {given.world} processes of {given.rows} candidates, k = {given.budget}, T = {given.tokens}")
        own = next(iter(figures[case]))
        for name, sent in figures[case].items():
            print(f"  {name:32} {sent / 1e6:9.2f} MB  {sent / figures[case][own]:6.2f} of {own}")
    if given.out:
        given.out.write_text(json.dumps({"arguments": {**vars(given), "out": None}, "bytes": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
