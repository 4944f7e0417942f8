"""Which preconditioner models an optimizer: what `preconditioner="auto"` means. Called by the selector."""

from __future__ import annotations

from torch.optim import Optimizer

from ftw.errors import UnsupportedOptimizerError
from ftw.optim_state.adafactor import Adafactor
from ftw.optim_state.adagrad import Adagrad
from ftw.optim_state.adam import Adam, AdamW
from ftw.optim_state.base import Preconditioner, models, qualified
from ftw.optim_state.hf_adafactor import HFAdafactor
from ftw.optim_state.lion import Lion
from ftw.optim_state.muon import Muon
from ftw.optim_state.nadam import NAdam
from ftw.optim_state.quantized import BitsandbytesAdam, BitsandbytesLion, TorchaoAdam, TorchaoAdamW
from ftw.optim_state.radam import RAdam
from ftw.optim_state.rmsprop import RMSprop
from ftw.optim_state.sgd import SGD
from ftw.optim_state.wrappers import unwrapped

BUILT_IN: tuple[type[Preconditioner], ...] = (
    SGD,
    Adam,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
    Adagrad,
    Lion,
    Adafactor,
    HFAdafactor,
    Muon,
    TorchaoAdam,
    TorchaoAdamW,
    BitsandbytesAdam,
    BitsandbytesLion,
)
"""Those that "auto" looks at. A plug-in is loaded only when it is named, so none is asked here."""


def preconditioner_for(optimizer: Optimizer) -> Preconditioner:
    """The built-in preconditioner that models the very class of `optimizer`.

    The class must match exactly: a subclass may override `step` (AdamW is itself a subclass of Adam). To
    vouch for a subclass, name the preconditioner.

    Raises:
        UnsupportedOptimizerError: no built-in models the class, or not with an option that is switched on.
    """
    optimizer = unwrapped(optimizer)
    for cls in BUILT_IN:
        if any(models(known, type(optimizer)) for known in cls.optimizers):
            preconditioner = cls()
            preconditioner.check(optimizer)
            return preconditioner
    raise UnsupportedOptimizerError(
        f"no preconditioner models the optimizer {qualified(type(optimizer))}; modelled are {_modelled()}; "
        f"{_if_it_steps_alike(optimizer)}use preconditioner='identity' for plain gradients, pass a Preconditioner of "
        "your own, or register one under entry-point group 'ftw.optim_state' and name it."
    )


def _if_it_steps_alike(optimizer: Optimizer) -> str:
    """What to do about a subclass of a modelled class."""
    for base in type(optimizer).mro():
        for cls in BUILT_IN:
            if any(models(known, base) for known in cls.optimizers):
                return (
                    f"if its step is that of {base.__name__}, pass preconditioner=ftw.optim_state.{cls.__name__}; else "
                )
    return ""


def _modelled() -> str:
    """All modelled classes, those of one module together: "torch.optim.sgd.SGD, torch.optim.adam.Adam, ..."."""
    modules: dict[str, list[str]] = {}
    for cls in BUILT_IN:
        for known in cls.optimizers:
            module, _, name = qualified(known).rpartition(".")
            modules.setdefault(module, []).append(name)
    return ", ".join(f"{module}.{'/'.join(names)}" for module, names in modules.items())
