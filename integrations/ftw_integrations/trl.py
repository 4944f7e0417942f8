"""Selection inside TRL's SFTTrainer, whose data preparation, loss, metrics and evaluation stay its own.

    SelectionSFTTrainer(model, args, train_dataset=pool, target_dataset=dev, selection=SelectionArguments(budget=0.25))

All else as in `ftw_integrations.huggingface`.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ftw.errors import ConfigurationError, TargetError
from ftw_integrations.arguments import SelectionArguments
from ftw_integrations.huggingface import SelectionTrainerMixin

__all__ = ["SelectionArguments", "SelectionSFTTrainer"]

_log = logging.getLogger(__name__)


class SelectionSFTTrainer(SelectionTrainerMixin, SFTTrainer):
    """`SFTTrainer` with selection.

    Args:
        target_dataset: a `datasets.Dataset` of what you train for, of any type that `train_dataset` may have; prepared
            as an evaluation set is, and never packed.
        selection: what is chosen and how.

    Raises:
        ConfigurationError: the target is no `Dataset`, and what `SelectionTrainerMixin` raises.
        TargetError: the target is empty, or nothing of it is left within `max_length`.
    """

    def __init__(
        self, *args: Any, target_dataset: Any = None, selection: SelectionArguments | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(target_dataset, Dataset):
            raise ConfigurationError(
                f"target_dataset is a {type(target_dataset).__name__}; a datasets.Dataset is needed, of a type that "
                "SFTTrainer trains on; pass a few samples of what you train for (Dataset.from_list makes one)."
            )
        super().__init__(*args, target_dataset=target_dataset, selection=selection, **kwargs)
        if not self._skip_prepare_dataset:
            prepare: Any = self._prepare_dataset
            settings: Any = self.args
            prepared = prepare(target_dataset, self.processing_class, settings, False, self._formatting_func, "target")
            if not len(prepared):
                raise TargetError(
                    f"no sample of target_dataset has a label within max_length={settings.max_length}; its loss is "
                    "nothing; pass shorter samples or raise max_length."
                )
            self._target_dataset = prepared
        self._head = _Head(self.model)
        if self._head.is_trained:
            _log.warning(
                "The output head is trained: while a micro-batch is recorded its logits (rows x length x vocabulary) "
                "are formed, which SFTTrainer's own loss avoids."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._head.called():
            return super().training_step(*args, **kwargs)

    def target_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """As the mixin's, and no part of TRL's metrics, which count whatever passes through `compute_loss`."""
        counted = copy.deepcopy(self._metrics)
        try:
            # With a cache, samples that share a row see one another. TRL trains and evaluates without one.
            return super().target_loss(model, {**batch, "use_cache": False})
        finally:
            self._metrics = counted


class _Head:
    """Has the model's output head called where it is trained, so that its contributions are recorded.

    TRL's loss takes the head's weight and multiplies by it itself, tile by tile: the layer never runs. Inside
    `called()` the model's own forward makes the logits, and what TRL asks for is read from them: the same numbers, for
    the memory of the logits. A frozen head is left to TRL.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.is_trained = _is_head_trained(base)
        self._active = False
        fused = base.forward.__func__

        @functools.wraps(fused)  # the signature is read by generate() and by the trainer
        def forward(module: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head or not self._active or not _is_head_trained(module):
                return fused(module, *args, fused_lm_head=fused_lm_head, **kwargs)
            labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
            items = kwargs.pop("num_items_in_batch", None)
            output = fused(module, *args, **kwargs)
            logits = output.logits[:, :-1] if shifted is None else output.logits
            return _per_token(logits, labels[:, 1:] if shifted is None else shifted, items, output.get("aux_loss"))

        base.forward = types.MethodType(forward, base)

    @contextmanager
    def called(self) -> Iterator[None]:
        self._active = True
        try:
            yield
        finally:
            self._active = False


def _is_head_trained(model: Any) -> bool:
    return any(p.requires_grad for p in model.get_output_embeddings().parameters())


def _per_token(logits: Tensor, labels: Tensor, items: Any, aux_loss: Tensor | None) -> FusedCausalLMOutput:
    """What TRL's fused head returns, for logits (rows, T, V) and labels (rows, T), zero where the label is -100."""
    mask = labels != -100
    targets = labels[mask]
    each = torch.log_softmax(logits[mask].float(), -1)

    def spread(values: Tensor) -> Tensor:  # (N,) -> (rows, T)
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    log_probs = spread(each.gather(-1, targets[:, None]).squeeze(-1))
    with torch.no_grad():
        entropy = spread(-(each.exp() * each).sum(-1))
        is_top1 = spread(each.argmax(-1) == targets)
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / (mask.sum().clamp(min=1) if items is None else items),
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
        aux_loss=aux_loss,
    )
