"""How exact the engine is, in float64: the largest relative errors against naive references.

    python benchmarks/exactness.py

The same comparisons are tests, with bounds; here are the figures. Errors are relative to the reference's norm,
the largest over parameters (contributions, gradients) or steps.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ftw
from ftw.gradients import Auto, Factorized, Full, Recorder
from tests.models import batch_of, label_tokens, lora_llama, tiny_llama, token_mean


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def weighted_gradients(model: nn.Module, batch: dict[str, Tensor], weights: Tensor) -> list[Tensor]:
    """Each candidate's own backward, weighted and summed: the explicit second pass."""
    total, loss = label_tokens(batch).sum(), torch.zeros((), dtype=torch.float64)
    for i in weights.nonzero().flatten().tolist():
        alone = {k: v[i : i + 1] for k, v in batch.items()}
        loss = loss + weights[i] * token_mean(model, alone) * label_tokens(alone).sum() / total
    return list(torch.autograd.grad(loss, trainable(model)))


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    # Key biases have no gradient but rounding: errors are measured against 1e-3 of the largest norm at least.
    floor = 1e-3 * max(float(e.norm()) for e in expected)
    return max(float((f - e).norm()) / max(float(e.norm()), floor) for f, e in zip(found, expected, strict=True))


def contributions(model: nn.Module, name: str) -> None:
    batch, params = batch_of(6), trainable(model)
    singles = [weighted_gradients(model, batch, torch.eye(6, dtype=torch.float64)[i]) for i in range(6)]
    expected = [torch.stack([s[j] for s in singles]) for j in range(len(params))]
    for extractor in (Full(), Factorized(), Auto()):
        recorder = Recorder(model, extractor=extractor)
        with recorder.record():
            token_mean(model, batch).backward()
        found = [recorder.contributions().per_candidate(p) for p in params]
        print(f"contributions, {name}, {type(extractor).__name__.lower()}: {worst(found, expected):.1e}")
        recorder.close()


def steps(model: nn.Module, name: str) -> None:
    params = trainable(model)
    optimizer = torch.optim.AdamW(params, lr=0.01)
    selector = ftw.Selector(model, optimizer, target=[batch_of(3, seed=9)], loss_fn=token_mean, budget=3)
    gradient, displacement = 0.0, 0.0
    for step in range(12):
        batch = batch_of(8, seed=step)
        with selector.record(mass=label_tokens(batch)):
            token_mean(model, batch).backward()
        selection = selector.apply()
        used = [p.grad.clone() for p in params if p.grad is not None]
        gradient = max(gradient, worst(used, weighted_gradients(model, batch, selection.weights)))
        reference = dict(zip(params, used, strict=True))
        predicted = (
            ftw.optim_state.preconditioner_for(optimizer).linearise(optimizer, reference).displacement(reference)
        )
        before = [p.detach().clone() for p in params]
        optimizer.step()
        optimizer.zero_grad()
        real = [p.detach() - b for p, b in zip(params, before, strict=True)]
        displacement = max(displacement, worst([predicted[p] for p in params], real))
    selector.close()
    print(f"apply() against a weighted second backward, {name}, 12 steps: {gradient:.1e}")
    print(f"affine update against the AdamW step, {name}, 12 steps: {displacement:.1e}")


def plain(model: nn.Module, name: str) -> None:
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(trainable(m), lr=0.01) for m in (model, twin)]
    selector = ftw.Selector(
        model, optimizers[0], target=[batch_of(3)], loss_fn=token_mean, budget=1.0, filter="all", solver="uniform"
    )
    for step in range(12):
        batch = batch_of(8, seed=step)
        with selector.record(mass=label_tokens(batch)):
            token_mean(model, batch).backward()
        selector.apply()
        token_mean(twin, batch).backward()
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            nn.utils.clip_grad_norm_(trainable(m), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    found, expected = ([p.detach() for p in trainable(m)] for m in (model, twin))
    same = all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    error = f"{worst(found, expected):.1e}{', bitwise' if same else ''}"
    print(f"weights = 1 against plain training, {name}, 12 steps: {error}")


def scale() -> None:
    seen = []
    for factor in (1.0, 65536.0):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = ftw.Selector(model, optimizer, target=[batch_of(3)], loss_fn=token_mean, budget=3)
        with selector.record():
            (factor * token_mean(model, batch_of(8))).backward()
        seen.append(selector.select().weights)
    print(f"loss times 65536 changes weights by {float((seen[0] - seen[1]).abs().max()):.1e}")


def main() -> None:
    torch.set_num_threads(1)
    for name, make in (
        ("llama", tiny_llama),
        ("tied llama", lambda: tiny_llama(tied=True)),
        ("lora llama", lora_llama),
    ):
        contributions(make(), name)
        steps(make(), name)
        plain(make(), name)
    scale()


if __name__ == "__main__":
    main()
