"""Rule of look-up tables: `nn.Embedding`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn import Parameter

from ftw.gradients.pieces import Piece, RowScatter
from ftw.gradients.rules.base import Call, LayerRule, accumulate, is_plain


class EmbeddingRule(LayerRule):
    """`y = W[ids]`. Options that change W in the forward (`max_norm`) or its gradient are not handled."""

    summary = "rows of a look-up table"

    def handles(self, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Embedding)
            and type(module).forward is nn.Embedding.forward
            and module.max_norm is None
            and not module.scale_grad_by_freq
            and not module.sparse
            and is_plain(module)
        )

    def event(self, module: nn.Module) -> int:
        return 0

    def pieces(self, call: Call, wanted: Mapping[str, Parameter]) -> Iterator[tuple[str, Piece]]:
        tokens = call.tokens(call.inputs, 0)
        row_of = tokens.take(call.inputs, 0).long()
        if call.module.padding_idx is not None:
            row_of = row_of.masked_fill(row_of == call.module.padding_idx, -1)
        weight = wanted["weight"]
        yield (
            "weight",
            RowScatter(
                start=call.layout.start,
                shape=tuple(weight.shape),
                dtype=accumulate(weight),
                bounds=tokens.bounds,
                grads=tokens.take(call.grad),
                scale=call.scale,
                row_of=row_of,
            ),
        )
