"""The optimizer's next step as an affine map of the gradient, read from its hyper-parameters and state."""

from ftw.optim_state.adafactor import Adafactor
from ftw.optim_state.adagrad import Adagrad
from ftw.optim_state.adam import Adam, AdamW
from ftw.optim_state.base import (
    AffineUpdate,
    Diagonal,
    Preconditioner,
    RowColumn,
    Scalar,
    ScaleOperator,
    TensorUpdate,
    TwoSided,
)
from ftw.optim_state.hf_adafactor import HFAdafactor
from ftw.optim_state.identity import Identity
from ftw.optim_state.lion import Lion
from ftw.optim_state.lookup import preconditioner_for
from ftw.optim_state.muon import Muon
from ftw.optim_state.nadam import NAdam
from ftw.optim_state.quantized import BitsandbytesAdam, BitsandbytesLion, TorchaoAdam, TorchaoAdamW
from ftw.optim_state.radam import RAdam
from ftw.optim_state.rmsprop import RMSprop
from ftw.optim_state.sgd import SGD
from ftw.optim_state.wrappers import unwrapped

__all__ = [
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AffineUpdate",
    "BitsandbytesAdam",
    "BitsandbytesLion",
    "Diagonal",
    "HFAdafactor",
    "Identity",
    "Lion",
    "Muon",
    "NAdam",
    "Preconditioner",
    "RAdam",
    "RMSprop",
    "RowColumn",
    "Scalar",
    "ScaleOperator",
    "TensorUpdate",
    "TorchaoAdam",
    "TorchaoAdamW",
    "TwoSided",
    "preconditioner_for",
    "unwrapped",
]
