"""Selection inside Lightning's Trainer, whose loop, precision, clipping and logging stay its own.

    Trainer(callbacks=[SelectionCallback(target=dev_batches, budget=0.25)], accumulate_grad_batches=4).fit(module, pool)

The LightningModule stays as it is: its training step is recorded as a whole, each micro-batch of an accumulation window
in a block of its own, and the selected gradient stands in `p.grad` once the window's last backward is through, before
it is unscaled, clipped and stepped. Works with `lightning` and with `pytorch_lightning`, whichever is there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ftw
from ftw.errors import ConfigurationError, RecordingError
from ftw.gradients.audit import first_tensor, refuse_packed
from ftw.processes.setting import refuse_static_graph
from ftw.processes.sharding import is_sharded_model
from ftw.target import Target
from ftw_integrations import states
from ftw_integrations.lightning_step import TrainingStep
from ftw_integrations.loop import of_candidates, owners, token_mean
from ftw_integrations.metrics import Metrics

__all__ = ["SelectionCallback", "token_mean"]


def _callback() -> Any:
    """The base class, from the namespace in use: a program has imported its trainer's before this module."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise ImportError("neither lightning nor pytorch_lightning is installed; install filter-then-weight[lightning].")


_Callback: Any = _callback()
_ARGUMENTS = inspect.signature(ftw.Selector).parameters.keys() - {"model", "optimizer", "target", "loss_fn"}
_SERVED = (
    "selection knows one device, one replica of the module in each process, and modules that fully_shard has cut; "
    "choose strategy='auto', 'ddp', or a ModelParallelStrategy with fully_shard in configure_model"
)


