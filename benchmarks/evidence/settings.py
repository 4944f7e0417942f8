"""What is compared: settings, targets, and cells (method x target x seed x setting). Plain data, hashed to a key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ftw.errors import ConfigurationError

FORMAT = 1
"""To be raised when the meaning of a figure changes: cells of another format are run again."""

POOL_SOURCES = (
    *("aqua", "commonsenseqa", "gsm8k", "instruct_basic", "math", "mmlu"),
    *("scan", "shakespeare", "svamp", "wiki", "xquad_de", "xquad_en"),
)
GENERAL_SOURCES = ("aqua", "commonsenseqa", "math", "shakespeare", "wiki", "xquad_en")
"""A part of these, which are no target's own, is the text of pre-training, and is no candidate afterwards."""


@dataclass(frozen=True)
class Target:
    """What is trained for: the files `<source>.dev.jsonl` and `<source>.test.jsonl`."""

    name: str
    source: str
    pool_lacks: tuple[str, ...] = ()
    """Sources taken out of the pool."""

    decode: int = 0
    """Most bytes to generate for exact match; 0: the answers are not generated."""


TARGETS = {
    target.name: target
    for target in (
        Target("svamp", "svamp", decode=40),
        Target("instruct_basic", "instruct_basic"),
        Target("xquad_de", "xquad_de"),
        Target("gsm8k_absent", "gsm8k", pool_lacks=("gsm8k",)),
        Target("scan", "scan", decode=216),
        Target("mmlu", "mmlu"),
    )
}
CORE_TARGETS = ("svamp", "instruct_basic", "xquad_de", "gsm8k_absent")


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison have in common; every number of it is part of a cell's key."""

    # The axes that are varied.
    optimizer: str = "adamw"
    tuning: str = "full"
    lr: float = 1e-3
    corrupted: float = 0.0
    """Share of the pool whose responses are exchanged among each other."""

    target_samples: int = 32
    pool_size: int = 16
    budget: int = 4

    # The rest.
    steps: int = 150
    target_batch: int = 8
    clip: float = 1.0
    max_length: int = 256
    """Bytes of a sample. A longer prompt loses its beginning, a response what then does not fit."""

    response_room: int = 96
    """Bytes of a response that come before the prompt's."""

    dev_samples: int = 32
    """Disjoint from the target samples; they choose stopping steps and learning rates, and steer nothing."""

    test_samples: int = 256
    curve_samples: int = 64
    """Of the test samples, those that the curves are measured on."""

    decode_samples: int = 96
    eval_every: int = 10
    width: int = 112
    layers: int = 2
    heads: int = 2
    pretrain_steps: int = 300
    pretrain_share: float = 0.3
    """Of the general sources."""

    lora_rank: int = 8


@dataclass(frozen=True)
class Cell:
    """One run, or one tuned family of runs: the unit that is stored and resumed."""

    method: str
    target: str
    seed: int
    setting: Setting = field(default_factory=Setting)

    def configuration(self, method: dict[str, Any], digest: str, versions: dict[str, str]) -> dict[str, Any]:
        """All that its figures depend on, as JSON has it."""
        whole = {
            "format": FORMAT,
            "method": {"name": self.method, **method},
            "target": asdict(TARGETS[self.target]),
            "seed": self.seed,
            "setting": asdict(self.setting),
            "data": digest,
            "versions": versions,
        }
        loaded: dict[str, Any] = json.loads(json.dumps(whole))
        return loaded

    @property
    def label(self) -> str:
        return f"{self.method} on {self.target}, seed {self.seed}"


def key_of(configuration: dict[str, Any]) -> str:
    """Hash of a full configuration."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:20]


def filtered(cells: Sequence[Cell], conditions: Sequence[str]) -> list[Cell]:
    """The cells that meet all conditions, each `name=value[,value]`: method, target, seed or a field of the setting.

    Raises:
        ConfigurationError: a condition is malformed, or no cell meets them.
    """
    names = ("method", "target", "seed", *(each.name for each in fields(Setting)))
    kept = list(cells)
    for condition in conditions:
        name, equals, values = condition.partition("=")
        if not equals or name not in names or not values:
            raise ConfigurationError(
                f"--only {condition!r} is not understood; name=value[,value] is needed, with a name of "
                f"{', '.join(names)}; for example method=ours,random."
            )
        wanted = [values, *values.split(",")]  # the name of a method may hold a comma
        kept = [cell for cell in kept if str(_value(cell, name)) in wanted]
    if not kept:
        raise ConfigurationError(
            f"no cell of the grid meets --only {' '.join(conditions)}; the grid has the methods "
            f"{', '.join(sorted({cell.method for cell in cells}))} and the targets "
            f"{', '.join(sorted({cell.target for cell in cells}))}; change the conditions or the grid."
        )
    return kept


def varied(base: Setting, **changes: Any) -> Setting:
    """The setting with something changed."""
    return replace(base, **changes)


def difference(setting: Setting, base: Setting) -> str:
    """What distinguishes a setting from another: `corrupted=0.3`; empty where nothing does."""
    changed = {
        each.name: getattr(setting, each.name)
        for each in fields(Setting)
        if getattr(setting, each.name) != getattr(base, each.name)
    }
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _value(cell: Cell, name: str) -> Any:
    return getattr(cell, name) if name in ("method", "target", "seed") else getattr(cell.setting, name)
