"""The route for any module whose candidates are independent: `torch.func` on its forward, candidate by candidate.

Chosen by the user (`functional=[...]`), never as a guess; the router's rule is a subclass. It costs a second forward
and backward of the module, and a written-out gradient per candidate.
"""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import Parameter
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ftw.errors import CandidateLayoutError, ConfigurationError, FtwError, RecordingError
from ftw.gradients.layout import Tokens
from ftw.gradients.pieces import Dense, Piece, as_rows
from ftw.gradients.rules.base import Call, LayerRule, accumulate
from ftw.modes import random_state

Evaluation = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
"""(parameters, tensor arguments) -> the outputs that got gradient."""


class FunctionalRule(LayerRule):
    """Whole modules, their children included, by a vector-Jacobian product for each candidate.

    Any module will do whose output for a candidate depends on that candidate's part of its arguments alone. Every
    tensor argument whose leading dimensions are those of the first one is divided among the candidates; all others
    are shared. The module's own `forward` is evaluated (its hooks stay out) in one `vmap` where all candidates have
    as many rows, in a loop where they have not or where `vmap` cannot.

    Args:
        modules: names in the model ("blocks.0.mixer", "*" stands for anything) or classes, subclasses included.
        flat: the module acts on each token by itself, so that it may be given flattened tokens (rows * T, d) and
            maps of tokens; otherwise candidates must be rows.

    Raises:
        ConfigurationError: by `bind`, where a name or class occurs nowhere in the model.
        RecordingError: in the backward, where the module draws random numbers, or cannot be evaluated by itself.
        CandidateLayoutError: in the backward, where an output with gradient has no rows, or rows are not independent.
    """

    keeps_all = True
    saves_outputs = True
    summary = "torch.func on the whole module, candidate by candidate"

    def __init__(self, *modules: str | type[nn.Module], flat: bool = False) -> None:
        for given in modules:
            if not isinstance(given, str) and not (isinstance(given, type) and issubclass(given, nn.Module)):
                raise ConfigurationError(
                    f"functional names {given!r}; allowed are names of modules and classes of modules; pass the name "
                    "as model.named_modules() shows it, or type(module)."
                )
        self.modules = modules
        self.flat = flat
        self._named: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._looped: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def bind(self, model: nn.Module) -> Self:
        bound = copy(self)
        bound._named, bound._looped = weakref.WeakSet(), weakref.WeakSet()
        names = dict(model.named_modules())
        for given in self.modules:
            if isinstance(given, str):
                found = [module for name, module in names.items() if fnmatchcase(name, given)]
                bound._named.update(found)
                near = difflib.get_close_matches(given, names, n=3, cutoff=0.4)
            else:
                found = [module for module in names.values() if isinstance(module, given)]
                near = difflib.get_close_matches(given.__name__, {type(m).__name__ for m in names.values()})
            if not found:
                what = given if isinstance(given, str) else f"class {given.__module__}.{given.__qualname__}"
                raise ConfigurationError(
                    f"functional names {what}, of which the model has no module"
                    f"{f'; near are {near}' if near else ''}; names are those of model.named_modules(); correct it or "
                    "leave it out."
                )
        return bound

    def handles(self, module: nn.Module) -> bool:
        return module in self._named or isinstance(module, tuple(m for m in self.modules if isinstance(m, type)))

    def parameters(self, module: nn.Module) -> dict[str, Parameter]:
        # Each place once, though a child may have several names: `functional_call` would put back what it put there.
        places = {}
        for path, child in module.named_modules():
            for key, p in child._parameters.items():
                if p is not None:
                    places[f"{path}.{key}" if path else key] = p
        return places

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        _refuse_cache(call)
        keys = {p: key for key, p in wanted.items()}  # a parameter in several places has one gradient
        division = _Division(call, self.flat)
        evaluate = _evaluation(call, wanted, list(keys))
        parameters = [p.detach() for p in keys]
        with call.evaluation():
            found = None if call.module in self._looped else _all_at_once(division, evaluate, parameters)
            if found is None:
                self._looped.add(call.module)
                found = _one_by_one(call, division, evaluate, parameters)
            if division.assumes:
                _check_independence(call, division, evaluate, parameters, found[1])
        for p, values in zip(keys, found[0], strict=True):
            shape, dtype = tuple(as_rows(p).shape), accumulate(p)
            values = values.to(dtype).reshape(-1, *shape)
            yield keys[p], Dense(call.layout.start, shape, dtype, values if call.scale == 1.0 else values * call.scale)


