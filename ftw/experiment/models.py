"""The models of `ftw run`: a local Hugging Face folder, or `tiny`, a small Llama pre-trained for a moment.

Called by `ftw.experiment.job`. Nothing here opens a network connection, runs code from a model folder or
unpickles: weights are read from safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftw.errors import ConfigurationError, DataError
from ftw.experiment.data import Row, collate, pool_order
from ftw.experiment.extras import optional

TINY = "tiny"

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
"""The small Llama: 0.6 million parameters with byte tokens."""


@dataclass(frozen=True)
class Pretraining:
    """How `tiny` is pre-trained: AdamW on the generic part, loss on every token."""

    steps: int = 150
    batch: int = 16
    lr: float = 3e-3
    warmup: int = 10
    seed: int = 0


def tiny_tokenizer() -> Any:
    """Bytes as tokens: 256 and pad, end, unknown. Needs no file."""
    return optional("transformers").ByT5Tokenizer(extra_ids=0)


def tiny(
    rows: Sequence[Row],
    pretraining: Pretraining,
    cache: Path | None,
    watch: Callable[[int, int], None] = lambda done, steps: None,
    architecture: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, str]:
    """The small Llama, pre-trained on `rows`, and what was done for it: "built" or "cached".

    The weights are kept in `cache` under a hash of architecture, rows and `pretraining`, so that a file is
    either exactly what would be built or of no interest. A file that cannot be read is built anew.

    Args:
        watch: called as `watch(done, steps)` while training.
        architecture: numbers of a `LlamaConfig`; default `ARCHITECTURE`.
    """
    tokenizer = tiny_tokenizer()
    shape = ARCHITECTURE if architecture is None else dict(architecture)
    model = _build(shape, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, pretraining.seed)
    path = None if cache is None else cache / f"tiny-{_key(rows, pretraining, shape)}.safetensors"
    if path is not None and _load(model, path):
        return model, "cached"
    _pretrain(model, rows, pretraining, tokenizer.pad_token_id, watch)
    if path is not None:
        _save(model, path)
    return model, "built"


def check_folder(folder: Path) -> None:
    """A `ConfigurationError` unless the folder looks like a model with safetensors; imports nothing heavy."""
    need = "a folder with config.json, *.safetensors and tokenizer files is needed, or the word 'tiny'"
    if not folder.is_dir():
        raise ConfigurationError(f"no model folder {folder}; {need}; check the path.")
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{folder} has no config.json; {need}; check the path.")
    if not any(folder.glob("*.safetensors")):
        raise ConfigurationError(
            f"{folder} has no *.safetensors; {need}, as pickled weights can run code; "
            "save the model again with safe_serialization."
        )


def local(folder: Path) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a local folder, in float32.

    Raises:
        ConfigurationError: transformers cannot read the folder, or it needs code of its own.
    """
    check_folder(folder)
    transformers = optional("transformers")
    transformers.utils.logging.disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"{folder} cannot be loaded: {reason}; a causal language model with its tokenizer is needed, "
            "without code of its own; check that both were saved there."
        ) from error
    return model.float(), tokenizer


def add_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """The model with LoRA adapters on every linear layer but the head; all else frozen."""
    peft = optional("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator
        torch.manual_seed(seed)
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, where gradients are wanted."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what training changes, for `restore`: each method starts from the same weights."""
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts a `snapshot` back and drops gradients."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(state[name])
            parameter.grad = None


def cache_folder() -> Path:
    """Where `tiny` is kept: `$XDG_CACHE_HOME/ftw`, by default `~/.cache/ftw`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path is invalid and is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ftw"


def _build(shape: dict[str, Any], vocabulary: int, pad: int, end: int, seed: int) -> nn.Module:
    transformers = optional("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, pad_token_id=pad, eos_token_id=end, bos_token_id=None, **shape
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def _key(rows: Sequence[Row], pretraining: Pretraining, shape: dict[str, Any]) -> str:
    # torch's version belongs to it: another one rounds differently, and initialises as it likes.
    settings = {
        "format": 1,
        "torch": torch.__version__,
        "model": shape,
        "pretraining": asdict(pretraining),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps(row.input_ids).encode())
    return digest.hexdigest()[:20]


def _load(model: nn.Module, path: Path) -> bool:
    safetensors = optional("safetensors.torch")
    if not path.is_file():
        return False
    try:
        model.load_state_dict(safetensors.load_file(str(path)))
    except Exception:  # cut short, overwritten, unreadable: whatever is wrong with it, the remedy is to rebuild
        return False
    return True


def _save(model: nn.Module, path: Path) -> None:
    safetensors = optional("safetensors.torch")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            safetensors.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, name)
            os.replace(name, path)  # atomic: another process sees the whole file or none
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError:
        return  # a cache that cannot be written costs the next run some seconds and nothing else


def _pretrain(
    model: nn.Module,
    rows: Sequence[Row],
    settings: Pretraining,
    pad: int,
    watch: Callable[[int, int], None],
) -> None:
    if not rows:
        raise DataError("the generic part holds no text; tiny is pre-trained on it; give a larger pool.")
    if not settings.steps:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_decay(settings))
    order = pool_order(len(rows), min(settings.batch, len(rows)), settings.steps, settings.seed)
    model.train()
    for done, indices in enumerate(order.tolist(), start=1):
        loss = model(**collate([rows[index] for index in indices], pad)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        watch(done, settings.steps)


def _warm_up_and_decay(settings: Pretraining) -> Callable[[int], float]:
    return lambda step: min((step + 1) / settings.warmup, max(0.05, 1 - step / settings.steps))
