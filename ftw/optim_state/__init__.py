"""The optimizer's next step as an affine map of the gradient, read from its hyper-parameters and state."""

from ftw.optim_state.adam import Adam, AdamW
from ftw.optim_state.base import (
    AffineUpdate,
    Diagonal,
    Preconditioner,
    Scalar,
    ScaleOperator,
    TensorUpdate,
)
from ftw.optim_state.identity import Identity
from ftw.optim_state.lookup import preconditioner_for
from ftw.optim_state.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AffineUpdate",
    "Diagonal",
    "Identity",
    "Preconditioner",
    "Scalar",
    "ScaleOperator",
    "TensorUpdate",
    "preconditioner_for",
]
