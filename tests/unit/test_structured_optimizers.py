"""Preconditioners that are not elementwise, Adafactor and Muon, against the real steps in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import ConfigurationError, OptimizerStateError, UnsupportedOptimizerError
from ftw.optim_state import (
    Adafactor,
    AffineUpdate,
    Diagonal,
    HFAdafactor,
    Muon,
    Preconditioner,
    RowColumn,
    TwoSided,
    preconditioner_for,
)
from ftw.testing import check_preconditioner
from tests.muon import iterate_in_own_precision

F64 = torch.float64
SHAPES = ((3, 4), (5, 2), (5,), (), (4, 4), (1, 3), (3, 1), (2, 3, 4), (2, 2, 3, 2))
MATRICES = ((3, 4), (5, 2), (4, 4), (1, 3), (3, 1), (6, 5))
Parameters = list[Parameter]


def two_groups(cls: Callable[..., Optimizer], first: dict[str, Any], **rest: Any) -> Callable[[Parameters], Optimizer]:
    """An optimizer whose first two parameters have hyper-parameters of their own."""
    return lambda ps: cls([{"params": ps[:2], **first}, {"params": ps[2:]}], **rest)


def stepped(
    cls: Callable[..., Optimizer], steps: int, shape: tuple[int, ...] = (4, 3), dtype: torch.dtype = F64, **options: Any
) -> tuple[Parameter, Optimizer]:
    generator = torch.Generator().manual_seed(1)
    p = Parameter(torch.randn(shape, generator=generator, dtype=F64).to(dtype))
    optimizer = cls([p], **options)
    for _ in range(steps):
        p.grad = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        optimizer.step()
    return p, optimizer


def gradient_like(p: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(p.dtype)


def real_step(p: Parameter, optimizer: Optimizer, gradient: Tensor) -> Tensor:
    """What `optimizer.step()` adds."""
    before = p.detach().clone()
    p.grad = gradient.clone()
    optimizer.step()
    return p.detach() - before


ADAFACTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "small steps": {"lr": 1e-3, "beta2_decay": -0.5},
    "no averaging": {"beta2_decay": 0.0},
    "eps": {"eps": (1e-3, 0.7)},
    "bound on the mean of rows": {"eps": (0.9, 1e-3)},
    "no clipping": {"d": 1e6},
    "decay": {"weight_decay": 0.3},
    "foreach": {"foreach": True, "weight_decay": 0.3, "d": 1.1},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "lr tensor": {"lr": torch.tensor(0.02, dtype=F64)},
}


class TestAdafactor:
    @pytest.mark.parametrize("name", ADAFACTOR_OPTIONS)
    def test_the_displacement_is_that_of_the_real_step(self, name: str) -> None:
        options = {"lr": 0.05, **ADAFACTOR_OPTIONS[name]}
        first = {"lr": 0.3, "weight_decay": 0.2, "d": 1.3}
        make_optimizer = two_groups(torch.optim.Adafactor, first, **options)
        check_preconditioner(Adafactor(), make_optimizer, shapes=SHAPES, steps=6, tolerance=1e-12)

    @pytest.mark.parametrize(
        ("shape", "separable"), [((4, 3), True), ((2, 4, 3), False), ((5,), False), ((2, 2, 4, 3), False)]
    )
    def test_the_second_moment_is_kept_as_factors(self, shape: tuple[int, ...], separable: bool) -> None:
        p, optimizer = stepped(torch.optim.Adafactor, 3, shape)
        scale = Adafactor().linearise(optimizer, {p: gradient_like(p)}).scale[p]
        assert isinstance(scale, RowColumn if len(shape) > 1 else Diagonal)
        assert scale.separable is separable
        if isinstance(scale, RowColumn):
            assert scale.rows.numel() + scale.columns.numel() < p.numel() or p.dim() == 2

    def test_where_its_lower_bound_is_reached_it_is_written_out(self) -> None:
        """A row without gradient, as in a table, has v = eps1^2 whatever the column."""
        p, optimizer = stepped(torch.optim.Adafactor, 0, lr=0.1)
        gradient = gradient_like(p)
        gradient[1] = 0.0
        update = Adafactor().linearise(optimizer, {p: gradient})
        scale = update.scale[p]
        assert isinstance(scale, Diagonal)
        assert torch.equal(scale.values[1], scale.values[1, 0].expand(3))
        assert float(scale.values[1, 0]) > 1e12 * float(scale.values[0].max())
        predicted = update.displacement({p: gradient})[p]
        torch.testing.assert_close(predicted, real_step(p, optimizer, gradient), rtol=1e-12, atol=1e-16)

    def test_tiny_gradients_in_float32_reach_it_everywhere(self) -> None:
        p, optimizer = stepped(torch.optim.Adafactor, 0, dtype=torch.float32, lr=0.1)
        for size, kind in ((1e-6, Diagonal), (1e-4, RowColumn)):
            gradient = size * gradient_like(p).sign()
            scale = Adafactor().linearise(optimizer, {p: gradient}).scale[p]
            assert isinstance(scale, kind)

    def test_a_gradient_of_zero_moves_nothing(self) -> None:
        for shape in ((4, 3), (3,), ()):
            p, optimizer = stepped(torch.optim.Adafactor, 0, shape)
            update = Adafactor().linearise(optimizer, {p: torch.zeros_like(p)})
            assert torch.equal(update.displacement({p: torch.zeros_like(p)})[p], torch.zeros_like(p))
            assert bool(torch.isfinite(update.scale[p].apply(gradient_like(p))).all())

    def test_a_wrong_clipping_only_rescales(self) -> None:
        """Away from the reference the denominator is the only error once v no longer moves."""
        p, optimizer = stepped(torch.optim.Adafactor, 3, beta2_decay=-60.0)  # w = 4^-60
        reference, gradient = gradient_like(p), 5.0 * gradient_like(p, 8)
        predicted = Adafactor().linearise(optimizer, {p: reference}).displacement({p: gradient})[p]
        real = real_step(p, optimizer, gradient)
        ratio = predicted / real
        torch.testing.assert_close(ratio, ratio.mean().expand(4, 3), rtol=1e-12, atol=0)
        assert float(ratio.mean()) > 2.0

    @pytest.mark.parametrize("size", [1.0, 1e4])
    def test_the_clipping_of_a_vector_is_bounded(self, size: float) -> None:
        """1/D >= d sqrt(w), reached as the gradient outgrows its history."""
        p, optimizer = stepped(torch.optim.Adafactor, 6, (50,), lr=0.1)
        gradient = size * gradient_like(p)
        one = Adafactor().linearise(optimizer, {p: gradient}).scale[p]
        optimizer.param_groups[0]["d"] = 1e9
        unclipped = Adafactor().linearise(optimizer, {p: gradient}).scale[p]
        assert isinstance(one, Diagonal)
        assert isinstance(unclipped, Diagonal)
        factor = float((one.values / unclipped.values).mean())
        least = 7**-0.4
        assert least * (1 - 1e-6) <= factor <= 1.0
        assert (factor < 1.001 * least) is (size > 1.0)

    def test_the_clipping_of_a_matrix_is_not(self) -> None:
        p, optimizer = stepped(torch.optim.Adafactor, 0, (2, 2), lr=0.1, eps=(1e-12, 1e-3))
        gradient = torch.diag(torch.tensor([1.0, 1e-3], dtype=F64))
        clipped = Adafactor().linearise(optimizer, {p: gradient}).scale[p].apply(gradient)
        optimizer.param_groups[0]["d"] = 1e9
        free = Adafactor().linearise(optimizer, {p: gradient}).scale[p].apply(gradient)
        assert float(free[0, 0] / clipped[0, 0]) == pytest.approx((1 + 1e-6) / 2e-3, rel=1e-9)

    @pytest.mark.parametrize("shape", [(4, 3), (5,)])
    def test_without_a_reference_v_is_the_last_steps(self, shape: tuple[int, ...]) -> None:
        p, optimizer = stepped(torch.optim.Adafactor, 5, shape, lr=0.4, eps=(1e-9, 1e-3))
        state, ones = optimizer.state[p], torch.ones(shape, dtype=F64)
        second = state["row_var"] @ state["col_var"] / state["row_var"].mean() if len(shape) > 1 else state["variance"]
        alpha = float(p.detach().square().mean().sqrt()) * min(0.4, 6**-0.5)
        found = Adafactor().linearise(optimizer).scale[p].apply(ones)
        torch.testing.assert_close(found, alpha / second.sqrt(), rtol=1e-13, atol=0)

    def test_half_precision_state_is_worked_out_in_float32(self) -> None:
        p, optimizer = stepped(torch.optim.Adafactor, 3, (4, 3), torch.bfloat16, lr=0.1, weight_decay=0.2)
        gradient = gradient_like(p)
        update = Adafactor().linearise(optimizer, {p: gradient})
        assert update.offset[p].dtype == torch.float32
        wide = Parameter(p.detach().double())
        eps = (torch.finfo(torch.bfloat16).eps, 1e-3)  # torch's default goes by the parameter's dtype
        twin = torch.optim.Adafactor([wide], lr=0.1, weight_decay=0.2, eps=eps)
        twin.state[wide] = {key: value.double() for key, value in optimizer.state[p].items()}
        real = real_step(wide, twin, gradient.double())
        torch.testing.assert_close(update.displacement({p: gradient})[p].double(), real, rtol=1e-5, atol=1e-7)

    def test_one_precision_for_several_dtypes(self) -> None:
        ps = [Parameter(torch.ones(2, 2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
        with pytest.raises(UnsupportedOptimizerError, match=r"eps\[0\]=None and parameters of torch.bfloat16, torch.f"):
            preconditioner_for(torch.optim.Adafactor(ps))
        assert isinstance(preconditioner_for(torch.optim.Adafactor(ps, eps=(1e-6, 1e-3))), Adafactor)
        ps[1].requires_grad_(False)
        assert isinstance(preconditioner_for(torch.optim.Adafactor(ps)), Adafactor)


HF_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "warm-up": {"warmup_init": True},
    "manual": {"lr": 0.05, "relative_step": False, "scale_parameter": False},
    "manual, scaled": {"lr": 0.05, "relative_step": False, "eps": (1e-30, 0.7)},
    "unscaled": {"scale_parameter": False},
    "first moment": {"beta1": 0.8, "weight_decay": 0.3},
    "first moment of nothing": {"beta1": 0.0},
    "decay": {"weight_decay": 0.3, "decay_rate": -0.4},
    "eps": {"eps": (0.3, 1e-3)},
    "clipping": {"clip_threshold": 0.3},
    "no clipping": {"clip_threshold": 1e6, "beta1": 0.5},
}


class TestHFAdafactor:
    @pytest.fixture(autouse=True)
    def cls(self) -> type[Optimizer]:
        module: Any = pytest.importorskip("transformers.optimization")
        found: type[Optimizer] = module.Adafactor
        return found

    @pytest.mark.parametrize("name", HF_OPTIONS)
    def test_the_displacement_is_that_of_the_real_step(self, cls: type[Optimizer], name: str) -> None:
        first = {"weight_decay": 0.2, "clip_threshold": 0.7, "beta1": 0.6}
        make_optimizer = two_groups(cls, first, **HF_OPTIONS[name])
        check_preconditioner(HFAdafactor(), make_optimizer, shapes=SHAPES, steps=6, tolerance=1e-12)

    def test_the_class_decides(self, cls: type[Optimizer]) -> None:
        _, optimizer = stepped(cls, 0)
        assert type(preconditioner_for(optimizer)) is HFAdafactor

    @pytest.mark.parametrize(("shape", "kind"), [((4, 3), RowColumn), ((2, 4, 3), RowColumn), ((5,), Diagonal)])
    def test_the_second_moment_is_kept_as_factors(
        self, cls: type[Optimizer], shape: tuple[int, ...], kind: type
    ) -> None:
        p, optimizer = stepped(cls, 2, shape)
        gradient = gradient_like(p)
        gradient[0] = 0.0
        assert isinstance(HFAdafactor().linearise(optimizer, {p: gradient}).scale[p], kind)

    @pytest.mark.parametrize("steps", [0, 3])
    def test_the_gain_is_not_corrected(self, cls: type[Optimizer], steps: int) -> None:
        p, optimizer = stepped(cls, steps, beta1=0.9)
        assert HFAdafactor().linearise(optimizer, {p: gradient_like(p)}).gain[p] == pytest.approx(0.1, rel=1e-15)

    def test_without_a_reference_v_is_the_last_steps(self, cls: type[Optimizer]) -> None:
        p, optimizer = stepped(cls, 5, lr=0.4, relative_step=False, beta1=0.9)
        state = optimizer.state[p]
        rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        update = HFAdafactor().linearise(optimizer)
        expected = 0.4 * p.detach().square().mean().sqrt() * 0.1 / (rows[:, None] * columns / rows.mean()).sqrt()
        torch.testing.assert_close(update.scale[p].apply(torch.ones_like(p)), expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(update.offset[p], 0.9 * state["exp_avg"], rtol=1e-15, atol=0)

    def test_a_gradient_of_zero_moves_nothing(self, cls: type[Optimizer]) -> None:
        p, optimizer = stepped(cls, 0, dtype=torch.float32)
        update = HFAdafactor().linearise(optimizer, {p: torch.zeros_like(p)})
        assert torch.equal(update.displacement({p: torch.zeros_like(p)})[p], torch.zeros_like(p))
        assert bool(torch.isfinite(update.scale[p].apply(gradient_like(p))).all())

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"beta1": 1.0}, "beta1=1.0 in parameter group 0; None or below 1"),
            ({"lr": None, "relative_step": False}, "lr=None and relative_step=False in parameter group 0"),
        ],
    )
    def test_what_is_no_step_is_refused(self, cls: type[Optimizer], options: dict[str, Any], said: str) -> None:
        _, optimizer = stepped(cls, 0, **options)
        with pytest.raises(UnsupportedOptimizerError, match=said):
            preconditioner_for(optimizer)

    def test_a_state_that_lacks_the_first_moment(self, cls: type[Optimizer]) -> None:
        p, optimizer = stepped(cls, 2)
        optimizer.param_groups[0]["beta1"] = 0.9
        with pytest.raises(OptimizerStateError, match=r"lacks \['exp_avg'\]"):
            HFAdafactor().linearise(optimizer, {p: torch.ones_like(p)})


MUON_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain momentum": {"nesterov": False, "momentum": 0.7},
    "no momentum": {"momentum": 0.0},
    "no decay": {"weight_decay": 0.0},
    "rms of adamw": {"adjust_lr_fn": "match_rms_adamw"},
    "original": {"adjust_lr_fn": "original"},
    "one step": {"ns_steps": 1},
    "no step": {"ns_steps": 0},
    "cubic": {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 9},
    "quintic": {"ns_coefficients": (15 / 8, -10 / 8, 3 / 8), "ns_steps": 7},
    "large eps": {"eps": 3.0},
    "lr tensor": {"lr": torch.tensor(0.02, dtype=F64)},
}


class TestMuon:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("torch.optim._muon")

    @pytest.fixture
    def in_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        iterate_in_own_precision(monkeypatch)

    @pytest.mark.usefixtures("in_float64")
    @pytest.mark.parametrize("name", MUON_OPTIONS)
    def test_the_displacement_is_that_of_the_step_in_float64(self, name: str) -> None:
        options = {"lr": 0.05, **MUON_OPTIONS[name]}
        make_optimizer = two_groups(torch.optim.Muon, {"lr": 0.3, "weight_decay": 0.2, "momentum": 0.5}, **options)
        check_preconditioner(Muon(), make_optimizer, shapes=MATRICES, steps=6, tolerance=1e-10)

    @pytest.mark.usefixtures("in_float64")
    @pytest.mark.parametrize("floor", [0.0, 0.3, 100.0])
    def test_the_floor_is_free_at_the_reference(self, floor: float) -> None:
        make_optimizer = two_groups(torch.optim.Muon, {"lr": 0.3, "weight_decay": 0.2, "momentum": 0.5}, lr=0.05)
        check_preconditioner(Muon(floor), make_optimizer, shapes=MATRICES, steps=6, tolerance=1e-10)

    @pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
    def test_the_floor_bounds_the_slope(self, shape: tuple[int, int]) -> None:
        """Directions that a reference of rank 1 lacks get a slope of a^k = 485 at floor 0."""
        p, optimizer = stepped(torch.optim.Muon, 0, shape, lr=1.0, momentum=0.0, weight_decay=0.0)
        gradient = torch.outer(gradient_like(p)[:, 0], gradient_like(p)[0])
        norm, adjusted = float(gradient.norm()), max(1.0, shape[0] / shape[1]) ** 0.5
        secant, floored, flat = (Muon(f).linearise(optimizer, {p: gradient}) for f in (0.0, 1.0, 100.0))

        def slopes(update: AffineUpdate) -> Tensor:
            scale = update.scale[p]
            assert isinstance(scale, TwoSided)
            assert isinstance(scale.inner, RowColumn)
            return (scale.inner.rows * scale.inner.columns).flatten() * norm / adjusted

        assert float(slopes(secant).max()) == pytest.approx(3.4445**5, rel=1e-6)
        assert not secant.offset[p].any()
        assert float(slopes(floored).max()) < 3.0  # f(x) / sqrt(x) at x = 1/4, f about 1
        assert float(slopes(floored).min()) == pytest.approx(float(slopes(secant).min()), rel=1e-9)
        assert float(slopes(flat).max()) == pytest.approx(float(slopes(flat).min()), rel=1e-9)

    @pytest.mark.parametrize("floor", [-0.1, float("nan"), float("inf")])
    def test_bad_floors_are_refused(self, floor: float) -> None:
        with pytest.raises(ConfigurationError, match="floor is"):
            Muon(floor)

    def test_an_empty_matrix_is_stepped_as_well(self) -> None:
        p = Parameter(torch.ones(0, 3, dtype=F64))
        displacement = Muon().linearise(torch.optim.Muon([p]), {p: torch.ones_like(p)}).displacement({p: p.detach()})
        assert displacement[p].shape == (0, 3)

    def test_a_buffer_of_another_parameter(self) -> None:
        p, optimizer = stepped(torch.optim.Muon, 2, (4, 3))
        optimizer.state[p]["momentum_buffer"] = torch.ones(3, dtype=F64)
        with pytest.raises(OptimizerStateError, match=r"momentum_buffer of shape \(3,\); \(4, 3\) is needed"):
            Muon().linearise(optimizer, {p: torch.ones_like(p)})

    @pytest.mark.usefixtures("in_float64")
    def test_a_reference_of_low_rank(self) -> None:
        p, optimizer = stepped(torch.optim.Muon, 0, (6, 4))
        gradient = torch.outer(gradient_like(p)[:, 0], gradient_like(p)[0])
        predicted = Muon().linearise(optimizer, {p: gradient}).displacement({p: gradient})[p]
        torch.testing.assert_close(predicted, real_step(p, optimizer, gradient), rtol=1e-10, atol=1e-14)

    @pytest.mark.usefixtures("in_float64")
    def test_an_iteration_that_does_not_converge_is_followed(self) -> None:
        """Small singular values end up below 1, and M must know by how much."""
        p, optimizer = stepped(torch.optim.Muon, 0, (5, 5), lr=1.0, weight_decay=0.0)
        left, _, right = torch.linalg.svd(gradient_like(p))
        gradient = left @ torch.diag(torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4], dtype=F64)) @ right
        predicted = Muon().linearise(optimizer, {p: gradient}).displacement({p: gradient})[p]
        sizes = torch.linalg.svdvals(predicted)
        assert float(sizes.min()) < 0.1
        assert float(sizes.max()) > 0.65
        torch.testing.assert_close(predicted, real_step(p, optimizer, gradient), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("shape", [(48, 32), (32, 48), (64, 64)])
    def test_the_gap_to_the_step_in_bfloat16(self, shape: tuple[int, int]) -> None:
        """What `Muon` says of it."""
        p, optimizer = stepped(torch.optim.Muon, 3, shape, lr=0.1, weight_decay=0.0)
        gradient = gradient_like(p)
        predicted = Muon().linearise(optimizer, {p: gradient}).displacement({p: gradient})[p]
        real = real_step(p, optimizer, gradient)
        gap = float((predicted - real).norm() / real.norm())
        assert 1e-4 < gap < 0.03

    @pytest.mark.parametrize(("shape", "left"), [((3, 5), True), ((5, 3), False), ((4, 4), True)])
    def test_the_smaller_side_is_rotated(self, shape: tuple[int, int], left: bool) -> None:
        p, optimizer = stepped(torch.optim.Muon, 2, shape)
        scale = Muon().linearise(optimizer, {p: gradient_like(p)}).scale[p]
        assert isinstance(scale, TwoSided)
        assert scale.separable
        assert scale.mixes_rows is left
        assert (scale.left is not None, scale.right is not None) == (left, not left)

    @pytest.mark.parametrize(("nesterov", "gain"), [(True, 1 - 0.8**2), (False, 0.2)])
    @pytest.mark.parametrize("steps", [0, 3])
    def test_the_gain_is_the_share_of_the_gradient(self, nesterov: bool, gain: float, steps: int) -> None:
        p, optimizer = stepped(torch.optim.Muon, steps, nesterov=nesterov, momentum=0.8)
        assert Muon().linearise(optimizer, {p: gradient_like(p)}).gain[p] == pytest.approx(gain, rel=1e-14)

    @pytest.mark.usefixtures("in_float64")
    def test_without_a_reference_it_is_taken_at_the_buffer(self) -> None:
        p, optimizer = stepped(torch.optim.Muon, 4, lr=0.1)
        buffer = optimizer.state[p]["momentum_buffer"].clone()
        predicted = Muon().linearise(optimizer).displacement({p: buffer})[p]
        # A gradient that equals the buffer leaves it where it is.
        torch.testing.assert_close(predicted, real_step(p, optimizer, buffer), rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("steps", [0, 2])
    def test_a_reference_of_zero_gives_no_nan(self, steps: int) -> None:
        p, optimizer = stepped(torch.optim.Muon, steps, dtype=torch.float32)
        update = Muon().linearise(optimizer, {p: torch.zeros_like(p)})
        for found in (update.scale[p].apply(gradient_like(p)), update.scale[p].sqrt().solve(update.offset[p])):
            assert bool(torch.isfinite(found).all())

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_reference_that_is_not_finite_is_passed_on(self, value: float) -> None:
        """The assembly looks for the candidate that is to blame; an exception would leave it none."""
        p, optimizer = stepped(torch.optim.Muon, 1)
        update = Muon().linearise(optimizer, {p: torch.full_like(p, value)})
        assert bool(update.scale[p].apply(torch.ones_like(p)).isnan().all())
        assert bool(update.offset[p].isnan().all())

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"momentum": 1.0}, "momentum=1.0 in parameter group 0; below 1 is modelled"),
            ({"eps": 0.0}, "eps=0.0 in parameter group 0; above 0 is modelled"),
            ({"ns_coefficients": (2.0, -3.0, 0.0)}, "can flip the sign of a singular value"),
            ({"ns_coefficients": (0.0, 1.0, 1.0)}, "can flip the sign of a singular value"),
            ({"ns_coefficients": (2.0, -3.0, 1.0)}, "can flip the sign of a singular value"),
            ({"ns_coefficients": (3.0, -1.0, 0.0), "ns_steps": 2}, "which 2 steps can flip"),
        ],
    )
    def test_what_m_cannot_stand_for_is_refused(self, options: dict[str, Any], said: str) -> None:
        _, optimizer = stepped(torch.optim.Muon, 0, **options)
        with pytest.raises(UnsupportedOptimizerError, match=said):
            preconditioner_for(optimizer)

    @pytest.mark.parametrize(
        "options",
        [
            {"ns_coefficients": (3.0, -1.0, 0.0), "ns_steps": 1},
            {"ns_coefficients": (2.0, -3.0, 1.0), "ns_steps": 0},
            {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 30},
            {},
        ],
    )
    def test_what_stays_positive_is_not(self, options: dict[str, Any]) -> None:
        p, optimizer = stepped(torch.optim.Muon, 0, **options)
        assert isinstance(preconditioner_for(optimizer), Muon)
        scale = Muon().linearise(optimizer, {p: gradient_like(p)}).scale[p]
        assert isinstance(scale, TwoSided)
        assert isinstance(scale.inner, RowColumn)
        assert float((scale.inner.rows * scale.inner.columns).min()) > 0


def test_before_the_first_step_there_is_no_second_moment() -> None:
    cases: list[tuple[Preconditioner, Callable[..., Optimizer]]] = [(Adafactor(), torch.optim.Adafactor)]
    if hasattr(torch.optim, "Muon"):
        cases.append((Muon(), torch.optim.Muon))
    for preconditioner, cls in cases:
        _, optimizer = stepped(cls, 0)
        with pytest.raises(OptimizerStateError, match="taken no step yet"):
            preconditioner.linearise(optimizer)


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    cases: list[tuple[Preconditioner, Callable[..., Optimizer]]] = [(Adafactor(), torch.optim.Adafactor)]
    if hasattr(torch.optim, "Muon"):
        cases.append((Muon(), torch.optim.Muon))
    for preconditioner, cls in cases:
        p, optimizer = stepped(cls, 2, lr=0.0, weight_decay=0.3)
        gradient = gradient_like(p)
        update = preconditioner.linearise(optimizer, {p: gradient})
        assert not update.displacement({p: gradient})[p].any()
        assert not update.scale[p].sqrt().solve(update.offset[p]).any()
