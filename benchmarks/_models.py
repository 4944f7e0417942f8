"""Models and token numbers that benchmarks are run on: presets of known shapes with random weights, any size.

Used by `selection_cost.py`, `rivals.py` and `memory.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "family": "llama",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 64,
        "vocab_size": 4096,
    },
    "qwen3-0.6b": {
        "family": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "llama-3.2-1b": {
        "family": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
}
"""Shapes of the models, heads tied to the embeddings."""


def shape_of(preset: str, *, shrink: bool = False) -> dict[str, Any]:
    """A preset's configuration; shrunk, it keeps its kind of layers and its grouping of heads, and little else."""
    shape = dict(PRESETS[preset])
    if shrink:
        groups = shape["num_attention_heads"] // shape["num_key_value_heads"]
        shape |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2 * groups,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 97,
        }
    return shape


def build(
    shape: dict[str, Any],
    tokens: int,
    lora: bool,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    checkpointing: bool = False,
) -> nn.Module:
    """A model of that shape with random weights, in training mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    torch.manual_seed(0)
    values = {key: value for key, value in shape.items() if key != "family"}
    configuration = {"llama": LlamaConfig, "qwen3": Qwen3Config}[shape["family"]]
    config = configuration(**values, max_position_embeddings=max(tokens, 64), tie_word_embeddings=True, use_cache=False)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        # A hook that only the other kind of checkpointing needs, and that torch.func cannot transform.
        model.disable_input_require_grads()  # type: ignore[operator]
    return model.to(device).train()


def resized(shape: dict[str, Any], hidden: int | None, layers: int | None, vocabulary: int | None) -> dict[str, Any]:
    """Another size than the preset's, the rest in proportion; None leaves it."""
    shape = dict(shape)
    if hidden is not None:
        shape |= {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3 // 64 * 64, "head_dim": 64}
        shape |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    if vocabulary is not None:
        shape["vocab_size"] = vocabulary
    return shape


def token_numbers(rows: int, length: int, vocabulary: int, *, seed: int = 1) -> Tensor:  # (rows, length)
    """Words as frequent as in text (Zipf): rows then have something in common, and some candidate is always useful."""
    frequency = 1.0 / torch.arange(10.0, 10.0 + vocabulary)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(frequency, rows * length, replacement=True, generator=generator).view(rows, length)