def _refuse_cache(call: Call) -> None:
    """A cache of keys and values, filled by the trainer's forward, would be filled once more."""
    for leaf in tree_leaves(call.arguments):
        if type(leaf).__name__.endswith("Cache"):
            raise RecordingError(
                f"{type(call.module).__name__} was called with a {type(leaf).__name__}, which its forward changes; "
                "modules in functional=[...] are evaluated again and need arguments that stay as they are; call the "
                "model with use_cache=False (model.config.use_cache = False)."
            )


class _Division:
    """A call's tensor arguments and output gradients, divided among the candidates."""

    def __init__(self, call: Call, flat: bool) -> None:
        leading = call.inputs.shape[:-1]
        by_token = call.layout.owner is not None and call.layout.owner.dim() == 2
        if by_token and not flat:
            raise CandidateLayoutError(
                f"{type(call.module).__name__} is evaluated by torch.func a candidate at a time, but candidates are "
                f"{call.layout.describe()}; that needs a module that acts on each token by itself; if it does, give "
                "functional=[FunctionalRule(..., flat=True)], or else one candidate a row."
            )
        units = tuple(leading[:2]) if by_token and leading[:1] != (call.layout.owner.numel(),) else tuple(leading[:1])  # type: ignore[union-attr]
        self.depth = len(units)
        self.tokens = call.layout.tokens(units, flat)
        self.tensors = [leaf for leaf in tree_leaves(call.arguments) if isinstance(leaf, Tensor)]
        self.divided = [tuple(tensor.shape[: self.depth]) == units for tensor in self.tensors]
        self.grads: list[tuple[Tensor, Tokens, int]] = []  # gradient, its tokens, how many dimensions they take
        for grad in call.grads:
            if grad is None:
                continue
            if tuple(grad.shape[: self.depth]) == units:
                self.grads.append((grad, self.tokens, self.depth))
            elif flat and call.layout.fits(grad.shape[:1], True):
                self.grads.append((grad, call.layout.tokens(grad.shape[:1], True), 1))
            else:
                raise CandidateLayoutError(
                    f"an output of {type(call.module).__name__} of shape {tuple(grad.shape)} got gradient, but has no "
                    f"leading dimensions {units} to divide among {call.layout.describe()}; let the module return what "
                    "belongs to each row, or name the module around it in functional=[...]."
                )

    @property
    def count(self) -> int:
        return len(self.tokens.bounds) - 1

    @property
    def assumes(self) -> bool:
        """Whether further arguments were taken to have rows because of their size."""
        return sum(self.divided) > 1 and self.count > 1

    @property
    def even(self) -> bool:
        return all(bool(tokens.even) for tokens in (self.tokens, *(tokens for _, tokens, _ in self.grads)))

    def take(self, tensor: Tensor) -> Tensor:  # (*units, ...) -> (N, ...)
        return self.tokens.take(tensor, tensor.dim() - self.depth)


