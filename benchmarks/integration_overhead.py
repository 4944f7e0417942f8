"""Overhead of the integrations: a step of Trainer, Lightning and `attach` with selection over the explicit loop's.

    python benchmarks/integration_overhead.py                        # small model, LoRA and full, CPU
    python benchmarks/integration_overhead.py --case lora --tokens 256 --repeats 40
    python benchmarks/integration_overhead.py --smoke                # does it run, do all choose the same

Seven loops of equal models on the same micro-batches, with the same AdamW, accumulation, clipping and selector, in one
process: a plain loop, Trainer and Lightning without selection, and with it the plain loop (`record()` and `apply()`),
the plain loop under `attach`, SelectionTrainer and SelectionCallback. They take their steps in turns, each round in
another order; a step's time is the whole period from the end of one optimizer step to the end of the next, with data
loading, logging and the trainer's own bookkeeping. The first rounds (set-up, audit) are left out.

With s the step with selection of a trainer, t its step without, e and p those of the plain loop:

    over the explicit loop    s / e                     what the user of that trainer sees
    integration               ((s - t) - (e - p)) / e   what selection costs there beyond what it costs in a plain loop

The second leaves out what the trainer costs by itself. For `attach` t is p, so that it is s / e - 1. Both are taken
within a round; given are the median over rounds and, as its uncertainty, the 95 % interval of the median by order
statistics.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _models import PRESETS, build, resized, shape_of, token_numbers

import ftw

WARM_ROUNDS = 3
CLIP = 1.0
LOG_EVERY = 10

Batch = dict[str, Tensor]
Tick = Callable[[], None]


class Task:
    """What all loops are given."""

    def __init__(self, arguments: argparse.Namespace, lora: bool, tokens: int) -> None:
        shape = shape_of(arguments.preset, shrink=arguments.smoke)
        self.shape = resized(shape, arguments.hidden, arguments.layers, arguments.vocabulary)
        self.arguments, self.lora, self.tokens = arguments, lora, tokens
        self.device = torch.device(arguments.device)
        self.steps = WARM_ROUNDS + arguments.repeats
        self.rows = arguments.pool // arguments.micro_batches
        ids = token_numbers(self.steps * arguments.pool + arguments.target, tokens, self.shape["vocab_size"])
        rows = [{"input_ids": row, "labels": row} for row in ids]
        self.pool, self.target = rows[arguments.target :], rows[: arguments.target]
        self.selector = {"budget": arguments.budget, "warmup": 0}
        self.chosen: dict[str, list[ftw.Selection]] = {}

    def model(self) -> nn.Module:
        return build(self.shape, self.tokens, self.lora, device=self.device)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def loader(self) -> Any:
        return torch.utils.data.DataLoader(self.pool, self.rows, collate_fn=collate)  # type: ignore[arg-type]


def collate(rows: list[Batch]) -> Batch:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


# -- the loops ---------------------------------------------------------------------------------------------------------


def plain(task: Task, selected: str | None, tick: Tick) -> None:
    """Without selection, with record() and apply(), or under attach()."""
    from ftw_integrations.loop import attach, token_mean

    model = task.model()
    optimizer = task.optimizer(model)
    pieces = task.arguments.micro_batches
    target, told = [_moved(collate(task.target), task.device)], task.chosen.setdefault(selected or "", [])
    if selected == "attach":
        attach(model, optimizer, target=target, mass=token_mean, max_grad_norm=CLIP, told=told.append, **task.selector)
    elif selected is not None:
        selector = ftw.Selector(model, optimizer, target=target, **task.selector)
    for number, batch in enumerate(task.loader(), 1):
        batch = _moved(batch, task.device)
        if selected == "record":
            with selector.record(mass=token_mean(batch)):
                (model(**batch).loss / pieces).backward()
        else:
            (model(**batch).loss / pieces).backward()
        if number % pieces == 0:
            if selected == "record":
                told.append(selector.apply())
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            tick()


def trainer(task: Task, selected: str | None, tick: Tick) -> None:
    """Hugging Face's, with its defaults but for what all share."""
    from ftw_integrations.huggingface import SelectionArguments, SelectionTrainer
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    model = task.model()
    optimizer = task.optimizer(model)
    told = task.chosen.setdefault("Trainer", [])

    class Ticking(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if selected is not None:
                told.append(made.selection)
            tick()

    class InOrder(SelectionTrainer if selected is not None else Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(task.pool)

    extra: dict[str, Any] = {}
    if selected is not None:
        extra = {
            "target_dataset": task.target,
            "selection": SelectionArguments(target_batch_size=len(task.target), **task.selector),
        }
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=task.steps,
            per_device_train_batch_size=task.rows,
            gradient_accumulation_steps=task.arguments.micro_batches,
            max_grad_norm=CLIP,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to=[],
            use_cpu=task.device.type == "cpu",
            disable_tqdm=True,
        )
        made = InOrder(
            model,
            settings,
            data_collator=collate,
            train_dataset=task.pool,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
            callbacks=[Ticking()],
            **extra,
        )
        made.remove_callback(PrinterCallback)
        made.train()


def lightning(task: Task, selected: str | None, tick: Tick) -> None:
    """Lightning's, with its defaults but for what all share."""
    import lightning.pytorch as pl
    from ftw_integrations.lightning import SelectionCallback, token_mean

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return task.optimizer(self.model)

    class Ticking(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if not trainer.fit_loop._should_accumulate():
                tick()

    callbacks: list[Any] = [Ticking()]
    if selected is not None:
        told = task.chosen.setdefault("Lightning", [])
        selecting = SelectionCallback([collate(task.target)], mass=token_mean, told=told.append, **task.selector)
        callbacks = [selecting, *callbacks]
    with tempfile.TemporaryDirectory() as folder:
        made = pl.Trainer(
            default_root_dir=folder,
            accelerator="cpu" if task.device.type == "cpu" else "gpu",
            devices=1,
            max_steps=task.steps,
            accumulate_grad_batches=task.arguments.micro_batches,
            gradient_clip_val=CLIP,
            log_every_n_steps=LOG_EVERY,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        made.fit(Module(), task.loader())


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


LOOPS: Mapping[str, tuple[Callable[[Task, str | None, Tick], None], str | None]] = {
    "plain loop": (plain, None),
    "plain loop, selection": (plain, "record"),
    "attach": (plain, "attach"),
    "Trainer": (trainer, None),
    "Trainer, selection": (trainer, "Trainer"),
    "Lightning": (lightning, None),
    "Lightning, selection": (lightning, "Lightning"),
}
WITHOUT = {"attach": "plain loop", "Trainer, selection": "Trainer", "Lightning, selection": "Lightning"}
"""Loop with selection -> the same without."""


# -- taking turns ------------------------------------------------------------------------------------------------------


class Turns:
    """Loops in threads of which one runs at a time: each takes a step and waits until the others have taken theirs."""

    def __init__(self, loops: Mapping[str, Callable[[Tick], None]], device: torch.device, threads: int) -> None:
        self._device, self._threads = device, threads
        self._go = {name: threading.Semaphore(0) for name in loops}
        self._back = threading.Semaphore(0)
        self._begun = 0.0
        self._failure: BaseException | None = None
        self.times: dict[str, list[float]] = {name: [] for name in loops}
        # Daemons: where one fails, the others wait for a turn that does not come.
        self._workers = {
            name: threading.Thread(target=self._work, args=(name, loop), daemon=True) for name, loop in loops.items()
        }

    def run(self, rounds: int) -> None:
        """That many steps of each, and then the end of each."""
        for worker in self._workers.values():
            worker.start()
        names = list(self._workers)
        for turn in range(rounds + 1):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                self._go[name].release()
                self._back.acquire()
                if self._failure is not None:
                    raise self._failure

    def _work(self, name: str, loop: Callable[[Tick], None]) -> None:
        self._go[name].acquire()
        torch.set_num_threads(self._threads)
        self._begun = time.perf_counter()
        try:
            loop(lambda: self._tick(name))
        except BaseException as failure:
            self._failure = failure
        self._back.release()

    def _tick(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times[name].append(time.perf_counter() - self._begun)
        self._back.release()
        self._go[name].acquire()
        self._begun = time.perf_counter()


# -- figures -----------------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace, lora: bool, tokens: int) -> list[dict[str, Any]]:
    """One row for each loop."""
    task = Task(arguments, lora, tokens)
    turns = Turns(
        {name: _begin(loop, task, selected) for name, (loop, selected) in LOOPS.items()},
        task.device,
        arguments.threads,
    )
    turns.run(task.steps)
    times = {name: each[WARM_ROUNDS:] for name, each in turns.times.items()}
    agreeing = agreement(task)
    explicit, bare = times["plain loop, selection"], times["plain loop"]
    rows = []
    for name, own in times.items():
        row: dict[str, Any] = {
            "parameters": "lora" if lora else "full",
            "tokens": tokens,
            "loop": name,
            "step_s": statistics.median(own),
            "over_explicit": middle([s / e for s, e in zip(own, explicit, strict=True)]),
            "times_s": own,
        }
        if name in WITHOUT:
            each = zip(own, times[WITHOUT[name]], explicit, bare, strict=True)
            row["integration"] = middle([((s - t) - (e - p)) / e for s, t, e, p in each])
            row["same_choice"] = agreeing[LOOPS[name][1] or ""]
        rows.append(row)
    return rows


def _begin(loop: Callable[[Task, str | None, Tick], None], task: Task, selected: str | None) -> Callable[[Tick], None]:
    return lambda tick: loop(task, selected, tick)


def agreement(task: Task) -> dict[str, float]:
    """Share of the steps in which a loop chose what the explicit one did: else they are not the same work."""
    expected = task.chosen["record"]
    return {
        name: sum(
            torch.equal(ours.indices, theirs.indices) and torch.allclose(ours.weights, theirs.weights, atol=1e-2)
            for ours, theirs in zip(made, expected, strict=True)
        )
        / len(expected)
        for name, made in task.chosen.items()
        if name
    }


def middle(values: list[float]) -> list[float]:
    """Median, and the order statistics that hold it between them with 95 % (sign test; the range, for few)."""
    values, n = sorted(values), len(values)
    rank = max(int((n - 1.96 * n**0.5) / 2), 0)
    return [statistics.median(values), values[rank], values[n - 1 - rank]]


HEADER = (
    "| trained | T | loop | step, s | over the explicit loop | 95 % | integration | 95 % | same choice |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    ratio, low, high = row["over_explicit"]
    cells = [row["parameters"], str(row["tokens"]), row["loop"], f"{row['step_s']:.4f}"]
    cells += [f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"]
    if "integration" in row:
        share, low, high = row["integration"]
        cells += [f"{share:+.1%}", f"{low:+.1%} to {high:+.1%}", f"{row['same_choice']:.0%}"]
    else:
        cells += ["", "", ""]
    return f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--hidden", type=int, default=None, help="another width than the preset's")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--vocabulary", type=int, default=None)
    parser.add_argument("--case", choices=("lora", "full", "both"), default="both", help="what is trained")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="lengths of the candidates")
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=4, help="gradient accumulation: pieces of the pool")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; 5 at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a few rounds of a shrunk model; all must choose the same")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON to this file")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.tokens, arguments.repeats = [16], 5
    elif arguments.repeats < 5:
        parser.error("a median of fewer than 5 rounds says little: --repeats 5 at least")
    if arguments.pool % arguments.micro_batches:
        parser.error("--pool must be a multiple of --micro-batches: all micro-batches are of one size")
    return arguments


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore", module="lightning|transformers")
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device.startswith("cuda")
    machine = torch.cuda.get_device_name(arguments.device) if on_gpu else platform.processor()
    print(
        f"{arguments.preset}{' (shrunk)' if arguments.smoke else ''}, float32: {arguments.pool} candidates in "
        f"{arguments.micro_batches} micro-batches, budget {arguments.budget}, target batch of {arguments.target}; "
        f"{arguments.device} {machine}, {arguments.threads} threads, torch {torch.__version__}, "
        f"{arguments.repeats} rounds\n\n{HEADER}"
    )
    rows: list[dict[str, Any]] = []
    for lora in {"lora": (True,), "full": (False,), "both": (True, False)}[arguments.case]:
        for tokens in arguments.tokens:
            found = compare(arguments, lora, tokens)
            rows += found
            print("\n".join(line(row) for row in found), flush=True)
    if arguments.out is not None:
        written = {
            "settings": {**vars(arguments), "out": None},
            "machine": machine,
            "torch": torch.__version__,
            "rows": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(written, indent=1, default=str) + "\n")
    if arguments.smoke and any(row.get("same_choice", 1.0) < 1.0 for row in rows):
        raise SystemExit("the loops did not choose the same")


if __name__ == "__main__":
    main()
