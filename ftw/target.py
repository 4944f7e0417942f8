"""The target: where the gradient g comes from. Batches of a small set that stands for what the user wants.

Called by the selector once a step, outside the trainer's forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from ftw.errors import ConfigurationError, NonFiniteError, TargetError
from ftw.gradients.company import ALONE, Company
from ftw.modes import all_finite, evaluating, parked_gradients
from ftw.optim_state.shards import local

Snapshot = tuple[int, int, dict[str, Tensor] | None, int, list[Any] | None, float]

LossFunction = Callable[[nn.Module, Any], Tensor]


def check_schedule(refresh: Any, batches_per_refresh: Any, ema: Any) -> None:
    """Raise `ConfigurationError` unless the arguments of `Target` of these names are allowed."""
    if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1:
        raise ConfigurationError(
            f"refresh is {refresh!r}; it counts steps and must be an integer of at least 1; 1 is every step."
        )
    if batches_per_refresh != "all" and (not isinstance(batches_per_refresh, int) or batches_per_refresh < 1):
        raise ConfigurationError(
            f"target_batches is {batches_per_refresh!r}; allowed are integers of at least 1, or 'all'; try 1."
        )
    if not isinstance(ema, Real) or not 0.0 <= float(ema) < 1.0:
        raise ConfigurationError(f"ema is {ema!r}; it must lie in [0, 1); 0 switches averaging off.")


class Target:
    """Gradient of the mean loss on target samples, refreshed on a schedule.

    Args:
        batches: iterable of batches; begun again when it ends. A list, or anything that yields the same batches each
            time, makes resuming exact.
        loss_fn: `loss_fn(model, batch) -> ()`, mean over the batch; default: `model(**batch).loss`, with the batch's
            tensors moved to the model's device.
        refresh: steps between two target gradients; 1 is every step. In between the last one is used again, which
            hurts soon (DESIGN, section 6).
        batches_per_refresh: how many batches make one gradient, weighted by their rows; "all": the whole iterable.
        ema: weight of the previous gradient, `g = ema * g_previous + (1 - ema) * g_new`; 0: none.

    The model is in eval mode while g is computed (no dropout); its modes, `p.grad` and the state of torch's random
    generators are then as they were.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        loss_fn: LossFunction | None = None,
        *,
        refresh: int = 1,
        batches_per_refresh: int | str = 1,
        ema: float = 0.0,
    ) -> None:
        if isinstance(batches, (str, bytes, Mapping, Tensor)) or not isinstance(batches, Iterable):
            raise ConfigurationError(
                f"target is a {type(batches).__name__}; an iterable of batches is needed; wrap a single batch in a "
                "list."
            )
        if isinstance(batches, Sequence) and not len(batches):
            raise TargetError("the target has no batch; at least one is needed; pass samples of what you train for.")
        check_schedule(refresh, batches_per_refresh, ema)
        self.batches = batches
        self.loss_fn = model_loss if loss_fn is None else loss_fn
        self.refresh = refresh
        self.batches_per_refresh = batches_per_refresh
        self.ema = ema
        self._position = 0  # batches consumed since the run began
        self._age = 0  # steps that used the present gradient
        self._gradient: dict[str, Tensor] | None = None
        self._iterator: Iterator[Any] | None = None
        self._iterator_at = 0
        self._replay: dict[int, Any] = {}  # position -> batch, those walked over since the last snapshot
        self._consumed = 0  # batches that made the present gradient
        self._present: list[Any] | None = None  # those batches, where they are at hand
        self.rows = 0.0
        """Own samples that the present gradient is the mean of, old ones of an average left aside."""

    def gradient(
        self, model: nn.Module, parameters: Mapping[str, Parameter], company: Company = ALONE
    ) -> dict[Parameter, Tensor]:
        """g for this step, parameter -> tensor of its shape and dtype; zero where the loss does not reach.

        Args:
            company: of the processes that a sharded model is spread over: g is then of the batches of all, and each
                process gets its shards of it.

        Raises:
            TargetError: no batch, no scalar loss, or a loss that reaches none of the parameters.
            NonFiniteError: g, or the loss of a batch, is NaN or infinite.
        """
        cached = self._gradient or {}
        stale = cached.keys() != parameters.keys()
        if not stale and any(cached[name].shape != local(p).shape for name, p in parameters.items()):
            raise TargetError(
                "the target gradient of an earlier step has other shapes than the parameters; of a sharded model each "
                "process keeps its shards of it; resume with as many processes as the run that saved it."
            )
        if stale or self._age >= self.refresh:
            fresh = self._compute(model, parameters, company)
            if self.ema and not stale:
                fresh = {name: self.ema * cached[name] + (1 - self.ema) * g for name, g in fresh.items()}
            self._gradient, self._age = fresh, 0
        self._age += 1
        assert self._gradient is not None
        return {p: self._gradient[name].to(p.device) for name, p in parameters.items()}

    def loss(self, model: nn.Module) -> float:
        """Mean loss on the batches that the present gradient was made of, without gradient, in eval mode.

        Raises:
            TargetError: there is no gradient yet; no scalar loss.
        """
        total = rows = 0.0
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with evaluating(model), torch.random.fork_rng(devices), torch.no_grad():
            for batch in self._present_batches():
                weight = float(_rows(batch))
                loss = self.loss_fn(model, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise TargetError(
                        f"the target's loss function returned {_describe(loss)}; a scalar tensor is needed; pass "
                        "loss_fn(model, batch) that returns the mean loss, or batches with labels."
                    )
                total, rows = total + weight * float(loss), rows + weight
        return total / rows

    def state_dict(self, at: Snapshot | None = None) -> dict[str, Any]:
        """Position, age and the cached gradient (by parameter name), now or at a snapshot: plain data."""
        position, age, cached, consumed, _, rows = self._now() if at is None else at
        gradient = None if cached is None else {k: v.clone() for k, v in cached.items()}
        return {"position": position, "age": age, "consumed": consumed, "rows": rows, "gradient": gradient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        position, age, gradient = int(state["position"]), int(state["age"]), state["gradient"]
        self._position, self._age, self._consumed = position, age, int(state.get("consumed", 0))
        self.rows = float(state.get("rows", 0.0))
        self._present = None
        self._gradient = None if gradient is None else {k: v.clone() for k, v in gradient.items()}
        self._iterator = None
        self._replay.clear()

    def snapshot(self) -> Snapshot:
        """What `restore` needs to undo a step; tensors are shared, as they are never changed in place."""
        self._replay = {at: batch for at, batch in self._replay.items() if at >= self._position}
        return self._now()

    def _now(self) -> Snapshot:
        return self._position, self._age, self._gradient, self._consumed, self._present, self.rows

    def restore(self, snapshot: Snapshot) -> None:
        """Undo to the last snapshot; batches delivered since will be delivered again."""
        self._position, self._age, self._gradient, self._consumed, self._present, self.rows = snapshot

    def _compute(self, model: nn.Module, parameters: Mapping[str, Parameter], company: Company) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        rows = own = 0.0
        begun = self._position
        present: list[Any] | None = None if self.batches_per_refresh == "all" else []
        losses: list[Tensor] = []
        for batch, weight, factor in company.weighted(self._next_batches(), lambda batch: float(_rows(batch))):
            if present is not None:
                present.append(batch)
            loss, grads = self._backward(model, batch, list(parameters.values()), factor)
            losses.append(loss)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] = grad * weight if name not in total else total[name].add_(grad, alpha=weight)
            rows += weight
            own += float(_rows(batch))
        self._consumed = self._position - begun
        self.rows = own
        self._present = present
        if not total:
            raise TargetError(
                "the target's loss does not depend on any parameter that is trained; a loss of the model's output is "
                "needed; check loss_fn and which parameters require grad."
            )
        result = {}
        for name, p in parameters.items():
            result[name] = total[name].div_(rows) if name in total else torch.zeros_like(local(p))
        if not all_finite(result.values()):
            name = next(name for name, g in result.items() if not all_finite([g]))
            raise NonFiniteError(
                f"the target gradient of {name} holds NaN or infinity; no selection can be made from it; look for "
                "empty labels or bad numbers in the target batches, or a diverged model."
            )
        if not all_finite(losses):  # of no label at all the mean is NaN, and its gradient 0
            raise NonFiniteError(
                f"the target's loss is {', '.join(f'{float(loss):.3g}' for loss in losses)} for its batches, though "
                "its gradient is finite: a mean over no label is NaN; leave batches without labels out of the target."
            )
        return result

    def _backward(
        self, model: nn.Module, batch: Any, parameters: list[Parameter], factor: float
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        # A plain backward, with p.grad out of the way: autograd.grad passes by what checkpointing recomputes.
        devices = {p.device for p in parameters if p.device.type == "cuda"}
        with (
            parked_gradients({*model.parameters(), *parameters}),
            evaluating(model, checkpointing=True),
            torch.random.fork_rng(devices),
            torch.enable_grad(),
        ):
            loss = self.loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise TargetError(
                    f"the target's loss function returned {_describe(loss)}; a scalar tensor with a gradient is "
                    "needed; pass loss_fn(model, batch) that returns the mean loss, or batches with labels."
                )
            loss = loss.reshape(())
            (loss if factor == 1.0 else loss * factor).backward()
            return loss.detach(), [None if p.grad is None else local(p.grad) for p in parameters]

    def _next_batches(self) -> Iterator[Any]:
        if self.batches_per_refresh == "all":
            count = 0
            for batch in self.batches:
                count += 1
                yield batch
            if not count:
                raise self._empty()
            self._position += count
            return
        assert isinstance(self.batches_per_refresh, int)
        for _ in range(self.batches_per_refresh):
            yield self._next_batch()

    def _next_batch(self) -> Any:
        if isinstance(self.batches, Sequence):
            batch = self.batches[self._position % len(self.batches)]
        else:
            batch = self._from_iterator()
        self._position += 1
        return batch

    def _present_batches(self) -> Iterable[Any]:
        if not self._consumed:
            raise TargetError(
                "the target's loss was asked for before there was a target gradient; it is taken on the batches that "
                "made one; call gradient() first."
            )
        if self.batches_per_refresh == "all":
            return self.batches
        if self._present is None:  # resumed: they are fetched again
            end = self._position
            self._iterator = None
            self._replay.clear()
            self._position = end - self._consumed
            try:
                self._present = [self._next_batch() for _ in range(self._consumed)]
            finally:
                self._position = end
        return self._present

    def _from_iterator(self) -> Any:
        """The batch at the present position of an iterable that can only be walked."""
        if self._position not in self._replay:
            if self._iterator is None:
                self._iterator, self._iterator_at = iter(self.batches), 0
                if isinstance(self.batches, Sized) and len(self.batches):  # resuming: whole rounds need no walk
                    self._iterator_at = self._position - self._position % len(self.batches)
            while self._iterator_at <= self._position:
                self._replay[self._iterator_at] = self._walk()
                self._iterator_at += 1
        return self._replay[self._position]

    def _walk(self) -> Any:
        assert self._iterator is not None
        for batch in self._iterator:
            return batch
        again = iter(self.batches)
        if again is not self._iterator:
            self._iterator = again
            for batch in again:
                return batch
        raise self._empty()

    def _empty(self) -> TargetError:
        return TargetError(
            f"the target yields no more batches after {self._position}; it must be iterable again and again; pass a "
            "list or a DataLoader, not an exhausted generator."
        )


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """`model(**batch).loss`, the batch's tensors on the model's device."""
    if not isinstance(batch, Mapping):
        raise TargetError(
            f"a target batch is a {type(batch).__name__}; without loss_fn it must be a mapping for model(**batch); "
            "pass loss_fn(model, batch)."
        )
    device = next(model.parameters()).device
    output = model(
        **{key: tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, v) for key, v in batch.items()}
    )
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise TargetError(
            "model(**batch) has no loss for a target batch; give it labels, or pass loss_fn(model, batch)."
        )
    result: Tensor = loss
    return result


def _rows(batch: Any) -> int:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    return 1


def _describe(loss: Any) -> str:
    if isinstance(loss, Tensor):
        return f"a tensor of shape {tuple(loss.shape)}{'' if loss.requires_grad else ' without gradient'}"
    return f"a {type(loss).__name__}"
