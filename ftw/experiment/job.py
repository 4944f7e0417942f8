"""From options and files to results: checks first, then the model, the comparison and the report.

Called by `ftw.cli`. Checks run in the order of their cost: numbers and names (`Options`), packages, files,
the folder for results, the model; training begins when nothing is left that can be known to be wrong.
"""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftw.errors import ConfigurationError, DataError
from ftw.experiment import data, extras, models, report
from ftw.experiment.compare import Settings, Stream, compare
from ftw.experiment.data import Row, Sample
from ftw.experiment.options import Options
from ftw.experiment.sources import demo_data

GENERIC_SHARE = 0.2
GENERIC_LIMIT = 2000
"""`tiny` is pre-trained on this share of the pool, at most so many samples, which are then no candidates."""

SPLIT_SEED = 0
"""Splits and pre-training do not follow --seed: seeds differ in the stream alone and share a cached model."""


@dataclass(frozen=True)
class Material:
    """Samples in their roles."""

    pool: list[Sample]
    target: list[Sample]
    evaluation: list[Sample]
    evaluated_on: str
    generic: list[Sample]
    """Text for the pre-training of `tiny`; empty for a model folder."""


def demo(options: Options) -> Path:
    """The comparison on generated data; returns the folder of the results."""
    extras.require(*_packages(options))
    made = demo_data(SPLIT_SEED)
    material = Material(made.pool, made.target, made.test, "the test set (generated)", made.generic)
    return _perform("demo", options, material, files={})


def run(options: Options, pool: Sequence[Path], target: Path, evaluation: Path | None) -> Path:
    """The comparison on JSONL files; returns the folder of the results."""
    extras.require(*_packages(options))
    candidates, aims = data.read_all(pool), data.read_samples(target)
    if evaluation is not None:
        judged, label = data.read_samples(evaluation), str(evaluation)
    elif len(aims) >= 16:
        aims, judged = data.split_off(aims, 0.25, SPLIT_SEED)
        label = f"a held-out quarter of {target}"
    else:
        judged, label = (
            aims,
            f"{target} itself, which also steers the selection (give --eval for an honest test)",
        )
    generic: list[Sample] = []
    if options.model == models.TINY:
        share = min(GENERIC_SHARE, GENERIC_LIMIT / len(candidates))
        candidates, generic = data.split_off(candidates, share, SPLIT_SEED)
    material = Material(candidates, aims, judged, label, generic)
    files = {"pool": [str(path) for path in pool], "target": str(target), "eval": str(evaluation or "")}
    return _perform("run", options, material, files)


