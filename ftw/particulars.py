"""What the training loop says of a window's candidates: masses and columns, block by block. Used by the selector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import as_entries


class Block(NamedTuple):
    """What was said of the candidates of one block of `record()`."""

    mass: Tensor  # (count,) float64
    equal: bool  # it was not given
    columns: dict[str, list[Any]]


class Particulars:
    """Masses and columns of the candidates recorded so far, in their order."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []

    def fitting(self, mass: Any, extras: Mapping[str, Any], count: int) -> Block:
        """Those of a block that is not added yet: the recorder may still drop it.

        Args:
            mass: (count,) positive, on any common scale; None: equal. For all blocks of a window, or for none.
            extras: name -> column, one entry for each candidate; the same names in each block.
            count: candidates of the block.

        Raises:
            ConfigurationError: they do not fit the block, or those of earlier blocks.
        """
        if any(block.equal != (mass is None) for block in self._blocks if len(block.mass)):
            raise ConfigurationError(
                "mass was given for some micro-batches of the window and not for others; their scales cannot be "
                "compared; pass it for all or for none."
            )
        return Block(_mass(mass, count), mass is None, self._fitting(extras, count))

    def add(self, block: Block) -> None:
        """The block was kept."""
        self._blocks.append(block)

    def clear(self) -> None:
        """The window has ended."""
        self._blocks.clear()

    @property
    def mass(self) -> Tensor:  # (n,) float64
        """Of all candidates."""
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(block.mass for block in self._blocks)])

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Name -> one entry for each candidate."""
        names = self._blocks[0].columns if self._blocks else {}
        return {name: [entry for block in self._blocks for entry in block.columns[name]] for name in names}

    def _fitting(self, extras: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
        columns = {name: as_entries(f"extras[{name!r}]", column) for name, column in extras.items()}
        wrong = {name: len(column) for name, column in columns.items() if len(column) != count}
        if wrong:
            raise ConfigurationError(
                f"extras have {wrong} entries for {count} recorded candidates; one each is needed, in their order; "
                "index them like the candidates."
            )
        if self._blocks and self._blocks[0].columns.keys() != columns.keys():
            raise ConfigurationError(
                f"extras are {sorted(columns)} here and {sorted(self._blocks[0].columns)} in an earlier block of the "
                "window; filters need them of all candidates; pass the same names each time."
            )
        return columns


def _mass(mass: Any, count: int) -> Tensor:
    if mass is None:
        return torch.ones(count, dtype=torch.float64)
    given = mass if isinstance(mass, Tensor) else list(mass)
    values = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    if values.shape != (count,) or not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ConfigurationError(
            f"mass has shape {tuple(values.shape)} for {count} recorded candidates (smallest "
            f"{float(values.min()) if values.numel() else None}); one positive finite number per candidate is needed; "
            "leave candidates without label tokens out of the batch."
        )
    return values
