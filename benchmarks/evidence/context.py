"""The study of long contexts: how far approximate representations are off at T = 256 ... 8192, and what they cost.

A pool of long rows, each of one source's text, is recorded once; every representation is then read from what was kept.
A record is one context length with one pool. Called by the command line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from ftw.assembly import measure
from ftw.decision import Policy
from ftw.experiment import data, models
from ftw.experiment.data import Row, Sample
from ftw.experiment.sources import demo_data
from ftw.filters.greedy import Greedy
from ftw.gradients import Recorder
from ftw.gradients.base import Contributions
from ftw.gradients.factorized import Factorized
from ftw.measurement import Quadratic
from ftw.optim_state.adam import AdamW
from ftw.optim_state.base import Preconditioner
from ftw.solvers.constraints import CappedCone
from ftw.solvers.projected_gradient import ProjectedGradient

from .cells import versions
from .representations import Separable, extractor
from .settings import POOL_SOURCES, key_of
from .training import backward, batch_of

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
REPRESENTATIONS = (
    *(f"projection {dimension}" for dimension in (64, 256, 1024, 4096, 16384)),
    "row x column",
    *("blocks 4", "blocks 16", "blocks 64", "blocks all"),
)
MEASURES = ("alignment", "gram", "jaccard", "weights", "match")


@dataclass(frozen=True)
class Study:
    """One record's configuration."""

    length: int
    pool: int
    """Number of the draw."""

    candidates: int = 8
    budget: int = 2
    targets: int = 2
    target_source: str = "svamp"
    width: int = 112
    layers: int = 2
    heads: int = 2
    lr: float = 1e-3
    pretrain_steps: int = 150
    first_steps: int = 10
    """Of plain training before the step that is studied, so that the optimizer has a second moment."""

    short: int = 256
    """Length of the rows of both."""


def run_study(study: Study, folder: Path | None, cache: Path | None) -> dict[str, Any]:
    """The record of one context length and pool."""
    began = time.perf_counter()
    config = configuration(study, folder)
    figures, clock = _figures(study, folder, cache)
    clock["total"] = time.perf_counter() - began
    return {"key": key_of(config), "configuration": config, "figures": figures, "clock": clock}


def configuration(study: Study, folder: Path | None) -> dict[str, Any]:
    """What the figures depend on."""
    texts = [text for _, text in sorted(_texts(folder, study.target_source).items())]
    return {
        "study": asdict(study),
        "representations": list(REPRESENTATIONS),
        "data": key_of({"texts": texts}),
        "versions": versions(),
    }


def _figures(study: Study, folder: Path | None, cache: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    texts = _texts(folder, study.target_source)
    generator = torch.Generator().manual_seed(study.pool)
    model = _model(study, texts, cache)
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.lr)
    for _ in range(study.first_steps):
        backward(model, [_row(texts, name, study.short, generator) for name in _sources(texts, 8, generator)])
        optimizer.step()
        optimizer.zero_grad()
    pool = [_row(texts, name, study.length, generator) for name in _sources(texts, study.candidates, generator)]
    aims = [_row(texts, "", study.length, generator) for _ in range(study.targets)]
    recorder = Recorder(model, extractor=Factorized(), check=False)  # an audited backward is not a lean one
    clock: dict[str, Any] = {}
    try:
        worked = time.process_time()
        with recorder.record():
            model(**batch_of(pool)).loss.backward()
        clock["forward and backward"] = time.process_time() - worked
        parameters = list(recorder.parameters)
        g = dict(zip(parameters, torch.autograd.grad(model(**batch_of(aims)).loss, parameters), strict=True))
        exact = recorder.contributions()
        figures = compared(exact, optimizer, g, study.budget, clock)
    finally:
        recorder.close()
    return figures, clock