def _perform(command: str, options: Options, material: Material, files: dict[str, Any]) -> Path:
    if len(material.pool) < options.pool_size:
        raise _pool_too_small(len(material.pool), options)
    _writable(options.out)
    methods = options.methods
    # Small operations gain little from more threads and lose much where cores are shared; and what one thread
    # computes is the same on any number of cores.
    threads = 1 if options.threads is None and options.model == models.TINY else options.threads
    with (
        _threads(threads),
        report.Display(options.plain, options.steps * len(methods) * len(options.seeds)) as display,
    ):
        model, tokenizer, model_note = _model(options, material, display)
        stream, counts = _stream(material, tokenizer, options)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        settings = Settings(
            steps=options.steps,
            pool_size=options.pool_size,
            budget=options.candidates,
            lr=options.learning_rate,
            seeds=options.seeds,
            lr_warmup=options.lr_warmup,
            lr_decay=options.lr_decay,
            target_batch=options.target_batch,
            target_batches=options.target_batches,
            refresh=options.refresh,
            gradients=options.gradients,
            eval_every=options.eval_every or max(1, options.steps // 10),
            curve_samples=options.curve_samples,
            pad=pad or 0,
            device=options.device,
        )
        for line in _describe(model_note, counts, material, settings):
            display.note(line)
        runs = compare(model, stream, methods, settings, display)
        versions = _versions()

    judged = f"{material.evaluated_on}, all {len(stream.evaluation)} samples"
    curve = f"{min(settings.curve_samples, len(stream.evaluation))} of {len(stream.evaluation)} test samples"
    pool_share = _shares(stream.pool)
    summaries = report.summarise(runs)
    report.print_tables(summaries, judged, pool_share, options.plain)
    sentences = report.verdicts(summaries)
    content = {
        "command": command,
        "files": files,
        "model": model_note,
        "evaluated_on": judged,
        "curve_on": curve,
        "data": counts,
        "pool_samples": Counter(row.source for row in stream.pool),
        "pool_share": pool_share,
        "methods": [asdict(method) for method in methods],
        "settings": asdict(settings),
        "verdicts": sentences,
        "versions": versions,
    }
    report.write_json(options.out / "result.json", content, runs)
    report.write_figure(options.out / "result.png", runs, curve, pool_share)
    print(*sentences, sep="\n")
    print(f"picture: {options.out / 'result.png'}\nfigures: {options.out / 'result.json'}")
    return options.out


def _model(options: Options, material: Material, display: report.Display) -> tuple[Any, Any, str]:
    if options.model == models.TINY:
        tokenizer = models.tiny_tokenizer()
        pretraining = models.Pretraining(seed=SPLIT_SEED)
        if options.pretrain_steps is not None:
            pretraining = replace(pretraining, steps=options.pretrain_steps)
        rows = data.encode(material.generic, tokenizer, options.max_length, loss_on_prompt=True).rows
        model, done = models.tiny(rows, pretraining, models.cache_folder(), display.prepare)
        note = f"tiny (pre-trained {pretraining.steps} steps on {len(rows)} generic samples, {done})"
    else:
        model, tokenizer = models.local(Path(options.model))
        note = options.model
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and options.max_length > longest:
            raise ConfigurationError(
                f"--max-length is {options.max_length}; {options.model} takes at most {longest}; lower it."
            )
    if options.lora:
        rank = 8 if options.lora_rank is None else options.lora_rank
        model = models.add_lora(model, rank, SPLIT_SEED)
        note += f" with LoRA of rank {rank}"
    count = sum(parameter.numel() for parameter in models.trainable(model).values())
    return model, tokenizer, f"{note}, {count:,} trainable parameters"


def _stream(material: Material, tokenizer: Any, options: Options) -> tuple[Stream, dict[str, dict[str, int]]]:
    parts = {"pool": material.pool, "target": material.target, "eval": material.evaluation}
    encoded = {name: data.encode(samples, tokenizer, options.max_length) for name, samples in parts.items()}
    for name, part in encoded.items():
        if not part.rows:
            raise DataError(
                f"none of the {part.skipped} samples of the {name} leaves room for a response; prompts must "
                f"be shorter than --max-length {options.max_length} tokens; raise it."
            )
    if len(encoded["pool"].rows) < options.pool_size:
        raise _pool_too_small(len(encoded["pool"].rows), options)
    counts = {
        name: {
            "used": len(part.rows),
            "response cut": part.truncated,
            "prompt too long, left out": part.skipped,
        }
        for name, part in encoded.items()
    }
    return Stream(encoded["pool"].rows, encoded["target"].rows, encoded["eval"].rows), counts


def _describe(model: str, counts: dict[str, dict[str, int]], material: Material, settings: Settings) -> list[str]:
    lines = [f"model: {model}"]
    for name, count in counts.items():
        extra = ", ".join(f"{number} {what}" for what, number in count.items() if number and what != "used")
        lines.append(f"{name}: {count['used']} samples" + (f" ({extra})" if extra else ""))
    lines.append(
        f"each step: {settings.pool_size} candidates, {settings.budget} to train on; "
        f"{settings.steps} steps, AdamW, lr {settings.lr:g}{' falling to 0' if settings.lr_decay else ''}"
    )
    for name, part in (("pool", material.pool), ("target", material.target)):
        known = {(sample.prompt, sample.response) for sample in part}
        leaked = sum((sample.prompt, sample.response) in known for sample in material.evaluation)
        if leaked and part is not material.evaluation:  # the target itself is named where it is the evaluation
            lines.append(f"warning: {leaked} of the evaluation samples stand in the {name} too")
    return lines


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _packages(options: Options) -> tuple[str, ...]:
    return (*extras.NEEDED, "peft") if options.lora else extras.NEEDED


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    tokens: Counter[str] = Counter()
    for row in rows:
        tokens[row.source] += row.response_tokens
    return {source: number / tokens.total() for source, number in tokens.items()}


def _pool_too_small(count: int, options: Options) -> DataError:
    return DataError(
        f"the pool has {count} usable samples; at least --pool-size {options.pool_size} are needed; "
        "add files or lower --pool-size."
    )


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {folder}: {error.strerror}; results need a folder; choose another with --out."
        ) from error


def _versions() -> dict[str, Any]:
    import torch

    versions: dict[str, Any] = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for name in ("filter-then-weight", "torch", "numpy", "transformers", "peft"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
