"""The data-parallel processes of a run: the few collectives that the selector needs.

Called by the selector and by `ftw.processes.decide`. Every method is collective unless it says
otherwise: all processes call it, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ftw.errors import RecordingError

BUCKET_BYTES = 64 << 20
"""Small tensors travel together, in buckets of at most this size (or of a single tensor)."""


class Group:
    """Processes that train one model, each on data of its own.

    Args:
        group: of `torch.distributed`; None: all processes.

    Attributes:
        rank, size: of this process, and how many there are.
        sent: bytes that this process has sent so far, those of a sum counted as a ring sends them:
            `2 (size - 1) / size` of what is summed.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        on_cpu = "gloo" in dist.get_backend_config(group) or "mpi" in dist.get_backend_config(group)
        self._device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def take_sent(self) -> int:
        """`sent` so far; counting begins anew. Not collective."""
        sent, self.sent = self.sent, 0
        return sent

    def gather(self, value: Any) -> list[Any]:
        """What every process says, in the order of ranks: numbers, strings, None, lists and mappings of them."""
        parts = self.exchange([_to_bytes(json.dumps(value).encode())] * self.size)
        return [json.loads(bytes(part.tolist()).decode()) for part in parts]

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor of one dtype, (m_r,), in the order of ranks, on the CPU."""
        flat = tensor.detach().to(self._device).contiguous().view(torch.uint8)
        return [part.cpu().view(tensor.dtype) for part in self.exchange([flat] * self.size)]

    def exchange(self, outgoing: Sequence[Tensor]) -> list[Tensor]:
        """Bytes for each process -> bytes from each: uint8 tensors (m,), on a device that the backend serves."""
        lengths = torch.tensor([len(part) for part in outgoing], device=self._device)
        expected = torch.empty_like(lengths)
        dist.all_to_all_single(expected, lengths, group=self._group)
        counts = expected.tolist()
        incoming = torch.empty(sum(counts), dtype=torch.uint8, device=self._device)
        whole = torch.cat([part.to(self._device) for part in outgoing])
        dist.all_to_all_single(incoming, whole, counts, lengths.tolist(), group=self._group)
        self.sent += lengths.nbytes + sum(len(part) for rank, part in enumerate(outgoing) if rank != self.rank)
        return list(incoming.split(counts))

    def sum(self, tensors: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """The sum over processes of each tensor, in its dtype; the same parameters, in the same order, everywhere."""
        result: dict[Parameter, Tensor] = {}
        for bucket in buckets(tensors):
            flat = torch.cat([tensors[p].detach().flatten() for p in bucket])
            where = flat.device
            flat = flat if where.type == self._device.type or _serves(self._group, where) else flat.to(self._device)
            dist.all_reduce(flat, group=self._group)
            self.sent += 2 * (self.size - 1) * flat.nbytes // self.size
            parts = flat.to(where).split([tensors[p].numel() for p in bucket])
            result |= {p: part.view_as(tensors[p]) for p, part in zip(bucket, parts, strict=True)}
        return {p: result[p] for p in tensors}

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Work without collectives that fails on all processes or on none, so that none waits for one that has left.

        Raises:
            RecordingError: another process failed; one that failed itself raises what it raised.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        said = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = [(rank, text) for rank, text in enumerate(said) if text is not None]
        if failed:
            rank, text = failed[0]
            raise RecordingError(
                f"process {rank} failed while {doing}, and so nothing was selected on any of the {self.size}; it said: "
                f"{text}"
            )


def _to_bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _serves(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    return f"{device.type}:" in dist.get_backend_config(group)


def buckets(tensors: Mapping[Parameter, Tensor]) -> Iterable[list[Parameter]]:
    """Parameters whose tensors share device and dtype, as many as fill a bucket."""
    alike: dict[tuple[torch.device, torch.dtype], list[Parameter]] = {}
    for p, tensor in tensors.items():
        alike.setdefault((tensor.device, tensor.dtype), []).append(p)
    for members in alike.values():
        bucket: list[Parameter] = []
        size = 0
        for p in members:
            if bucket and size + tensors[p].nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(p)
            size += tensors[p].nbytes
        if bucket:
            yield bucket
