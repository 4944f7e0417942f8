"""Each rule against a per-sample loop in float64: an audited step, then a lean one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw.errors import CandidateLayoutError, ConfigurationError, CoverageError, RecordingError
from ftw.gradients import Auto, LoRA, Recorder
from ftw.gradients.rules import FunctionalRule, rules_for
from tests.models import batch_of, label_tokens, tiny_gpt2, tiny_llama, token_mean

Loss = Callable[[nn.Module, slice], Tensor]
"""The share of some rows in the loss of the whole batch."""


def worst_error(
    model: nn.Module, loss: Loss, rows: int, *, candidates: Any = None, functional: Any = (), **options: Any
) -> float:
    """The largest relative error of a parameter's contributions, over an audited and a lean step.

    Relative to the parameter's contributions, or to a thousandth of the largest parameter's where they vanish but for
    rounding (key biases).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    alone = [
        torch.autograd.grad(loss(model, slice(i, i + 1)), parameters, allow_unused=True, materialize_grads=True)
        for i in range(rows)
    ]
    expected = [torch.stack([each[j] for each in alone]) for j in range(len(parameters))]
    largest = max(float(value.norm()) for value in expected)
    recorder = Recorder(model, rules=rules_for(functional), **options)
    worst = 0.0
    for _ in range(2):
        recorder.clear()
        with recorder.record(candidates=candidates):
            loss(model, slice(0, rows)).backward()
        contributions = recorder.contributions()
        assert all(p.grad is None for p in parameters)
        for p, value in zip(parameters, expected, strict=True):
            if float(value.norm()) == 0.0:
                continue
            error = float((contributions.per_candidate(p) - value).norm())
            worst = max(worst, error / max(float(value.norm()), 1e-3 * largest))
    recorder.close()
    return worst