def _evaluation(call: Call, wanted: Mapping[str, Parameter], order: list[Parameter]) -> Evaluation:
    """The module as a function of the parameters, in this order, and of its tensor arguments."""
    place = {p: i for i, p in enumerate(order)}
    wrapper = _Forward(call.module)
    leaves, structure = tree_flatten(call.arguments)
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def evaluate(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, tensor in zip(slots, tensors, strict=True):
            filled[i] = tensor.clone()  # the forward may work in place
        args, kwargs = tree_unflatten(filled, structure)
        state = {name: buffer.clone() for name, buffer in wrapper.named_buffers()}
        state |= {f"module.{key}": parameters[place[p]] for key, p in wanted.items()}
        output = functional_call(wrapper, state, args, kwargs, tie_weights=False)
        tapped = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return tuple(leaf for leaf, grad in zip(tapped, call.grads, strict=True) if grad is not None)

    return evaluate


class _Forward(nn.Module):
    """A module's forward without the module's call, so that its hooks stay out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _product(
    evaluate: Evaluation, parameters: Sequence[Tensor], tensors: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One candidate's gradients, and its outputs."""
    outputs, pull, *_ = vjp(lambda *values: evaluate(values, tensors), *parameters)
    grads = pull(tuple(grad.to(output.dtype) for grad, output in zip(cotangents, outputs, strict=True)))
    return grads, outputs


def _all_at_once(
    division: _Division, evaluate: Evaluation, parameters: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
    """Gradients (count, *shape) and outputs (N, ...) by `vmap`; None: it cannot."""
    if not division.even:
        return None

    def group(tensor: Tensor) -> Tensor:  # (N, ...) -> (count, N / count, ...)
        return tensor.reshape(division.count, -1, *tensor.shape[1:])

    pairs = list(zip(division.tensors, division.divided, strict=True))
    tensors = [group(division.take(tensor)) if divided else tensor for tensor, divided in pairs]
    cotangents = [group(tokens.take(grad, grad.dim() - depth)) for grad, tokens, depth in division.grads]
    dims = [0 if divided else None for divided in division.divided], 0
    try:
        grads, outputs = vmap(lambda t, c: _product(evaluate, parameters, t, c), in_dims=dims)(tensors, cotangents)
    except Exception:  # whatever vmap lacks; a fault of the module itself shows again in the loop
        return None
    return grads, [output.flatten(0, 1) for output in outputs]


def _one_by_one(
    call: Call, division: _Division, evaluate: Evaluation, parameters: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Gradients (count, *shape) and outputs (N, ...) in a loop over candidates."""
    found = [p.new_zeros((division.count, *p.shape), dtype=accumulate(p)) for p in parameters]
    outputs: list[tuple[Tensor, ...]] = []
    pairs = list(zip(division.tensors, division.divided, strict=True))
    taken = [division.take(tensor) if divided else tensor for tensor, divided in pairs]
    cotangents = [(tokens.take(grad, grad.dim() - depth), tokens.bounds) for grad, tokens, depth in division.grads]
    for i, (first, last) in enumerate(zip(division.tokens.bounds, division.tokens.bounds[1:], strict=False)):
        if first == last:
            continue
        own = [t[first:last] if divided else t for t, divided in zip(taken, division.divided, strict=True)]
        state = random_state(call.inputs.device)
        try:
            grads, out = _product(
                evaluate, parameters, own, [grad[bounds[i] : bounds[i + 1]] for grad, bounds in cotangents]
            )
        except FtwError:
            raise
        except Exception as error:
            raise RecordingError(
                f"{type(call.module).__name__} cannot be evaluated by torch.func for one candidate alone (its tensor "
                f"arguments have shapes {[tuple(t.shape) for t in own]}): {error}; a module qualifies whose candidates "
                "are independent; name the module around it, or freeze it."
            ) from error
        _refuse_random(call, state)
        outputs.append(out)
        for values, grad in zip(found, grads, strict=True):
            values[i] = grad
    return found, [torch.cat(each) for each in zip(*outputs, strict=True)]


def _refuse_random(call: Call, before: list[Tensor]) -> None:
    if all(torch.equal(a, b) for a, b in zip(before, random_state(call.inputs.device), strict=True)):
        return
    torch.set_rng_state(before[0])
    if len(before) > 1:
        torch.cuda.set_rng_state(before[1], call.inputs.device)
    raise RecordingError(
        f"{type(call.module).__name__} draws random numbers in its forward (dropout in training mode, say), so that "
        "torch.func would see other ones than the trainer's forward did; modules in functional=[...] must be "
        "deterministic; set its dropout to 0 or put it into eval mode, or name its deterministic parts instead."
    )


def _check_independence(
    call: Call, division: _Division, evaluate: Evaluation, parameters: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """A tensor as long as the batch by chance, divided wrongly, gives other outputs than the whole call."""
    device = call.inputs.device.type
    coarsest = [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
    with torch.no_grad():
        whole = evaluate(parameters, division.tensors)
    for (grad, tokens, depth), all_rows, own in zip(division.grads, whole, outputs, strict=True):
        expected = tokens.take(all_rows, grad.dim() - depth)
        eps = max(torch.finfo(dtype).eps for dtype in (own.dtype, *coarsest))
        allowed = max(1e-4, 10 * eps) * expected.norm()
        if expected.shape != own.shape or not bool((own - expected).norm() <= allowed):
            if not bool(torch.isfinite(expected).all()):
                continue  # a faulty candidate is somebody else's business
            shapes = [tuple(t.shape) for t, divided in zip(division.tensors, division.divided, strict=True) if divided]
            raise CandidateLayoutError(
                f"{type(call.module).__name__} gives another output for the batch than for each candidate alone, with "
                f"arguments of shapes {shapes} divided among {call.layout.describe()}; rows must be independent, and "
                "an argument that is not the candidates' must not be as long as the batch; expand that argument to "
                "(1, ...), change the batch size, or name another module in functional=[...]."
            )
