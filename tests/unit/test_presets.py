"""Each preset against a few independent lines of its source's formula, on per-sample gradients from a loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ftw
from ftw import registry
from ftw.errors import ConfigurationError
from ftw.presets import PRESETS, preset
from tests.models import MLP, tiny_llama

N, K, LR, EPS, BETA1, BETA2, STEPS = 10, 4, 0.02, 1e-8, 0.9, 0.999, 3
Vector = np.ndarray[Any, np.dtype[np.float64]]


def data(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = (model(x) - 1.0).square().mean()
    return result


class Case(NamedTuple):
    """What a formula sees: gradients of single samples' losses over n, g, and AdamW's moments, all flat."""

    c: Vector  # (n, P)
    g: Vector  # (P,)
    m: Vector
    v: Vector
    losses: Vector  # (n,)

    @property
    def scale(self) -> Vector:
        """M of the coming AdamW step, its second moment predicted from the pool, as the paper of Adam writes it."""
        t = STEPS + 1
        v_hat = (BETA2 * self.v + (1 - BETA2) * self.c.sum(0) ** 2) / (1 - BETA2**t)
        scale: Vector = LR * (1 - BETA1) / (1 - BETA1**t) / (np.sqrt(v_hat) + EPS)
        return scale


def flat(tensors: Any) -> Vector:
    result: Vector = torch.cat([t.detach().flatten() for t in tensors]).numpy()
    return result


def case(name: str) -> tuple[Case, ftw.Selection]:
    """Per-sample gradients and moments after a few steps, and what the selector makes of them."""
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, eps=EPS)
    for step in range(STEPS):
        loss_of(model, data(N, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    pool, target = data(N, 50), data(5, 51) + 0.5
    params = list(model.parameters())
    losses = (model(pool) - 1.0).square().mean(-1)
    c = np.stack([flat(torch.autograd.grad(loss / N, params, retain_graph=True)) for loss in losses])
    g = flat(torch.autograd.grad(loss_of(model, target), params))
    states = [optimizer.state[p] for p in params]
    made = Case(
        c, g, flat(s["exp_avg"] for s in states), flat(s["exp_avg_sq"] for s in states), losses.detach().numpy()
    )
    selector = ftw.Selector(model, optimizer, target=[target], loss_fn=loss_of, budget=K, preset=name, warmup=0)
    extras = {
        "loss": losses.detach(),
        "reference_loss": losses.detach().flip(0) / 2,
        "loss_with_prompt": losses.detach() / 3,
        "loss_without_prompt": losses.detach().flip(0),
    }
    with selector.record(extras=extras):
        loss_of(model, pool).backward()
    return made, selector.apply()


def best(score: Vector, k: int = K) -> list[int]:
    return sorted(int(i) for i in np.argsort(-score, kind="stable")[:k])


def hard_filter(x: Case) -> list[int]:
    b = x.c @ (x.scale * x.g)
    return [i for i in best(b) if b[i] > 0]


def greats(x: Case) -> list[int]:
    grads = x.c * N  # of single samples
    chosen: list[int] = []
    for _ in range(K):
        gain = LR * grads @ x.g - LR**2 * sum((grads @ grads[j] for j in chosen), np.zeros(N))
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))
    return sorted(chosen)


def less_online(x: Case) -> list[int]:
    b = x.c @ (x.scale * x.g)
    return best(b / np.sqrt((x.c**2 * x.scale).sum(1)))


def in_run_shapley(x: Case) -> list[int]:
    """By enumeration: the mean of marginal utilities over all orders, without replacement of the formula by itself."""
    b, gram = LR * x.c @ x.g, LR * x.c @ x.c.T

    def utility(members: tuple[int, ...]) -> float:
        index = list(members)
        return float(b[index].sum() - gram[np.ix_(index, index)].sum() / 2)

    value = np.zeros(N)
    for i in range(N):
        others = [j for j in range(N) if j != i]
        for size in range(N):
            marginal = [utility((*s, i)) - utility(s) for s in itertools.combinations(others, size)]
            value[i] += np.mean(marginal) / N
    return best(value)


def grad_match(x: Case) -> list[int]:
    return omp(np.sqrt(LR) * x.c, np.sqrt(LR) * x.g, K)


def omp(c: Vector, g: Vector, k: int) -> list[int]:
    """Matching pursuit by the largest residual, non-negative ridge refit by enumeration of supports."""
    rho = 0.5 * float((c**2).sum(1).mean())
    chosen: list[int] = []
    residual = g
    while len(chosen) < k:
        score = c @ residual
        score[chosen] = -np.inf
        if score.max() <= 1e-4 * np.abs(c @ g).max():
            break
        chosen.append(int(score.argmax()))
        w = non_negative_ridge(c[chosen], g, rho)
        residual = g - w @ c[chosen]
    return sorted(chosen)


def non_negative_ridge(c: Vector, g: Vector, rho: float) -> Vector:
    m = len(c)
    found, lowest = np.zeros(m), np.inf
    for size in range(m + 1):
        for support in itertools.combinations(range(m), size):
            index = list(support)
            w = np.zeros(m)
            if index:
                w[index] = np.linalg.solve(c[index] @ c[index].T + rho * np.eye(size), c[index] @ g)
            error = float(((w @ c - g) ** 2).sum() + rho * (w**2).sum())
            if (w >= 0).all() and error < lowest:
                found, lowest = w, error
    return found


def opus(x: Case) -> list[int]:
    """Draws of exp(U / tau), U = b - s sum_S K: by the Gumbel trick, on the generator of the selector's seed 0."""
    gram, b = matching(x.c, x.g, x.scale)
    top = np.argsort(-b)[:K]
    s = max(b[top].sum() / gram[np.ix_(top, top)].sum(), 0.0)
    generator = torch.Generator().manual_seed(0)
    chosen: list[int] = []
    for _ in range(K):
        uniform = torch.rand(N, generator=generator, dtype=torch.float64).numpy()
        drawn = (b - s * gram[chosen].sum(0)) / (0.9 * b.std()) - np.log(-np.log(1 - uniform))
        drawn[chosen] = -np.inf
        chosen.append(int(drawn.argmax()))
    return sorted(chosen)


