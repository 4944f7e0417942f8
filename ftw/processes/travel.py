"""Pieces as bytes: how contributions travel to the process that measures a parameter.

Factors travel as factors, so that a full-rank layer's contribution costs `T (d_in + d_out)` numbers, not `d_in d_out`.
Plain data: a JSON header and the tensors' own bytes; nothing is unpickled. Called by `ftw.processes.decide`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ftw.gradients.pieces import Broadcast, Dense, OuterProduct, Piece, RowScatter

_KINDS: Mapping[str, type[Piece]] = {kind.__name__: kind for kind in (Dense, OuterProduct, Broadcast, RowScatter)}

_ALIGN = 16
"""Every tensor begins at a multiple of this many bytes, so that it can be read in place."""


def of_candidates(pieces: Iterable[Piece], chosen: Sequence[int], first: int) -> list[Piece]:
    """The pieces of some candidates, `chosen` ascending, numbered anew from `first` in their order."""
    place = {candidate: first + i for i, candidate in enumerate(chosen)}
    result = []
    for piece in pieces:
        mine = [i for i in chosen if piece.start <= i < piece.start + piece.count]
        if mine:
            result.append(replace(piece.only(mine), start=place[mine[0]]))
    return result


def pack(pieces: Sequence[tuple[int, Piece]]) -> Tensor:  # -> (m,) uint8, on the CPU
    """Pieces with the number of their parameter, as bytes."""
    header: list[dict[str, Any]] = []
    body: list[Tensor] = []
    for number, piece in pieces:
        known = piece if type(piece).__name__ in _KINDS else piece.dense()
        plain: dict[str, Any] = {}
        tensors = []
        for each in fields(known):
            value = getattr(known, each.name)
            if isinstance(value, Tensor):
                tensors.append([each.name, str(value.dtype).removeprefix("torch."), list(value.shape)])
                body.append(_padded(value.detach().cpu().contiguous().flatten().view(torch.uint8)))
            else:
                plain[each.name] = str(value).removeprefix("torch.") if each.name == "dtype" else value
        header.append({"parameter": number, "kind": type(known).__name__, "plain": plain, "tensors": tensors})
    text = _padded(torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8))
    size = torch.tensor([len(text), 0]).view(torch.uint8)
    return torch.cat([size, text, *body])


def unpack(raw: Tensor, device_of: Sequence[torch.device]) -> list[tuple[int, Piece]]:
    """What `pack` packed, each piece on the device of its parameter, `device_of[number]`."""
    raw = raw.cpu()
    at = 16 + int(raw[:8].view(torch.int64))
    result = []
    for entry in json.loads(bytes(raw[16:at].tolist()).decode().rstrip("\0")):
        number, kind, plain = entry["parameter"], _KINDS[entry["kind"]], entry["plain"]
        values: dict[str, Any] = {
            name: getattr(torch, value) if name == "dtype" else tuple(value) if isinstance(value, list) else value
            for name, value in plain.items()
        }
        for name, dtype_name, shape in entry["tensors"]:
            dtype = getattr(torch, dtype_name)
            length = torch.Size(shape).numel() * dtype.itemsize
            values[name] = raw[at : at + length].view(dtype).view(shape).to(device_of[number])
            at += length + -length % _ALIGN
        result.append((number, kind(**values)))
    return result


def _padded(raw: Tensor) -> Tensor:
    return torch.nn.functional.pad(raw, (0, -len(raw) % _ALIGN))
