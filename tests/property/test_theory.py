"""The statements of docs/theory.md, in its order, for steps that the selector and a real optimizer make. float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

import ftw
from ftw.optim_state import AffineUpdate, preconditioner_for
from ftw.problem import Status
from ftw.solvers.constraints import NonNegative
from tests.models import MLP
from tests.steps import Given, Loss, gradient, random, step, weights_of

Make = Callable[[list[Parameter], float], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.8, nesterov=True),
    "adam": lambda ps, lr: torch.optim.Adam(ps, lr=lr, weight_decay=0.1),
    "adamw": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, amsgrad=True),
    "nadam": lambda ps, lr: torch.optim.NAdam(ps, lr=lr),
    "radam": lambda ps, lr: torch.optim.RAdam(ps, lr=lr, weight_decay=0.1),
    "rmsprop": lambda ps, lr: torch.optim.RMSprop(ps, lr=lr, momentum=0.7, centered=True),
    "adagrad": lambda ps, lr: torch.optim.Adagrad(ps, lr=lr),
}
CANDIDATES = 6
GROUPS = {"seed": st.integers(0, 10**6), "lr": st.floats(1e-3, 0.3), "history": st.integers(0, 7)}


def losses(model: nn.Module, x: Tensor) -> Tensor:  # -> (n,)
    return (model(x) - 1.0).square().mean(1)


def target_loss(model: nn.Module, x: Tensor) -> Tensor:
    return losses(model, x + 0.5).mean()


def with_history(model: nn.Module, optimizer: Optimizer, steps: int, scale: float = 1.0) -> None:
    for seed in range(steps):
        (losses(model, random(5, 6, seed=seed)).mean() * scale).backward()
        optimizer.step()
        optimizer.zero_grad()


def select(
    model: nn.Module, optimizer: Optimizer, x: Tensor, target: Loss = target_loss, scale: float = 1.0, **options: Any
) -> ftw.Selection:
    """The selection among all of x, gradients untouched."""
    selector = ftw.Selector(
        model, optimizer, target=[x], loss_fn=target, **{"budget": 1.0, "filter": "all", "warmup": 0, **options}
    )
    with selector.record():
        (losses(model, x).mean() * scale).backward()
    selection = selector.select()
    selector.close()
    optimizer.zero_grad()
    return selection


def inner(first: dict[Parameter, Tensor], second: dict[Parameter, Tensor]) -> float:
    return sum(float((first[p] * second[p]).sum()) for p in first)


def in_p(update: AffineUpdate, vector: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
    """P times a vector."""
    return {p: update.scale[p].apply(x) / update.gain[p] for p, x in vector.items()}


# -- one step, to second order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=12, deadline=None)
@given(**GROUPS)
def test_the_drop_of_a_quadratic_loss_with_hessian_p_inverse_is_exact(
    name: str, seed: int, lr: float, history: int
) -> None:
    model = MLP(seed=seed % 7)
    optimizer = OPTIMIZERS[name](list(model.parameters()), lr)
    with_history(model, optimizer, history)
    x, weights = random(CANDIDATES, 6, seed=seed), weights_of(CANDIDATES, seed)
    used = gradient(model, losses(model, x) @ weights / CANDIDATES)
    update = preconditioner_for(optimizer).linearise(optimizer, used)
    # As far from the start as a step goes, so that neither first order nor curvature drowns in the other.
    optimum = {p: p.detach() - lr * random(*p.shape, seed=seed + 1) for p in used}

    def quadratic(model: nn.Module, x: Tensor) -> Tensor:
        away = {p: p - optimum[p] for p in used}
        bent = {p: update.gain[p] * update.scale[p].solve(away[p]) for p in used}
        return torch.stack([(away[p] * bent[p]).sum() for p in used]).sum() / 2

    before = quadratic(model, x).item()
    selection, seen = step(model, optimizer, losses, x, weights, quadratic)
    size = before + abs(selection.diagnostics["first_order"]) + selection.diagnostics["curvature"]
    assert abs(selection.predicted_drop - seen.realised_drop) <= 1e-11 * size


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), history=st.integers(0, 5), decay=st.sampled_from([0.0, 0.2]))
def test_utility_is_the_distance_of_the_gradient_that_adamw_really_applies(
    seed: int, history: int, decay: float
) -> None:
    """`U(w) = 1/2 |g|_P^2 - 1/2 |m_hat(w) - g|_P^2`, every number read from the optimizer's state after its step."""
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)
    with_history(model, optimizer, history)
    x = random(CANDIDATES, 6, seed=seed)
    g = gradient(model, target_loss(model, x))
    old = {p: p.detach().clone() for p in g}
    selection, _ = step(model, optimizer, losses, x, weights_of(CANDIDATES, seed), target_loss)
    utility = 0.0
    for p in g:
        state = optimizer.state[p]
        t = int(state["step"])
        root = (state["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8
        applied = state["exp_avg"] / (1 - 0.9**t) + decay * root * old[p]
        utility += 0.01 / 2 * float((g[p].square() / root - (applied - g[p]).square() / root).sum())
    assert selection.predicted_drop == pytest.approx(utility, rel=1e-10, abs=1e-14)


# -- match and utility -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["curvature", "update", "vanilla"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_match_measures_how_far_the_step_is_from_the_target_s_own(name: str, geometry: str) -> None:
    """`relative_residual` from two displacements, whose offset is common and cancels."""
    model = MLP()
    optimizer = OPTIMIZERS[name](list(model.parameters()), 0.01)
    with_history(model, optimizer, 3)
    x, weights = random(CANDIDATES, 6, seed=1), weights_of(CANDIDATES, 1)
    pool = gradient(model, losses(model, x).mean())
    mixed = gradient(model, losses(model, x) @ weights / CANDIDATES)
    g = gradient(model, target_loss(model, x))
    selection = select(model, optimizer, x, solver=Given(weights), geometry=geometry)
    update = preconditioner_for(optimizer).linearise(optimizer, pool)
    ours, aim = update.displacement(mixed), update.displacement(g)
    gap = {p: ours[p] - aim[p] for p in g}
    whole = {p: aim[p] + update.offset[p] for p in g}

    def length(vector: dict[Parameter, Tensor]) -> float:
        if geometry == "update":
            return inner(vector, vector) ** 0.5
        bent = {p: update.scale[p].solve(v) for p, v in vector.items()}
        return inner(bent, vector if geometry == "curvature" else bent) ** 0.5

    assert selection.diagnostics["relative_residual"] == pytest.approx(length(gap) / length(whole), rel=1e-10)


@pytest.mark.parametrize(
    ("make", "history", "same"),
    [
        pytest.param(lambda ps: torch.optim.SGD(ps, lr=0.01), 3, True, id="plain gradient descent"),
        pytest.param(lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.0), 0, True, id="Adam's first step"),
        pytest.param(lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9), 3, False, id="momentum"),
        pytest.param(lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.0), 3, False, id="Adam"),
        pytest.param(lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5), 0, False, id="decay alone"),
    ],
)
def test_match_and_utility_have_the_same_minimiser_only_without_offset(
    make: Callable[[Any], Optimizer], history: int, same: bool
) -> None:
    model = MLP()
    optimizer = make(model.parameters())
    with_history(model, optimizer, history)
    x = random(CANDIDATES, 6, seed=3)
    match, utility = (select(model, optimizer, x, objective=objective).weights for objective in ("match", "utility"))
    assert ((match - utility).abs().max() < 1e-7) == same


