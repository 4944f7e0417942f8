"""The recorder: hooks on a model that turn the trainer's own backward into contributions.

Owned by the selector; usable alone (`with recorder.record(): loss.backward()`, then `recorder.contributions()`).
The hooks stay until `close()` and do nothing outside `record()`. DESIGN, sections 3.1 to 3.3.

Longer than others: window, hooks and audits share one state, which must be undone as a whole when a block fails.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ftw.arguments import one_of
from ftw.errors import CandidateLayoutError, ConfigurationError, MemoryCapError, RecordingError
from ftw.gradients import audit, completeness
from ftw.gradients.auto import Auto
from ftw.gradients.base import Contributions, GradientExtractor
from ftw.gradients.company import ALONE, Company
from ftw.gradients.coverage import UNCOVERED, TappedLayer, find_layers
from ftw.gradients.layout import Layout, candidate_maps
from ftw.gradients.output_gradient import OutputGradient
from ftw.gradients.pieces import Piece, as_rows
from ftw.gradients.replay import replayed_output
from ftw.gradients.rules import RULES, Call, LayerRule
from ftw.gradients.tap import Tap
from ftw.gradients.window import Forward, Window
from ftw.modes import all_finite, random_state
from ftw.optim_state.shards import is_sharded, local

RESIDUALS = ("error", "keep")
GRANULARITIES = ("sample", "token")

Rebuild = tuple[list[Any], Any, list[int]]
"""Leaves of a layer's arguments without its tensors, their structure, and the places of the tensors."""

_ATTEMPTS = 5
"""Audits of identity that may end without proof before the recorder gives up, with a warning."""