def at_random(x: Case) -> list[int]:
    return sorted(torch.randperm(N, generator=torch.Generator().manual_seed(0))[:K].tolist())


def tagcos(x: Case) -> list[int]:
    """Ward's clusters by the definition: of all pairs, the one whose union adds least to the squared distances."""
    c = x.c * np.sqrt(x.scale)
    clusters = [[i] for i in range(N)]

    def spread(members: list[int]) -> float:
        return float(((c[members] - c[members].mean(0)) ** 2).sum())

    while len(clusters) > int(np.ceil(np.sqrt(K))):
        pairs = itertools.combinations(clusters, 2)
        one, other = min(pairs, key=lambda pair: spread(pair[0] + pair[1]) - spread(pair[0]) - spread(pair[1]))
        clusters = [each for each in clusters if each not in (one, other)] + [one + other]
    exact = [K * len(each) / N for each in clusters]
    shares = [int(each) for each in exact]
    for i in sorted(range(len(clusters)), key=lambda i: shares[i] - exact[i])[: K - sum(shares)]:
        shares[i] += 1
    chosen = []
    for members, share in zip(clusters, shares, strict=True):
        chosen += [members[i] for i in omp(c[members], c[members].mean(0), share)]
    return sorted(chosen)


def craig(x: Case) -> list[int]:
    distance = np.linalg.norm(x.c[:, None] - x.c[None], axis=-1)
    chosen: list[int] = []
    for _ in range(K):
        cost = np.array([distance[:, [*chosen, j]].min(1).sum() if j not in chosen else np.inf for j in range(N)])
        # Of two that are nearest to each other either costs the same: the first, whatever rounding says.
        chosen.append(int(np.flatnonzero(cost <= cost.min() * (1 + 1e-12))[0]))
    return sorted(chosen)


