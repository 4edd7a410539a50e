"""What changed in a rank's tensors since the version before: a snapshot of its share in the generator's dtype, compared on its device.

On a GPU one launch reads tensors and snapshot, packs what differs, brings the snapshot up to date and computes the checksums, each
byte once; blocks take their places in any order and are put in line afterwards. On a CPU the same is done tensor by tensor.

What it trades: memory of the trainer for bytes on the bus, a copy of the share in the generator's dtype and a packing buffer of an
eighth of it. A version with more than one element of `DENSEST` changed is not worth a patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from otj_runtime.weights.checksums import triton_dtype
from otj_runtime.weights.device_write import MADE_BYTES
from otj_runtime.weights.layout import Layout, tensor_digest
from otj_runtime.weights.patch import BITS, BLOCK, Patch, encode, joined

DENSEST = 16
"""One changed element of so many is the most that a patch holds."""


@dataclass(frozen=True)
class Changed:
    """The patch of a share, and the new checksum of each of its tensors by position in the layout."""

    patch: Patch
    checksums: dict[int, int]


class Changes(ABC):
    """The snapshot of the tensors that one rank writes.

    Args:
        layout: of the mailbox.
        device: where the tensors are.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._bits = BITS[layout.tensors[0].torch_dtype.itemsize]
        self._snapshots: dict[int, torch.Tensor] = {}

    def remember(self, position: int, tensor: torch.Tensor) -> None:
        """Take a tensor into the snapshot."""
        entry = self._layout.tensors[position]
        if position not in self._snapshots:
            self._snapshots[position] = torch.empty(entry.count, dtype=entry.torch_dtype, device=self._device)
        self._snapshots[position].view(entry.shape).copy_(tensor.detach())

    @property
    def blocks(self) -> int:
        """Blocks of the share."""
        return sum(-(-count // BLOCK) for count in self._counts())

    @property
    def most(self) -> int:
        """Most changed elements of a patch."""
        return max(sum(self._counts()) // DENSEST, BLOCK)

    def _counts(self) -> Iterator[int]:
        """Elements of each tensor of the share; from the layout, because asking the tensors takes nine times as long."""
        return (self._layout.tensors[position].count for position in self._snapshots)

    @abstractmethod
    def find(self, tensors: Iterable[tuple[int, torch.Tensor]], *, limit: int) -> Changed | None:
        """What differs from the snapshot, which is brought up to date; None if it is more than `limit` or `most` elements.

        Args:
            tensors: the share, by position in the layout. All are taken, whatever is found.
        """


class HostChanges(Changes):
    """On a CPU."""

    def find(self, tensors: Iterable[tuple[int, torch.Tensor]], *, limit: int) -> Changed | None:
        patches = [_nothing(self._bits)]
        checksums = {}
        for position, tensor in tensors:
            entry, snapshot = self._layout.tensors[position], self._snapshots[position]
            new = tensor.detach().to(entry.torch_dtype).contiguous().view(-1)
            patches.append(encode(entry, new.view(self._bits), snapshot.view(self._bits)))
            snapshot.copy_(new)
            checksums[position] = tensor_digest(snapshot)
        patch = joined(patches)
        return Changed(patch, checksums) if len(patch.indices) <= min(limit, self.most) else None


class DeviceChanges(Changes):
    """On a GPU."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        super().__init__(layout, device)
        self._tables: dict[torch.dtype, _Table] = {}
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def find(self, tensors: Iterable[tuple[int, torch.Tensor]], *, limit: int) -> Changed | None:
        limit = min(limit, self.most)
        self._total = torch.zeros(1, dtype=torch.int64, device=self._device)
        launched: list[_Launched] = []
        kept: list[tuple[int, torch.Tensor]] = []
        made = 0
        for position, tensor in tensors:
            kept.append((position, tensor.detach().contiguous()))
            made += 0 if isinstance(tensor, torch.nn.Parameter) else kept[-1][1].nbytes
            if made >= MADE_BYTES:
                launched += self._launch(kept, limit)
                kept, made = [], 0
        launched += self._launch(kept, limit)
        changed = int(self._total.item())
        if changed > limit:
            return None
        checksums: dict[int, int] = {}
        for launch in launched:
            checksums.update(zip(launch.positions, (value % 2**64 for value in launch.sums.tolist()), strict=True))
        return Changed(self._in_line(launched, changed), checksums)

    def _launch(self, kept: list[tuple[int, torch.Tensor]], limit: int) -> list[_Launched]:
        """Look at some tensors, on the current stream."""
        if self._buffers is None:
            self._buffers = tuple(torch.empty(self.most, dtype=dtype, device=self._device) for dtype in (torch.int16, self._bits))  # type: ignore[assignment]
        assert self._buffers is not None
        launched = []
        for source in {tensor.dtype for _, tensor in kept}:
            table = self._table(source, [(position, tensor) for position, tensor in kept if tensor.dtype == source])
            if not table.programs.shape[0]:
                continue
            sums = torch.zeros(len(table.positions), dtype=torch.int64, device=self._device)
            starts = torch.empty_like(table.dests)
            counts = torch.empty(len(starts), dtype=torch.int32, device=self._device)
            dtype = self._layout.tensors[0].torch_dtype
            _kernel()[(len(starts),)](
                table.pieces,
                table.programs,
                sums,
                self._total,
                starts,
                counts,
                *self._buffers,
                limit,
                triton_dtype(source),
                triton_dtype(dtype),
                dtype.itemsize == 4,
                BLOCK,
                num_warps=16,
            )
            launched.append(_Launched(table.positions, sums, table.dests, starts, counts))
        return launched

    def _in_line(self, launched: list[_Launched], changed: int) -> Patch:
        """The patch, its blocks in the order in which they took their places."""
        assert self._buffers is not None
        if not launched:
            return _nothing(self._bits)
        dests, starts, counts = (torch.cat(parts) for parts in zip(*((one.dests, one.starts, one.counts) for one in launched), strict=True))
        # A block without changes shares its place with the next one: which of them is first does not matter.
        order = torch.argsort(starts)
        indices, values = self._buffers
        return Patch(dests[order], counts[order], indices[:changed], values[:changed])

    def _table(self, source: torch.dtype, tensors: list[tuple[int, torch.Tensor]]) -> _Table:
        """The table of the tensors of one dtype; made anew only if they have moved."""
        pieces = [
            (tensor.data_ptr(), tensor.numel(), self._snapshots[position].data_ptr(), index)
            for index, (position, tensor) in enumerate(tensors)
        ]
        if source not in self._tables or self._tables[source].source != pieces:
            counts = torch.tensor([-(-count // BLOCK) for _, count, _, _ in pieces], dtype=torch.int64)
            piece_of = torch.repeat_interleave(torch.arange(len(pieces)), counts)
            block_of = torch.arange(len(piece_of)) - (torch.cumsum(counts, 0) - counts)[piece_of]
            itemsize = self._bits.itemsize
            firsts = torch.tensor([self._layout.tensors[position].offset // itemsize for position, _ in tensors], dtype=torch.int64)
            self._tables[source] = _Table(
                source=pieces,
                positions=[position for position, _ in tensors],
                pieces=torch.tensor(pieces, dtype=torch.int64).view(-1, 4).to(self._device),
                programs=torch.stack([piece_of, block_of], dim=1).to(torch.int32).to(self._device),
                dests=(firsts[piece_of] + BLOCK * block_of).to(self._device),
            )
        return self._tables[source]


@dataclass(frozen=True)
class _Table:
    """What one launch walks; `dests` as in `Patch`, one for each program."""

    source: list[tuple[int, int, int, int]]
    positions: list[int]
    pieces: torch.Tensor
    programs: torch.Tensor
    dests: torch.Tensor


@dataclass(frozen=True)
class _Launched:
    """What one launch leaves."""

    positions: list[int]
    sums: torch.Tensor
    dests: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor


def _nothing(bits: torch.dtype) -> Patch:
    return Patch(*(torch.empty(0, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int16, bits)))


def _kernel() -> Any:
    """The kernel; a host without a GPU has no Triton."""
    from otj_runtime.weights.patch_kernel import find_changes

    return find_changes
