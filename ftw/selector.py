"""The selector: record -> contributions -> problem -> filter -> solver -> weights -> gradient.

The only place where the parts meet. The training loop stays the user's: it records around its own backward and
calls `apply()` before it clips and steps.

Longer than others because of the arguments, which are documented and checked where users look for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw import presets, registry
from ftw.arguments import integer, one_of
from ftw.assembly import GEOMETRIES, REFERENCES, groups_of, is_idle
from ftw.combinations import refuse_combinations
from ftw.curvature.base import Curvature
from ftw.decision import ConstraintMaker, Policy
from ftw.errors import ConfigurationError, NonFiniteError, RecordingError
from ftw.fidelity import Expectation, Fidelity, TrustRegion, Watcher, total_norm
from ftw.filters.base import Filter
from ftw.gradients.base import GradientExtractor
from ftw.gradients.coverage import CoverageTable, describe
from ftw.gradients.recorder import Recorder
from ftw.gradients.rules import LayerRule, rules_for
from ftw.modes import all_finite
from ftw.optim_state.base import Preconditioner, state_of
from ftw.optim_state.lookup import preconditioner_for
from ftw.optim_state.shards import local
from ftw.optim_state.wrappers import unwrapped
from ftw.particulars import Particulars
from ftw.problem import Selection, Status
from ftw.processes.decide import decide_together
from ftw.processes.setting import Setting
from ftw.quotas import WeightQuota
from ftw.ridges import RidgeTowards
from ftw.routes import Decided, Step, decide_beyond_cap, decide_samples, decide_tokens, displacement_of
from ftw.scoring import directions
from ftw.solvers.base import WeightSolver
from ftw.solvers.constraints import CappedCone, ConstraintSet
from ftw.target import LossFunction, Target
from ftw.targets import Targets, target_of
from ftw.watching.journal import Journal
from ftw.watching.log import DecisionLog
from ftw.writing import Writer

STATE_VERSION = 1

NOTHING_USEFUL = ("zero", "skip")


class Selector:
    """Chooses and weighs the candidates of every optimizer step.

    Args:
        model: called by the training loop; its inputs' leading dimension is the candidates'.
        optimizer: the one whose `step()` follows `apply()`, or accelerate's or Lightning's wrapper of it. Its trainable
            parameters are recorded.
        target: iterable of batches of the target set, or a `Target`; or a mapping of names to several of them, whose
            predicted drops are then reported one by one (`diagnostics["predicted_drops"]`).
        targets: what several targets are to be: "mean" (their weighted mean is the target), "worst" (the weights raise
            the utility of the one that gains least) or "no_harm" (the mean, with weights under which no target loses
            at first order, offset aside). The filter goes by the mean.
        target_weights: name -> share in that mean; default: equal.
        loss_fn: loss of a target batch, `loss_fn(model, batch) -> ()`; default `model(**batch).loss`.
        budget: k; an int, or a float in (0, 1] for a fraction of the pool (rounded, at least 1). A pool smaller than
            an int budget keeps all its candidates.
        preset: name of a ready configuration (`ftw list`, docs/presets.md): what filter, solver, constraints, geometry,
            objective, granularity and ridge are where they are not given. "ours" by default: greedy filter, pgd,
            "curvature", "match", "sample", 1e-3.
        gradients: extractor: "auto", "full", "lora", "factorized", "projection", a class or an instance.
        preconditioner: "auto" (by the optimizer's type), a name, a class or an instance.
        filter, solver: a name (`ftw list` shows them), a class or an instance.
        constraints: set of weights that the solver minimises over, a `ConstraintMaker`, or a `WeightQuota` for shares
            by source; default `CappedCone(cap)`. A set that says something of single candidates (bounds, masses, rows,
            one entry each) does so by their places in the pool. Whatever the set, see `total`.
        cap: largest weight as a multiple of the chosen candidates' mean weight, 4 by default; goes with the default
            constraints only.
        ridge: added to K's diagonal on the chosen candidates, relative to its mean there; 1e-3 by default. Or a
            `RidgeTowards`, which pulls towards equal weights, or those of a column, instead of towards 0.
        geometry: "curvature" (M), "update" (M^2) or "vanilla" (learning rate only).
        objective: "match" (make the update that the target gradient would make) or "utility" (second-order fall of
            the target loss, offset included).
        trust: curvature of the utility is multiplied by one over it; above 1 is bolder. "adaptive", or a `TrustRegion`,
            follows from realised over predicted drop, which makes every step a watched one. For "utility" only.
        total: "preserve" rescales to `mu'w = n`, so that weights are free of either loss's scale; "at_most" keeps the
            solver's own total where it is smaller (both losses must then be on one scale).
        warmup: vanilla geometry while the optimizer has taken fewer steps than this; for optimizers whose M depends on
            their history (see `docs/optimizer-state.md` for the measurement behind the default).
        refresh, target_batches, ema: see `Target`.
        curvature: model H of the target's Hessian in the utility and in `predicted_drop`: "optimizer" (P^-1, free of
            cost), "kfac", "ekfac", a class or an instance.
        relinearise: once the weights are known, predict the second moment from the gradient that they give (the pool's
            where that is zero), and decide again with it; as costly as a second Gram and two combinations. For
            optimizers whose M depends on the gradient.
        watch: every how many steps the prediction is compared with what the step really does (`fidelity`); 0: never.
            A watched step costs two evaluations of the target batch and two copies of the parameters.
        log: where every step's decision is written when the optimizer has made it: a `DecisionLog`, or the path of one
            (a ".jsonl" file, or a folder). Of several processes the first writes. See docs/watching.md.
        nothing_useful: what `apply()` leaves when no candidate helps: "zero" gradients (momentum and decay still act),
            or "skip": `p.grad = None`, a kept residual included, so that the optimizer's step does nothing.
        reference: what the coming step's second moment is predicted from: "pool" (the sum of the contributions),
            "target" (the target gradient) or "previous" (the second moment as the last step left it; the target's
            gradient at a parameter's first step, where a cap forbids to wait for the pool's).
        memory_cap: bound in bytes on what a window keeps until the step: contributions, and with `reference="target"`
            or "previous" also arguments and output gradients (logits) of its forwards, which must fit by themselves. A
            window that outgrows it raises `MemoryCapError` with `reference="pool"`; with the other two M is known
            before the backward, so only alignments are kept, and the best candidates are run again: k of them, 2k for
            a filter that needs K. Their contributions are read some parameters at a time, with a second forward and
            backward of their rows for each share that fits the cap, and one more for the gradient if it takes
            several; a filter and solver that need no K ("topk", "uniform") take a single one and keep no contributions.
            See `docs/contributions.md`.
        granularity: "sample", or "token": the tokens of the model's (rows, T) inputs are the candidates, numbered
            row by row. Filters that need no K ("topk") and solver "uniform" scale to any number of tokens.
        uncovered: what happens to trainable parameters of layers without a rule: "error", "scale" (they do not take
            part in the selection, and their gradient is formed with the selected weights by a second backward of the
            chosen rows) or "ignore" (they keep the gradient that the trainer's backward made, unweighted).
        functional: names or classes of modules whose contributions `torch.func` works out, candidate by candidate:
            for modules without a rule whose rows do not depend on each other. A `LayerRule` of your own goes here too.
        residual: gradient that no candidate owns: "error", or "keep" to add it unweighted.
        lean: form no pool gradient in the backward. False leaves the trainer's `p.grad` in place until `apply()`.
        pool: what the candidates of a step are where `torch.distributed` runs several processes: "global" (those of
            all of them: every process finds the same selection) or "local" (each decides alone, and the weighted
            gradients are averaged). Either way `apply()` leaves the same gradient on all, and nothing else must
            synchronise it; a `DistributedDataParallel` model is given as it is, and so is one under `fully_shard`
            (FSDP2), "global" alone, whose shards of that gradient it leaves. See docs/processes.md.
        process_group: the data-parallel processes; default: all.
        check: audit identity and completeness in the first record.
        seed: of the generator that random filters draw from.

    Raises:
        ConfigurationError, UnknownComponentError, CoverageError, UnsupportedOptimizerError: at construction, before
            the model is touched.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        target: Iterable[Any] | Target | Mapping[str, Iterable[Any] | Target],
        targets: str = "mean",
        target_weights: Mapping[str, float] | None = None,
        loss_fn: LossFunction | None = None,
        budget: float = 0.25,
        preset: str = "ours",
        gradients: str | type[GradientExtractor] | GradientExtractor = "auto",
        preconditioner: str | type[Preconditioner] | Preconditioner = "auto",
        filter: str | type[Filter] | Filter | None = None,
        solver: str | type[WeightSolver] | WeightSolver | None = None,
        constraints: ConstraintSet | ConstraintMaker | WeightQuota | None = None,
        cap: float | None = None,
        ridge: float | RidgeTowards | None = None,
        geometry: str | None = None,
        objective: str | None = None,
        trust: float | str | TrustRegion = 1.0,
        curvature: str | type[Curvature] | Curvature = "optimizer",
        relinearise: bool = False,
        watch: int = 0,
        log: DecisionLog | str | os.PathLike[str] | None = None,
        total: str = "preserve",
        warmup: int = 5,
        refresh: int = 1,
        target_batches: int | str = 1,
        ema: float = 0.0,
        nothing_useful: str = "zero",
        reference: str = "pool",
        memory_cap: int | None = None,
        granularity: str | None = None,
        uncovered: str = "error",
        functional: Sequence[str | type[nn.Module] | LayerRule] = (),
        residual: str = "error",
        lean: bool = True,
        pool: str = "global",
        process_group: torch.distributed.ProcessGroup | None = None,
        check: bool = True,
        seed: int = 0,
    ) -> None:
        chosen = presets.preset(preset).arguments()
        filter = chosen["filter"] if filter is None else filter
        solver = chosen["solver"] if solver is None else solver
        geometry = chosen["geometry"] if geometry is None else geometry
        objective = chosen["objective"] if objective is None else objective
        granularity = chosen["granularity"] if granularity is None else granularity
        ridge = chosen["ridge"] if ridge is None else ridge
        if constraints is None and cap is None:
            constraints = chosen["constraints"]
        one_of("geometry", geometry, GEOMETRIES)
        one_of("nothing_useful", nothing_useful, NOTHING_USEFUL)
        one_of("reference", reference, REFERENCES)
        integer("seed", seed, 0)
        integer("warmup", warmup, 0)
        integer("watch", watch, 0)
        if isinstance(trust, str):
            one_of("trust", trust, ("adaptive",))
            trust = TrustRegion()
        if memory_cap is not None:
            integer("memory_cap", memory_cap, 1)
        self.target: Target | Targets = target_of(
            target,
            targets=targets,
            target_weights=target_weights,
            loss_fn=loss_fn,
            refresh=refresh,
            target_batches=target_batches,
            ema=ema,
        )
        refuse_combinations(
            objective=objective,
            geometry=geometry,
            granularity=granularity,
            memory_cap=memory_cap,
            uncovered=uncovered,
            curvature=curvature,
            relinearise=relinearise,
            trust=trust,
            constraints=constraints,
            cap=cap,
            several_targets=isinstance(self.target, Targets),
        )
        self._processes = Setting(model, pool, process_group)
        self.model = model = self._processes.model
        self._given = optimizer
        optimizer = self.optimizer
        self.policy = Policy(
            filter=registry.resolve("filters", filter),
            solver=registry.resolve("solvers", solver),
            constraints=CappedCone(4.0 if cap is None else cap) if constraints is None else constraints,
            budget=budget,
            ridge=ridge,
            objective=objective,
            trust=trust.initial if isinstance(trust, TrustRegion) else trust,
            total=total,
            targets=targets,
        )
        self.geometry = geometry
        self.warmup = warmup
        self.nothing_useful = nothing_useful
        self.reference = reference
        self.policy.require_honoured()
        self.granularity = granularity
        self.uncovered = uncovered
        self.relinearise = relinearise
        self.watch = watch
        self.fidelity: Fidelity | None = None
        """Of the last watched step that was made."""
        self._trust_region = trust if isinstance(trust, TrustRegion) else None
        self.curvature: Curvature | None = (
            None if curvature == "optimizer" else registry.resolve("curvature", curvature)
        )
        if self.curvature is not None and gradients == "auto":
            gradients = "factorized"  # what curvature is estimated from
        self._generator = torch.Generator().manual_seed(seed)
        extractor: GradientExtractor = registry.resolve("gradients", gradients)
        self.preconditioner: Preconditioner = (
            preconditioner_for(optimizer)
            if preconditioner == "auto"
            else registry.resolve("optim_state", preconditioner)
        )
        self.preconditioner.check(optimizer)
        self._processes.check(
            extractor=gradients,
            curvature=curvature,
            granularity=granularity,
            memory_cap=memory_cap,
            uncovered=uncovered,
            watched=bool(watch) or isinstance(trust, TrustRegion),
            residual=residual,
            lean=lean,
            preconditioner=self.preconditioner,
            parameters=[p for group in optimizer.param_groups for p in group["params"]],
        )
        self._recorder = Recorder(
            model,
            lambda: [p for group in optimizer.param_groups for p in group["params"]],
            extractor,
            lean=lean,
            residual=residual,
            check=check,
            uncovered=uncovered,
            rules=rules_for(functional),
            granularity=granularity,
            memory_cap=memory_cap,
            company=self._processes.company,
        )
        self._watcher: Watcher | None = None
        if watch or self._trust_region is not None:
            held = self._processes.total
            self._watcher = Watcher(optimizer, lambda: self._recorder.parameters, self._target_loss, self._learn, held)
        about = {
            "preset": preset,
            "optimizer": type(optimizer).__name__,
            "filter": type(self.policy.filter).__name__,
            "solver": type(self.policy.solver).__name__,
            "budget": str(budget),
            "geometry": geometry,
            "objective": objective,
            "granularity": granularity,
            "watch": str(watch),
        }
        self._journal: Journal | None = None
        if log is not None:
            made = log if isinstance(log, DecisionLog) else DecisionLog(log)
            if self._processes.group is None or self._processes.group.rank == 0:
                self._journal = Journal(made, optimizer, about, candidates=granularity == "sample")
        self._step = 0
        self._particulars = Particulars()
        self._loss_scale = 1.0
        self._scaled = False
        self._decided: Decided | None = None
        self._further: list[dict[Parameter, Tensor]] = []  # of several targets
        self._writer = Writer(self._recorder, scales_uncovered=uncovered == "scale")
        self._g: dict[Parameter, Tensor] | None = None  # the target gradient of this window
        self._early: dict[Parameter, Tensor] | None = None  # the same, where it was needed before the backward
        self._early_geometry: str | None = None
        self._unreached: frozenset[str] = frozenset()  # names of parameters that the last window had no gradient of
        self._before = self._snapshot()

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that steps, taken out of its wrapper anew: ZeRO-1 hands hyper-parameters on only then."""
        return unwrapped(self._given)

    # -- the step --------------------------------------------------------------------------------------------------

    @contextmanager
    def record(
        self,
        *,
        mass: Tensor | Iterable[float] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        candidates: Any = None,
        extras: Mapping[str, Any] | None = None,
    ) -> Iterator[None]:
        """Record the forwards and backwards inside the block; blocks add up until `apply()` or `select()`.

        Args:
            mass: each candidate's share of the loss normalisation, on any common positive scale, one entry per
                candidate of the block in their order: label tokens where the loss is a token mean. Default: equal.
            scaler: the GradScaler that scales the loss in this block; its scale is divided out of the
                contributions and put back by `apply()`.
            candidates: whose each row, (rows,), or each token, (rows, T), is: integers from 0, counted anew in each
                block, -1 for nobody's; a sequence of them where the block has several forwards. Default: one
                candidate a row. For packed rows see `ftw.packed_candidates`; for preference pairs give the chosen
                and the rejected row of a pair the same number.
            extras: what else is known of the candidates of the block, name -> one entry each: numbers such as "loss",
                or labels such as "source". For filters (docs/filters.md), quotas and ridges that read it.
                "learning_rate", the largest of the optimizer's groups, is always there.

        Raises:
            ConfigurationError: mass does not fit, or a column is missing. See `Recorder.record` for the rest.
            UnsupportedOptimizerError: the optimizer has got an option that is not modelled since the last window.
        """
        self.require_columns(extras or ())
        if self._decided is not None:  # select() ended that window
            self._clear()
        scaled = scaler is not None and scaler.is_enabled()
        scale = float(scaler.get_scale()) if scaler is not None and scaled else 1.0
        if self._recorder.count and scale != self._loss_scale:
            raise RecordingError(
                f"the loss scale changed from {self._loss_scale} to {scale} within one window; all micro-batches of a "
                "step must share it; pass the same scaler each time and update it after the step."
            )
        before = self._recorder.count
        if not before:
            self._begin_window()
        try:
            yield from self._record(before, scale, mass, candidates, extras or {})
        except BaseException:
            if not self._recorder.count:  # the window has not begun: g was worked out for nothing
                self._forget_early()
            raise
        self._loss_scale, self._scaled = scale, scaled

    def _record(
        self, before: int, scale: float, mass: Any, candidates: Any, extras: Mapping[str, Any]
    ) -> Iterator[None]:
        parts = scale * self._processes.share
        with self._processes.unsynchronised(), self._recorder.record(loss_scale=parts, candidates=candidates):
            yield
            block = self._particulars.fitting(mass, extras, self._recorder.count - before)
        # Only now: the recorder checks the block on its way out, and may still drop it.
        self._particulars.add(block)

    def require_columns(self, extras: Iterable[str]) -> None:
        """Checks, as `record()` does, that extras of these names are all that filter, quota and ridge read.

        Raises:
            ConfigurationError: one is missing.
        """
        self.policy.require_columns({"learning_rate", *extras})

    def select(self) -> Selection:
        """Indices and weights of the window, gradients untouched; ends the window.

        `apply()` may follow and writes the gradient of the same selection; the next `record()` begins a new window.

        Raises:
            RecordingError: nothing was recorded.
            NonFiniteError, TargetError, SolverError: nothing was changed; the window can be discarded.
        """
        if self._decided is not None:
            raise RecordingError("select() was called twice for one window; record() the next step first.")
        return self._decide().selection

    def apply(self) -> Selection:
        """Write `sum_i w_i c_i` to `p.grad`; then clip, step and zero the gradients as usual.

        Raises:
            As `select()`; `p.grad` is then as it was.
        """
        decided = self._decide() if self._decided is None else self._decided
        try:
            self._write(decided)
            self._expect(decided)
        except BaseException:
            self._undo()
            self._decided = None
            raise
        if self._journal is not None:
            coming = self._step + (decided.selection.status == Status.OVERFLOW)  # an overflow is not counted
            self._journal.expect(decided.selection, coming, decided.selection.diagnostics.get("columns", {}))
        self._clear()
        return decided.selection

    def discard(self) -> None:
        """Forget what was recorded since the last step."""
        if self._decided is None:
            self._forget_early()
        self._clear()

    def close(self) -> None:
        """Remove all hooks from model and optimizer and release what was recorded."""
        self._clear()
        if self._watcher is not None:
            self._watcher.close()
        if self._journal is not None:
            self._journal.close()
        self._recorder.close()

    def coverage(self) -> CoverageTable:
        """How each trainable parameter of the model is handled; printed, it is a table.

        Raises:
            RecordingError: the selector is closed, or parameters were frozen or thawed in the middle of a window.
            CoverageError: one that was thawed since the last step has no rule.
        """
        self._recorder.refresh_layers()
        return describe(self.model, self._recorder.layers, self._recorder.uncovered, self.uncovered)

    # -- resuming --------------------------------------------------------------------------------------------------

    def state_dict(self, *, within_window: bool = False) -> dict[str, Any]:
        """Plain data (numbers, tensors) from which a run resumes bitwise: steps, random state, target.

        Args:
            within_window: in the middle of a window, give the state at its begin, for trainers that save there and
                drop what was accumulated; the window resumes without what it has recorded so far.

        Raises:
            RecordingError: in the middle of a window, whose contributions cannot be saved.
        """
        if self._decided is None and self._recorder.count and not within_window:
            raise RecordingError(
                f"{self._recorder.count} candidates are recorded and not yet applied; state can be saved between steps "
                "only; call apply() or discard() first."
            )
        autocast = self._recorder.autocast_state
        early = None if self._early is None or self._decided is not None else self._before.target
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "generator": self._generator.get_state(),
            "target": self.target.state_dict(early) if isinstance(self.target, Target) else self.target.state_dict(),
            "trust": self.policy.trust,
            "curvature": None if self.curvature is None else self.curvature.state_dict(),
            "unreached": sorted(self._unreached),
            "autocast": None if autocast is None else (autocast[0], str(autocast[1]).removeprefix("torch.")),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict()` was taken; model and optimizer must have been restored to the same moment."""
        if state.get("version") != STATE_VERSION:
            raise ConfigurationError(
                f"the selector's state has version {state.get('version')!r}; this release reads {STATE_VERSION}; "
                "resume with the release that saved it."
            )
        step, generator = int(state["step"]), torch.Generator()
        generator.set_state(state["generator"].cpu())  # what cannot be read raises before anything is changed
        if (self.curvature is None) != (state["curvature"] is None):
            raise ConfigurationError(
                f"the state was saved {'without' if state['curvature'] is None else 'with'} a curvature model, this "
                f"selector has curvature={self.curvature!r}; make it with the arguments of the run that saved it."
            )
        if self.curvature is not None:
            self.curvature.load_state_dict(state["curvature"])
        if self._trust_region is not None:
            self.policy = replace(self.policy, trust=float(state["trust"]))
        self.target.load_state_dict(state["target"])
        self._clear()
        if self._watcher is not None:
            self._watcher.forget()
        if self._journal is not None:
            self._journal.forget()
        self._step, self._generator = step, generator
        self._unreached = frozenset(state.get("unreached", ()))
        autocast = state.get("autocast")
        self._recorder.autocast_state = None if autocast is None else (autocast[0], getattr(torch, autocast[1]))

    # -- deciding --------------------------------------------------------------------------------------------------

    def _decide(self) -> Decided:
        if self._recorder.active:
            raise RecordingError(
                "apply() or select() was called inside record(), where the backward may still be under way; leave the "
                "block first."
            )
        if not self._recorder.count and self._processes.group is None:
            raise RecordingError(
                "nothing was recorded since the last step; run forward and backward inside `with selector.record():` "
                "before apply() or select()."
            )
        if self._early is None:
            self._before = self._snapshot()
        try:
            decided = self._decide_window()
        except BaseException:
            self._undo()
            raise
        touched = self._recorder.window.touched
        self._unreached = frozenset(name for p, name in self._recorder.parameters.items() if p not in touched)
        self._decided = decided
        return decided

    def _decide_window(self) -> Decided:
        group, spread = self._processes.group, self._processes.spread
        if group is None:
            decided = self._decide_alone(self._coming_step())
        elif spread is not None:
            decided = decide_together(self._coming_step(), spread)
        else:
            with group.together("deciding about its own candidates"):
                step = self._coming_step()
                decided = self._decide_alone(step) if self._recorder.count else Decided(step.nothing(), None)
            if any(group.gather(decided.selection.status == Status.OVERFLOW)):
                decided = step.overflow(decided.contributions)
        selection = decided.selection
        if not self._processes.pools and (columns := self._particulars.columns):
            selection.diagnostics["columns"] = columns
        if selection.status == Status.OVERFLOW:
            self._restore(self._before)
        else:
            self._step += 1
            selection.diagnostics["step"] = self._step
            if is_idle(self.optimizer):
                nothing: dict[str, Any] = {"first_order": 0.0, "curvature": 0.0, "offset_drop": 0.0}
                targets = selection.diagnostics.get("predicted_drops", ())
                nothing |= {"curvature_parts": (0.0,) * 3, "predicted_drops": dict.fromkeys(targets, 0.0)}
                selection.diagnostics.update({k: v for k, v in nothing.items() if k in selection.diagnostics})
                decided = decided._replace(selection=replace(selection, predicted_drop=0.0))
        return decided

    def _decide_alone(self, step: Step) -> Decided:
        if self._recorder.window.alignment is not None:
            return decide_beyond_cap(step)
        return decide_tokens(step) if self.granularity == "token" else decide_samples(step)

    def _coming_step(self) -> Step:
        rate = max((float(group["lr"]) for group in self.optimizer.param_groups if group.get("lr")), default=0.0)
        return Step(
            recorder=self._recorder,
            optimizer=self.optimizer,
            preconditioner=self.preconditioner,
            policy=self.policy,
            target=self._target(),
            further=self._further,
            names=self.target.names if isinstance(self.target, Targets) else (),
            geometry=self._geometry(),
            reference=self.reference,
            mass=self._particulars.mass,
            extras={"learning_rate": [rate] * self._recorder.count, **self._particulars.columns},
            generator=self._generator,
            curvature=self.curvature,
            relinearise=self.relinearise,
            scaled=self._scaled,
            early=self._early is not None,
            uncovered=self._writer.uncovered,
            proved=self._writer.proved,
            residual=self._recorder.residual,
        )

    def _snapshot(self) -> Snapshot:
        curvature = None if self.curvature is None else self.curvature.snapshot()
        return Snapshot(self._step, self._generator.get_state(), self.target.snapshot(), curvature)

    def _restore(self, before: Snapshot) -> None:
        self._step = before.step
        self._generator.set_state(before.generator)
        self.target.restore(before.target)
        if self.curvature is not None:
            self.curvature.restore(before.curvature)

    def _undo(self) -> None:
        """Back to before the decision, so that it can be tried again; an early g stays with its window."""
        self._g = None
        target = self._before.target if self._early is None else self.target.snapshot()
        self._restore(self._before._replace(target=target))

    def _forget_early(self) -> None:
        if self._early is not None:
            self._restore(self._before)
            self._g = self._early = self._early_geometry = self._recorder.direction = None

    def _target(self) -> dict[Parameter, Tensor]:
        """g of everything that can be recorded, whatever this window used: its schedule must not depend on that."""
        if self._early is not None:
            return self._early
        if self._g is None:
            names = {name: p for p, name in self._recorder.parameters.items()}
            with self._processes.together("working out its target's gradient"), self._recorder.autocast():
                g = self.target.gradient(self.model, names, self._processes.company)
            several = self.target if isinstance(self.target, Targets) else None
            self._further = [] if several is None else several.gradients
            if self._processes.pools and several is not None:
                each = zip(several.gradients, several.each.values(), strict=True)
                self._further = [self._processes.mean(gradient, target.rows) for gradient, target in each]
                g = several.mean(self._further)
            elif self._processes.pools:
                g = self._processes.mean(g, self.target.rows)
            self._g = g
        return self._g

    def _geometry(self, coming: bool = False) -> str:
        """The geometry of the coming step: vanilla while M's history is too short to be trusted.

        Only parameters that the window has reached count, for others (a head that is never used) may never get a
        history. Of a `coming` window, before its backward, those that the last one has reached, and new ones.
        """
        if self._early_geometry is not None:
            return self._early_geometry
        touched, recorded = self._recorder.window.touched, self._recorder.parameters
        reached = [p for p, name in recorded.items() if (name not in self._unreached if coming else p in touched)]
        groups = groups_of(self.optimizer, reached)
        ages = [self.preconditioner.age(groups[p], state_of(self.optimizer, p)) for p in reached]
        return "vanilla" if any(age is not None and age < self.warmup for age in ages) else self.geometry

    def _begin_window(self) -> None:
        """The optimizer is looked at again: groups are added, and options changed, in the middle of a run.

        Where a cap may force pieces to be dropped, what they are reduced to must be known before the backward.
        """
        self.preconditioner.check(self.optimizer)
        if self._recorder.memory_cap is None or self.reference == "pool":
            return
        self._recorder.refresh_layers()
        self._before = self._snapshot()
        if self._recorder.autocast_known:
            self._prepare_direction()
        else:  # g belongs under the autocast that the first forward runs in
            self._recorder.at_forward(self._prepare_direction)

    def _prepare_direction(self) -> None:
        try:
            self._early = self._target()
            self._early_geometry = self._geometry(coming=True)
            self._recorder.direction = directions(
                self._early, self.optimizer, self.preconditioner, self._early, self._early_geometry, self.reference
            )
        except BaseException:
            self._restore(self._before)
            self._g = self._early = self._early_geometry = None
            raise

    # -- fidelity --------------------------------------------------------------------------------------------------

    def _expect(self, decided: Decided) -> None:
        """Have the coming step compared with what it is predicted to do, if it is a watched one."""
        if self._watcher is None:
            return
        self._watcher.forget()
        selection = decided.selection
        watched = self.watch > 0 and self._step % self.watch == 0
        if selection.status == Status.OVERFLOW or not (watched or self._trust_region):
            return
        written = [p.grad / self._loss_scale for p in self._recorder.parameters if p.grad is not None]
        displacement = displacement_of(self._coming_step(), decided) if watched else None
        norm = total_norm(written, self._processes.total)
        self._watcher.expect(Expectation(selection, self.policy.trust, norm, displacement))

    def _target_loss(self) -> float:
        with self._processes.together("working out its target's loss"), self._recorder.autocast():
            loss = self.target.loss(self.model)
        self._processes.company.end_forwards()
        return self._processes.mean_number(loss, self.target.rows) if self._processes.pools else loss

    def _learn(self, fidelity: Fidelity) -> None:
        self.fidelity = fidelity
        if self._journal is not None:
            self._journal.told(fidelity)
        if self._trust_region is not None:
            self.policy = replace(self.policy, trust=self._trust_region.next(self.policy.trust, fidelity))

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write(self, decided: Decided) -> None:
        group = self._processes.group
        if group is None:
            gradients = self._gradients(decided)
        else:
            with group.together("forming its part of the weighted gradient"):
                own = self._gradients(decided)
                if self.uncovered == "ignore":
                    unweighted = {p: p.grad for p in self._recorder.uncovered if p.grad is not None}
                    own |= self._processes.parts(unweighted)
            # A gradient that the decision was read from is the sum over processes already.
            summed = self._processes.pools and decided.gradient is not None
            order = [*(() if summed else self._recorder.parameters), *self._recorder.uncovered]
            gradients = self._processes.averaged(own, order)
            decided.selection.diagnostics["sent_bytes"] = group.take_sent()
            finite = all_finite(local(g) for g in gradients.values() if g is not None)
            said = group.gather([self._scaled, finite])
            routine = any(scaled for scaled, _ in said) or decided.selection.status == Status.OVERFLOW
            if not routine and not all(finite for _, finite in said):
                raise NonFiniteError(
                    "the sum of the processes' weighted gradients overflows; it was not written; discard() this step "
                    "on all of them, and lower the loss or the cap."
                )
        for p, gradient in gradients.items():
            if gradient is None or p.grad is None:
                p.grad = gradient
            else:
                p.grad.copy_(gradient)

    def _gradients(self, decided: Decided) -> dict[Parameter, Tensor | None]:
        """What this process's candidates give; None: no gradient at all."""
        selection = decided.selection
        recorded = list(self._recorder.parameters)
        if selection.status == Status.NOTHING_USEFUL and self.nothing_useful == "skip":
            return dict.fromkeys([*recorded, *self._writer.uncovered])
        if selection.status == Status.OVERFLOW and decided.contributions is None:
            # an overflow beyond the memory cap: the scaler must see one
            return {p: torch.full_like(p, float("inf")) for p in recorded}
        return dict(self._writer.combine(decided, self._loss_scale, self._scaled))

    def _clear(self) -> None:
        self._recorder.clear()
        self._recorder.direction = None
        self._particulars.clear()
        self._decided = None
        self._g = self._early = self._early_geometry = None
        self._further = []
        self._scaled = False


class Snapshot(NamedTuple):
    """What a step that fails is undone to."""

    step: int
    generator: Tensor
    target: Any
    curvature: Any
