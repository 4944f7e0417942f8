"""Selection inside Hugging Face's Trainer, whose loop, loss, clipping and evaluation stay its own.

    SelectionTrainer(model, args, train_dataset=pool, target_dataset=dev, selection=SelectionArguments(budget=0.25))

The pool of a step is its whole accumulation window: the selector records each micro-batch and writes the gradient at
the last one, before the Trainer clips and steps. For a trainer of your own put `SelectionTrainerMixin` in front of it:
`class Mine(SelectionTrainerMixin, OtherTrainer)`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sized
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

import ftw
from ftw.errors import ConfigurationError, TargetError
from ftw.target import model_loss
from ftw_integrations import states
from ftw_integrations.arguments import SelectionArguments
from ftw_integrations.columns import (
    COLUMNS,
    NAMES,
    KeepColumns,
    SteadyColumns,
    columns_of,
    is_dispatched,
    require,
    texts_of,
)
from ftw_integrations.metrics import Metrics

__all__ = ["SelectionArguments", "SelectionTrainer", "SelectionTrainerMixin"]

STATE_NAME = "ftw_selector.pt"
"""The selector's state in a checkpoint's folder; plain data, read with `weights_only=True`."""

_Base: Any = Trainer if TYPE_CHECKING else object


class SelectionTrainerMixin(_Base):
    """Selection for a `Trainer` that stands behind it in the MRO.

    Args:
        target_dataset: samples of what you train for, in the form of `train_dataset`; collated by the trainer's own
            collator, in their order, when training begins.
        selection: what is chosen and how.

    Attributes:
        selector: of the present `train()`; None before its first step.
        selection: of the last step; None before.

    Raises:
        ConfigurationError: no target, a sharded model, several devices in one process, or arguments that do not fit.
        TargetError: the target is empty.
    """

    def __init__(
        self, *args: Any, target_dataset: Any = None, selection: SelectionArguments | None = None, **kwargs: Any
    ) -> None:
        if target_dataset is None or not isinstance(target_dataset, Sized) or isinstance(target_dataset, Mapping):
            raise ConfigurationError(
                f"target_dataset is a {type(target_dataset).__name__}; a dataset with a length is needed, in the form "
                "of train_dataset; pass a few samples of what you train for."
            )
        if not len(target_dataset):
            raise TargetError("target_dataset is empty; at least one sample is needed; pass what you train for.")
        if not isinstance(selection, SelectionArguments | None):
            raise ConfigurationError(
                f"selection is a {type(selection).__name__}; allowed is a SelectionArguments; pass "
                "SelectionArguments(budget=0.25)."
            )
        self._selection_arguments = selection or SelectionArguments()
        self._target_dataset: Any = target_dataset
        self.selector: ftw.Selector | None = None
        self.selection: ftw.Selection | None = None
        self._selector_state: dict[str, Any] | None = None
        self._metrics_of_selection = Metrics()
        self._steady = SteadyColumns()
        super().__init__(*args, **kwargs)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or self.args.n_gpu > 1:
            raise ConfigurationError(
                f"the trainer runs {self.accelerator.num_processes} processes with {self.args.n_gpu} devices each"
                f"{', sharded' if sharded else ''}; selection knows replicas of the model, one in each process "
                "(DistributedDataParallel); start it with torchrun or accelerate launch and without FSDP or DeepSpeed, "
                "or set CUDA_VISIBLE_DEVICES to one device."
            )
        self._needed = self._selection_arguments.columns
        if self._needed and (there := columns_of(self.train_dataset)) is not None:
            require(self._needed, there, "train_dataset")
        self.add_callback(_Beginning(self))

    # -- the step --------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; however it ends, an interrupt included, no hook and no window stays behind."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.selector is not None:
                self.selector.close()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The trainer's own, recorded; at the window's last micro-batch the selection takes the gradient's place."""
        selector = self._selector_in_use(model)
        columns = inputs.pop(COLUMNS, {})
        mass, candidates, used = self._candidates(inputs, num_items_in_batch)
        if len(mass):
            extras = self._known(columns, inputs, candidates, used)
            with selector.record(mass=mass, candidates=candidates, scaler=self.accelerator.scaler, extras=extras):
                loss = super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)
            self._recorded = True
        else:  # no row has a label: there is nothing to choose from, and no gradient that others could wait for
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)
        if self.accelerator.sync_gradients and self._anything_recorded():
            self.selection = selector.apply()
            self._recorded = False
            self._metrics_of_selection.add(self.selection)
        return loss

    def target_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of a target batch: the model's own, or the trainer's where that was changed by an argument."""
        if self.compute_loss_func is None and self.label_smoother is None:
            return model_loss(model, batch)
        loss: Tensor = self.compute_loss(model, self._prepare_inputs(dict(batch)))
        return loss

    def _selector_in_use(self, model: nn.Module) -> ftw.Selector:
        if self.selector is None:
            chosen = self._selection_arguments
            batches = self._target_batches(chosen.target_batch_size)
            self.selector = ftw.Selector(
                model if isinstance(model, DistributedDataParallel) else self.model,
                self.optimizer,
                target=self._own(batches),
                loss_fn=self.target_loss,
                **chosen.for_selector(),
            )
            self._recorded = False
            if self._selector_state is not None:
                self.selector.load_state_dict(self._selector_state)
                self._selector_state = None
        return self.selector

    def _own(self, batches: list[Any]) -> list[Any]:
        """The target's batches of this process, whose gradients are averaged with those of the others."""
        size, rank = self.args.world_size, self.args.process_index
        if self._selection_arguments.target_batches == "all":
            return batches[rank::size] or batches[-1:]
        # All in turn, each process some steps ahead of the one before it: together they walk as one would.
        return [batches[(step * size + rank) % len(batches)] for step in range(len(batches))]

    def _anything_recorded(self) -> bool:
        """Whether any process has a candidate in this window; those that have none take part all the same."""
        if self.args.world_size == 1:
            return self._recorded
        return any(gather_object([self._recorded]))

    def _target_batches(self, size: int) -> list[Any]:
        """All of the target, collated. Should the collator draw at random, the trainer's generators do not notice."""
        data = self._target_dataset
        collate = self._get_collator_with_removed_columns(self.data_collator, description="target")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._selection_arguments.selection_seed)
            starts = range(0, len(data), size)
            return [collate([data[i] for i in range(at, min(at + size, len(data)))]) for at in starts]

    def _candidates(self, inputs: Mapping[str, Any], num_items: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """Mass of the candidates of a micro-batch, (n,), and whose each row or token is, where that is not plain.

        Third, which of the samples are candidates, (samples,): those that have a label.
        """
        labels = inputs.get("shift_labels", inputs.get("labels"))
        owner = _packed(inputs)
        if isinstance(labels, Tensor) and labels.dim() > 1:
            shifted = "shift_labels" not in inputs and getattr(self, "_loss_shifts_labels", True)
            counted = (labels[:, 1:] if shifted else labels).ne(-100).cpu()
            if owner is None:
                tokens = counted.flatten(1).sum(1)
            else:
                predicts = owner[:, : counted.shape[1]]
                tokens = torch.bincount(predicts[counted & (predicts >= 0)], minlength=int(owner.max()) + 1)
        else:  # one label a row, or a loss that is made without labels
            rows = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim())
            tokens = torch.ones(rows, dtype=torch.long)
        used = tokens > 0
        mass = tokens[used].double()
        if self._normalised_over_window(num_items):
            mass = mass / (1.0 if num_items is None else float(num_items))  # the processes' own number, or that of all
        else:
            mass = mass / mass.sum()  # each micro-batch is a mean of its own, and the step the mean of these
        if bool(used.all()):
            return mass, owner, used
        numbers = (used.cumsum(0) - 1).masked_fill(~used, -1)
        return mass, numbers if owner is None else numbers[owner], used

    def _normalised_over_window(self, num_items: Any) -> bool:
        """Whether the loss is a sum over the window's label tokens divided by their number: as `training_step` asks."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    # -- columns of the dataset, for the filter and the decision log -----------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The trainer's own, whose batches carry the columns that filter and log read and the model is not to see."""
        own: Any = self
        needed, logs = self._needed, self._selection_arguments.log is not None
        if not (needed or logs) or is_dispatched(self.accelerator, self.train_dataset, needed):
            return super().get_train_dataloader()
        own._set_signature_columns_if_needed()
        collator, seen = own.data_collator, own._signature_columns
        names = [name for name in NAMES if logs and name not in (*seen, *needed)]
        unseen = [name for name in (*needed, *names) if name not in seen]
        own.data_collator = KeepColumns(
            collator, needed, names, spared=unseen if self.args.remove_unused_columns else ()
        )
        own._signature_columns = [*seen, *unseen]
        try:
            return super().get_train_dataloader()
        finally:
            own.data_collator, own._signature_columns = collator, seen

    def candidate_texts(self, inputs: Mapping[str, Any], candidates: Tensor | None) -> list[str] | None:
        """Texts of the candidates of a micro-batch for the decision log; None: not known.

        By default their tokens, decoded by the `processing_class`. Not asked where the dataset has a column "text".

        Args:
            inputs: of the model.
            candidates: whose each row or token is, as in `Selector.record`; None: one candidate a row.
        """
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ids = inputs.get("input_ids")
        if not hasattr(tokenizer, "batch_decode") or not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        return texts_of(tokenizer, ids, inputs.get("attention_mask"), candidates, self._selection_arguments.log_text)

    def _known(
        self, columns: Mapping[str, list[Any]], inputs: Mapping[str, Any], candidates: Tensor | None, used: Tensor
    ) -> dict[str, list[Any]]:
        """What the filter reads of the candidates of a micro-batch, and what the log calls them."""
        kept = used.nonzero().flatten().tolist()
        found = {name: [each[i] for i in kept] for name, each in columns.items() if len(each) == len(used)}
        require(self._needed, found, f"a micro-batch of {len(used)} samples, as its collator and loader leave it,")
        read = {name: found[name] for name in self._needed}
        if self._selection_arguments.log is None:
            return read
        named = {name: found[name] for name in NAMES if name in found}
        longest = self._selection_arguments.log_text
        if longest and "text" not in named:
            texts = self.candidate_texts(inputs, candidates)
            named |= {} if texts is None else {"text": texts}
        return self._steady(named, len(kept), longest) | read

    # -- metrics and checkpoints -----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own; training logs gain the means of `ftw/*` since the last."""
        if "loss" in logs:
            logs = {**logs, **self._metrics_of_selection.take()}
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.selector is not None and (self.args.should_save or self.args.world_size > 1):
            os.makedirs(output_dir, exist_ok=True)  # the first process may not have come to it
            torch.save(self.selector.state_dict(within_window=True), os.path.join(output_dir, self._state_name))

    @property
    def _state_name(self) -> str:
        """Each process's own: so is its part of the target."""
        return STATE_NAME if self.args.world_size == 1 else f"{self.args.process_index}_{STATE_NAME}"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, self._state_name)
        if os.path.isfile(path):
            self._selector_state = states.read(path)
        else:
            warnings.warn(
                f"{checkpoint} holds no {self._state_name}: it was saved without selection, with "
                "save_only_model, or by another number of processes; the selector begins anew.",
                stacklevel=2,
            )


class SelectionTrainer(SelectionTrainerMixin, Trainer):
    """`Trainer` with selection: `SelectionTrainer(..., target_dataset=dev, selection=SelectionArguments())`."""


def _packed(inputs: Mapping[str, Any]) -> Tensor | None:
    """Whose each token is, (rows, T), where rows hold several samples, which `position_ids` say by starting anew."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    owner = ftw.packed_candidates(positions, attention_mask=inputs.get("attention_mask"))
    return owner if int(owner.max()) >= len(positions) else None


class _Beginning(TrainerCallback):
    """Begins what the selector keeps where the loop begins."""

    def __init__(self, trainer: SelectionTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._trainer.selector is not None:  # of an attempt with larger batches
            self._trainer.selector.close()
        self._trainer.selector = self._trainer.selection = None
        self._trainer._steady = SteadyColumns()
        self._trainer._metrics_of_selection.take()
