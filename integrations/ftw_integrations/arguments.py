"""The selector's arguments as a dataclass, for `HfArgumentParser` and for trainers. No trainer is imported here."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field, fields
from typing import Any

from ftw import presets, registry
from ftw.arguments import at_least, one_of
from ftw.assembly import GEOMETRIES, OBJECTIVES, REFERENCES
from ftw.decision import TOTALS, check_budget
from ftw.errors import ConfigurationError
from ftw.gradients.coverage import UNCOVERED
from ftw.gradients.recorder import RESIDUALS
from ftw.processes.setting import POOLS
from ftw.selector import NOTHING_USEFUL
from ftw.solvers.constraints import CappedCone
from ftw.target import check_schedule
from ftw.watching import DecisionLog

_COMPONENTS = {
    "filter": ("filters", None),
    "solver": ("solvers", None),
    "gradients": ("gradients", None),
    "preconditioner": ("optim_state", "auto"),
    "curvature": ("curvature", "optimizer"),
}
"""Field -> the group its names are registered in, and the word that is no component."""


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SelectionArguments:
    """What is chosen and how: arguments of `ftw.Selector` of the same names, and how the target is batched.

    Where a name is asked for, a class or an instance does as well, from Python.

    Args:
        seed: another name of `selection_seed`, and wins over it. Not on a command line, where it is the trainer's.

    Raises:
        ConfigurationError, UnknownComponentError: a value that is not allowed.
    """

    # A parser that knows one type an argument takes the second of three: a string, which is told apart below.
    budget: float | str | None = _help(
        0.25, "Candidates that are kept each step: a share of the window (0.25, 1.0), or a number (4)."
    )
    preset: str = _help("ours", "Ready configuration, see `ftw list`; the arguments below override it.")
    filter: str | None = _help(
        None,
        "What chooses candidates: greedy, topk, quota, ... Columns it reads are the dataset's. Default: the preset's.",
    )
    solver: str | None = _help(None, "What weighs them, such as pgd or uniform. Default: the preset's.")
    geometry: str | None = _help(None, "curvature, update or vanilla. Default: the preset's.")
    objective: str | None = _help(None, "match or utility. Default: the preset's.")
    cap: float | None = _help(None, "Largest weight as a multiple of the chosen's mean weight. Default: 4.")
    ridge: float | None = _help(None, "Added to K's diagonal, relative to its mean. Default: the preset's.")
    total: str = _help("preserve", "preserve the step's size, or at_most that.")
    trust: float | str | None = _help(1.0, "Divides the curvature of the utility: a number, or adaptive.")
    curvature: str = _help("optimizer", "Model of the target's curvature: optimizer, kfac or ekfac.")
    gradients: str = _help("auto", "Form of the contributions: auto, factorized, full, lora or projection.")
    preconditioner: str = _help("auto", "Model of the optimizer; auto goes by its type.")
    target_batch_size: int = _help(8, "Target samples in a batch.")
    target_batches: int | str | None = _help(1, "Batches that make one target gradient: a number, or all.")
    refresh: int = _help(1, "Steps between two target gradients.")
    ema: float = _help(0.0, "Weight of the previous target gradient, in [0, 1).")
    warmup: int = _help(5, "Steps in vanilla geometry while the optimizer has no history.")
    reference: str = _help("pool", "What the second moment is predicted from: pool, target or previous.")
    memory_cap: int | None = _help(None, "Bytes that a window may keep. Default: no bound.")
    nothing_useful: str = _help("zero", "Where no candidate helps: zero gradients, or skip the step.")
    uncovered: str = _help("error", "Trainable parameters that cannot be recorded: error, scale or ignore.")
    residual: str = _help("error", "Gradient that no candidate owns: error, or keep.")
    relinearise: bool = _help(False, "Decide twice, the second time with the second moment that the first gives.")
    watch: int = _help(0, "Every how many steps prediction and step are compared; 0 is never.")
    pool: str = _help("global", "With several processes: candidates of all together (global), or each alone (local).")
    log: str | None = _help(None, "Decision log: a .jsonl file, or a folder for one. Default: none is written.")
    log_bytes: int = _help(64 << 20, "Bytes that the decision log may grow to.")
    log_text: int = _help(200, "Characters of each sample's text in the decision log; 0 for none.")
    check: bool = _help(True, "Audit the first window.")
    selection_seed: int = _help(0, "Of filters that draw at random; seed= from Python.")
    seed: InitVar[int | None] = None

    def __post_init__(self, seed: int | None) -> None:
        if seed is not None:
            self.selection_seed = seed
        self.budget = _number("budget", self.budget)
        self.trust = _number("trust", self.trust, "adaptive")
        self.target_batches = _number("target_batches", self.target_batches, "all")
        check_budget(self.budget)
        check_schedule(self.refresh, self.target_batches, self.ema)
        for name, (group, word) in _COMPONENTS.items():
            given = getattr(self, name)
            if given is not None and not (isinstance(given, str) and given == word):
                registry.resolve(group, given)
        chosen = presets.preset(self.preset)
        if chosen.granularity != "sample":
            raise ConfigurationError(
                f"preset {self.preset!r} needs tokens as candidates, which a trainer does not hand on; choose a preset "
                "without, or write the loop with ftw.Selector."
            )
        for name, allowed in (("geometry", GEOMETRIES), ("objective", OBJECTIVES)):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), allowed)
        one_of("total", self.total, TOTALS)
        one_of("reference", self.reference, REFERENCES)
        one_of("nothing_useful", self.nothing_useful, NOTHING_USEFUL)
        one_of("uncovered", self.uncovered, UNCOVERED)
        one_of("residual", self.residual, RESIDUALS)
        one_of("pool", self.pool, POOLS)
        if self.log is None:
            for each in fields(self):
                if each.name in ("log_bytes", "log_text") and getattr(self, each.name) != each.default:
                    raise ConfigurationError(
                        f"{each.name} is {getattr(self, each.name)!r}, and there is no log; it says how one is "
                        "written; give log='runs/mine' as well, or leave it out."
                    )
        self._log()
        counts = {"target_batch_size": 1, "warmup": 0, "watch": 0, "memory_cap": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if name != "memory_cap" or value is not None:
                at_least(name, value, least)
                if not isinstance(value, int):
                    raise ConfigurationError(f"{name} is {value!r}; it counts; give an integer.")
        if self.ridge is not None:
            at_least("ridge", self.ridge, 0)
        if self.cap is not None:
            CappedCone(self.cap)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the training dataset's columns that the filter reads."""
        chosen = presets.preset(self.preset).arguments()["filter"] if self.filter is None else self.filter
        columns: tuple[str, ...] = registry.resolve("filters", chosen).columns
        return tuple(name for name in columns if name != "learning_rate")  # which the selector knows

    def for_selector(self) -> dict[str, Any]:
        """Keyword arguments for `ftw.Selector`, the target and its loss left out."""
        own = ("target_batch_size", "log_bytes", "log_text", "selection_seed")
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in own}
        return given | {"log": self._log(), "seed": self.selection_seed}

    def _log(self) -> DecisionLog | None:
        return None if self.log is None else DecisionLog(self.log, max_bytes=self.log_bytes, text=self.log_text)


def _number(name: str, given: Any, word: str | None = None) -> Any:
    """What the command line gave as text: "4" is the integer, "0.25" the number, the word itself."""
    if given is not None and not isinstance(given, bool):
        if not isinstance(given, str) or given == word:
            return given
        for kind in (int, float):
            try:
                return kind(given)
            except ValueError:
                continue
    raise ConfigurationError(
        f"{name} is {given!r}; a number{f' or {word!r}' if word else ''} is needed; set it so or leave it out."
    )
