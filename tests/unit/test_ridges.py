"""A ridge towards reference weights, in a real step: its formula, its limits, and that no scale changes it."""

import copy
import math

import pytest
import torch

import ftw
from ftw.errors import ConfigurationError
from ftw.solvers import CappedSimplex, Free, NonNegative, ProjectedGradient, Simplex
from ftw.solvers.ridge import fitting_scale
from ftw.target import Target
from tests.models import MLP


class Seeing(ProjectedGradient):
    """Keeps what it was given."""

    def _solve(self, gram, alignment, constraints, start=None):
        self.seen = gram.clone(), alignment.clone()
        return super()._solve(gram, alignment, constraints, start)


def data(rows, seed):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(model, x):
    return (model(x) - 1.0).square().mean()


def other_loss(model, x):
    return (model(x) + 0.5).square().mean()


def made(model=None, optimizer=None, **options):
    model = MLP() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if optimizer is None else optimizer
    given = {"target": [data(5, 100)], "loss_fn": loss_of, "filter": "topk", "budget": 5, "warmup": 0} | options
    if isinstance(given["target"], dict):
        del given["loss_fn"]
    return ftw.Selector(model, optimizer, **given), model, optimizer


def selected(seed=0, extras=None, factor=1.0, **options):
    torch.manual_seed(1)
    selector, model, _ = made(**options)
    with selector.record(extras=extras):
        (factor * loss_of(model, data(8, seed))).backward()
    return selector.select()


def test_what_the_solver_is_given():
    plain, pulled = Seeing(), Seeing()
    selected(solver=plain, ridge=0.0)
    selected(solver=pulled, ridge=ftw.RidgeTowards(0.3))
    (K, b), (K_ridge, b_ridge) = plain.seen, pulled.seen
    rho, common = 0.3 * K.diagonal().mean(), b.sum() / K.sum()
    assert common > 0
    assert torch.allclose(K_ridge, K + rho * torch.eye(5, dtype=K.dtype), rtol=1e-14)
    assert torch.allclose(b_ridge, b + rho * common, rtol=1e-12)


def test_from_the_solver_s_own_weights_to_equal_ones():
    equal = selected(solver="uniform").weights
    away = [float((selected(ridge=ftw.RidgeTowards(rho)).weights - equal).norm()) for rho in (0.0, 0.1, 1.0, 10.0, 1e8)]
    assert away == sorted(away, reverse=True)
    assert away[0] > 0.1
    assert away[-1] < 1e-6
    assert torch.equal(selected(ridge=ftw.RidgeTowards(0.0)).weights, selected(ridge=0.0).weights)


@pytest.mark.parametrize("constraints", [None, Free(), Simplex(8.0), CappedSimplex(8.0, 6.0)])
def test_a_column_is_what_a_strong_ridge_leads_to(constraints):
    prior = [1.0, 2.0, 0.5, 1.0, 3.0, 0.0, 1.5, 1.0]
    weights = [
        selected(
            extras={"prior": [scale * each for each in prior]},
            ridge=ftw.RidgeTowards(1e9, column="prior"),
            constraints=constraints,
        ).weights
        for scale in (1.0, 1024.0)
    ]
    assert torch.equal(*weights)
    chosen = selected(solver="uniform").weights > 0
    expected = torch.where(chosen, torch.tensor(prior, dtype=torch.float64), 0.0)
    assert torch.allclose(weights[0], expected * (8 / expected.sum()), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"geometry": "vanilla"}, {"target": {"a": 1, "b": 2}, "targets": "worst"}])
def test_no_scale_of_the_loss_changes_a_bit(options):
    if "targets" in options:
        options = options | {"target": {"a": Target([data(5, 1)], loss_of), "b": Target([data(5, 2)], other_loss)}}
    plain = {"constraints": NonNegative(), "ridge": ftw.RidgeTowards(0.5), "preconditioner": "sgd"}
    runs = []
    for factor in (1.0, 65536.0):
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        runs.append(selected(factor=factor, model=model, optimizer=optimizer, **plain, **copy.deepcopy(options)))
    assert torch.equal(runs[0].weights, runs[1].weights)


@pytest.mark.parametrize("targets", ["worst", "no_harm"])
def test_several_targets(targets):
    several = {"up": Target([data(5, 1)], loss_of), "down": Target([data(5, 2)], loss_of)}
    options = {"target": several, "targets": targets, "filter": "all", "constraints": NonNegative()}
    strong = selected(ridge=ftw.RidgeTowards(1e9), **options).weights
    own = selected(ridge=1e-3, **options).weights
    assert float((own - 1.0).norm()) > 0.1
    # Equal weights harm neither of these two targets, so both ways lead to them.
    assert torch.allclose(strong, torch.ones(8, dtype=torch.float64), atol=1e-5)


def test_the_scale_of_the_reference():
    K = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b, ones = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert fitting_scale(K, b, NonNegative(), ones) == 1.0
    assert fitting_scale(K, b, NonNegative(), 4 * ones) == 0.25
    assert fitting_scale(K, -b, NonNegative(), ones) == 0.0
    assert fitting_scale(0 * K, b, NonNegative(), ones) == 0.0
    assert fitting_scale(K, -b, Simplex(3.0, [1.0, 2.0]), ones) == 1.0
    assert fitting_scale(K, b, Simplex(3.0), 0 * ones) == 0.0


def test_a_resumed_run_goes_on_bitwise():
    def steps(selector, model, optimizer, first, count):
        weights = []
        for step in range(first, first + count):
            with selector.record(extras={"prior": torch.rand(8, generator=torch.Generator().manual_seed(step))}):
                loss_of(model, data(8, step)).backward()
            weights.append(selector.apply().weights)
            optimizer.step()
            optimizer.zero_grad()
        return weights

    options = {"ridge": ftw.RidgeTowards(0.5, "prior")}
    torch.manual_seed(3)
    selector, model, optimizer = made(**options)
    steps(selector, model, optimizer, 0, 2)
    saved = copy.deepcopy((selector.state_dict(), model.state_dict(), optimizer.state_dict()))
    expected = steps(selector, model, optimizer, 2, 3)
    again, model, optimizer = made(**options)
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    again.load_state_dict(saved[0])
    for one, other in zip(steps(again, model, optimizer, 2, 3), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, True, "much", None])
def test_a_strength_is_a_finite_number(strength):
    with pytest.raises(ConfigurationError, match="strength"):
        ftw.RidgeTowards(strength)
    if strength is not None:
        with pytest.raises(ConfigurationError, match="ridge"):
            made(ridge=strength)


def test_columns_are_checked():
    with pytest.raises(ConfigurationError, match="name of a column"):
        ftw.RidgeTowards(1.0, column=3)
    ridge = ftw.RidgeTowards(1.0, column="prior")
    with pytest.raises(ConfigurationError, match=r"RidgeTowards needs the column 'prior'.*record\(extras="):
        selected(ridge=ridge)
    for wrong, message in (([-1.0] * 8, "at least 0"), ([math.nan] * 8, "not finite"), (["a"] * 8, "real numbers")):
        with pytest.raises(ConfigurationError, match=message):
            selected(ridge=ridge, extras={"prior": wrong})


@pytest.mark.parametrize("solver", ["uniform", "softmax"])
def test_rules_that_do_not_minimise_are_refused(solver):
    with pytest.raises(ConfigurationError, match="rule of their own"):
        made(solver=solver, ridge=ftw.RidgeTowards(1.0))
    with pytest.raises(ConfigurationError, match="rule of their own"):
        made(solver=solver, targets="worst", target={"a": Target([data(5, 1)], loss_of)})