def compared(
    exact: Contributions, optimizer: torch.optim.Optimizer, g: Any, budget: int, clock: dict[str, Any]
) -> dict[str, Any]:
    """Errors of every representation against the exact form; `clock` gets what reading each took."""

    def read(contributions: Contributions, preconditioner: Preconditioner) -> Any:
        return measure(contributions, optimizer, preconditioner, g, {}, "curvature", "pool")

    policy = Policy(
        filter=Greedy(),
        solver=ProjectedGradient(),
        constraints=CappedCone(4.0),
        budget=budget,
        ridge=1e-3,
        objective="match",
        trust=1.0,
        total="preserve",
        targets="mean",
    )
    mass = torch.ones(exact.count, dtype=torch.float64)

    def decided(measurement: Any) -> Tensor:
        return policy.decide(measurement, "curvature", mass, torch.Generator()).weights

    worked = time.process_time()
    right = read(exact, AdamW())
    clock["exact"] = time.process_time() - worked
    weights = decided(right)
    figures: dict[str, Any] = {"exact": {"numbers": exact.numel()}}
    for name in REPRESENTATIONS:
        worked = time.process_time()
        made = extractor(name)
        contributions = exact if made is None else made.contributions(exact._pieces, exact.count)
        found = read(contributions, Separable() if made is None else AdamW())
        clock[name] = time.process_time() - worked
        other = decided(found)
        figures[name] = {
            "alignment": _relative(found.true.alignment, right.true.alignment),
            "gram": _relative(found.true.gram, right.true.gram),
            "rank": float(stats.spearmanr(found.true.alignment, right.true.alignment).statistic),
            "jaccard": _jaccard(other, weights),
            "weights": _relative(other, weights),
            # Both under the exact numbers: what the decision is worth, whatever it was made from.
            "match": _cosine(right.true, other) / _cosine(right.true, weights),
            "numbers": contributions.numel(),
        }
    return figures


def _texts(folder: Path | None, target: str) -> dict[str, str]:
    """Source -> all its text; the target's under the empty name. Generated data without a folder."""
    samples: dict[str, Sequence[Sample]] = {}
    if folder is None:
        made = demo_data()
        for sample in made.pool:
            samples[sample.source] = [*samples.get(sample.source, ()), sample]
        samples[""] = made.target
    else:
        samples = {source: data.read_samples(folder / f"{source}.train.jsonl") for source in POOL_SOURCES}
        samples[""] = data.read_samples(folder / f"{target}.dev.jsonl")
    return {name: "\n\n".join(f"{s.prompt}\n{s.response}" for s in each) for name, each in samples.items()}


def _sources(texts: dict[str, str], count: int, generator: torch.Generator) -> list[str]:
    """That many names, each once before one comes twice, in a random order."""
    names = [name for name in sorted(texts) if name]
    order = torch.randperm(len(names), generator=generator).tolist()
    return [names[order[i % len(order)]] for i in range(count)]


def _row(texts: dict[str, str], name: str, length: int, generator: torch.Generator) -> Row:
    """`length` bytes from a random place of a source's text, which is repeated where it is shorter."""
    content = texts[name].encode()
    first = int(torch.randint(0, len(content), (), generator=generator))
    turned = content[first:] + content[:first]
    taken = (turned * (-(-length // len(turned))))[:length]
    ids = [byte + 3 for byte in taken]  # 3: pad, end, unknown
    return Row(ids, ids, name)


def _model(study: Study, texts: dict[str, str], cache: Path | None) -> nn.Module:
    """Pre-trained on short rows of all sources but the target's; one model for all context lengths of a pool."""
    shape = {
        "hidden_size": study.width,
        "intermediate_size": study.width * 8 // 3,
        "num_hidden_layers": study.layers,
        "num_attention_heads": study.heads,
        "num_key_value_heads": max(1, study.heads // 2),
        "max_position_embeddings": max(LENGTHS),
        "tie_word_embeddings": False,
    }
    generator = torch.Generator().manual_seed(study.pool)
    names = _sources(texts, max(16, 4 * study.pretrain_steps), generator)
    rows = [_row(texts, name, study.short, generator) for name in names if name != study.target_source]
    pretraining = models.Pretraining(steps=study.pretrain_steps, seed=study.pool)
    model, _ = models.tiny(rows, pretraining, cache, architecture=shape)
    model.train()
    return model


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())  # NaN where nothing was useful


def _cosine(exact: Quadratic, weights: Tensor) -> float:
    """Of `C w` and g under M."""
    length = float(weights @ exact.gram @ weights) * float(exact.target)
    return float(exact.alignment @ weights) / length**0.5 if length > 0 else math.nan


def _jaccard(first: Tensor, second: Tensor) -> float:
    a, b = ({int(i) for i in each.nonzero().flatten()} for each in (first, second))
    return len(a & b) / len(a | b) if a | b else 1.0