class Recorder:
    """Records contributions of the given parameters.

    Args:
        model: the module whose call is a forward. Its inputs' leading dimension is the candidates', unless
            `record(candidates=...)` says otherwise.
        parameters: gives those to record; every one must belong to layers that have a rule. Default: all that require
            grad. Asked at each `record()`, so that parameters frozen, thawed, added or removed are noticed.
        extractor: in what form contributions are kept.
        lean: run tapped layers with detached parameters, so that autograd forms no pool gradient of them
            and `p.grad` stays as it was. False leaves the trainer's gradient in `p.grad`.
        residual: what to do with gradient that no candidate owns: "error", or "keep" to collect it in `residual`.
        check: audit identity and completeness in the first record after construction.
        uncovered: "error", or leave parameters without a rule to the caller: "scale" keeps what a second backward
            needs (as `keep_calls`), "ignore" leaves them alone.
        rules: asked in this order for each module.
        granularity: "sample", or "token": every position of the model's (rows, T) input is a candidate.
        memory_cap: bound on the bytes that a window keeps: pieces, and what forwards need to be run again. Beyond it
            only alignments along `direction` are kept of the pieces.
        company: of the processes that a sharded model (FSDP2) is spread over.

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
        uncovered: str = "error",
        rules: Sequence[LayerRule] = RULES,
        granularity: str = "sample",
        memory_cap: int | None = None,
        company: Company = ALONE,
    ) -> None:
        one_of("residual", residual, RESIDUALS)
        one_of("uncovered", uncovered, UNCOVERED)
        one_of("granularity", granularity, GRANULARITIES)
        self.model = model
        self.extractor = Auto() if extractor is None else extractor
        self.lean = lean
        self.residual_policy = residual
        self.granularity = granularity
        self.memory_cap = memory_cap
        self._company = company
        self.direction: Mapping[Parameter, Tensor] | None = None
        self.autocast_state: tuple[str, torch.dtype] | None = None  # that the last forward ran in: device type, dtype
        self.autocast_known = False  # whether there was a forward
        self.uncovered: dict[Parameter, str] = {}
        self._uncovered_policy = uncovered
        self._rules = rules
        self._wanted = parameters
        self._check = check
        self._anchor = torch.zeros((), requires_grad=True)
        self._shared: set[str] = set()  # tables that were looked up by (T,) positions
        self._expanded: set[str] = set()  # tables that were looked up for each row in place of all
        self._reached: Counter[str] = Counter()  # calls with gradient in the block's first forward, by layer
        self._handles: list[Any] = []
        self._layers: list[TappedLayer] = []
        self._batch_norms: dict[str, nn.Module] = {}
        self._parameters: dict[Parameter, str] = {}
        self._active = False
        self._auditing = False
        self._replaying = False
        self._prepare: Callable[[], None] | None = None
        self._inside: Forward | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._maps: list[Tensor] | None = None
        self._block = 0
        self._first = 0
        self._mark = Window().mark()
        self._input_storages: set[int] = set()
        self._unowned: list[tuple[str, Tensor]] = []
        self._dropped: dict[Parameter, Tensor] = {}
        self._whole: completeness.WholeGradients | None = None  # in an audited block
        self._scale = 1.0
        self._precision = 0.0
        self._completeness_due = self._identity_due = False
        self._inconclusive = 0
        self.window = Window()
        self._attach()

    # -- the window ---------------------------------------------------------------------------------------------

    @contextmanager
    def record(self, *, loss_scale: float = 1.0, candidates: Any = None) -> Iterator[None]:
        """Record every forward and backward of the model inside the block. Blocks add up to one window.

        If the block raises, what it recorded is dropped and `p.grad` is as it was before the block.

        Args:
            loss_scale: what the loss was multiplied with (by a GradScaler, say); divided out of contributions.
            candidates: whose each row, (rows,), or each token, (rows, T), is: integers that count the block's
                candidates from 0, -1 for nobody's; a sequence of such tensors where the block has several forwards.
                Default: one candidate a row.

        Raises:
            RecordingError: nested use, a forward whose backward did not follow, no forward at all, gradient at a token
                that is nobody's.
            CandidateLayoutError: rows of a layer are not the rows of the batch.
            CompletenessError: contributions do not add up to the gradient.
            MemoryCapError: the window outgrew the cap, and M is not known before the backward, or what is needed to
                run forwards again does not fit by itself.
        """
        if self._active:
            raise RecordingError("record() was entered inside record(); end the first block before the next.")
        maps = candidate_maps(candidates, nobody=self._company is not ALONE)
        if maps is not None and self.granularity == "token":
            raise ConfigurationError(
                "candidates was given to a selector of granularity='token', whose candidates are the tokens "
                "themselves; leave it out, or choose granularity='sample'."
            )
        self.refresh_layers()
        self._scale = 1.0 / loss_scale
        self._maps = maps
        self._first, self._block = len(self.window.forwards), self.window.count
        self._refuse_mixing()
        mark = self._mark = self.window.mark()
        parked = self._park_gradients()
        outside = {p: p.grad for p in self.uncovered}
        for p in outside:
            p.grad = None
        self._active, self._auditing = True, self._completeness_due
        if self._auditing:
            self._whole = completeness.WholeGradients(
                lambda p: self.window.pieces.get(p, [])[mark.pieces.get(p, 0) :], self._scale
            )
        try:
            yield
            self._active = False
            self._check_forwards()
            if self._identity_due:
                self._audit_identity(self.window.forwards[self._first].layout)
            self._settle(self.window.since(mark), parked)
        except BaseException as error:
            if self._auditing and self._expanded:
                error.add_note(
                    f"inside record(), {', '.join(sorted(self._expanded))} looked up for each row what the model "
                    "looks up once for all (positions, virtual tokens), and gave (rows, T, d); if the model cannot "
                    "take that, look up (1, T) of them and expand the result instead of repeating it, or name the "
                    "module around the table (the model itself, if need be) in functional=[...]."
                )
            self.window.rewind(mark)
            for p, grad in (parked | outside).items():
                p.grad = grad
            raise
        else:
            for p, before in outside.items():
                if before is not None:
                    p.grad = before if p.grad is None else before + p.grad
        finally:
            self._active, self._inside, self._call, self._maps = False, None, None, None
            self._prepare = None
            self._reached.clear()
            self._unowned, self._dropped = [], {}
            if self._whole is not None:
                self._whole.close()
                self._whole = None
            # The layers' own hooks do it too, but not after an interrupt.
            for layer in self._layers:
                layer.put_back()

    def contributions(self) -> Contributions:
        """The contributions of the window so far."""
        return self.extractor.contributions(self.window.pieces, self.window.count)

    @property
    def count(self) -> int:
        """n, the candidates of the window so far."""
        return self.window.count

    @property
    def residual(self) -> dict[Parameter, Tensor]:
        """Gradient of the window that no candidate owns."""
        return self.window.residual

    @property
    def active(self) -> bool:
        """Whether a block of `record()` is open."""
        return self._active

    @property
    def layers(self) -> list[TappedLayer]:
        """The layers that are tapped."""
        return list(self._layers)

    @property
    def parameters(self) -> dict[Parameter, str]:
        """The parameters that are recorded, and their names in the model, in the model's order."""
        return self._parameters

    @property
    def precision(self) -> float:
        """The coarsest machine epsilon among the gradients that were recorded."""
        return self._precision

    @property
    def loss_scale(self) -> float:
        """What the loss of the last block was multiplied with."""
        return 1.0 / self._scale

    @property
    def keep_calls(self) -> bool:
        """Whether forwards can be replayed: their arguments and output gradients are kept."""
        capped = self.memory_cap is not None and self.direction is not None
        return not self._replaying and (capped or (self._uncovered_policy == "scale" and bool(self.uncovered)))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The autocast state that the last recorded forward ran in."""
        if self.autocast_state is None:
            yield
            return
        device, dtype = self.autocast_state
        with torch.autocast(device, dtype=dtype):
            yield

    def at_forward(self, prepare: Callable[[], None]) -> None:
        """Have this called once, when the block's first forward begins and its autocast is known."""

        def alone() -> None:
            with self._evaluation():
                prepare()

        self._prepare = torch.compiler.disable(alone)  # a compiled model traces its hooks

    @contextmanager
    def aside(self, window: Window) -> Iterator[None]:
        """Record into that window inside the block, for a replay: lean, without audits, without a cap of the
        recorder's own, and keeping no calls; what was set comes back after."""
        names = ("window", "_completeness_due", "_identity_due", "memory_cap", "direction", "lean", "_replaying")
        before = {name: getattr(self, name) for name in names}
        self.window = window
        self._completeness_due = self._identity_due = False
        self.memory_cap = self.direction = None
        self.lean = self._replaying = True
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def clear(self) -> None:
        """Forget the window and release its memory."""
        if self._active:
            raise RecordingError("the window cannot be cleared inside record(); leave the block first.")
        self.window = Window()

    def close(self) -> None:
        """Remove all hooks and forget the window. Recording again needs a new recorder."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers, self._batch_norms, self._parameters = [], [], {}, {}
        self.window = Window()

    def _refuse_mixing(self) -> None:
        """What lets candidates mix, or changes a gradient on its way, where no audit would see it."""
        for name, module in self._batch_norms.items() if self._check else ():
            if module.training:
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

    def _audit_identity(self, layout: Layout) -> None:
        if self.granularity == "token":  # tokens of a row depend on each other; rows must not
            layout = Layout(layout.rows)
        # A single candidate cannot be mixed up: look again when there are more.
        looks = self._call is not None and layout.count > 1
        if not self._company.any(looks):
            return
        assert self._call is not None
        args, kwargs = self._call
        with self.autocast(), self._company.in_step(self.model, args, kwargs) as forward:
            divided = [layer for layer in self._layers if layer.name not in self._shared]
            proved = not looks or audit.check_identity(
                self.model, divided, args, kwargs, layout, self._reached, forward
            )
        proved = self._company.all(proved)
        self._identity_due = not proved
        self._inconclusive += not proved
        if self._inconclusive == _ATTEMPTS:
            self._identity_due = False
            warnings.warn(
                f"{_ATTEMPTS} batches in a row could not show that row i of every layer is candidate i (constant or "
                "duplicate rows); the check is given up; make sure that the model keeps the batch's rows apart.",
                stacklevel=5,
            )

    # -- gradients outside the contributions -----------------------------------------------------------------------

    def _park_gradients(self) -> dict[Parameter, Tensor | None]:
        """Take p.grad out of the way, so that what is there after the block was made in the block."""
        recorded = self.parameters
        if not self.window.forwards:
            self.window.residual.clear()
            names = {p: name for name, p in self.model.named_parameters()}
            stale = [p for p in recorded if p.grad is not None and bool(local(p.grad).count_nonzero())]
            overwritten = self.uncovered if self._uncovered_policy == "scale" else ()
            lost = [p for p in overwritten if p.grad is not None and bool(local(p.grad).count_nonzero())]
            if lost or (stale and self.residual_policy == "error"):
                stale = stale or lost
                raise RecordingError(
                    f"p.grad of {names.get(stale[0], 'a parameter')} and {len(stale) - 1} others is not zero "
                    "before the window's first record(); apply() would overwrite it; call optimizer.zero_grad() first, "
                    "or pass residual='keep' to add that gradient, unweighted, to the step."
                )
            for p in stale:
                assert p.grad is not None
                self.window.residual[p] = p.grad * self._scale
        parked = {p: p.grad for p in recorded}
        for p in recorded:
            p.grad = None
        return parked

    def _settle(self, new: Mapping[Parameter, Sequence[Piece]], parked: dict[Parameter, Tensor | None]) -> None:
        """Compare what autograd formed with what was recorded; put p.grad back."""
        self._check_unowned()
        formed = {p: p.grad * self._scale for p in parked if p.grad is not None}
        plain = {p: grad for p, grad in formed.items() if not is_sharded(p)}
        if self._auditing or not self.lean:
            pieces = {p: kept for p, kept in new.items() if not is_sharded(p)}
            left = completeness.leftover(pieces, self._dropped, plain, self._precision)
        else:  # autograd formed nothing for recorded calls; zeros are a term that vanishes
            left = {p: grad for p, grad in plain.items() if bool(grad.count_nonzero())}
        sizes = {p: (float(rest.norm()), float(formed[p].norm()) if p in formed else 0.0) for p, rest in left.items()}
        # A sharded parameter gets no gradient where its layer was recorded: what it has came by other ways.
        shards = {p: float(local(grad).norm()) for p, grad in formed.items() if is_sharded(p)}
        sizes |= {p: (size, size) for p, size in shards.items() if size}
        if self._whole is not None:
            sizes |= self._whole.finish(list(parked), self._precision)
        if sizes and (self.residual_policy == "error" or sizes.keys() - left.keys()):
            raise completeness.completeness_error({self._parameters[p]: size for p, size in sizes.items()})
        for p, rest in left.items():
            self.window.residual[p] = self.window.residual[p] + rest if p in self.window.residual else rest
        for p, before in parked.items():
            if self.lean:
                p.grad = before
            elif before is not None:
                p.grad = before if p.grad is None else before + p.grad
        # An audit that saw nothing but faulty numbers has proved nothing: the next block is audited again.
        if self._whole is not None and self._whole.finite and all_finite(plain.values()):
            self._completeness_due = False

    def _check_unowned(self) -> None:
        for name, size in self._unowned:
            if bool(size > 0):
                raise RecordingError(
                    f"tokens that belong to nobody (-1 in candidates) carry gradient at layer {name}; every token that "
                    "the loss reaches must belong to a candidate; give it one, or mask its label."
                )

    # -- forwards --------------------------------------------------------------------------------------------------

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._active or not torch.is_grad_enabled() or self._inside is not None:
            return
        layout = self._layout(args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._input_storages = {_storage(tensor) for tensor in tensors}
        device = self._anchor_device.type
        self.autocast_state = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        self.autocast_known = True
        if self._prepare is not None:
            prepare, self._prepare = self._prepare, None
            prepare()
        waiting = any(not forward.reached for forward in self.window.forwards)
        if waiting:
            for forward in self.window.forwards:
                forward.recomputable = forward.recomputable and forward.reached
        self._inside = Forward(layout, recomputable=not waiting)
        if self.keep_calls:
            # Copies: the caller may reuse its buffers for the next batch.
            call = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))
            self._make_room(leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor))
            self.window.keep_call(self._inside, call)
            self._inside.random_state = random_state(self._anchor_device)
        self.window.forwards.append(self._inside)
        self.window.count = max(self.window.count, layout.start + layout.count)
        if self._identity_due and self._call is None:
            self._call = args, kwargs

    def _layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        """Whose the rows of the forward that begins are."""
        first = audit.first_tensor(args, kwargs)
        rows = first.shape[0]
        if self._maps is not None:
            number = len(self.window.forwards) - self._first
            if number >= len(self._maps) or self._maps[number].shape[0] != rows:
                shapes = [tuple(each.shape) for each in self._maps]
                raise CandidateLayoutError(
                    f"forward {number} of the block has {rows} rows; candidates has maps of shapes {shapes}; one map "
                    "is needed for each forward, as long as its rows; pass a list of maps."
                )
            count = max(int(each.max()) for each in self._maps) + 1
            return Layout(rows, self._block, self._maps[number], count)
        audit.refuse_packed(kwargs)
        if self.granularity == "token":
            if first.dim() < 2:
                raise CandidateLayoutError(
                    f"the model's input has shape {tuple(first.shape)}; granularity='token' needs (rows, T, ...)."
                )
            owner = torch.arange(rows * first.shape[1]).view(rows, -1)
            return Layout(rows, self.window.count, owner)
        return Layout(rows, self.window.count)

    def _after_model(self, model: nn.Module, args: Any, output: Any) -> None:
        forward, self._inside = self._inside, None
        if forward is None or forward.call is None or output is None:
            return
        now = random_state(self._anchor_device)
        forward.drew = any(not torch.equal(a, b) for a, b in zip(forward.random_state, now, strict=True))
        found = replayed_output(output, forward.layout)
        if found is not None:
            forward.output = found[0]
            found[1].register_hook(partial(self._keep_output, forward))

    def _keep_output(self, forward: Forward, grad: Tensor) -> None:
        """A tensor hook on the output."""
        found = OutputGradient.of(grad.detach())
        if forward.output_gradient is not None:
            found = forward.output_gradient + found
        self._make_room(found.tensors)
        self.window.keep_output(forward, found)

    def _check_forwards(self) -> None:
        block = self.window.forwards[self._first :]
        if not block:
            raise RecordingError(
                "no forward of the model was seen inside record(); contributions are recorded when the model itself "
                "is called with gradients enabled; call model(...), not a part of it, inside the block."
            )
        idle = [forward for forward in block if not forward.reached]
        if self._maps is not None and len(block) != len(self._maps):
            raise CandidateLayoutError(
                f"candidates has {len(self._maps)} maps, but the block has {len(block)} forwards; pass one for each."
            )
        if idle:
            raise RecordingError(
                f"{len(idle)} of {len(block)} forwards inside record() got no backward (candidates from "
                f"{idle[0].layout.start} on); each forward of the block must be followed by its backward inside it; "
                "use torch.no_grad() for forwards that are not trained on."
            )

    def _forward_of(self, layer: TappedLayer) -> Forward:
        if self._inside is not None:
            return self._inside
        # Outside the model's forward a tapped layer runs only when activation checkpointing recomputes it.
        last = self.window.forwards[-1] if self.window.forwards else None
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

    def refresh_layers(self) -> None:
        """Attach anew if parameters were frozen or thawed since."""
        now = self.parameters
        wanted = self.model.parameters() if self._wanted is None else self._wanted()
        if not self._handles:
            raise RecordingError("the recorder is closed; make a new one.")
        if now.keys() | self.uncovered.keys() != {p for p in wanted if p.requires_grad}:
            if self.window.forwards:
                raise RecordingError(
                    "parameters were frozen or thawed in the middle of a window; finish the step with apply() first."
                )
            self._attach()

    def _attach(self) -> None:
        wanted = None if self._wanted is None else self._wanted()
        coverage = find_layers(self.model, wanted, uncovered=self._uncovered_policy, rules=self._rules)
        found = {p for layer in coverage.layers for p in layer.parameters.values()}
        parameters = {p: name for name, p in self.model.named_parameters() if p in found}
        self.extractor.check(self.model, {name: p for p, name in parameters.items()})
        # Nothing was changed so far: what cannot be recorded may be frozen again, and recording goes on as before.
        for handle in self._handles:
            handle.remove()
        self._layers, self.uncovered, self._parameters = coverage.layers, coverage.uncovered, parameters
        self._batch_norms = {name: each for name, each in self.model.named_modules() if isinstance(each, _BatchNorm)}
        self._completeness_due = self._identity_due = self._check
        self._inconclusive = 0
        self._anchor_device = next(iter(found)).device
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

    def _before_layer(self, layer: TappedLayer, module: nn.Module, args: Any) -> Any:
        if not self._active or not torch.is_grad_enabled():
            return None
        if self.lean and not self._auditing:
            layer.detach()
        elif self._whole is not None:
            self._whole.watch(layer)
        if layer.rule.event(module) == 0 and args and isinstance(args[0], Tensor):
            return self._each_row(layer, args, self._forward_of(layer).layout)
        return None

    def _each_row(self, layer: TappedLayer, args: tuple[Any, ...], layout: Layout) -> Any:
        """Positions, looked up once for all rows: look them up for each, so that each has its gradient."""
        ids, rows = args[0], layout.rows
        # A table once looked up by (T,) positions is so, too, where there are as many of them as rows.
        if ids.dim() == 1 and (layer.name in self._shared or not layout.fits(ids.shape)):
            self._shared.add(layer.name)
        elif ids.dim() != 2 or ids.shape[0] != 1 or rows == 1:
            return None
        self._expanded.add(layer.name)
        return (ids.expand(rows, ids.shape[-1]), *args[1:])

    def _after_layer(self, layer: TappedLayer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._active or not torch.is_grad_enabled():
            return None
        layer.put_back()
        if output is None:  # the layer raised; the hook only had to put its parameters back
            return None
        forward = self._forward_of(layer)
        kept, rebuild = self._kept(layer, args, kwargs)
        # What stands in the caller's own buffers is copied: they may hold the next batch before the step.
        saved = [tensor.clone() if _storage(tensor) in self._input_storages else tensor for tensor in kept]
        collect = partial(self._collect, layer, forward, rebuild)
        copy = torch.clone if layer.rule.saves_outputs else _same
        if isinstance(output, Tensor):
            return Tap.apply(collect, 1, self._anchor, copy(output), *saved)[0]
        out, shape = tree_flatten(output)
        tapped = [i for i, leaf in enumerate(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        passed = Tap.apply(collect, len(tapped), self._anchor, *[copy(out[i]) for i in tapped], *saved)
        for i, leaf in zip(tapped, passed, strict=True):
            out[i] = leaf
        return tree_unflatten(out, shape)

    @staticmethod
    def _kept(layer: TappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Rebuild | None]:
        """The tensors of a call that the layer's rule needs, and how the call is made of them again, if it must be."""
        if not layer.rule.keeps_all:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(first, Tensor):
                return [first.detach()], None
        leaves, structure = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not places or not layer.rule.keeps_all:
            raise CandidateLayoutError(
                f"layer {layer.name} ({type(layer.module).__name__}) was called without a tensor, so its rows cannot "
                "be divided among the candidates; name the module around it in functional=[...], or freeze it."
            )
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return [leaves[i].detach() for i in places], (others, structure, places)

    def _collect(
        self,
        layer: TappedLayer,
        forward: Forward,
        rebuild: Rebuild | None,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
    ) -> None:
        if not self._active:
            raise RecordingError(
                f"the backward of layer {layer.name} ran after record() had ended; call backward inside the block."
            )
        forward.reached = True
        reached = [grad for grad in grads if grad is not None]
        if not reached:
            return
        self._reached[layer.name] += forward is self.window.forwards[self._first]
        self._precision = max(self._precision, *(torch.finfo(grad.dtype).eps for grad in reached))
        call = Call(
            layer.module,
            _arguments(rebuild, saved),
            saved[0],
            grads,
            forward.layout,
            layer.rule.flat,
            self._scale,
            self._evaluation,
        )
        self._check_layout(layer, call, reached)
        wanted = {name: p for name, p in layer.parameters.items() if self.window.wants(p)}
        whole = {name: p for name, p in layer.whole().items() if name in wanted}
        for name, piece in layer.rule.pieces(call, whole) if wanted else ():
            self._store(wanted[name], piece)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """For rules that run a module again: in the forward's autocast, and no layer that runs in it is recorded."""
        before, self._active = self._active, False
        try:
            with self.autocast():
                yield
        finally:
            self._active = before

    def _check_layout(self, layer: TappedLayer, call: Call, grads: Sequence[Tensor]) -> None:
        event = layer.rule.event(layer.module)
        leading = call.inputs.shape[: call.inputs.dim() - event]
        if not call.layout.fits(leading, call.flat):
            raise CandidateLayoutError(
                f"layer {layer.name} ({type(layer.module).__name__}) got an input of shape {tuple(call.inputs.shape)} "
                f"in a forward of {call.layout.describe()}; its leading dimensions must be the candidates'; give the "
                "model unpacked, batch-first rows, say in record(candidates=...) whose each row or token is, or freeze "
                "that layer."
            )
        for grad in grads:
            nobodys = call.layout.of_nobody(grad, call.flat)
            if nobodys is not None:
                self._unowned.append((layer.name, nobodys.abs().amax()))

    def _store(self, p: Parameter, piece: Piece) -> None:
        window = self.window
        window.touched.add(p)
        if window.alignment is None:
            piece = self.extractor.keep(piece)
            if window.keep(p, piece, self.memory_cap):
                return
            self._drop_pieces()
        self._drop(p, piece)

    def _drop_pieces(self) -> None:
        """Keep alignments in place of the pieces, and of those to come."""
        window = self.window
        if self.direction is None:
            raise MemoryCapError(
                f"the window keeps {window.kept_bytes} bytes so far, and what comes next does not fit below "
                f"memory_cap={self.memory_cap} bytes; all contributions are needed until the step, because its scale M "
                "is read from their sum; choose reference='previous' or 'target', a smaller window, or a larger cap."
            )
        window.alignment = torch.zeros(0, dtype=torch.float64, device=self._anchor_device)
        for p in list(window.pieces):
            for i, piece in enumerate(window.pieces[p]):
                self._drop(p, piece, earlier=i < self._mark.pieces.get(p, 0))
            window.drop(p)

    def _make_room(self, tensors: Iterable[Tensor]) -> None:
        """Drop pieces where what must be kept would not fit beside them."""
        window, extra = self.window, self.window.ledger.extra(tensors)
        if self.memory_cap is None or window.kept_bytes + extra <= self.memory_cap:
            return
        if window.alignment is None:
            self._drop_pieces()
        if window.kept_bytes + extra > self.memory_cap:
            raise MemoryCapError(
                f"arguments and output gradients of the window's forwards take {window.kept_bytes + extra} bytes so "
                f"far, more than memory_cap={self.memory_cap} bytes; a window beyond its cap needs them to run the "
                "chosen candidates again; choose a larger cap or a smaller window."
            )

    def _drop(self, p: Parameter, piece: Piece, *, earlier: bool = False) -> None:
        assert self.direction is not None
        self.window.align(piece, as_rows(self.direction[p]))
        if not earlier and (self._auditing or not self.lean):
            total = self._dropped.setdefault(p, torch.zeros(piece.shape, dtype=piece.dtype, device=piece.device))
            piece.add_combined(total, None)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _arguments(rebuild: Rebuild | None, saved: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if rebuild is None:
        return (), {}
    others, structure, places = rebuild
    leaves = list(others)
    for i, tensor in zip(places, saved, strict=True):
        leaves[i] = tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, structure)
    return arguments


def _storage(tensor: Tensor) -> int:
    """Where a tensor's numbers are; views share it."""
    return tensor.untyped_storage().data_ptr()


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