def ifd(x: Case) -> list[int]:
    ratio = (x.losses / 3) / x.losses[::-1]
    ratio[ratio > 1] = -np.inf
    return [i for i in best(ratio) if ratio[i] > -np.inf]


FORMULAS: dict[str, Callable[[Case], list[int]]] = {
    "hard_filter": hard_filter,
    "adam_topk": lambda x: best(x.c @ (x.scale * x.g)),
    "vanilla_topk": lambda x: best(x.c @ x.g),
    "full": lambda x: list(range(N)),
    "greats": greats,
    "grad_match": grad_match,
    "less_online": less_online,
    "in_run_shapley": in_run_shapley,
    "craig": craig,
    "tagcos": tagcos,
    "opus": opus,
    "random": at_random,
    "max_loss": lambda x: best(x.losses),
    "grad_norm": lambda x: best(np.linalg.norm(x.c, axis=1)),
    "rho_loss": lambda x: best(x.losses - x.losses[::-1] / 2),
    "ifd": ifd,
}
WEIGHED = ("ours", "vanilla_reweight", "unbounded", "grad_match")


@pytest.mark.parametrize("name", FORMULAS)
def test_the_choice_is_that_of_the_formula(name: str) -> None:
    x, selection = case(name)
    expected = FORMULAS[name](x)
    assert selection.diagnostics["geometry"] == PRESETS[name].geometry
    if name in WEIGHED:  # weights may fall to 0 among the chosen
        assert set(selection.indices.tolist()) <= set(expected)
    else:
        assert selection.indices.tolist() == expected
        weights = selection.weights[expected]
        torch.testing.assert_close(weights, torch.full_like(weights, N / len(expected)))


def matching(c: Vector, g: Vector, scale: Vector) -> tuple[Vector, Vector]:
    return c @ (scale[:, None] * c.T), c @ (scale * g)


def pursuit(gram: Vector, b: Vector) -> list[int]:
    """Greedy: the largest fall of the objective with a candidate alone, weights refitted by enumeration."""
    root = np.linalg.cholesky(gram + 1e-14 * np.trace(gram) * np.eye(N))  # c with c c' = K
    g = np.linalg.solve(root, b)
    chosen: list[int] = []
    w = np.zeros(0)
    while len(chosen) < K:
        residual = b - gram[:, chosen] @ w
        gain = np.where(residual > 1e-12, residual**2 / np.diagonal(gram), -np.inf)
        gain[chosen] = -np.inf
        if not np.isfinite(gain.max()):
            break
        chosen.append(int(gain.argmax()))
        w = non_negative_ridge(root[chosen], g, 0.0)
        chosen, w = [i for i, each in zip(chosen, w, strict=True) if each > 0], w[w > 0]
    return chosen


@pytest.mark.parametrize("name", ["ours", "vanilla_reweight", "unbounded", "grad_match"])
def test_weights_are_those_of_the_formula(name: str) -> None:
    x, selection = case(name)
    scale = np.full_like(x.g, LR) if PRESETS[name].geometry == "vanilla" else x.scale
    gram, b = matching(x.c, x.g, scale)
    if name in ("ours", "unbounded"):
        chosen = sorted(pursuit(gram, b))
    else:
        chosen = best(b) if name == "vanilla_reweight" else grad_match(x)
    block, right = gram[np.ix_(chosen, chosen)], b[chosen]
    m = len(chosen)
    block = block + PRESETS[name].ridge * np.trace(block) / m * np.eye(m)
    if name == "unbounded":
        w = np.linalg.solve(block, right)
    elif name == "grad_match":
        w = enumerated(block, right, cap=np.inf)
    else:
        w = enumerated(block, right, cap=4.0)
    w *= N / w.sum()
    np.testing.assert_allclose(selection.weights[chosen].numpy(), w, rtol=1e-6, atol=1e-8)


