"""Which preconditioner models an optimizer: what `preconditioner="auto"` means. Called by the selector."""

from __future__ import annotations

from torch.optim import Optimizer

from ftw.errors import UnsupportedOptimizerError
from ftw.optim_state.adam import Adam, AdamW
from ftw.optim_state.base import Preconditioner
from ftw.optim_state.sgd import SGD

BUILT_IN: tuple[type[Preconditioner], ...] = (SGD, Adam, AdamW)
"""Those that "auto" looks at. A plug-in is loaded only when it is named, so none is asked here."""


def preconditioner_for(optimizer: Optimizer) -> Preconditioner:
    """The built-in preconditioner that models the very class of `optimizer`.

    The class must match exactly: a subclass may override `step` (AdamW is itself a subclass of Adam). To
    vouch for a subclass, name the preconditioner.

    Raises:
        UnsupportedOptimizerError: no built-in models the class, or not with an option that is switched on.
    """
    for cls in BUILT_IN:
        if type(optimizer) in cls.optimizers:
            preconditioner = cls()
            preconditioner.check(optimizer)
            return preconditioner
    given = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    modelled = ", ".join(f"{known.__module__}.{known.__qualname__}" for cls in BUILT_IN for known in cls.optimizers)
    raise UnsupportedOptimizerError(
        f"no preconditioner models the optimizer {given}; modelled are {modelled}; use "
        "preconditioner='identity' for plain gradients, or register one under entry-point group "
        "'ftw.optim_state' and name it."
    )
