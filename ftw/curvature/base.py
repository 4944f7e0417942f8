"""The interface of curvature models: what stands for the Hessian H in the second-order utility.

`U(w) = g'd - 1/2 d'H d` with `d = o + M C w` (docs/theory.md). By default H is the optimizer's own model P^-1, which
costs nothing. A model of this interface replaces it, parameter by parameter. Called by the assembly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.nn import Parameter

from ftw.optim_state.operators import ScaleOperator

if TYPE_CHECKING:
    from ftw.gradients.base import Contributions


class Curvature(ABC):
    """H of the target's loss, block diagonal over parameters, symmetric positive semidefinite.

    Laws: `operator` changes in `observe` and `load_state_dict` alone; `restore(snapshot())` undoes what came between.
    """

    @abstractmethod
    def observe(self, contributions: Contributions, names: Mapping[Parameter, str]) -> None:
        """Learn from a window, before it is measured.

        Args:
            contributions: of the window; candidates with NaN or infinity may be among them.
            names: the model's name of every parameter that can be recorded.
        """

    @abstractmethod
    def operator(self, parameter: Parameter) -> ScaleOperator | None:
        """H for one parameter; None: the optimizer's own model."""

    @abstractmethod
    def snapshot(self) -> Any:
        """What `restore` needs to undo a window; may share tensors that are never changed in place."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Undo to a snapshot."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain data (numbers, strings, tensors), from which a run resumes bitwise."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict()` was taken."""
