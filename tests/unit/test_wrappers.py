"""Wrappers of optimizers: what is seen through, what is not, and that what is read is what steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ftw.errors import UnsupportedOptimizerError
from ftw.optim_state import SGD, AdamW, Identity, Preconditioner, preconditioner_for, unwrapped
from ftw.optim_state.wrappers import SEEN_THROUGH

F64 = torch.float64


def parameters(dtype: torch.dtype = F64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((4, 3), (5,))]


def adamw(ps: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW([{"params": ps[:1], "lr": 0.2}, {"params": ps[1:]}], lr=0.05, weight_decay=0.1)


def draw(ps: list[Parameter], generator: torch.Generator) -> dict[Parameter, Tensor]:
    return {p: torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in ps}


def check_steps(
    given: Any,
    ps: list[Parameter],
    step: Callable[[], Any],
    after: Callable[[], Any] = lambda: None,
    steps: int = 4,
) -> None:
    """The displacement read from `given` is that of `step`, several steps deep."""
    preconditioner = preconditioner_for(given)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        reference = draw(ps, generator)
        predicted = preconditioner.linearise(given, reference).displacement(reference)
        before = [p.detach().clone() for p in ps]
        for p, gradient in reference.items():
            p.grad = gradient.clone()
        step()
        after()
        for p, old in zip(ps, before, strict=True):
            torch.testing.assert_close(predicted[p], p.detach() - old, rtol=1e-12, atol=1e-14)


class Emulated:
    """Lightning's wrappers as they are built, without importing Lightning: an optimizer by its class alone."""

    def __init__(self, optimizer: Optimizer, *, copies: bool) -> None:
        if copies:  # Fabric, and the Trainer's before 2.3
            self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        self._optimizer.step()


def emulated(name: str, optimizer: Optimizer, *, copies: bool) -> Any:
    """`Emulated` under the full name of the real class."""
    module, _, qualname = name.rpartition(".")

    def step(self: Any) -> None:
        self._optimizer.step()

    step.__module__, step.__qualname__ = module, f"{qualname}.step"
    return type(qualname, (Emulated,), {"step": step, "__module__": module})(optimizer, copies=copies)


LIGHTNING = [name for name in SEEN_THROUGH if "lightning" in name]


class TestLightning:
    @pytest.mark.parametrize("copies", [False, True])
    @pytest.mark.parametrize("name", LIGHTNING)
    def test_a_subclass_made_for_the_instance_is_seen_through(self, name: str, copies: bool) -> None:
        ps = parameters()
        inner = adamw(ps)
        wrapper = emulated(name, inner, copies=copies)
        assert isinstance(wrapper, torch.optim.AdamW)
        assert unwrapped(wrapper) is inner
        check_steps(wrapper, ps, wrapper.step)

    @pytest.mark.parametrize("copies", [False, True])
    def test_the_inner_state_counts_after_a_checkpoint_is_loaded(self, copies: bool) -> None:
        ps = parameters()
        inner = adamw(ps)
        wrapper = emulated(LIGHTNING[0], inner, copies=copies)
        check_steps(wrapper, ps, wrapper.step)
        inner.load_state_dict(copy.deepcopy(inner.state_dict()))  # makes new groups and a new state
        inner.param_groups[0]["lr"] = 0.7
        check_steps(wrapper, ps, wrapper.step)

    def test_the_real_one_in_a_training_run(self, tmp_path: Path) -> None:
        lightning = pytest.importorskip("lightning")
        errors: list[float] = []

        class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(3, 4, dtype=F64)

            def configure_optimizers(self) -> Any:
                inner = adamw(list(self.parameters()))
                return [inner], [torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)]

            def training_step(self, batch: Tensor) -> Tensor:
                loss: Tensor = self.layer(batch).square().mean()
                return loss

            def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
                wrapper = self.optimizers()
                assert wrapper is not optimizer
                assert unwrapped(wrapper) is optimizer
                reference = {p: p.grad for p in self.parameters() if p.grad is not None}
                self.predicted = preconditioner_for(wrapper).linearise(wrapper, reference).displacement(reference)
                self.before = {p: p.detach().clone() for p in self.parameters()}

            def on_train_batch_end(self, *args: Any) -> None:
                for p, old in self.before.items():
                    errors.append(float((self.predicted[p] - (p.detach() - old)).abs().max()))

        data = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=2, default_root_dir=tmp_path, log_every_n_steps=1, **quiet
        )
        trainer.fit(Model(), torch.utils.data.DataLoader(data, batch_size=2))
        assert len(errors) == 2 * 3 * 2
        assert max(errors) < 1e-14

    def test_the_real_one_of_fabric(self) -> None:
        pytest.importorskip("lightning")
        from lightning.fabric import Fabric

        model = torch.nn.Linear(3, 4, dtype=F64)
        ps = list(model.parameters())
        inner = adamw(ps)
        _, wrapper = Fabric(accelerator="cpu", devices=1).setup(model, inner)
        assert unwrapped(wrapper) is inner
        check_steps(wrapper, ps, wrapper.step)


