"""JSONL lines -> samples -> token rows -> padded batches, and the order in which candidates are offered.

Called by `ftw.experiment.job` (reading, encoding) and `ftw.experiment.compare` (batches, order). Nothing is
dropped silently: malformed lines are errors with their number, cut and skipped samples are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftw.errors import DataError

FIELDS = ("prompt", "response", "source")
SEPARATOR = "\n"
"""Stands between prompt and response; belongs to the prompt, so that no loss falls on it."""

IGNORED = -100
"""The label that cross-entropy passes over."""

_ROW = 'each line is an object like {"prompt": "...", "response": "...", "source": "..."}'


@dataclass(frozen=True)
class Sample:
    """One instruction: the loss falls on the response alone; `source` says where it comes from."""

    prompt: str
    response: str
    source: str


@dataclass(frozen=True)
class Row:
    """An encoded sample. `labels` repeats `input_ids` where the loss falls and is `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]
    source: str

    @property
    def response_tokens(self) -> int:
        """How many tokens the loss falls on; nothing predicts the first."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoded:
    """Rows that fit `max_length`, and what it took to make them fit."""

    rows: list[Row]
    truncated: int
    """Rows whose response lost its end."""

    skipped: int
    """Samples left out because their prompt alone fills `max_length`."""


def read_samples(path: Path) -> list[Sample]:
    """The samples of one JSONL file; blank lines are passed over.

    Raises:
        DataError: the file is missing, not UTF-8, empty, or a line is malformed; names file and line.
    """
    samples = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    samples.append(_sample(line, f"{path}, line {number}"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; a JSONL file is needed; check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); JSONL is read as UTF-8; convert the file.") from error
    if not samples:
        raise DataError(f"{path} holds no sample; at least one line is needed; {_ROW}.")
    return samples


def read_all(paths: Iterable[Path]) -> list[Sample]:
    """The samples of several files, in order."""
    return [sample for path in paths for sample in read_samples(path)]


def _sample(line: str, where: str) -> Sample:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}); {_ROW}; mend or remove the line.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object; {_ROW}; mend or remove the line.")
    for name in FIELDS:
        if name not in value:
            raise DataError(f"{where}: no field {name!r}; {_ROW}; add the field.")
        if not isinstance(value[name], str):
            raise DataError(f"{where}: field {name!r} is a {type(value[name]).__name__}; text is needed; quote it.")
    if not value["response"].strip():
        raise DataError(f"{where}: the response is empty; the loss falls on it, so one is needed; remove the line.")
    return Sample(value["prompt"], value["response"], value["source"])


def encode(
    samples: Iterable[Sample],
    tokenizer: Any,
    max_length: int,
    *,
    loss_on_prompt: bool = False,
) -> Encoded:
    """Token rows `[BOS] prompt separator response EOS`, cut at the end where longer than `max_length`.

    Args:
        tokenizer: a Hugging Face tokenizer; BOS is set where the tokenizer would set it itself.
        loss_on_prompt: labels on the prompt too (pre-training on plain text).
    """
    start = tokenizer("")["input_ids"][:1]
    bos = start if start == [tokenizer.bos_token_id] else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows, truncated, skipped = [], 0, 0
    for sample in samples:
        prompt = bos + tokenizer(sample.prompt + SEPARATOR, add_special_tokens=False)["input_ids"]
        ids = prompt + tokenizer(sample.response, add_special_tokens=False)["input_ids"] + end
        if len(prompt) >= max_length and not loss_on_prompt:
            skipped += 1
            continue
        truncated += len(ids) > max_length
        labels = ids if loss_on_prompt else [IGNORED] * len(prompt) + ids[len(prompt) :]
        rows.append(Row(ids[:max_length], labels[:max_length], sample.source))
    return Encoded(rows, truncated, skipped)


def collate(rows: Sequence[Row], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """One batch for a causal language model, padded on the right to its longest row; all (n, T) int64."""
    length = max(len(row.input_ids) for row in rows)

    def padded(lists: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([each + [fill] * (length - len(each)) for each in lists], device=device)

    return {
        "input_ids": padded((row.input_ids for row in rows), pad),
        "attention_mask": padded(([1] * len(row.input_ids) for row in rows), 0),
        "labels": padded((row.labels for row in rows), IGNORED),
    }


def label_tokens(batch: dict[str, Tensor]) -> Tensor:  # -> (n,) int64
    """`response_tokens` of each row of a batch: its share of a token-mean loss, the selector's `mass`."""
    return (batch["labels"][:, 1:] != IGNORED).sum(dim=1)


def batches(rows: Sequence[Row], size: int, pad: int, device: torch.device | str = "cpu") -> list[dict[str, Tensor]]:
    """All rows in order, `size` at a time; the last batch may be smaller."""
    return [collate(rows[start : start + size], pad, device) for start in range(0, len(rows), size)]


def pool_order(size: int, pool_size: int, steps: int, seed: int) -> Tensor:  # -> (steps, pool_size) int64
    """Which samples are on offer at each step: every epoch is a new permutation of `range(size)`.

    A rest smaller than `pool_size` is left out of its epoch, so that no step offers a sample twice.
    """
    generator = torch.Generator().manual_seed(seed)
    per_epoch = size // pool_size
    epochs = [
        torch.randperm(size, generator=generator)[: per_epoch * pool_size].view(per_epoch, pool_size)
        for _ in range(-(-steps // per_epoch))
    ]
    return torch.cat(epochs)[:steps]


def split_off(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(rest, part): part is a seeded `fraction` of each source, at least one of two or more; order kept."""
    generator = torch.Generator().manual_seed(seed)
    by_source: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_source.setdefault(sample.source, []).append(index)
    chosen: set[int] = set()
    for members in by_source.values():
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        order = torch.randperm(len(members), generator=generator)[:count].tolist()
        chosen.update(members[position] for position in order)
    rest = [sample for index, sample in enumerate(samples) if index not in chosen]
    return rest, [samples[index] for index in sorted(chosen)]