def enumerated(gram: Vector, b: Vector, cap: float) -> Vector:
    """`min 1/2 w'Kw - b'w`, w >= 0 and w_i <= cap * mean(w): every set of active bounds is tried (four candidates)."""
    m = len(b)
    found, lowest = np.zeros(m), 0.0
    for at in itertools.product((0, 1, 2), repeat=m):  # free, at 0, at the cap
        low, high = [i for i in range(m) if at[i] == 1], [i for i in range(m) if at[i] == 2]
        if high and not cap < m:
            continue
        rows = [np.eye(m)[i] for i in low] + [np.eye(m)[i] - cap / m for i in high]
        A = np.array(rows).reshape(len(rows), m)
        system = np.block([[gram, A.T], [A, np.zeros((len(rows), len(rows)))]])
        w = np.linalg.lstsq(system, np.concatenate([b, np.zeros(len(rows))]), rcond=None)[0][:m]
        inside = (w >= -1e-9).all() and (w <= cap * w.mean() + 1e-9).all()
        value = float(w @ gram @ w / 2 - b @ w)
        if inside and value < lowest:
            found, lowest = w, value
    return found


def test_tagcos_approximates_every_cluster() -> None:
    """Two groups of gradients far apart, one three times as large: each sends its share."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    small = 0.3 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = small + torch.tensor([[10.0, 0.0]] * 6 + [[0.0, 10.0]] * 2, dtype=torch.float64)
    selector = ftw.Selector(
        model,
        optimizer,
        target=[torch.ones(1, 2, dtype=torch.float64)],
        loss_fn=loss_of,
        budget=4,
        preset="tagcos",
    )
    with selector.record():
        loss_of(model, x).backward()
    found = selector.apply().indices.tolist()
    # Of each cluster the member with the largest inner product with the cluster's mean gradient comes first.
    for members in (range(6), range(6, 8)):
        mean = x[list(members)].mean(0)
        assert max(members, key=lambda i: float(x[i] @ mean)) in found  # gradients are -x_i/4
    assert sum(i < 6 for i in found) <= 3
    assert sum(i >= 6 for i in found) <= 1


def test_token_level_scores_and_drops_tokens() -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(1, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    target = {"input_ids": ids.flip(0), "labels": ids.flip(0)}
    selector = ftw.Selector(model, optimizer, target=[target], budget=0.25, preset="token_level")
    with selector.record():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    selection = selector.apply()
    alignment = selection.diagnostics["alignment"]
    reached = [i for i in range(24) if i % 8 != 7]  # the last token of a row predicts nothing
    expected = sorted(sorted(reached, key=lambda i: -float(alignment[i]))[: round(len(reached) / 4)])
    assert selection.indices.tolist() == expected
    assert len(set(selection.weights[selection.indices].tolist())) == 1


def test_every_preset_is_pinned() -> None:
    assert set(FORMULAS) | set(WEIGHED) | {"token_level"} == set(PRESETS)


def test_the_page_says_what_each_preset_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    assert [row[0] for row in rows] == [f"`{name}`" for name in PRESETS]
    for (_, summary, parts, geometry, source), each in zip(rows, PRESETS.values(), strict=True):
        assert (summary, geometry) == (each.summary, each.geometry)
        assert f"`{each.filter}`" in parts
        assert f"`{each.solver}`" in parts
        assert source.split("; needs")[0] == each.source
        assert all(name in source for name in each.needs)


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_says_it_needs_is_what_its_filter_reads(name: str) -> None:
    each = PRESETS[name]
    made = registry.resolve("filters", each.filter, **each.filter_options)
    assert set(made.columns) - {"learning_rate"} == set(each.needs)
    assert each.source
    assert each.summary


def test_an_argument_overrides_the_preset() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"target": [data(3, 1)], "loss_fn": loss_of, "preset": "greats"}
    selector = ftw.Selector(model, optimizer, **options, filter="greedy", geometry="curvature", ridge=0.1)
    assert type(selector.policy.filter).__name__ == "Greedy"
    assert type(selector.policy.solver).__name__ == "Uniform"
    assert selector.geometry == "curvature"
    assert selector.policy.ridge == 0.1


def test_unknown_preset() -> None:
    with pytest.raises(ConfigurationError, match="unknown preset 'great'; did you mean 'greats'"):
        preset("great")
