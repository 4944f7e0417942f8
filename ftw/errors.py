"""Typed errors. Each message has three parts: what was given, what is allowed, what to do.

Every error that ftw raises on purpose is an `FtwError`; most are also the built-in exception that a caller
would expect (`ValueError`, `LookupError`, `RuntimeError`).
"""


class FtwError(Exception):
    """Root of all errors raised by ftw."""


class ConfigurationError(FtwError, ValueError):
    """An argument has a value or a type that is not allowed."""


class UnknownComponentError(FtwError, LookupError):
    """No component of that name is registered in the group."""


class DuplicateComponentError(FtwError, LookupError):
    """Two distributions register the same name in one group."""


class BrokenPluginError(FtwError, ImportError):
    """A registered component could not be imported; the message names its distribution."""


class MissingDependencyError(FtwError, ImportError):
    """An optional dependency of a component is not installed; the message names the extra."""


class UnsupportedOptimizerError(FtwError, TypeError):
    """No preconditioner models this optimizer, or not with this option."""


class OptimizerStateError(FtwError, RuntimeError):
    """The optimizer's state does not hold what its preconditioner needs."""


class CoverageError(FtwError, TypeError):
    """A trainable parameter belongs to a layer whose contributions cannot be recorded."""


class RecordingError(FtwError, RuntimeError):
    """`record()`, `select()`, `apply()` or the saving of state were used out of order, or saw nothing."""


class CandidateLayoutError(RecordingError):
    """A tapped layer's rows are not the candidates of the batch (flattened, packed, permuted, time-first)."""


class CompletenessError(RecordingError):
    """Contributions do not add up to the gradient: some of it belongs to no candidate."""


class MemoryCapError(RecordingError):
    """What a window keeps exceeds `memory_cap`, and nothing of it may be dropped."""


class NonFiniteError(FtwError, ArithmeticError):
    """NaN or infinity where no candidate can be blamed (target gradient, optimizer state, whole pool)."""


class TargetError(FtwError, ValueError):
    """The target yields no batch, no loss, or a loss that does not depend on the model."""


class FilterError(FtwError, RuntimeError):
    """A filter returned something else than distinct indices within the budget."""


class SolverError(FtwError, RuntimeError):
    """A weight solver did not return a usable solution; the message is its status sentence."""


class DataError(FtwError, ValueError):
    """A data file is missing, malformed or empty; the message names the file and the line."""
