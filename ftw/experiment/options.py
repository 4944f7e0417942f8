"""What `ftw run` and `ftw demo` both take, checked when made. Made by `ftw.cli`, read by the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftw import registry
from ftw.errors import ConfigurationError
from ftw.experiment import models
from ftw.experiment.methods import Method

_COUNTS = (
    *("pool_size", "steps", "target_batch", "target_batches", "refresh", "max_length", "lora_rank"),
    *("eval_every", "curve_samples", "threads"),
)


@dataclass(frozen=True)
class Options:
    """The settings of a comparison, whatever its data.

    Raises:
        ConfigurationError: a number out of range, an option that would have no effect, a model folder or a
            device that is not there.
        UnknownComponentError: no gradient extractor of that name.
    """

    methods: Sequence[Method]
    budget: float | int
    """A fraction of the pool (float) or a number of candidates (int)."""

    pool_size: int
    steps: int
    seeds: tuple[int, ...]
    model: str
    out: Path
    lr: float | None = None
    lr_warmup: int = 0
    lr_decay: bool = True
    lora: bool = False
    lora_rank: int | None = None
    max_length: int = 384
    target_batch: int = 8
    target_batches: int | str = 1
    refresh: int = 1
    gradients: str = "auto"
    eval_every: int | None = None
    curve_samples: int = 128
    pretrain_steps: int | None = None
    device: str = "cpu"
    threads: int | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        for name in _COUNTS:
            _at_least(name, getattr(self, name), 1)
        for name in ("lr_warmup", "pretrain_steps"):
            _at_least(name, getattr(self, name), 0)
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ConfigurationError(f"--lr is {self.lr}; a positive number is needed, such as 1e-3.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigurationError(
                f"--seed is {','.join(map(str, self.seeds)) or 'empty'}; different integers from 0 on are "
                "needed, such as 0,1,2."
            )
        self.candidates  # noqa: B018  (raises if the budget is out of range)
        registry.load("gradients", self.gradients)
        if self.lora_rank is not None and not self.lora:
            raise ConfigurationError("--lora-rank is given without --lora; it sizes adapters; add --lora.")
        if self.model != models.TINY:
            if self.pretrain_steps is not None:
                raise ConfigurationError(
                    f"--pretrain-steps is given with model {self.model}; only 'tiny' is pre-trained; drop it."
                )
            models.check_folder(Path(self.model))
        _check_device(self.device)

    @property
    def candidates(self) -> int:
        """k: how many of the pool's candidates may be trained on at each step."""
        allowed = (
            f"allowed are an integer from 1 to --pool-size {self.pool_size} or a fraction above 0 up to 1.0; "
            "a quarter of the pool is 0.25"
        )
        if isinstance(self.budget, int):
            if not 1 <= self.budget <= self.pool_size:
                raise ConfigurationError(f"--budget is {self.budget}; {allowed}.")
            return self.budget
        if not 0 < self.budget <= 1:
            raise ConfigurationError(f"--budget is {self.budget}; {allowed}.")
        return max(1, round(self.budget * self.pool_size))

    @property
    def learning_rate(self) -> float:
        """As given, or what suits the model: a small fresh one bears far more than a large trained one."""
        if self.lr is not None:
            return self.lr
        if self.model == models.TINY:
            return 1e-3
        return 2e-4 if self.lora else 2e-5


def _check_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"--device is {name!r}: {reason}; use cpu, or a device that torch sees.") from error


def _at_least(name: str, value: object, least: int) -> None:
    # Options left out are None, and "all" batches are enough.
    if isinstance(value, int) and value < least:
        option = "--" + name.replace("_", "-")
        raise ConfigurationError(f"{option} is {value}; an integer from {least} on is needed; raise it.")
