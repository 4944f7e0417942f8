"""Small models for tests, made from configurations. Nothing is downloaded."""

from __future__ import annotations

import torch
from torch import nn


def exact_attention(module: nn.Module, query, key, value, attention_mask, scaling, dropout=0.0, **_):  # type: ignore[no-untyped-def]
    """transformers' eager attention, in the model's own precision: theirs takes the softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def tiny_llama(dtype: torch.dtype = torch.float64, *, tied: bool = False, layers: int = 2, seed: int = 0) -> nn.Module:
    """A Llama with grouped-query attention, biases in the attention, 2 layers, 61 tokens."""
    from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("exact", exact_attention)
    AttentionMaskInterface.register("exact", eager_mask)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
        attn_implementation="exact",
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":  # it squares in float32, whatever the model's precision
                setattr(module, name, nn.RMSNorm(16, eps=child.variance_epsilon))
    model = model.to(dtype)
    with torch.no_grad():  # biases and norms start at constants; move them, so that nothing is zero by luck
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.train()


def lora_llama(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """The tiny Llama with LoRA adapters on all linear layers, B not zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_llama(dtype, seed=seed),
        LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.1)
    return model.to(dtype).train()


def tiny_gpt2(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> nn.Module:
    """A GPT-2 of 2 layers and 61 tokens without dropout; nothing in it is in another precision than `dtype`.

    Its norms are torch's own, its loss `token_mean`; only the attention's softmax had to be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("exact", exact_attention)
    AttentionMaskInterface.register("exact", eager_mask)

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=61,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
        attn_implementation="exact",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(dtype)
    with torch.no_grad():  # biases and norms start at constants
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.train()


def batch_of(rows: int, length: int = 11, *, seed: int = 0, vocabulary: int = 61) -> dict[str, torch.Tensor]:
    """Right-padded rows of different lengths, prompt tokens masked in the labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for i in range(rows):
        used = length - (i * 2) % (length - 4)
        mask[i, used:] = 0
        ids[i, used:] = 0
        labels[i, used:] = -100
        labels[i, : 1 + i % 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def label_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens that each row's loss is a mean over: labels after the shift of causal language models."""
    return (batch["labels"][:, 1:] != -100).sum(1)


class MLP(nn.Module):
    """A plain regression model with every kind of layer that is recorded, without transformers."""

    def __init__(self, width: int = 6, inside: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(width, inside)
        self.norm = nn.LayerNorm(inside)
        self.root = nn.RMSNorm(inside)
        self.last = nn.Linear(inside, 2)
        self.to(dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * torch.randn_like(p))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.root(torch.tanh(self.norm(self.first(x)))))
        return result


def token_mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss over label tokens in the model's own precision (transformers' own loss is float32)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