class SelectionCallback(_Callback):
    """Selection as a callback, for automatic optimisation with one optimizer.

    Args:
        target: batches of what you train for, as the training step gets them: an iterable that can be walked again (a
            list, a DataLoader), names of several, or something to call for it when training begins (`data.target`, a
            method of a LightningDataModule, say). They go the way of the training batches to the device.
        loss_fn: loss of a target batch, `loss_fn(module, batch) -> ()`. Default: what `training_step` returns, run in
            eval mode and without a trace in logs, metrics and attributes of the module.
        mass: batch -> share of its candidates in the loss, (candidates,); rows of mass 0 are no candidates.
            `token_mean` where the loss is the mean over label tokens. Default: equal. As Lightning takes the mean over
            micro-batches, each should sum to the same.
        candidates: batch -> whose each row or token is, as in `Selector.record`; `ftw.packed_candidates` for packed
            rows, the same number for the rows of a preference pair.
        extras: batch -> what filters need to know of its candidates, as in `Selector.record`, and "id", "source" and
            "text" for the decision log (`log=`).
        model: name of the submodule whose call is the forward, and which is called once a step. Default: the training
            step as a whole. Needed for `memory_cap` and `uncovered="scale"` where the step returns no more than a loss.
        told: called with the selection of every step.
        selector: further arguments of `ftw.Selector`.

    Attributes:
        selector: of the present `fit()`; None before its first step.
        selection: of the last step; None before.

    Raises:
        ConfigurationError: arguments that are not allowed; at the begin of `fit()`: manual optimisation, a strategy
            that wraps the module (DDP excepted) or accumulates by itself, no `extras` for a filter that needs some.
    """

    def __init__(
        self,
        target: Any,
        *,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        mass: Callable[[Any], Tensor] | None = None,
        candidates: Callable[[Any], Any] | None = None,
        extras: Callable[[Any], Mapping[str, Any]] | None = None,
        model: str | None = None,
        told: Callable[[ftw.Selection], None] | None = None,
        **selector: Any,
    ) -> None:
        super().__init__()
        for name in selector.keys() - _ARGUMENTS:
            close = get_close_matches(name, sorted(_ARGUMENTS), 1)
            raise ConfigurationError(
                f"SelectionCallback got {name}={selector[name]!r}{f'; did you mean {close[0]}?' if close else ';'} "
                f"allowed are its own arguments and {', '.join(sorted(_ARGUMENTS))}; leave it out."
            )
        self.selector: ftw.Selector | None = None
        self.selection: ftw.Selection | None = None
        self._given, self._loss_fn, self._arguments = target, loss_fn, selector
        self._mass, self._candidates, self._extras = mass, candidates, extras
        self._model, self._told = model, told
        self._state: dict[str, Any] | None = None
        self._metrics = Metrics()
        self._block: AbstractContextManager[None] | None = None
        self._offering = False  # whether it has a candidate
        self._recorded = self._offers = False  # a block in this window, and a candidate in it
        self._processes, self._sharded = 1, False
        self._undo: list[Callable[[], Any]] = []

    # -- beginning and end -----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self.selector = self.selection = self._state = None
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                f"{type(pl_module).__name__} has automatic_optimization=False; selection needs Lightning's own loop; "
                "switch it on, or call record() and apply() of an ftw.Selector in training_step."
            )
        if trainer.strategy.handles_gradient_accumulation:
            raise ConfigurationError(f"{type(trainer.strategy).__name__} accumulates gradients by itself; {_SERVED}.")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        wrapper = trainer.strategy.model
        replicated = isinstance(wrapper, DistributedDataParallel) and wrapper.module is pl_module
        if wrapper is not pl_module and not replicated:
            raise ConfigurationError(
                f"{type(trainer.strategy).__name__} wraps the module in a {type(wrapper).__name__}; {_SERVED}."
            )
        refuse_static_graph(wrapper)
        # FSDP reduces outside of blocks, and waits for all processes there: each of them opens one for every batch.
        self._processes, self._sharded = trainer.world_size, is_sharded_model(pl_module)
        step = TrainingStep(pl_module)
        if replicated:  # what is selected is summed instead
            self._undo.append(_synchronise_nothing(wrapper))
        self.selector = ftw.Selector(
            step if self._model is None else _submodule(pl_module, self._model),
            trainer.optimizers[0],
            target=self._target(self._given),
            loss_fn=functools.partial(self._target_loss, trainer, pl_module, step),
            **self._arguments,
        )
        if self._extras is None:
            self.selector.require_columns(())
        if self._state is not None:
            self.selector.load_state_dict(states.own(self._state))
            self._state = None
        self._recorded = self._offers = False
        self._metrics.take()
        self._record_steps(trainer, pl_module, step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._forget()  # a window that was broken off: its gradient is dropped as well

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()

    def _target(self, given: Any) -> Any:
        if callable(given):
            given = given()
        if isinstance(given, Mapping) and not all(isinstance(each, Tensor) for each in given.values()):
            return {name: self._target(each) for name, each in given.items()}
        if isinstance(given, Target):
            raise ConfigurationError(
                "target is an ftw Target, whose loss is no training step's; batches are needed; pass them, and "
                "loss_fn, refresh, target_batches and ema to SelectionCallback."
            )
        return given

    def _target_loss(self, trainer: Any, pl_module: Any, step: TrainingStep, model: nn.Module, batch: Any) -> Tensor:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        with trainer.precision_plugin.train_step_context():
            return step.loss(batch) if self._loss_fn is None else self._loss_fn(pl_module, batch)

    def _end(self) -> None:
        if self.selector is not None:
            self._forget()
            self.selector.close()
        while self._undo:
            self._undo.pop()()

    # -- the step --------------------------------------------------------------------------------------------------

    def _record_steps(self, trainer: Any, pl_module: Any, step: TrainingStep) -> None:
        """Have a block opened around each training step; the end of its backward closes it."""
        attributes, plain = vars(pl_module), pl_module.training_step
        own = {"training_step": plain} if "training_step" in attributes else {}  # a compiled one

        @functools.wraps(plain)
        def training_step(*args: Any) -> Any:
            if not trainer.training or not torch.is_grad_enabled():  # called by a validation_step, say
                return plain(*args)
            self._drop_block("a training step got no backward")
            self._open_block(trainer, args[0])
            try:
                output = step.run(*args, recorded=self._model is None)
            except BaseException:
                self._drop_block("training_step failed")
                raise
            if output is None:  # Lightning passes over this micro-batch
                self._drop_block("training_step returned None")
            return output

        def restore() -> None:
            del attributes["training_step"]
            attributes.update(own)

        attributes["training_step"] = training_step
        self._undo.append(restore)

    def _open_block(self, trainer: Any, batch: Any) -> None:
        assert self.selector is not None
        candidates = None if self._candidates is None else self._candidates(batch)
        if candidates is None and isinstance(batch, Mapping):
            refuse_packed(batch)
        if self._mass is not None:
            mass = self._mass(batch)
        else:  # Lightning's step is the mean over micro-batches of whatever size, each a mean over its own
            count = first_tensor((batch,), {}).shape[0] if candidates is None else _count(candidates)
            mass = torch.full((count,), 1.0 / count, dtype=torch.float64)
        extras = None if self._extras is None else self._extras(batch)
        if candidates is None:
            mass, candidates = owners(mass)
            extras = None if extras is None else of_candidates(extras, candidates)
        if not len(mass) and not self._sharded:
            return  # no row has a label: there is nothing to choose from, and no gradient
        if not self._recorded:
            trainer.optimizers[0].zero_grad()  # as Lightning does a moment later, between forward and backward
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        block = self.selector.record(mass=mass, scaler=scaler, candidates=candidates, extras=extras)
        block.__enter__()
        self._block, self._offering = block, bool(len(mass))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._block is not None:
            block, self._block = self._block, None
            block.__exit__(None, None, None)
            self._recorded, self._offers = True, self._offers or self._offering
        # Here, and not when the optimizer is about to step: a GradScaler has unscaled the gradient by then.
        if trainer.fit_loop._should_accumulate():
            return
        if self._processes == 1:
            offered = self._offers
        else:  # one that has no candidate takes part all the same
            offered = trainer.strategy.reduce_boolean_decision(self._offers, all=False)
        if offered:
            self._select()
        elif self._recorded:  # for nobody: the gradient that the plain trainer would have made of it
            self._forget()
            for p in (p for group in trainer.optimizers[0].param_groups for p in group["params"] if p.requires_grad):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self._recorded:
            return
        # The window's last micro-batch had no backward; under a GradScaler Lightning then takes no step.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            self._select()
        else:
            self._forget()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0 and not trainer.barebones:
            pl_module.log_dict(self._metrics.take())

    def _select(self) -> None:
        assert self.selector is not None
        self.selection = self.selector.apply()
        self._recorded = self._offers = False
        self._metrics.add(self.selection)
        if self._told is not None:
            self._told(self.selection)

    def _drop_block(self, reason: str) -> None:
        if self._block is not None:
            block, self._block = self._block, None
            block.__exit__(RecordingError, RecordingError(f"{reason}; what was recorded of it is dropped."), None)

    def _forget(self) -> None:
        assert self.selector is not None
        self._drop_block("training was broken off")
        self.selector.discard()
        self._recorded = self._offers = False

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The selectors' of all processes, plain data; within a window those of its begin, as Lightning saves no
        gradients either. Collective, as Lightning's saving is.
        """
        if self.selector is not None:
            return states.gathered(self.selector.state_dict(within_window=True))
        return {} if self._state is None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if not checkpoint.get("callbacks", {}).get(self.state_key):
            warnings.warn(
                "the checkpoint holds no state of SelectionCallback: it was saved without selection; the selector "
                "begins anew.",
                stacklevel=2,
            )


def _synchronise_nothing(wrapper: DistributedDataParallel) -> Callable[[], None]:
    """As within `no_sync()`, for as long as it is not undone."""
    before, wrapper.require_backward_grad_sync = wrapper.require_backward_grad_sync, False

    def undo() -> None:
        wrapper.require_backward_grad_sync = before

    return undo


def _submodule(module: nn.Module, name: str) -> nn.Module:
    known = dict(module.named_modules())
    if not name or name not in known:
        children = ", ".join(child for child, _ in module.named_children())
        raise ConfigurationError(
            f"model={name!r} names no submodule of {type(module).__name__}; its children are {children}; name the one "
            "whose call is the forward."
        )
    return known[name]


def _count(candidates: Any) -> int:
    """Candidates of a map; `record()` refuses it if it is none."""
    return max(int(torch.as_tensor(candidates).max()) + 1, 1)
