"""Greedy decoding of a causal language model, and exact match of what it says. Called by `cells`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftw.experiment import models
from ftw.experiment.data import SEPARATOR, Sample

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
BATCH = 32


@torch.no_grad()
def greedy(model: nn.Module, prompts: Sequence[Sequence[int]], most: int, end: int, pad: int = 0) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token, at most `most` tokens, without the end token.

    Prompts are padded on the left, their positions are counted from their own beginning, and keys and values are kept,
    so that each step costs one token a prompt.

    Args:
        prompts: token numbers, at least one each.
        end: the token that ends an answer.
    """
    mode = model.training
    model.eval()
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    position = (mask.cumsum(1) - 1).clamp_min(0)
    said: list[list[int]] = [[] for _ in prompts]
    open_: list[bool] = [True] * len(prompts)
    past: Any = None
    for _ in range(most):
        output = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=past, use_cache=True)
        past = output.past_key_values
        chosen: Tensor = output.logits[:, -1].argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            open_[row] = open_[row] and token != end
            if open_[row]:
                said[row].append(token)
        if not any(open_):
            break
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        position = position[:, -1:] + 1
    model.train(mode)
    return said


def answers(model: nn.Module, samples: Sequence[Sample], most: int) -> list[str]:
    """What the model with bytes as tokens says to each prompt; bytes that are no UTF-8 are left out."""
    tokenizer = models.tiny_tokenizer()
    found: list[str] = []
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        prompts = [tokenizer(each.prompt + SEPARATOR, add_special_tokens=False)["input_ids"] for each in part]
        found += [
            bytes(token - 3 for token in said if 3 <= token < 259).decode(errors="ignore")  # 3: pad, end, unknown
            for said in greedy(model, prompts, most, tokenizer.eos_token_id)
        ]
    return found


def accuracy(model: nn.Module, samples: Sequence[Sample], source: str, most: int) -> dict[str, float]:
    """Exact match over the samples: "exact" of the whole answer; of svamp also "number", the last one in it."""
    said = answers(model, samples, most)
    pairs = [(each, sample.response) for each, sample in zip(said, samples, strict=True)]
    figures = {"exact": _share([each.strip() == right.strip() for each, right in pairs])}
    if source == "svamp":
        figures["number"] = _share([same_number(each, right) for each, right in pairs])
    return figures


def same_number(said: str, right: str) -> bool:
    """Whether the last number of both is the same: `( 10.0 + 8.0 ) = 18` and `18.0` agree."""
    numbers = [NUMBER.findall(text) for text in (said, right)]
    return all(numbers) and math.isclose(float(numbers[0][-1]), float(numbers[1][-1]), rel_tol=1e-9, abs_tol=1e-9)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
