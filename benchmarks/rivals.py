"""Two other ways to the same step, written for `selection_cost.py`: per-sample gradients by vmap, and ghost products.

    python benchmarks/rivals.py        # checks both against ftw on a small model, prints the errors

`Vmap` forms every candidate's gradient with `torch.func.vmap(grad)`, K and b under Adam's update scale from them, and
adds up the weighted ones: what one writes without a library, exact for any geometry, n times the parameters' memory.

`Ghost` is the two-pass scheme of GREATS (Wang et al., NeurIPS 2024) and GhostSuite: a first pass records each layer's
input and output gradient and forms inner products of *raw* gradients from T x T matrices, without any gradient being
written out; target samples ride along as further rows of that pass. Then candidates are chosen, and a second forward
and backward of those makes the gradient. Adam's scale is out of its reach: `<c_i, M c_j>` does not factor into T x T
products. With `mixed=True` a parameter's gradients are written out where that is fewer operations, layer by layer.

Both use the policy (filter, solver, bounds) of the selector that they are compared with, so that only the
way to K, b and the gradient differs. The loss is the token mean of a causal language model, rows of equal length.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _models import PRESETS, build, shape_of, token_numbers
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.assembly import Measurement
from ftw.decision import Policy
from ftw.gradients import Recorder
from ftw.optim_state import Scalar

GHOST_ELEMENTS = 1 << 27
"""Bound on the numbers in one T x T product: half a gigabyte in float32."""


class Numbers(NamedTuple):
    """The small problem."""

    gram: Tensor  # (n, n) float64, CPU
    alignment: Tensor  # (n,) float64, CPU


@dataclass
class Task:
    """What a step works on, the same for every method."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    pool: Tensor  # (n, T) token numbers
    target: Tensor  # (m, T)
    policy: Policy
    target_gradient: bool = True  # form the target's gradient in every step, or use that of the first
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def parameters(self) -> dict[str, Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def row_losses(self, ids: Tensor, forward: Callable[..., Any] | None = None) -> Tensor:  # (rows,)
        """Each row's loss, summed over its tokens."""
        with self.autocast():
            logits = (forward or self.model)(input_ids=ids, use_cache=False).logits[:, :-1]
            return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    def tokens(self, ids: Tensor) -> int:
        """What the loss of these rows is divided by."""
        return len(ids) * (ids.shape[1] - 1)

    def gradient_of_target(self) -> dict[str, Tensor]:
        with self.autocast():
            loss: Tensor = self.model(input_ids=self.target, labels=self.target, use_cache=False).loss
        parameters = self.parameters
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    def decide(self, numbers: Numbers) -> Tensor:  # (n,) float64
        """Weights by the selector's own filter and solver."""
        n = len(numbers.alignment)
        measurement = Measurement(n, "curvature", torch.device("cpu"))
        measurement.true.gram, measurement.true.alignment = numbers.gram, numbers.alignment
        mass = torch.ones(n, dtype=torch.float64)
        return self.policy.decide(measurement, "curvature", mass, torch.Generator().manual_seed(0)).weights

    def finish(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Vmap:
    """Per-sample gradients by `torch.func.vmap(grad)`, written out, `chunk` candidates at a time.

    Activation checkpointing is off in here: `torch.func` cannot transform it. "eager" attention is what vmap has
    batching rules for on every device; with "sdpa" torch falls back to a loop where one is missing.
    """

    def __init__(self, task: Task, *, chunk: int = 4, attention: str = "eager", geometry: str = "adam") -> None:
        self.task = task
        self.chunk = chunk
        self.attention = attention
        self.geometry = geometry
        self._target: dict[str, Tensor] | None = None

    @contextmanager
    def around(self) -> Iterator[None]:
        """The model as vmap can take it; entered outside the clock."""
        model: Any = self.task.model
        attention = model.config._attn_implementation
        checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        model.set_attn_implementation(self.attention)
        for module in checkpointed:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            model.set_attn_implementation(attention)
            for module in checkpointed:
                module.gradient_checkpointing = True

    def step(self) -> int:
        """A whole step; how many candidates it was made of."""
        rows = self.per_sample()
        weights = self.task.decide(self.numbers(rows))
        for name, p in self.task.parameters.items():
            p.grad = torch.tensordot(weights.to(p.device, p.dtype), rows.pop(name), dims=1)
        self.task.finish()
        return len(weights.nonzero())

    def per_sample(self) -> dict[str, Tensor]:  # name -> (n, *shape)
        task, pool = self.task, self.task.pool
        parameters = {name: p.detach() for name, p in task.parameters.items()}
        rest = {name: p.detach() for name, p in task.model.named_parameters() if not p.requires_grad}
        rest |= dict(task.model.named_buffers())
        total = task.tokens(pool)

        def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:  # ids (T,)
            def forward(**inputs: Any) -> Any:
                return torch.func.functional_call(task.model, {**parameters, **rest}, (), inputs)

            return task.row_losses(ids[None], forward)[0] / total

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
        result = {name: p.new_empty(len(pool), *p.shape) for name, p in parameters.items()}
        for first in range(0, len(pool), self.chunk):
            part = each(parameters, pool[first : first + self.chunk])
            for name in result:
                result[name][first : first + self.chunk] = part.pop(name)
        return result

    def numbers(self, rows: dict[str, Tensor]) -> Numbers:
        if self.task.target_gradient or self._target is None:
            self._target = self.task.gradient_of_target()
        n, device = len(self.task.pool), self.task.pool.device
        gram = torch.zeros(n, n, dtype=torch.float64, device=device)
        alignment = torch.zeros(n, dtype=torch.float64, device=device)
        for name, p in self.task.parameters.items():
            scaled, g = rows[name].flatten(1), self._target[name].flatten()
            if self.geometry == "adam":
                root = self._scale(p, rows[name].sum(0)).sqrt_().flatten().to(scaled.dtype)
                scaled, g = scaled * root, g * root
            gram += (scaled @ scaled.T).double()
            alignment += (scaled @ g).double()
        return Numbers(gram.cpu(), alignment.cpu())

    def _scale(self, p: Parameter, reference: Tensor) -> Tensor:
        """M of the coming AdamW step, v_hat after a step with the pool's gradient (DESIGN, section 2)."""
        group = next(g for g in self.task.optimizer.param_groups if any(q is p for q in g["params"]))
        state, (beta1, beta2) = self.task.optimizer.state.get(p, {}), group["betas"]
        t = float(state.get("step", 0)) + 1
        second = (1 - beta2) * reference.float().square()
        if "exp_avg_sq" in state:
            second += beta2 * state["exp_avg_sq"]
        second /= 1 - beta2**t
        return group["lr"] * (1 - beta1) / (1 - beta1**t) / (second.sqrt_() + group["eps"])


class Ghost:
    """Two passes: T x T products of raw gradients in the first, the chosen rows again in the second.

    Linear layers, embeddings and RMSNorms of any library; a weight that several layers share is treated as one whose
    tokens are those of all of them. Weight gradients are not formed in the first pass. A layer's factors are dropped
    once its products are, except those of a shared weight, and activation checkpointing stays on.

    Args:
        mixed: write gradients out where it is fewer operations than T x T products.
    """

    def __init__(self, task: Task, *, mixed: bool = False) -> None:
        self.task = task
        self.mixed = mixed
        self._target: dict[str, Tensor] | None = None
        self._alone = {id(p): Products(p, mixed) for p in task.parameters.values()}
        self._uses = Counter(id(p) for module in task.model.modules() for p in own_parameters(module))

    def around(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self) -> int:
        """A whole step; how many candidates it was made of."""
        task = self.task
        weights = task.decide(self.numbers())
        chosen = weights.nonzero().flatten()
        if len(chosen):
            ids = task.pool[chosen.to(task.pool.device)]
            losses = task.row_losses(ids)
            (losses @ weights[chosen].to(losses) / task.tokens(task.pool)).backward()
        task.finish()
        return len(chosen)

    def numbers(self) -> Numbers:
        task, n = self.task, len(self.task.pool)
        along = None
        if not task.target_gradient:
            if self._target is None:
                self._target = task.gradient_of_target()
            along = {id(p): self._target[name] for name, p in task.parameters.items()}
        ids = task.pool if along is not None else torch.cat([task.pool, task.target])
        inner = torch.zeros(n, len(ids), dtype=torch.float64, device=ids.device)
        alignment = torch.zeros(n, dtype=torch.float64, device=ids.device)

        def note(p: Parameter, call: Call) -> None:
            products = self._alone[id(p)]
            products.calls.append(call)
            if len(products.calls) < self._uses[id(p)]:
                return
            inner.add_(products.inner(n))
            if along is not None:
                alignment.add_(products.along(along[id(p)]))
            products.calls.clear()

        anchor = torch.zeros((), requires_grad=True, device=ids.device)
        handles = [
            module.register_forward_hook(partial(tap, anchor, note))
            for module in task.model.modules()
            if own_parameters(module)
        ]
        try:
            losses = task.row_losses(ids)
            loss = losses[:n].sum() / task.tokens(task.pool)
            if along is None:
                loss = loss + losses[n:].sum() / task.tokens(task.target)
            torch.autograd.grad(loss, anchor)  # to the taps only: no weight's gradient is formed
        finally:
            for handle in handles:
                handle.remove()
        if along is None:
            alignment = inner[:, n:].sum(1)
        return Numbers(inner[:, :n].cpu(), alignment.cpu())


class Call(NamedTuple):
    """Factors of one call of a layer: c_i = sum_t left[i, t] right[i, t]'; or the gradients of a vector."""

    left: Tensor | None  # (N, T, rows), or (N, T) integers: the row of a table; None: right is (N, d), written out
    right: Tensor  # (N, T, columns)


class Products:
    """Inner products of candidates in one parameter."""

    def __init__(self, parameter: Parameter, mixed: bool) -> None:
        self.parameter = parameter
        self.mixed = mixed
        self.calls: list[Call] = []

    def inner(self, n: int) -> Tensor:  # (n, N) float64
        """Of the first n rows with all."""
        if self.calls[0].left is None:
            values = sum((call.right for call in self.calls[1:]), self.calls[0].right)
            return (values[:n] @ values.T).double()
        self._unify()
        rows, columns = self.parameter.shape
        N, T = self.calls[0].right.shape[:2]
        pairs = len(self.calls) * (len(self.calls) + 1) / 2
        ghost = pairs * N * n / 2 * T * T * (rows + columns)
        written = len(self.calls) * N * T * rows * columns + n * N * rows * columns
        if self.mixed and written < ghost:
            return self._written(n)
        total = self.calls[0].right.new_zeros(n, N, dtype=torch.float64)
        for at, first in enumerate(self.calls):
            total += _ghost(first, first, n, symmetric=True)
            for second in self.calls[at + 1 :]:
                total += _ghost(first, second, n)
                total += _ghost(second, first, n)
        return total

    def _unify(self) -> None:
        """Under autocast the layers that share a weight may differ in precision; the lowest serves them all."""
        dtype = min((call.right.dtype for call in self.calls), key=lambda dtype: dtype.itemsize)
        self.calls = [
            Call(left.to(dtype) if left is not None and left.is_floating_point() else left, right.to(dtype))
            for left, right in self.calls
        ]

    def along(self, g: Tensor) -> Tensor:  # (N,) float64
        """With one gradient."""
        total: Tensor | None = None
        for left, right in self.calls:
            if left is None:
                part = right @ g.to(right.dtype)
            elif left.dim() == 2:
                part = (F.embedding(left, g).to(right.dtype) * right).flatten(1).sum(1)
            else:
                part = ((right @ g.to(right.dtype).T) * left).flatten(1).sum(1)
            total = part.double() if total is None else total + part.double()
        assert total is not None
        return total

    def _written(self, n: int) -> Tensor:
        """By gradients written out, some rows of the parameter at a time."""
        rows, columns = self.parameter.shape
        N = len(self.calls[0].right)
        step = max(1, GHOST_ELEMENTS // (4 * N * columns))
        total = self.calls[0].right.new_zeros(n, N, dtype=torch.float64)
        for first in range(0, rows, step):
            size = min(step, rows - first)
            values = self.calls[0].right.new_zeros(N, size, columns)
            for left, right in self.calls:
                assert left is not None
                if left.dim() == 3:
                    values += left[:, :, first : first + size].transpose(1, 2) @ right
                    continue
                inside = (left >= first) & (left < first + size)
                at = (left - first).clamp(0, size - 1) + size * torch.arange(N, device=left.device)[:, None]
                values.view(-1, columns).index_add_(0, at.flatten(), (right * inside[:, :, None]).flatten(0, 1))
            flat = values.flatten(1)
            total += (flat[:n] @ flat.T).double()
        return total


def _ghost(first: Call, second: Call, n: int, *, symmetric: bool = False) -> Tensor:  # (n, N) float64
    """`sum_ts <left_i[t], left_j[s]> <right_i[t], right_j[s]>` for i among the first n rows and all j."""
    assert first.left is not None
    assert second.left is not None
    N, T = first.right.shape[:2]
    total = first.right.new_zeros(n, N, dtype=torch.float64)
    step = max(1, GHOST_ELEMENTS // (T * T))
    for i in range(n):
        for j in range(i if symmetric else 0, N, step):
            others = slice(j, min(j + step, N))
            rights = first.right[i] @ second.right[others].flatten(0, 1).T  # (T, others * T)
            lefts = _lefts(first.left[i], second.left[others].flatten(0, 1))
            product = rights.float().mul_(lefts) if rights.dtype != torch.float64 else rights * lefts
            total[i, others] = product.view(T, -1, T).sum((0, 2)).double()
    if symmetric:
        square = total[:, :n]
        total[:, :n] = square + square.triu(1).T
    return total


def _lefts(mine: Tensor, others: Tensor) -> Tensor:  # (T, N T)
    """Inner products of left factors; a row number stands for the unit vector."""
    if mine.dtype == torch.long and others.dtype == torch.long:
        return mine[:, None] == others
    if mine.dtype == torch.long:
        return others.T[mine]
    if others.dtype == torch.long:
        return mine[:, others]
    return mine @ others.T


class _Tap(torch.autograd.Function):
    """The identity; its backward sees the layer's input and the gradient of its output."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, note: Callable[[Tensor, Tensor], None]
    ) -> Any:
        ctx.save_for_backward(inputs)
        ctx.note = note
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (inputs,) = ctx.saved_tensors
        ctx.note(inputs, gradient)
        return gradient, gradient.new_zeros((), dtype=torch.float32), None, None


def tap(
    anchor: Tensor, note: Callable[[Parameter, Call], None], module: nn.Module, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    """A forward hook: factors of the layer's trainable parameters go to `note` in the backward."""

    def take(given: Tensor, gradient: Tensor) -> None:
        for p in own_parameters(module):
            note(p, factors(module, p, given, gradient))

    result: Tensor = _Tap.apply(output, anchor, inputs[0].detach(), take)
    return result


def factors(module: nn.Module, p: Parameter, given: Tensor, gradient: Tensor) -> Call:
    if isinstance(module, nn.Linear):
        if p is module.weight:
            return Call(gradient, given.to(gradient.dtype))
        return Call(None, gradient.flatten(1, -2).sum(1))
    if isinstance(module, nn.Embedding):
        return Call(given, gradient)
    if type(module).__name__.endswith("RMSNorm"):
        norm: Any = module
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        normal = given.float() * torch.rsqrt(given.float().square().mean(-1, keepdim=True) + eps)
        return Call(None, (normal * gradient).flatten(1, -2).sum(1))
    raise NotImplementedError(f"{type(module).__name__} has no ghost products here")


def own_parameters(module: nn.Module) -> list[Parameter]:
    return [p for p in module._parameters.values() if p is not None and p.requires_grad]


def check(task: Task, bound: float = 1e-4) -> dict[str, float]:
    """Relative differences of K, b and the weighted gradient from ftw's, in the geometry of plain gradients.

    Raises:
        AssertionError: one exceeds the bound.
    """
    parameters = task.parameters
    recorder = Recorder(task.model, check=False)
    with recorder.record():
        task.model(input_ids=task.pool, labels=task.pool, use_cache=False).loss.backward()
    contributions = recorder.contributions()
    target = task.gradient_of_target()
    expected = Numbers(
        contributions.gram({p: Scalar(1.0) for p in contributions.parameters}),
        contributions.alignment({p: target[name] for name, p in parameters.items()}),
    )
    weights = torch.arange(len(task.pool), dtype=torch.float64) % 3
    combined = contributions.combine(weights)
    recorder.close()
    differences: dict[str, float] = {}

    def differ(what: str, found: Tensor, reference: Tensor) -> None:
        differences[what] = float((found.double() - reference.double()).norm() / reference.double().norm())

    vmap = Vmap(task, chunk=2, geometry="identity")
    with vmap.around():
        rows = vmap.per_sample()
        found = vmap.numbers(rows)
    differ("vmap K", found.gram, expected.gram)
    differ("vmap b", found.alignment, expected.alignment)
    gradient = [torch.tensordot(weights.to(rows[name]), rows[name], dims=1).flatten() for name in parameters]
    differ("vmap gradient", torch.cat(gradient), torch.cat([combined[p].flatten() for p in parameters.values()]))
    kept = task.target_gradient
    for mixed in (False, True):
        for task.target_gradient in (True, False):
            found = Ghost(task, mixed=mixed).numbers()
            name = f"ghost{', mixed' if mixed else ''}{'' if task.target_gradient else ', cached target'}"
            differ(f"{name} K", found.gram, expected.gram)
            differ(f"{name} b", found.alignment, expected.alignment)
    task.target_gradient = kept
    chosen = weights.nonzero().flatten()
    losses = task.row_losses(task.pool[chosen.to(task.pool.device)])
    loss = losses @ weights[chosen].to(losses) / task.tokens(task.pool)
    second = torch.autograd.grad(loss, list(parameters.values()))
    flat = torch.cat([g.flatten() for g in second])
    differ("ghost second pass", flat, torch.cat([combined[p].flatten() for p in parameters.values()]))
    wrong = {name: value for name, value in differences.items() if not value < bound}
    assert not wrong, f"further from ftw than {bound}: {wrong}"
    return differences


def check_adam(task: Task, bound: float = 1e-3) -> dict[str, float]:
    """The same for Adam's geometry, which vmap alone has: b against the selector's own."""
    import ftw

    batch = {"input_ids": task.target, "labels": task.target}
    selector = ftw.Selector(task.model, task.optimizer, target=[batch], budget=2, warmup=0)
    with selector.record():
        task.model(input_ids=task.pool, labels=task.pool, use_cache=False).loss.backward()
    selection = selector.select()
    selector.close()
    vmap = Vmap(task, chunk=2)
    with vmap.around():
        found = vmap.numbers(vmap.per_sample())
    expected = selection.diagnostics["alignment"]
    error = float((found.alignment - expected).norm() / expected.norm())
    assert error < bound, f"vmap's alignment under AdamW is {error} from the selector's"
    assert torch.equal(vmap.task.decide(found).nonzero(), selection.weights.nonzero()), "the same candidates are chosen"
    return {"vmap b under AdamW": error}


def agreement(
    preset: str, lora: bool, device: str = "cpu", *, checkpointing: bool = False
) -> dict[str, float]:  # what -> relative difference
    """`check` and `check_adam` on a shrunk model whose optimizer has a history."""
    import ftw

    shape = shape_of(preset, shrink=True)
    model = build(shape, 16, lora, device=device, checkpointing=checkpointing)
    ids = token_numbers(9, 16, shape["vocab_size"]).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    selector = ftw.Selector(model, optimizer, target=[{"input_ids": ids, "labels": ids}], budget=2)
    selector.close()
    task = Task(model, optimizer, ids[:6], ids[6:], selector.policy)
    for step in range(3):  # after which LoRA's B is no longer zero
        task.row_losses(ids[step : step + 3]).mean().backward()
        task.finish()
    return check(task) | check_adam(task)


def main() -> None:
    begun = time.perf_counter()
    for preset in PRESETS:
        for lora in (False, True):
            differences = agreement(preset, lora)
            print(f"{preset} (shrunk), {'lora' if lora else 'full'}: furthest from ftw {max(differences.values()):.1e}")
            for name, value in differences.items():
                print(f"    {name:<32} {value:.1e}")
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