def test_kappa_divides_the_weights_and_a_cone_does_not_see_it() -> None:
    """Nesterov's first step has no offset, and kappa = 1 + momentum."""
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.6, nesterov=True)
    x = random(CANDIDATES, 6, seed=3)

    def weights(objective: str, **options: Any) -> Tensor:
        small: Loss = lambda model, x: target_loss(model, x) * 1e-3  # noqa: E731
        return select(model, optimizer, x, small, objective=objective, **options).weights

    torch.testing.assert_close(weights("match"), weights("utility"), rtol=1e-7, atol=1e-9)
    own = {"constraints": NonNegative(), "total": "at_most"}
    match, utility = weights("match", **own), weights("utility", **own)
    assert 0 < float(match.sum()) < CANDIDATES
    torch.testing.assert_close(match / 1.6, utility, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "trust"), [("nesterov", 10.0), ("adamw", 1.0), ("adamw", 10.0), ("rmsprop", 1.0), ("rmsprop", 10.0)]
)
def test_utility_is_match_against_an_extrapolated_target(name: str, trust: float) -> None:
    """`g* = (trust g - P^-1 o) / kappa`."""
    model = MLP()
    optimizer = OPTIMIZERS[name](list(model.parameters()), 0.01)
    with_history(model, optimizer, 4)
    x = random(CANDIDATES, 6, seed=3)
    g = gradient(model, target_loss(model, x))
    update = preconditioner_for(optimizer).linearise(optimizer, gradient(model, losses(model, x).mean()))
    aim = {p: trust * g[p] / update.gain[p] - update.scale[p].solve(update.offset[p]) for p in g}

    def linear(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([(p * aim[p]).sum() for p in g]).sum()

    utility = select(model, optimizer, x, objective="utility", trust=trust)
    assert utility.status == Status.OPTIMAL
    torch.testing.assert_close(utility.weights, select(model, optimizer, x, linear).weights, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("trust", "status"), [(8.9, Status.NOTHING_USEFUL), (9.1, Status.OPTIMAL)])
def test_torch_momentum_needs_a_trust_above_momentum_over_one_minus_momentum(trust: float, status: Status) -> None:
    """Its buffer is a sum and no average: on a constant gradient g the offset alone is u/(1-u) lr g."""
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = random(CANDIDATES, 6, seed=0) + 1.0

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = model(x).mean()
        return result

    for _ in range(400):
        loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    selector = ftw.Selector(
        model, optimizer, target=[x], loss_fn=loss, budget=1.0, filter="all", objective="utility", trust=trust
    )
    with selector.record():
        loss(model, x).backward()
    assert selector.select().status == status


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(["sgd", "adam", "adamw"]))
def test_on_the_cone_match_maximises_the_cosine(seed: int, name: str) -> None:
    model = MLP()
    optimizer = OPTIMIZERS[name](list(model.parameters()), 0.01)
    with_history(model, optimizer, 3)
    x = random(CANDIDATES, 6, seed=seed)
    each = [gradient(model, losses(model, x)[i] / CANDIDATES) for i in range(CANDIDATES)]
    g = gradient(model, target_loss(model, x))
    update = preconditioner_for(optimizer).linearise(optimizer, gradient(model, losses(model, x).mean()))

    def cosine(weights: Tensor) -> float:
        mixed = {p: sum(w * c[p] for w, c in zip(weights.tolist(), each, strict=True)) for p in g}
        size = inner(mixed, in_m(mixed)) * inner(g, in_m(g))
        return inner(mixed, in_m(g)) / size**0.5

    def in_m(vector: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        return {p: update.scale[p].apply(v) for p, v in vector.items()}

    selection = select(model, optimizer, x, ridge=0.0)
    assume(selection.status == Status.OPTIMAL)
    best = cosine(selection.weights)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = torch.rand(CANDIDATES, generator=generator, dtype=torch.float64) ** 3
        if float(other.max()) <= 4 * float(other.mean()):
            assert cosine(other) <= best + 1e-7
        near = (selection.weights + 0.05 * torch.randn(CANDIDATES, generator=generator).double()).clamp_min(0.0)
        if float(near.max()) <= 4 * float(near.mean()):
            assert cosine(near) <= best + 1e-7


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_match_is_free_of_both_scales_and_utility_of_a_common_one(name: str) -> None:
    """A power of two, so that nothing is rounded; the history's loss is scaled as well where it says so."""
    x = random(CANDIDATES, 6, seed=3)

    def weights(objective: str, pool: float = 1.0, aim: float = 1.0, past: float = 1.0) -> Tensor:
        model = MLP()
        make: Any = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
        options = {"momentum": 0.9} if name == "sgd" else {"weight_decay": 0.0, "eps": 0.0}
        optimizer = make(model.parameters(), lr=0.0, **options)
        with_history(model, optimizer, 3, past)
        optimizer.param_groups[0]["lr"] = 0.01
        target: Loss = lambda model, x: target_loss(model, x) * aim  # noqa: E731
        return select(model, optimizer, x, target, pool, objective=objective).weights

    big = 65536.0
    plain, utility = weights("match"), weights("utility")
    close: Any = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(weights("match", aim=big), plain, **close)
    torch.testing.assert_close(weights("match", big, 1.0, big), plain, **close)
    torch.testing.assert_close(weights("utility", big, big, big), utility, **close)
    assert (weights("utility", aim=big) - utility).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_match_does_not_see_the_learning_rate_and_neither_does_utility(name: str) -> None:
    """M, o and H^-1 = P are all linear in it; the history is made at a rate of 0."""
    found: dict[str, list[Tensor]] = {"match": [], "utility": []}
    for lr in (1e-5, 1e-1):
        for objective, weights in found.items():
            model = MLP()
            optimizer = OPTIMIZERS[name](list(model.parameters()), 0.0)
            with_history(model, optimizer, 3)
            optimizer.param_groups[0]["lr"] = lr
            weights.append(select(model, optimizer, random(CANDIDATES, 6, seed=3), objective=objective).weights)
    for small, large in found.values():
        torch.testing.assert_close(small, large, rtol=1e-7, atol=1e-9)


def test_adafactor_s_first_moment_holds_past_rates() -> None:
    """The exception: `match` is as free of the rate as elsewhere, utility is not."""
    hf = pytest.importorskip("transformers.optimization")
    found: dict[str, list[Tensor]] = {"match": [], "utility": []}
    for lr in (1e-5, 1e-1):
        for objective, weights in found.items():
            model = MLP()
            optimizer = hf.Adafactor(model.parameters(), lr=0.01, beta1=0.9, relative_step=False, scale_parameter=False)
            with_history(model, optimizer, 3)
            optimizer.param_groups[0]["lr"] = lr
            weights.append(select(model, optimizer, random(CANDIDATES, 6, seed=3), objective=objective).weights)
    torch.testing.assert_close(*found["match"], rtol=1e-7, atol=1e-9)
    assert (found["utility"][0] - found["utility"][1]).abs().max() > 1e-2