@pytest.fixture
def accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """accelerate's wrapper, on the CPU; the state that accelerate keeps for the process is put back."""
    module = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    kept = [(cls, dict(cls._shared_state)) for cls in (PartialState, AcceleratorState, GradientState)]
    for cls, _ in kept:
        cls._shared_state.clear()
    module.Accelerator()
    yield module.optimizer.AcceleratedOptimizer
    for cls, state in kept:
        cls._shared_state.clear()
        cls._shared_state.update(state)


class TestAccelerate:
    def test_it_is_seen_through(self, accelerate: Any) -> None:
        ps = parameters()
        inner = adamw(ps)
        wrapper = accelerate(inner)
        assert unwrapped(wrapper) is inner
        assert unwrapped(accelerate(emulated(LIGHTNING[0], wrapper, copies=False))) is inner
        check_steps(wrapper, ps, wrapper.step)

    def test_a_scheduler_of_either_is_read_at_the_moment(self, accelerate: Any) -> None:
        for around in (False, True):
            ps = parameters()
            inner = adamw(ps)
            wrapper = accelerate(inner)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(wrapper if around else inner, gamma=0.5)
            check_steps(wrapper, ps, wrapper.step, scheduler.step)
            assert unwrapped(wrapper).param_groups[0]["lr"] == pytest.approx(0.2 * 0.5**4, rel=1e-12)

    def test_with_a_scaler_the_gradient_is_the_unscaled_one(self, accelerate: Any) -> None:
        ps = parameters()
        inner = adamw(ps)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        wrapper = accelerate(inner, scaler=scaler)
        assert unwrapped(wrapper) is inner

        def step() -> None:
            scaler.scale(torch.zeros(()))  # as a scaled loss does, so that the scaler has its scale
            for p in ps:
                assert p.grad is not None
                p.grad *= scaler.get_scale()
            wrapper.step()

        check_steps(wrapper, ps, step)
        assert not wrapper.step_was_skipped


class TestSchedulers:
    @pytest.mark.parametrize(
        "make",
        [
            lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.3),
            lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (1 + t)),
            # cycles the betas as well
            lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=6),
        ],
    )
    def test_the_step_they_patch_is_still_that_of_the_class(self, make: Callable[[Optimizer], Any]) -> None:
        ps = parameters()
        optimizer = adamw(ps)
        scheduler = make(optimizer)
        assert "step" in vars(optimizer), "a scheduler patches the instance"
        assert unwrapped(optimizer) is optimizer
        check_steps(optimizer, ps, optimizer.step, scheduler.step, steps=5)

    def test_a_tensor_learning_rate_is_changed_in_place(self) -> None:
        ps = parameters()
        optimizer = torch.optim.AdamW(ps, lr=torch.tensor(0.1, dtype=F64))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        check_steps(optimizer, ps, optimizer.step, scheduler.step)


