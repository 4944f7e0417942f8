"""The rows of a cell in their roles: general text, pool, target, dev and test. Everything follows from the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from ftw.errors import DataError
from ftw.experiment import data, models
from ftw.experiment.data import SEPARATOR, Row, Sample

from .settings import GENERAL_SOURCES, POOL_SOURCES, Cell, Setting, Target

TEST_SEED = 0
"""The test samples are the same for all seeds."""

CORRUPTION_SEED = 1_000_003
"""Added to a cell's seed for the choice of the exchanged responses. (On the CPU torch keeps 32 bits of a seed.)"""


@dataclass(frozen=True)
class Material:
    """Encoded rows. `candidates` holds one list per step, the same for every method of a target and seed."""

    candidates: list[list[Row]]
    target: list[Row]
    dev: list[Row]
    test: list[Row]
    decoded: list[Sample]
    """Test samples whose answers are generated; each fits in whole."""

    pool_share: dict[str, float]
    """Source -> share of the response tokens of all candidates offered."""


def digest(folder: Path, target: Target) -> str:
    """Hash of the files that a cell of that target reads."""
    found = hashlib.sha256()
    for path in _files(folder, target):
        found.update(f"{path.name} {_file_digest(path, path.stat().st_mtime_ns)}\n".encode())
    return found.hexdigest()[:20]


def material(folder: Path, cell: Cell, target: Target) -> Material:
    """The rows of a cell.

    Raises:
        DataError: a file is missing or malformed, or holds too few samples.
    """
    setting, seed = cell.setting, cell.seed
    pool, _ = _pool(folder, target, setting.pretrain_share)
    if setting.corrupted:
        pool = corrupted(pool, setting.corrupted, seed)
    order = data.pool_order(len(pool), setting.pool_size, setting.steps, seed)
    steering, choosing = target_and_dev(_read(folder / f"{target.source}.dev.jsonl"), setting, seed, target.source)
    judged = _drawn(_read(folder / f"{target.source}.test.jsonl"), setting.test_samples, TEST_SEED)
    whole = [sample for sample in judged if fitted(sample, setting) == sample]
    candidates = [rows_of([pool[i] for i in step], setting) for step in order.tolist()]
    return Material(
        candidates,
        rows_of(steering, setting),
        rows_of(choosing, setting),
        rows_of(judged, setting),
        whole[: setting.decode_samples] if target.decode else [],
        _shares([row for step in candidates for row in step]),
    )


def general(folder: Path, setting: Setting) -> list[Row]:
    """The text of pre-training, loss on every token; the same for all targets and seeds."""
    samples = [
        fitted(sample, setting)
        for source in GENERAL_SOURCES
        for sample in _split(folder, source, setting.pretrain_share)[1]
    ]
    return data.encode(samples, models.tiny_tokenizer(), setting.max_length, loss_on_prompt=True).rows


def target_and_dev(
    samples: Sequence[Sample], setting: Setting, seed: int, source: str
) -> tuple[list[Sample], list[Sample]]:
    """Two disjoint draws of one file: samples that steer, and samples that choose stopping and learning rate."""
    needed = setting.target_samples + setting.dev_samples
    if len(samples) < needed:
        raise DataError(
            f"{source}.dev.jsonl holds {len(samples)} samples; target_samples={setting.target_samples} and "
            f"dev_samples={setting.dev_samples} need {needed}; choose another target or fewer samples."
        )
    drawn = _drawn(samples, needed, seed)
    # Dev first: seeds that differ in the number of target samples then share their dev samples.
    return drawn[setting.dev_samples :], drawn[: setting.dev_samples]


def corrupted(pool: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """The pool with the responses of a seeded share moved on to each other; their source says so."""
    # A stream of its own: the order of the pool is drawn with the bare seed, and a permutation of as many samples from
    # the same stream would corrupt the very ones that come first.
    generator = torch.Generator().manual_seed(CORRUPTION_SEED + seed)
    count = round(share * len(pool))
    chosen = torch.randperm(len(pool), generator=generator)[:count].tolist()
    out = list(pool)
    for at, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        source = f"{pool[at].source} (corrupted)"
        out[at] = replace(pool[at], response=pool[other].response, source=source)
    return out


def fitted(sample: Sample, setting: Setting) -> Sample:
    """The sample with as much of its prompt's end as fits beside the response's first `response_room` bytes."""
    kept = min(len(sample.response.encode()) + 1, setting.response_room)  # 1: the end token
    room = setting.max_length - kept - len(SEPARATOR.encode())
    prompt = sample.prompt.encode()
    if len(prompt) <= room:
        return sample
    return replace(sample, prompt=prompt[-room:].decode(errors="ignore"))  # a letter cut in two is left out


def rows_of(samples: Sequence[Sample], setting: Setting) -> list[Row]:
    """Encoded, none left out."""
    fits = [fitted(sample, setting) for sample in samples]
    encoded = data.encode(fits, models.tiny_tokenizer(), setting.max_length)
    assert not encoded.skipped
    return encoded.rows


def _pool(folder: Path, target: Target, share: float) -> tuple[list[Sample], list[str]]:
    sources = [source for source in POOL_SOURCES if source not in target.pool_lacks]
    return [sample for source in sources for sample in _split(folder, source, share)[0]], sources


def _split(folder: Path, source: str, share: float) -> tuple[list[Sample], list[Sample]]:
    """(candidates, general text) of a source."""
    samples = _read(folder / f"{source}.train.jsonl")
    return data.split_off(samples, share, 0) if source in GENERAL_SOURCES else (list(samples), [])


def _files(folder: Path, target: Target) -> list[Path]:
    names = [f"{source}.train.jsonl" for source in POOL_SOURCES]
    paths = [folder / name for name in (*names, f"{target.source}.dev.jsonl", f"{target.source}.test.jsonl")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"the data folder lacks {', '.join(missing)}; <source>.train.jsonl of every source and dev and test of "
            "the targets are needed (docs/evidence.md); pass the folder that holds them."
        )
    return paths


def _read(path: Path) -> tuple[Sample, ...]:
    return _read_once(path, path.stat().st_mtime_ns) if path.is_file() else tuple(data.read_samples(path))


@lru_cache(maxsize=64)
def _read_once(path: Path, changed: int) -> tuple[Sample, ...]:
    return tuple(data.read_samples(path))


@lru_cache(maxsize=64)
def _file_digest(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _drawn(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return [samples[i] for i in order[:count].tolist()]


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    tokens: dict[str, int] = {}
    for row in rows:
        tokens[row.source] = tokens.get(row.source, 0) + row.response_tokens
    return {source: number / sum(tokens.values()) for source, number in sorted(tokens.items())}
