"""The recorder: hooks on a model that turn the trainer's own backward into contributions.

Owned by the selector; usable alone (`with recorder.record(): loss.backward()`, then `recorder.contributions()`).
The hooks stay until `close()` and do nothing outside `record()`. DESIGN, sections 3.1 to 3.3.

Longer than others: window, hooks and audits share one state, which must be undone as a whole when a block fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from ftw.errors import CandidateLayoutError, ConfigurationError, RecordingError
from ftw.gradients import audit
from ftw.gradients.auto import Auto
from ftw.gradients.base import Contributions, GradientExtractor
from ftw.gradients.coverage import TappedLayer, find_layers
from ftw.gradients.layers import Call
from ftw.gradients.pieces import Piece
from ftw.gradients.tap import Tap

RESIDUALS = ("error", "keep")

_ATTEMPTS = 5
"""Audits of identity that may end without proof before the recorder gives up, with a warning."""


@dataclass
class Forward:
    """One forward of the model inside `record()`: `count` rows, candidates from `start` on."""

    start: int
    count: int
    recomputable: bool  # no other forward was waiting for its backward when this one ran
    reached: bool = False  # a backward has come by


class Recorder:
    """Records contributions of the given parameters.

    Args:
        model: the module whose call is a forward. Its inputs' leading dimension is the candidates'.
        parameters: gives those to record; every one must belong to layers that have a rule. Default: all that require
            grad. Asked at each `record()`, so that parameters frozen, thawed, added or removed are noticed.
        extractor: in what form contributions are kept.
        lean: run tapped layers with detached parameters, so that autograd forms no pool gradient of them
            and `p.grad` stays as it was. False leaves the trainer's gradient in `p.grad`.
        residual: what to do with gradient that no candidate owns: "error", or "keep" to collect it in `residual`.
        check: audit identity and completeness in the first record after construction.

    Raises:
        CoverageError: a parameter belongs to a layer without a rule; the message names it and the ways out.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Callable[[], list[Parameter]] | None = None,
        extractor: GradientExtractor | None = None,
        *,
        lean: bool = True,
        residual: str = "error",
        check: bool = True,
    ) -> None:
        if residual not in RESIDUALS:
            raise ConfigurationError(
                f"residual is {residual!r}; allowed are {RESIDUALS}; choose one, 'error' is the default."
            )
        self.model = model
        self.extractor = Auto() if extractor is None else extractor
        self.lean = lean
        self.residual_policy = residual
        self._wanted = parameters
        self._check = check
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[Any] = []
        self._layers: list[TappedLayer] = []
        self._active = False
        self._auditing = False
        self._inside: Forward | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._autocast: tuple[str, torch.dtype] | None = None
        self._scale = 1.0
        self._precision = 0.0
        self._clear()
        self._attach()

    # -- the window ---------------------------------------------------------------------------------------------

    @contextmanager
    def record(self, *, loss_scale: float = 1.0) -> Iterator[None]:
        """Record every forward and backward of the model inside the block. Blocks add up to one window.

        If the block raises, what it recorded is dropped and `p.grad` is as it was before the block.

        Args:
            loss_scale: what the loss was multiplied with (by a GradScaler, say); divided out of contributions.

        Raises:
            RecordingError: nested use, a forward whose backward did not follow, no forward at all.
            CandidateLayoutError: rows of a layer are not the rows of the batch.
            CompletenessError: contributions do not add up to the gradient.
        """
        if self._active:
            raise RecordingError("record() was entered inside record(); end the first block before the next.")
        self._refresh_layers()
        self._scale = 1.0 / loss_scale
        mark = self.count, len(self._forwards), {p: len(kept) for p, kept in self._pieces.items()}
        parked = self._park_gradients()
        self._refuse_mixing()
        self._active, self._auditing = True, self._completeness_due
        try:
            yield
            self._active = False
            self._check_forwards(mark[1])
            if self._identity_due:
                self._audit_identity(self._forwards[mark[1]].count)
            self._settle(mark[2], parked)
        except BaseException:
            self._rewind(*mark)
            for p, grad in parked.items():
                p.grad = grad
            raise
        finally:
            self._active, self._inside, self._call = False, None, None
            # The layers' own hooks do it too, but not after an interrupt.
            for layer in self._layers:
                layer.put_back()

    def contributions(self) -> Contributions:
        """The contributions of the window so far."""
        return self.extractor.contributions(self._pieces, self.count)

    @property
    def active(self) -> bool:
        """Whether a block of `record()` is open."""
        return self._active

    @property
    def parameters(self) -> set[Parameter]:
        """The parameters that are recorded."""
        return {p for layer in self._layers for p in layer.parameters.values()}

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The autocast state that the last recorded forward ran in."""
        if self._autocast is None:
            yield
            return
        device, dtype = self._autocast
        with torch.autocast(device, dtype=dtype):
            yield

    def clear(self) -> None:
        """Forget the window and release its memory."""
        if self._active:
            raise RecordingError("the window cannot be cleared inside record(); leave the block first.")
        self._clear()

    def close(self) -> None:
        """Remove all hooks and forget the window. Recording again needs a new recorder."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers = [], []
        self._clear()

    def _clear(self) -> None:
        self.count = 0
        self.residual: dict[Parameter, Tensor] = {}
        self._pieces: dict[Parameter, list[Piece]] = {}
        self._forwards: list[Forward] = []

    def _refuse_mixing(self) -> None:
        """What lets candidates mix, or changes a gradient on its way, where no audit would see it."""
        for name, module in self.model.named_modules() if self._identity_due else ():
            if isinstance(module, _BatchNorm) and module.training:
                raise CandidateLayoutError(
                    f"{name} ({type(module).__name__}) is in training mode and mixes the candidates of a batch; each "
                    "candidate must be computed by itself; put that module into eval mode, or use another norm."
                )
        for layer in self._layers:
            for key, p in layer.parameters.items():
                if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                    raise RecordingError(
                        f"{layer.name}.{key} has gradient hooks, which the weighted gradient would bypass; change "
                        "p.grad after apply() instead, and remove the hooks."
                    )

    def _audit_identity(self, rows: int) -> None:
        if self._call is None or rows < 2:
            return  # a single candidate cannot be mixed up; look again when there are more
        with self.autocast():
            proved = audit.check_identity(self.model, self._layers, *self._call, rows)
        self._identity_due = not proved
        self._inconclusive += not proved
        if self._inconclusive == _ATTEMPTS:
            self._identity_due = False
            warnings.warn(
                f"{_ATTEMPTS} batches in a row could not show that row i of every layer is candidate i (constant or "
                "duplicate rows); the check is given up; make sure that the model keeps the batch's rows apart.",
                stacklevel=5,
            )

    def _rewind(self, count: int, forwards: int, kept: dict[Parameter, int]) -> None:
        self.count = count
        del self._forwards[forwards:]
        if not forwards:
            self.residual.clear()
        for p in list(self._pieces):
            del self._pieces[p][kept.get(p, 0) :]

    # -- gradients outside the contributions -----------------------------------------------------------------------

    def _park_gradients(self) -> dict[Parameter, Tensor | None]:
        """Take p.grad out of the way, so that what is there after the block was made in the block."""
        recorded = self.parameters
        if not self._forwards:
            names = {p: name for name, p in self.model.named_parameters()}
            stale = [p for p in recorded if p.grad is not None and bool(p.grad.count_nonzero())]
            if stale and self.residual_policy == "error":
                raise RecordingError(
                    f"p.grad of {names.get(stale[0], 'a parameter')} and {len(stale) - 1} others is not zero "
                    "before the window's first record(); apply() would overwrite it; call optimizer.zero_grad() first, "
                    "or pass residual='keep' to add that gradient, unweighted, to the step."
                )
            for p in stale:
                assert p.grad is not None
                self.residual[p] = p.grad * self._scale
        parked = {p: p.grad for p in recorded}
        for p in recorded:
            p.grad = None
        return parked

    def _settle(self, kept: dict[Parameter, int], parked: dict[Parameter, Tensor | None]) -> None:
        """Compare what autograd formed with what was recorded; put p.grad back."""
        new = {p: pieces[kept.get(p, 0) :] for p, pieces in self._pieces.items()}
        formed = {p: p.grad * self._scale for p in parked if p.grad is not None}
        if self._auditing or not self.lean:
            left = audit.leftover(new, formed, self._precision)
        else:  # autograd formed nothing for recorded calls; zeros are a term that vanishes
            left = {p: grad for p, grad in formed.items() if bool(grad.count_nonzero())}
        if left:
            names = {p: name for name, p in self.model.named_parameters()}
            if self.residual_policy == "error":
                raise audit.completeness_error({names[p]: left[p] for p in left}, formed, names)
            for p, rest in left.items():
                self.residual[p] = self.residual[p] + rest if p in self.residual else rest
        for p, before in parked.items():
            if self.lean:
                p.grad = before
            elif before is not None:
                p.grad = before if p.grad is None else before + p.grad
        # An audit that saw nothing but faulty numbers has proved nothing: the next block is audited again.
        if self._auditing and all(bool(torch.isfinite(grad).all()) for grad in formed.values()):
            self._completeness_due = False

    # -- forwards --------------------------------------------------------------------------------------------------

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._active or not torch.is_grad_enabled() or self._inside is not None:
            return
        rows = audit.rows_of(args, kwargs)
        device = self._anchor_device.type
        self._autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        audit.refuse_packed(kwargs)
        waiting = any(not forward.reached for forward in self._forwards)
        if waiting:
            for forward in self._forwards:
                forward.recomputable = forward.recomputable and forward.reached
        self._inside = Forward(self.count, rows, recomputable=not waiting)
        self._forwards.append(self._inside)
        self.count += rows
        if self._identity_due and self._call is None:
            self._call = args, kwargs

    def _after_model(self, model: nn.Module, args: Any, output: Any) -> None:
        self._inside = None

    def _check_forwards(self, first: int) -> None:
        block = self._forwards[first:]
        if not block:
            raise RecordingError(
                "no forward of the model was seen inside record(); contributions are recorded when the model itself "
                "is called with gradients enabled; call model(...), not a part of it, inside the block."
            )
        idle = [forward for forward in block if not forward.reached]
        if idle:
            raise RecordingError(
                f"{len(idle)} of {len(block)} forwards inside record() got no backward (candidates from "
                f"{idle[0].start} on); each forward of the block must be followed by its backward inside it; use "
                "torch.no_grad() for forwards that are not trained on."
            )

    def _forward_of(self, layer: TappedLayer) -> Forward:
        if self._inside is not None:
            return self._inside
        # Outside the model's forward a tapped layer runs only when activation checkpointing recomputes it.
        last = self._forwards[-1] if self._forwards else None
        recomputing = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks it
        if last is None or not recomputing:
            raise RecordingError(
                f"layer {layer.name} ran inside record() but outside a forward of the model; candidates are counted "
                "by the model's own call; call model(...) instead of its parts."
            )
        if not last.recomputable:
            raise RecordingError(
                f"layer {layer.name} was recomputed by activation checkpointing while several forwards waited for one "
                "backward, so its candidates cannot be told; call backward after each forward."
            )
        return last

    # -- layers ----------------------------------------------------------------------------------------------------

    def _refresh_layers(self) -> None:
        """Attach anew if parameters were frozen or thawed since."""
        now = self.parameters
        wanted = self.model.parameters() if self._wanted is None else self._wanted()
        if not self._handles:
            raise RecordingError("the recorder is closed; make a new one.")
        if now != {p for p in wanted if p.requires_grad}:
            if self._forwards:
                raise RecordingError(
                    "parameters were frozen or thawed in the middle of a window; finish the step with apply() first."
                )
            self._attach()

    def _attach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._layers = find_layers(self.model, None if self._wanted is None else self._wanted())
        self._completeness_due = self._identity_due = self._check
        self._inconclusive = 0
        names = dict(self.model.named_parameters())
        recorded = self.parameters
        self._anchor_device = next(iter(recorded)).device
        self.extractor.check(self.model, {name: p for name, p in names.items() if p in recorded})
        self._handles = [
            self.model.register_forward_pre_hook(_Hook(self._before_model), with_kwargs=True, prepend=True),
            self.model.register_forward_hook(_Hook(self._after_model), always_call=True),
        ]
        for layer in self._layers:
            before, after = (
                _Hook(partial(self._before_layer, layer)),
                _Hook(partial(self._after_layer, layer)),
            )
            self._handles.append(layer.module.register_forward_pre_hook(before))
            self._handles.append(
                layer.module.register_forward_hook(after, with_kwargs=True, always_call=True, prepend=True)
            )

    def _before_layer(self, layer: TappedLayer, module: nn.Module, args: Any) -> None:
        if self._active and self.lean and not self._auditing and torch.is_grad_enabled():
            for name, p in layer.parameters.items():
                module._parameters[name] = p.detach()  # type: ignore[assignment]

    def _after_layer(self, layer: TappedLayer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._active or not torch.is_grad_enabled():
            return None
        layer.put_back()
        if output is None:  # the layer raised; the hook only had to put its parameters back
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        forward = self._forward_of(layer)
        if inputs.dim() == 0 or inputs.shape[0] != forward.count:
            raise CandidateLayoutError(
                f"layer {layer.name} ({type(module).__name__}) got an input of shape {tuple(inputs.shape)} "
                f"in a forward of {forward.count} rows; its leading dimension must be the candidates'; give the "
                "model unpacked, batch-first rows, or freeze that layer."
            )
        return Tap.apply(output, self._anchor, inputs.detach(), partial(self._collect, layer, forward))

    def _collect(self, layer: TappedLayer, forward: Forward, inputs: Tensor, grads: Tensor) -> None:
        if not self._active:
            raise RecordingError(
                f"the backward of layer {layer.name} ran after record() had ended; call backward inside the block."
            )
        forward.reached = True
        self._precision = max(self._precision, torch.finfo(grads.dtype).eps)
        call = Call(layer.module, inputs, grads, forward.start, self._scale)
        for name, p in layer.parameters.items():
            self._pieces.setdefault(p, []).append(self.extractor.keep(layer.rule.piece(call, name, p)))


class _Hook:
    """A hook that a copy of the model does not carry along: copies and pickles of it do nothing."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(_nothing)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    return None
