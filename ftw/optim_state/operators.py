"""Update scales: M for one parameter, a small algebra of symmetric positive semidefinite operators.

| operator | structure | M X | passes through b a' (`separable`) | rows stay apart |
|---|---|---|---|---|
| `Scalar` | scalar | value X | yes | yes |
| `Diagonal` | diagonal | values * X | no | yes |
| `RowColumn` | row_column | diag(rows) X diag(columns) | yes, for one matrix | yes |
| `TwoSided` | two_sided | L inner(L'X R) R' | if the inner one does | if there is no L |

Made by preconditioners and curvature models, applied by the assembly.

Longer than others: the operators are short, and share laws that are best read side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ftw.errors import ConfigurationError


class ScaleOperator(ABC):
    """M for one parameter: symmetric positive semidefinite, learning rate included.

    Laws, X shaped as the parameter: `M.power(a).apply(M.power(b).apply(X)) == M.power(a + b).apply(X)`;
    `M.apply(M.solve(X)) == X` where M is not singular; where `separable`, `M.apply(b a')` is the outer product of what
    `apply_factors(a, b)` returns; unless `mixes_rows`, `M.cut(rows)` of rows of X is those rows of `M.apply(X)`.

    Operators are values: no method but `apply_` writes to a tensor. Results have the wider dtype of M and X.
    """

    structure: ClassVar[str]

    @abstractmethod
    def apply(self, tensor: Tensor) -> Tensor:  # (..., *shape) -> (..., *shape)
        """M times `tensor`, whose trailing dimensions are the parameter's; leading ones are a batch."""

    def apply_(self, tensor: Tensor) -> Tensor:  # (..., *shape) -> (..., *shape)
        """As `apply`, in place and in the tensor's own dtype."""
        return tensor.copy_(self.apply(tensor))

    @abstractmethod
    def power(self, exponent: float) -> ScaleOperator:
        """M to the power of `exponent`; a negative one of a singular M holds infinities, see `solve`."""

    def sqrt(self) -> ScaleOperator:
        """M^(1/2)."""
        return self.power(0.5)

    @abstractmethod
    def solve(self, tensor: Tensor) -> Tensor:  # (..., *shape) -> (..., *shape)
        """`M^-1 tensor`; where M is 0 (a learning rate of 0) and the tensor as well, so is the result."""

    @property
    def separable(self) -> bool:
        """Whether M of an outer product is an outer product, so that gradients need not be written out."""
        return False

    @property
    def mixes_rows(self) -> bool:
        """Whether a row of `M X` depends on other rows of X."""
        return False

    def apply_factors(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """M applied to outer products `grads[t] inputs[t]'`, where `separable`.

        Args:
            inputs: (N, C). grads: (N, R), for a parameter (R, C).

        Returns:
            What stands for `inputs` and `grads` afterwards, in the same shapes.

        Raises:
            ConfigurationError: M is not separable.
        """
        raise ConfigurationError(
            f"{type(self).__name__} does not pass through an outer product; `separable` says which do; write the "
            "gradient out and apply M to it."
        )

    def cut(self, rows: slice | Tensor) -> ScaleOperator:
        """M on some rows of the parameter, seen as (R, d) with all but its last dimension flattened.

        Args:
            rows: a slice, or a LongTensor of row numbers.

        Raises:
            ConfigurationError: M mixes rows.
        """
        raise ConfigurationError(
            f"{type(self).__name__} mixes rows and cannot be cut; apply it to the whole parameter."
        )


@dataclass(frozen=True)
class Scalar(ScaleOperator):
    """M = value * I, value not negative."""

    value: float
    structure: ClassVar[str] = "scalar"

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor * self.value

    def apply_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.value)

    def power(self, exponent: float) -> Scalar:
        if not self.value and exponent < 0:
            return Scalar(math.inf)
        return Scalar(self.value**exponent)

    def solve(self, tensor: Tensor) -> Tensor:
        return tensor / self.value if self.value else torch.where(tensor == 0, 0.0, tensor / 0.0)

    @property
    def separable(self) -> bool:
        return True

    def apply_factors(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, grads * self.value

    def cut(self, rows: slice | Tensor) -> Scalar:
        return self


@dataclass(frozen=True)
class Diagonal(ScaleOperator):
    """M = diag(values), `values` shaped as the parameter and not negative."""

    values: Tensor
    structure: ClassVar[str] = "diagonal"

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor * self.values

    def apply_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.values)

    def power(self, exponent: float) -> Diagonal:
        if exponent == 0.5:
            return Diagonal(self.values.sqrt())
        return Diagonal(self.values.reciprocal() if exponent == -1.0 else self.values**exponent)

    def solve(self, tensor: Tensor) -> Tensor:
        return torch.where(tensor == 0, 0.0, tensor / self.values)

    def cut(self, rows: slice | Tensor) -> Diagonal:
        values = self.values.reshape(1) if not self.values.dim() else self.values
        return Diagonal((values.flatten(0, -2) if values.dim() > 2 else values)[rows])


