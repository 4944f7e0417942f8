"""Extractor `lora`: low-rank adapters, written out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn import Parameter

from ftw.errors import CoverageError
from ftw.gradients.full import Full


class LoRA(Full):
    """Materialises c_i of low-rank adapters: r * (d_in + d_out) numbers a layer and candidate.

    Exact and cheap for any update scale and any context length, and the layers' inputs are free again as soon as
    the backward has passed them. Adapters are recognised by "lora" in the parameter's name, as peft names them.
    """

    def check(self, model: nn.Module, parameters: Mapping[str, Parameter]) -> None:
        """Raise `CoverageError` if a trainable parameter is not an adapter's."""
        other = [name for name in parameters if "lora" not in name.lower()]
        if other:
            raise CoverageError(
                f"gradients='lora' was chosen, but {len(other)} trainable parameters are no adapter's: "
                f"{', '.join(other[:5])}{' ...' if len(other) > 5 else ''}; this extractor serves parameters with "
                "'lora' in their name; freeze the others, or choose gradients='auto'."
            )