class Mixer(nn.Module):
    """A module with no rule: a gate of its own, a child used twice, a weight used outside its layer, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decay = nn.Parameter(torch.rand(5))
        self.inside = nn.Linear(5, 5)
        self.twin = nn.Linear(5, 5, bias=False)
        self.twin.weight = self.inside.weight
        self.register_buffer("shift", torch.rand(5))
        self.double()

    def forward(self, x: Tensor, scale: Tensor | None = None, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = torch.cumsum(self.inside(x) * self.decay, dim=1) + self.twin(torch.tanh(x)) + self.shift
        if scale is not None:
            state = state * scale[:, None, None]
        if table is not None:
            state = state + table * self.decay
        return state, nn.functional.linear(state, self.inside.weight.T).sum(1)


class Branching(Mixer):
    """A forward that vmap refuses: control flow by data."""

    def forward(self, x: Tensor, scale: Tensor | None = None, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if bool(x.sum() > 1e6):
            raise AssertionError
        return super().forward(x, scale, table)


class Around(nn.Module):
    """A model with the module, a head, and arguments with and without rows."""

    def __init__(self, mixer: nn.Module, length: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(5, 5, dtype=torch.float64)
        self.mixer = mixer
        self.register_buffer("table", torch.randn(length, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        state, total = self.mixer(self.first(x), scale=x[:, 0, 0], table=self.table)
        result: Tensor = state.square().mean((1, 2)) + total.tanh().sum(1)
        return result


def rows_of(count: int, length: int = 4, width: int = 5) -> Tensor:
    return torch.randn(count, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def mean_loss(x: Tensor) -> Loss:
    return lambda model, rows: model(x[rows]).sum() / len(x)


@pytest.mark.parametrize("mixer", [Mixer, Branching])
@pytest.mark.parametrize("named", ["name", "pattern", "class"])
def test_any_module_by_functional(mixer: type[Mixer], named: str) -> None:
    functional = [{"name": "mixer", "pattern": "mix*", "class": Mixer}[named]]
    assert worst_error(Around(mixer()), mean_loss(rows_of(3)), 3, functional=functional) < 1e-10


def test_vmap_is_used_where_it_can_and_the_loop_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import ftw.gradients.rules.functional as where

    loops = []
    original = where._one_by_one
    monkeypatch.setattr(where, "_one_by_one", lambda *args: loops.append(1) or original(*args))
    worst_error(Around(Mixer()), mean_loss(rows_of(3)), 3, functional=["mixer"])
    assert not loops
    worst_error(Around(Branching()), mean_loss(rows_of(3)), 3, functional=["mixer"])
    assert len(loops) == 2


def test_functional_with_several_rows_a_candidate() -> None:
    model, x = Around(Mixer()), rows_of(5)
    owner = torch.tensor([0, 1, 0, 1, 1])
    params = list(model.parameters())
    recorder = Recorder(model, rules=rules_for(["mixer"]))
    for _ in range(2):
        recorder.clear()
        with recorder.record(candidates=owner):
            model(x).sum().backward()
    for i in range(2):
        alone = torch.autograd.grad(model(x[owner == i]).sum(), params)
        for p, value in zip(params, alone, strict=True):
            torch.testing.assert_close(recorder.contributions().per_candidate(p)[i], value, rtol=1e-11, atol=1e-14)


def test_functional_module_with_a_child_of_two_names() -> None:
    mixer = Mixer()
    mixer.alias = mixer.inside
    model = Around(mixer)
    parameters = list(model.parameters())
    assert worst_error(model, mean_loss(rows_of(3)), 3, functional=["mixer"]) < 1e-10
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


def test_functional_module_called_twice_and_under_checkpointing() -> None:
    class Twice(Around):
        def forward(self, x: Tensor) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            first = self.mixer(self.first(x))[0]
            again = checkpoint(self.mixer, first.tanh(), use_reentrant=False)[1]
            return first.square().sum((1, 2)) + again.sum(1)

    assert worst_error(Twice(Mixer()), mean_loss(rows_of(3)), 3, functional=[Mixer]) < 1e-10


def test_functional_refuses_random_modules_and_leaves_the_random_state() -> None:
    class Random(Mixer):
        def forward(self, x: Tensor, scale: Any = None, table: Any = None) -> tuple[Tensor, Tensor]:
            return super().forward(nn.functional.dropout(x, 0.5, self.training), scale, table)

    model, x = Around(Random()).train(), rows_of(3)
    recorder = Recorder(model, rules=rules_for(["mixer"]))
    torch.manual_seed(5)
    with pytest.raises(RecordingError, match="draws random numbers"), recorder.record():
        model(x).sum().backward()
    after = torch.rand(())
    torch.manual_seed(5)
    model(x)
    assert torch.equal(after, torch.rand(()))
    assert worst_error(model.eval(), mean_loss(x), 3, functional=["mixer"]) < 1e-10


def test_an_argument_as_long_as_the_batch_by_chance_is_noticed() -> None:
    model = Around(Branching(), length=4)
    recorder = Recorder(model, rules=rules_for(["mixer"]), check=False)
    with pytest.raises((CandidateLayoutError, RecordingError), match="alone"), recorder.record():
        model(rows_of(4)).sum().backward()


def test_functional_refuses_what_has_no_rows() -> None:
    class Scalar(Mixer):
        def forward(self, x: Tensor, scale: Any = None, table: Any = None) -> tuple[Tensor, Tensor]:
            state, total = super().forward(x)
            return state, total.mean()

    class Outer(Around):
        def forward(self, x: Tensor) -> Tensor:
            state, total = self.mixer(x)
            result: Tensor = state.sum((1, 2)) + total
            return result

    model = Outer(Scalar())
    model.first.requires_grad_(False)
    recorder = Recorder(model, rules=rules_for(["mixer"]))
    with pytest.raises(CandidateLayoutError, match="no leading dimensions"), recorder.record():
        model(rows_of(3)).sum().backward()


def test_token_maps_need_a_module_that_acts_on_tokens() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.slope = nn.Parameter(torch.rand(5, dtype=torch.float64))
            self.power = nn.Parameter(torch.rand(5, dtype=torch.float64) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.slope * torch.exp(self.power * x.tanh())

    class Flattening(nn.Module):
        def __init__(self, flatten: bool) -> None:
            super().__init__()
            self.inner = Pointwise()
            self.flatten = flatten

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x.flatten(0, 1) if self.flatten else x)
            return y.view_as(x).square().sum((1, 2))

    x = rows_of(3)
    rule = FunctionalRule(Pointwise, flat=True)
    for flatten in (False, True):
        assert worst_error(Flattening(flatten), mean_loss(x), 3, functional=[rule]) < 1e-10
    model = Flattening(False)
    owner = torch.tensor([[0, 0, 1, 1], [2, 2, 2, -1], [3, 3, 3, 3]])
    recorder = Recorder(model, rules=rules_for([rule]))
    with recorder.record(candidates=owner):
        model(x)[[0, 2]].sum().backward()  # row 1 holds a token that is nobody's
    found = recorder.contributions().per_candidate(model.inner.slope)
    for i, (row, columns) in enumerate([(0, slice(0, 2)), (0, slice(2, 4)), (1, slice(0, 3)), (2, slice(0, 4))]):
        part = model.inner(x[row, columns]).square().sum() * (row != 1)
        (alone,) = torch.autograd.grad(part, [model.inner.slope])
        torch.testing.assert_close(found[i], alone, rtol=1e-11, atol=1e-14)
    strict = Recorder(model, rules=rules_for([Pointwise]))
    with pytest.raises(CandidateLayoutError, match="flat=True"), strict.record(candidates=owner):
        model(x)[[0, 2]].sum().backward()


def test_functional_names_must_exist() -> None:
    for given, message in ((["mixr"], "mixr.*near are"), ([nn.Conv2d], "Conv2d"), ([3], "3"), ("mixer", "list")):
        with pytest.raises(ConfigurationError, match=message):
            Recorder(Around(Mixer()), rules=rules_for(given))  # type: ignore[arg-type]


class Attending(nn.Module):
    """An attention with all its options, between layers of another kind."""

    def __init__(self, use: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.heads = 2
        self.first = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, self.heads, batch_first=True, **options)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.2 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        rows, length, _ = x.shape
        padding = torch.zeros(rows, length, dtype=torch.bool)
        padding[:, -1] = x[:, 0, 0] > 0
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        options: dict[str, Any] = {
            "self": {},
            "padded": {"key_padding_mask": padding, "need_weights": False},
            "causal": {"attn_mask": causal, "key_padding_mask": padding},
            "heads": {"attn_mask": x.detach()[:, :1, :length].repeat_interleave(self.heads, 0).expand(-1, length, -1)},
            "cross": {},
            "weights": {"average_attn_weights": False},
        }[self.use]
        memory = torch.cat([x.tanh(), x.flip(1)[:, :2]], 1) if self.use == "cross" else x
        out, attention = self.attention(x, memory[..., : self.attention.kdim], memory, **options)
        total = out.square().sum((1, 2))
        if attention is not None and self.use != "self":
            total = total + attention.pow(3).flatten(1).sum(1)
        result: Tensor = total
        return result


ATTENTIONS: dict[str, dict[str, Any]] = {
    "joint": {},
    "separate": {"kdim": 4},
    "learned keys": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("use", ["self", "padded", "causal", "heads", "cross", "weights"])
@pytest.mark.parametrize("options", ATTENTIONS)
def test_multihead_attention(use: str, options: str) -> None:
    x = rows_of(3, 4, 6)
    assert worst_error(Attending(use, **ATTENTIONS[options]), mean_loss(x), 3) < 1e-10


def test_token_maps_reach_multihead_attention() -> None:
    rows = torch.arange(3)[:, None].expand(3, 4)
    assert worst_error(Attending("causal"), mean_loss(rows_of(3, 4, 6)), 3, candidates=rows) < 1e-10


@pytest.mark.parametrize(
    ("use", "options", "message"), [("cross", "joint", "other"), ("self", "learned keys", "learned")]
)
def test_tokens_whose_keys_are_unknown_are_refused(use: str, options: str, message: str) -> None:
    rows = torch.arange(3)[:, None].expand(3, 4)
    with pytest.raises(CandidateLayoutError, match=f"{message}.*give one candidate a row"):
        worst_error(Attending(use, **ATTENTIONS[options]), mean_loss(rows_of(3, 4, 6)), 3, candidates=rows)


def test_a_functional_module_without_a_tensor_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.rand(5, dtype=torch.float64))

        def forward(self, flag: bool) -> Tensor:
            return self.start.exp() if flag else self.start

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare = Bare()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = (x * self.bare(True)).sum((1, 2))
            return result

    model = Outer()
    with (
        pytest.raises(CandidateLayoutError, match="without a tensor"),
        Recorder(model, rules=rules_for([Bare])).record(),
    ):
        model(rows_of(3)).sum().backward()
    assert worst_error(model, mean_loss(rows_of(3)), 3, functional=[Outer]) < 1e-10


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder(training: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.encoder(x, src_key_padding_mask=x[..., 0] > 1.0).square().sum((1, 2))
            return result

    assert worst_error(Encoder().train(training), mean_loss(rows_of(3, 4, 6)), 3) < 1e-10


def test_multihead_attention_refuses_dropout_and_time_first() -> None:
    model, x = Attending("self", dropout=0.1), rows_of(3, 4, 6)
    with pytest.raises(RecordingError, match=r"dropout=0\.1"), Recorder(model).record():
        model(x).sum().backward()
    model = Attending("self")
    model.attention.batch_first = False
    with pytest.raises(CandidateLayoutError, match="batch_first=True"), Recorder(model).record():
        model(x).sum().backward()


def text_loss(batch: dict[str, Tensor]) -> Loss:
    total = label_tokens(batch).sum()

    def loss(model: nn.Module, rows: slice) -> Tensor:
        part = {key: value[rows] for key, value in batch.items()}
        return token_mean(model, part) * label_tokens(part).sum() / total

    return loss


def dora_llama(dropout: float = 0.0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3, lora_alpha=6, lora_dropout=dropout, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.1)
            if "magnitude" in name:
                p.mul_(1.1)
    return model.double().train()


@pytest.mark.parametrize("extractor", [Auto, LoRA])
def test_dora(extractor: type[Auto]) -> None:
    model = dora_llama()
    assert any("lora_magnitude_vector" in name for name, p in model.named_parameters() if p.requires_grad)
    assert worst_error(model, text_loss(batch_of(4)), 4, extractor=extractor()) < 1e-10
    # As many rows as a layer has inputs: the look at A and B by an identity matrix has no rows, and no gradient.
    assert worst_error(model, text_loss(batch_of(16, 6)), 16, extractor=extractor()) < 1e-10


def test_dora_with_dropout() -> None:
    model, batch = dora_llama(0.5), batch_of(4)
    recorder = Recorder(model)
    for _ in range(2):
        recorder.clear()
        torch.manual_seed(3)
        with recorder.record():
            token_mean(model, batch).backward()
    found = recorder.contributions().combine()
    torch.manual_seed(3)
    token_mean(model, batch).backward()
    for p, value in found.items():
        assert p.grad is not None
        torch.testing.assert_close(value, p.grad, rtol=1e-11, atol=1e-15)


NORMS = [
    # family, class, arguments, and whether its weight meets the model's own precision
    ("llama", "LlamaRMSNorm", (6,), True),
    ("gemma", "GemmaRMSNorm", (6,), False),
    ("gemma3", "Gemma3RMSNorm", (6,), False),
    ("gemma3n", "Gemma3nRMSNorm", (6,), False),
    ("olmoe", "OlmoeRMSNorm", (6,), True),
    ("t5", "T5LayerNorm", (6,), True),
    ("mt5", "MT5LayerNorm", (6,), True),
    ("pix2struct", "Pix2StructLayerNorm", (6,), True),
    ("cohere", "CohereLayerNorm", (6,), False),
    ("cohere", "CohereLayerNorm", ((4, 6),), False),
    ("deberta", "DebertaLayerNorm", (6,), True),
    ("imagegpt", "ImageGPTLayerNorm", (6,), True),
    ("chameleon", "ChameleonLayerNorm", ((6,),), True),
    ("qwen3_next", "Qwen3NextRMSNorm", (6,), False),
    ("qwen3_next", "Qwen3NextRMSNormGated", (6,), False),
    ("mamba2", "MambaRMSNormGated", (6, 3), False),
    ("bamba", "BambaRMSNormGated", (6, 3), False),
]


def norm_of(family: str, name: str, args: tuple[Any, ...]) -> nn.Module:
    from importlib import import_module

    torch.manual_seed(0)
    made = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)(*args).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p))
    module: nn.Module = made
    return module


@pytest.mark.parametrize(("family", "name", "args", "exact"), NORMS, ids=lambda value: str(value))
def test_norms_of_transformers(family: str, name: str, args: tuple[Any, ...], exact: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm_of(family, name, args)

        def forward(self, x: Tensor) -> Tensor:
            out = self.norm(x, x.flip(1)) if name.endswith("Gated") else self.norm(x)
            result: Tensor = out.pow(3).flatten(1).mean(1)
            return result

    model, x = Model(), rows_of(3, 4, 6)
    # Those that work in float32 up to the weight or gate, whatever the model's precision, are compared in float32.
    if exact:
        assert worst_error(model, mean_loss(x), 3) < 1e-10
    else:
        assert worst_error(model.float(), mean_loss(x.float()), 3) < 1e-6


@pytest.mark.parametrize(
    ("family", "name", "args"),
    [("muse_spark", "MuseSparkTextInputScaledRMSNorm", (6,)), ("vitdet", "VitDetLayerNorm", (6,))],
)
def test_norms_that_are_not_affine_or_channels_first_are_refused(family: str, name: str, args: Any) -> None:
    with pytest.raises(CoverageError, match=name):
        Recorder(norm_of(family, name, args))
    with pytest.raises(CoverageError, match="GroupNorm"):
        Recorder(nn.GroupNorm(2, 6))


def tiny_mixture(family: str, implementation: str = "eager", **options: Any) -> nn.Module:
    """A mixture of experts from a configuration, in float64, its softmaxes and norms included."""
    import transformers

    tiny_llama()  # registers the attention that keeps the model's precision
    common: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": "exact",
        "pad_token_id": 0,
        "num_experts_per_tok": 2,
    }
    own: dict[str, Any] = {
        "Mixtral": {"num_local_experts": 5},
        "Qwen2Moe": {"num_experts": 5, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 8, "norm_topk_prob": True},
        "Olmoe": {"num_experts": 5},
        "DeepseekV3": {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 1,
            "q_lora_rank": 5,
            "kv_lora_rank": 5,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
        },
        "GptOss": {"num_local_experts": 5, "head_dim": 4, "attn_implementation": "eager"},
    }[family]
    config = getattr(transformers, f"{family}Config")(**(common | own | options))
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    model.config._experts_implementation = implementation
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):  # it squares in float32, whatever the model's precision
                setattr(module, name, nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double().train()


def route_in_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers take their softmax in float32, whatever the model's precision; then they do not."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim=-1, **_: softmax(x, dim))


@pytest.fixture
def keep_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    route_in_own_precision(monkeypatch)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV3", "GptOss"])
def test_mixtures_of_experts(family: str, implementation: str, keep_precision: None) -> None:
    model = tiny_mixture(family, implementation)
    functional = []
    if family == "GptOss":  # its attention has learned sinks
        functional = ["*.self_attn"]
        with (
            pytest.raises(RecordingError, match="use_cache=False"),
            Recorder(model, rules=rules_for(functional)).record(),
        ):
            token_mean(model, batch_of(4)).backward()
        model.config.use_cache = False  # type: ignore[union-attr]
    assert worst_error(model, text_loss(batch_of(4)), 4, functional=functional) < 1e-10


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe"])
def test_mixtures_of_experts_in_single_precision(family: str) -> None:
    model = tiny_mixture(family, "grouped_mm").float()  # the implementation that transformers prefers takes no float64
    # One candidate alone and a batch are multiplied in other orders: rounding of float32, through two layers.
    assert worst_error(model, text_loss(batch_of(4)), 4) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_mixtures_of_experts_under_checkpointing(reentrant: bool, keep_precision: None) -> None:
    model = tiny_mixture("Qwen2Moe")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:
        model.enable_input_require_grads()  # type: ignore[operator]
    assert worst_error_backward(model, batch_of(4)) < 1e-10


def worst_error_backward(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """`worst_error` for a model whose checkpoints need a plain `backward()`."""
    loss, rows = text_loss(batch), len(batch["input_ids"])
    parameters = list(model.parameters())
    expected = []
    for i in range(rows):
        loss(model, slice(i, i + 1)).backward()
        expected.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        model.zero_grad()
    recorder, worst = Recorder(model), 0.0
    for _ in range(2):
        recorder.clear()
        with recorder.record():
            loss(model, slice(0, rows)).backward()
        for j, p in enumerate(parameters):
            value = torch.stack([each[j] for each in expected])
            if float(value.norm()):
                error = float((recorder.contributions().per_candidate(p) - value).norm()) / float(value.norm())
                worst = max(worst, error if float(value.norm()) > 1e-12 else 0.0)
    return worst


def test_gradient_through_router_logits(keep_precision: None) -> None:
    batch = batch_of(4)

    def both(model: nn.Module, rows: slice) -> Tensor:
        out = model(
            input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows], output_router_logits=True
        )
        return torch.stack([each.square().sum() for each in out.router_logits]).sum() + out.logits.square().sum()

    assert worst_error(tiny_mixture("Mixtral"), both, 4) < 1e-10


def test_token_maps_reach_experts(keep_precision: None) -> None:
    model, batch = tiny_mixture("Qwen2Moe"), batch_of(4)
    rows = torch.arange(4)[:, None].expand(4, batch["input_ids"].shape[1])
    assert worst_error(model, text_loss(batch), 4, candidates=rows) < 1e-10


def test_gpt2() -> None:
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert worst_error(model, text_loss(batch_of(4)), 4) < 1e-10


HALF: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "functional": (lambda: Around(Mixer()), ["mixer"]),
    "functional in a loop": (lambda: Around(Branching()), ["mixer"]),
    "attention": (lambda: Attending("causal", add_bias_kv=True), ()),
    "attention weights": (lambda: Attending("weights"), ()),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_by_autocast_and_a_loss_scale(name: str) -> None:
    made, functional = HALF[name]
    model = made().float()
    x = rows_of(3, 4, 5 if functional else 6).float()
    recorder = Recorder(model, rules=rules_for(functional))
    for _ in range(2):  # the first compares with what autograd formed
        recorder.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16), recorder.record(loss_scale=512.0):
            loss = model(x).float().sum()
            (512.0 * loss).backward()
    found = recorder.contributions().combine()
    model(x).sum().backward()
    for p, value in found.items():
        assert p.grad is not None
        # bfloat16 rounds factors and outputs to 0.4 %; a chain of some ten such products
        assert float((value - p.grad).norm()) < 0.05 * float(p.grad.norm()) + 1e-3, p.shape


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe"])
@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_mixtures_of_experts_in_half_precision(family: str, mode: str) -> None:
    model, batch = tiny_mixture(family, "grouped_mm"), batch_of(4)
    model = model.float() if mode == "autocast" else model.bfloat16()
    recorder = Recorder(model)
    for _ in range(2):  # the first compares with what autograd formed
        recorder.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"), recorder.record():
            token_mean(model, batch).backward()
    assert all(bool(torch.isfinite(value).all()) for value in recorder.contributions().combine().values())


def test_dora_in_half_precision() -> None:
    model, batch = dora_llama().float(), batch_of(4)
    recorder = Recorder(model)
    for _ in range(2):  # the first compares with what autograd formed
        recorder.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16), recorder.record(loss_scale=512.0):
            (512.0 * token_mean(model, batch)).backward()
    assert recorder.count == 4
