"""A ridge towards reference weights, instead of towards 0. Passed as the selector's `ridge`."""

from __future__ import annotations

from torch import Tensor

from ftw.arguments import at_least
from ftw.errors import ConfigurationError
from ftw.filters.ranking import column
from ftw.problem import SelectionProblem
from ftw.solvers.constraints import ConstraintSet
from ftw.solvers.ridge import fitting_scale


class RidgeTowards:
    """Adds `1/2 rho ||w - s v||^2` to what the solver minimises: weights stay near `s v`.

    v are reference weights of the chosen candidates, relative as all weights are: equal ones, which pull towards plain
    training on the chosen, or those of a column. s is their best scale (`ftw.solvers.ridge.fitting_scale`), so that no
    scale of a loss or of v changes the selection. As rho grows the weights go from the solver's own to v.

    Law: with a large strength and no column the weights are those of the solver 'uniform', where equal weights help.

    Args:
        strength: rho in units of the mean of K_ii over the chosen, at least 0. It takes the place of the plain ridge.
        column: of `record(extras=...)` with a number of at least 0 for each candidate; None: equal weights.

    Raises:
        ConfigurationError: a strength that is no finite number of at least 0, or a column that is no name.
    """

    def __init__(self, strength: float, column: str | None = None) -> None:
        at_least("strength", strength, 0.0)
        if column is not None and not isinstance(column, str):
            raise ConfigurationError(
                f"column is {column!r}; the name of a column of record(extras=...) is needed; leave it out for equal "
                "weights."
            )
        self.strength, self.column = float(strength), column

    def __repr__(self) -> str:
        return f"RidgeTowards({self.strength!r}, {self.column!r})"

    def reference(
        self, problem: SelectionProblem, chosen: Tensor, gram: Tensor, constraints: ConstraintSet
    ) -> Tensor:  # (m,)
        """`s v` of the chosen candidates (m,), of a problem whose K on them is `gram` (m, m).

        Raises:
            ConfigurationError: the column is missing or holds something else than finite numbers of at least 0.
        """
        shape = problem.alignment.new_ones(len(chosen))
        if self.column is not None:
            shape = column(problem, self.column, "RidgeTowards")[chosen]
            if bool((shape < 0).any()):
                raise ConfigurationError(
                    f"extras[{self.column!r}] holds {float(shape.min())}; reference weights of at least 0 are needed; "
                    "1 stands for a candidate's weight in plain training."
                )
        return fitting_scale(gram, problem.alignment[chosen], constraints, shape) * shape