@dataclass(frozen=True)
class RowColumn(ScaleOperator):
    """M_ij = rows_i * columns_j over a parameter's last two dimensions: Adafactor's factored second moment.

    Attributes:
        rows: (..., R, 1), not negative; for a single matrix also (1, 1), one value for all rows.
        columns: (..., 1, C), likewise. Leading dimensions are stacked matrices, each with its own.
    """

    rows: Tensor
    columns: Tensor
    structure: ClassVar[str] = "row_column"

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor * self.rows * self.columns

    def apply_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.rows).mul_(self.columns)

    def power(self, exponent: float) -> RowColumn:
        return RowColumn(self.rows**exponent, self.columns**exponent)

    def solve(self, tensor: Tensor) -> Tensor:
        return torch.where(tensor == 0, 0.0, tensor / self.rows / self.columns)

    @property
    def separable(self) -> bool:
        return self.rows.dim() == 2

    def apply_factors(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        if not self.separable:
            return super().apply_factors(inputs, grads)
        return inputs * self.columns.flatten(), grads * self.rows.flatten()

    def cut(self, rows: slice | Tensor) -> ScaleOperator:
        if self.separable:
            return self if len(self.rows) == 1 else RowColumn(self.rows[rows], self.columns)
        height = self.rows.shape[-2]
        flat, columns = self.rows.flatten(), self.columns.flatten(0, -2)
        if isinstance(rows, slice):
            rows = torch.arange(len(flat), device=flat.device)[rows]
        return Diagonal(flat[rows, None] * columns[rows // height])


@dataclass(frozen=True)
class TwoSided(ScaleOperator):
    """`M X = L inner(L' X R) R'` for a matrix X: a scale in rotated coordinates (Muon, Shampoo, K-FAC, EK-FAC).

    Attributes:
        inner: the scale in those coordinates, for a matrix (R, C).
        left: L, (R, R), orthogonal; None: the identity. right: R, (C, C), likewise.
    """

    inner: ScaleOperator
    left: Tensor | None = None
    right: Tensor | None = None
    structure: ClassVar[str] = "two_sided"

    @staticmethod
    def of(left: Tensor | None, right: Tensor | None) -> TwoSided:
        """`M X = left X right` for symmetric positive semidefinite matrices; None: the identity.

        Args:
            left: (R, R). right: (C, C). Eigenvalues below zero are taken for rounding errors of zero.
        """
        rows = columns = None
        if left is not None:
            values, left = torch.linalg.eigh(left)
            rows = values.clamp_min(0.0)[:, None]
        if right is not None:
            values, right = torch.linalg.eigh(right)
            columns = values.clamp_min(0.0)[None, :]
        if rows is None or columns is None:
            one = rows if rows is not None else columns
            if one is None:
                return TwoSided(Scalar(1.0))
            rows = one.new_ones(1, 1) if rows is None else rows
            columns = one.new_ones(1, 1) if columns is None else columns
        return TwoSided(RowColumn(rows, columns), left, right)

    def apply(self, tensor: Tensor) -> Tensor:
        return self._back(self.inner.apply(self._there(tensor)))

    def power(self, exponent: float) -> TwoSided:
        return TwoSided(self.inner.power(exponent), self.left, self.right)

    def solve(self, tensor: Tensor) -> Tensor:
        return self._back(self.inner.solve(self._there(tensor)))

    @property
    def separable(self) -> bool:
        return self.inner.separable

    @property
    def mixes_rows(self) -> bool:
        return self.left is not None or self.inner.mixes_rows

    def apply_factors(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        inputs, grads = self.inner.apply_factors(_times(inputs, self.right), _times(grads, self.left))
        return _times(inputs, self.right, back=True), _times(grads, self.left, back=True)

    def cut(self, rows: slice | Tensor) -> ScaleOperator:
        if self.left is not None:
            return super().cut(rows)
        return TwoSided(self.inner.cut(rows), None, self.right)

    def _there(self, tensor: Tensor) -> Tensor:
        tensor = _times(tensor.mT, self.left).mT
        return _times(tensor, self.right)

    def _back(self, tensor: Tensor) -> Tensor:
        tensor = _times(tensor.mT, self.left, back=True).mT
        return _times(tensor, self.right, back=True)


def _times(tensor: Tensor, basis: Tensor | None, *, back: bool = False) -> Tensor:  # (..., N, d), (d, d)
    """`tensor basis`, or `tensor basis'` for the way back, in the wider dtype; None: the identity."""
    if basis is None:
        return tensor
    dtype = torch.promote_types(tensor.dtype, basis.dtype)
    basis = basis.to(dtype)
    return tensor.to(dtype) @ (basis.T if back else basis)


@dataclass(frozen=True)
class Product(ScaleOperator):
    """`outer inner X`: one operator after the other. Not symmetric in general, so that it is no scale by itself.

    It has no powers (ConfigurationError), and the law about them does not hold; the others do.
    """

    outer: ScaleOperator
    inner: ScaleOperator
    structure: ClassVar[str] = "product"

    def apply(self, tensor: Tensor) -> Tensor:
        return self.outer.apply(self.inner.apply(tensor))

    def apply_(self, tensor: Tensor) -> Tensor:
        return self.outer.apply_(self.inner.apply_(tensor))

    def power(self, exponent: float) -> ScaleOperator:
        raise ConfigurationError(
            f"a product of two scales has no power {exponent}; it is not symmetric; take powers of the two apart."
        )

    def solve(self, tensor: Tensor) -> Tensor:
        return self.inner.solve(self.outer.solve(tensor))

    @property
    def separable(self) -> bool:
        return self.outer.separable and self.inner.separable

    @property
    def mixes_rows(self) -> bool:
        return self.outer.mixes_rows or self.inner.mixes_rows

    def apply_factors(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        return self.outer.apply_factors(*self.inner.apply_factors(inputs, grads))

    def cut(self, rows: slice | Tensor) -> Product:
        return Product(self.outer.cut(rows), self.inner.cut(rows))