class TestGradScaler:
    @pytest.mark.parametrize("unscaled_first", [False, True])
    @pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
    @pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
    def test_the_reference_is_the_unscaled_gradient(
        self, cls: Callable[..., Optimizer], options: dict[str, Any], unscaled_first: bool
    ) -> None:
        # A fused optimizer unscales inside its step: what is in p.grad is scaled until then.
        ps = parameters()
        optimizer = cls(ps, lr=0.1, weight_decay=0.2, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def step() -> None:
            scaler.scale(torch.zeros(()))
            for p in ps:
                assert p.grad is not None
                p.grad *= scaler.get_scale()
            if unscaled_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

        check_steps(optimizer, ps, step)

    @pytest.mark.parametrize("options", [{}, {"fused": True}])
    def test_a_step_that_is_skipped_leaves_what_is_read_as_it_was(self, options: dict[str, Any]) -> None:
        ps = parameters()
        optimizer = torch.optim.AdamW(ps, lr=0.1, **options)
        check_steps(optimizer, ps, optimizer.step)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        reference = draw(ps, torch.Generator().manual_seed(3))
        predicted = AdamW().linearise(optimizer, reference).displacement(reference)
        before = [p.detach().clone() for p in ps]

        scaler.scale(torch.zeros(()))
        for p in ps:
            p.grad = torch.full_like(p, torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**9, "the step was to be skipped"
        assert all(torch.equal(p, old) for p, old in zip(ps, before, strict=True))

        again = AdamW().linearise(optimizer, reference).displacement(reference)
        assert all(torch.equal(again[p], predicted[p]) for p in ps)
        for p in ps:
            p.grad = reference[p] * scaler.get_scale()
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        for p, old in zip(ps, before, strict=True):
            torch.testing.assert_close(predicted[p], p.detach() - old, rtol=1e-12, atol=1e-14)


class Lookahead(Optimizer):
    """Takes the inner step, then pulls the weights back: a step of its own around an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def step(self, closure: Any = None) -> None:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.optimizer.step()
        with torch.no_grad():
            for p, old in zip((p for group in self.param_groups for p in group["params"]), before, strict=True):
                p.lerp_(old, 0.5)


class TestWhatIsNotSeenThrough:
    def test_a_known_optimizer_that_happens_to_hold_another(self) -> None:
        ps = parameters()
        for name in ("optimizer", "_optimizer", "optim", "base_optimizer"):
            outer = torch.optim.SGD(ps[:1], lr=0.1)
            setattr(outer, name, torch.optim.AdamW(ps[1:]))
            assert unwrapped(outer) is outer
            assert type(preconditioner_for(outer)) is SGD

    def test_a_wrapper_with_a_step_of_its_own_is_refused_by_name(self) -> None:
        wrapper = Lookahead(adamw(parameters()))
        assert unwrapped(wrapper) is wrapper
        with pytest.raises(
            UnsupportedOptimizerError, match=r"test_wrappers\.Lookahead; modelled are .*AdamW.*register"
        ):
            preconditioner_for(wrapper)
        with pytest.raises(UnsupportedOptimizerError, match="given the optimizer Lookahead; it models"):
            AdamW().linearise(wrapper)

    def test_a_subclass_of_a_known_wrapper_that_steps_otherwise(self, accelerate: Any) -> None:
        class Twice(accelerate):  # type: ignore[misc]
            def step(self, closure: Any = None) -> None:
                super().step(closure)
                super().step(closure)

        class Renamed(accelerate):  # type: ignore[misc]
            pass

        inner = adamw(parameters())
        assert unwrapped(Renamed(inner)) is inner
        wrapper = Twice(inner)
        assert unwrapped(wrapper) is wrapper
        with pytest.raises(UnsupportedOptimizerError, match="Twice; modelled are"):
            preconditioner_for(wrapper)

    def test_a_known_wrapper_of_something_else(self, accelerate: Any) -> None:
        wrapper = accelerate(SimpleNamespace(param_groups=[], state={}), device_placement=False)
        with pytest.raises(
            UnsupportedOptimizerError, match=r"AcceleratedOptimizer around a SimpleNamespace; .*Optimizer; wrap one"
        ):
            unwrapped(wrapper)

    @pytest.mark.parametrize("given", [None, [Parameter(torch.ones(2))], SimpleNamespace(optimizer=None)])
    def test_no_optimizer_at_all(self, given: Any) -> None:
        with pytest.raises(UnsupportedOptimizerError, match=r"neither a torch.optim.Optimizer nor a wrapper .*; pass"):
            unwrapped(given)

    @pytest.mark.parametrize("preconditioner", [SGD(), Identity()])
    def test_what_holds_an_optimizer_is_no_wrapper(self, preconditioner: Preconditioner) -> None:
        holder: Any = SimpleNamespace(optimizer=torch.optim.SGD(parameters(), lr=0.1))
        with pytest.raises(UnsupportedOptimizerError, match="a SimpleNamespace, neither"):
            preconditioner.linearise(holder)
