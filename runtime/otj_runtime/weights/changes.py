"""What changed in a rank's tensors since the version before: a snapshot of its share in the generator's dtype, compared on its device.

On a GPU one launch reads tensors and snapshot, packs what differs, brings the snapshot up to date and computes the checksums, each
byte once; blocks take their places in any order and are put in line afterwards. It is asked for part after part, all at once, and each part is
handed out when it is there, so that one is copied to the host while the GPU looks for the next. On a CPU the same is done tensor by tensor.

What it trades: memory of the trainer for bytes on the bus, a copy of the share in the generator's dtype and a packing buffer of an
eighth of it. A version with more than one element of `DENSEST` changed is not worth a patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch

from otj_runtime.weights.checksums import triton_dtype
from otj_runtime.weights.device_write import MADE_BYTES
from otj_runtime.weights.layout import PARTS, Layout, tensor_digest
from otj_runtime.weights.patch import BITS, BLOCK, Patch, encode, joined

DENSEST = 16
"""One changed element of so many is the most that a patch holds."""


class TooManyChanges(Exception):
    """More than a patch may hold."""


@dataclass(frozen=True)
class Changed:
    """The patch of a part of the share, and the new checksum of each tensor in it by position in the layout."""

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
        self._part_of: dict[int, int] = {}
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def remember(self, position: int, tensor: torch.Tensor) -> None:
        """Take a tensor into the snapshot."""
        entry = self._layout.tensors[position]
        if position not in self._snapshots:
            self._snapshots[position] = torch.empty(entry.count, dtype=entry.torch_dtype, device=self._device)
        self._snapshots[position].view(entry.shape).copy_(tensor.detach())

    def beside(self) -> AbstractContextManager[object]:
        """In the block, the device's work is not behind what it still looks for."""
        stream: AbstractContextManager[object] = nullcontext() if self._side is None else torch.cuda.stream(self._side)
        return stream

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

    def _in_parts(self, tensors: Iterable[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, Iterator[tuple[int, torch.Tensor]]]]:
        """The share cut into at most `PARTS` parts of about as many elements, and their numbers."""
        if len(self._part_of) != len(self._snapshots):
            before = list(accumulate(self._counts(), initial=0))
            self._part_of = {
                position: min(PARTS * begin // max(before[-1], 1), PARTS - 1)
                for position, begin in zip(self._snapshots, before, strict=False)
            }
        return groupby(tensors, key=lambda item: self._part_of[item[0]])

    @abstractmethod
    def find(self, tensors: Iterable[tuple[int, torch.Tensor]], *, limit: int) -> Iterator[Changed]:
        """What differs from the snapshot, which is brought up to date: `PARTS` parts, some perhaps empty.

        Args:
            tensors: the share, by position in the layout. All are taken, whatever is found.
            limit: most elements that may have changed.

        Raises:
            TooManyChanges: if it is more than `limit` or `most` elements, perhaps after some of the parts.
        """


class HostChanges(Changes):
    """On a CPU."""

    def find(self, tensors: Iterable[tuple[int, torch.Tensor]], *, limit: int) -> Iterator[Changed]:
        patches: list[list[Patch]] = [[_nothing(self._bits, self._device)] for _ in range(PARTS)]
        checksums: list[dict[int, int]] = [{} for _ in range(PARTS)]
        for part, members in self._in_parts(tensors):
            for position, tensor in members:
                entry, snapshot = self._layout.tensors[position], self._snapshots[position]
                new = tensor.detach().to(entry.torch_dtype).contiguous().view(-1)
                patches[part].append(encode(entry, new.view(self._bits), snapshot.view(self._bits)))
                snapshot.copy_(new)
                checksums[part][position] = tensor_digest(snapshot)
        if sum(len(patch.indices) for found in patches for patch in found) > min(limit, self.most):
            raise TooManyChanges
        for found, sums in zip(patches, checksums, strict=True):
            yield Changed(joined(found), sums)


class DeviceChanges(Changes):
    """On a GPU."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        super().__init__(layout, device)
        self._tables: dict[tuple[int, torch.dtype], _Table] = {}
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def find(self, tensors: Iterable[tuple[int, torch.Tensor]], *, limit: int) -> Iterator[Changed]:
        limit = min(limit, self.most)
        total = torch.zeros(1, dtype=torch.int64, device=self._device)
        asked = [_Asked.nothing(total)] * PARTS
        for part, members in self._in_parts(tensors):
            asked[part] = self._ask(members, total, limit)
        before = 0
        for one in asked:
            if one.done is not None:
                one.done.synchronize()
            with self.beside():
                changed, *sums = one.head.tolist()
            if changed > limit:
                raise TooManyChanges
            yield self._found(one, [value % 2**64 for value in sums], slice(before, changed))
            before = max(before, changed)

    def _ask(self, members: Iterable[tuple[int, torch.Tensor]], total: torch.Tensor, limit: int) -> _Asked:
        """Look at the tensors of a part, on the current stream."""
        launched: list[_Launched] = []
        kept: list[tuple[int, torch.Tensor]] = []
        made = 0
        for position, tensor in members:
            kept.append((position, tensor.detach().contiguous()))
            made += 0 if isinstance(tensor, torch.nn.Parameter) else kept[-1][1].nbytes
            if made >= MADE_BYTES:
                launched += self._launch(kept, total, limit)
                kept, made = [], 0
        launched += self._launch(kept, total, limit)
        return _Asked.of(launched, total)

    def _launch(self, kept: list[tuple[int, torch.Tensor]], total: torch.Tensor, limit: int) -> list[_Launched]:
        """Look at some tensors, on the current stream."""
        if self._buffers is None:
            self._buffers = tuple(torch.empty(self.most, dtype=dtype, device=self._device) for dtype in (torch.int16, self._bits))  # type: ignore[assignment]
        assert self._buffers is not None
        launched = []
        for source in {tensor.dtype for _, tensor in kept}:
            table = self._table(source, [(position, tensor) for position, tensor in kept if tensor.dtype == source])
            sums = torch.zeros(len(table.positions), dtype=torch.int64, device=self._device)
            starts = torch.empty_like(table.dests)
            counts = torch.empty(len(starts), dtype=torch.int32, device=self._device)
            dtype = self._layout.tensors[0].torch_dtype
            if len(starts):  # else all of them are empty
                _kernel()[(len(starts),)](
                    table.pieces,
                    table.programs,
                    sums,
                    total,
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

    def _found(self, asked: _Asked, sums: list[int], place: slice) -> Changed:
        """A part, whose elements took this place in the buffers."""
        assert self._buffers is not None
        if asked.dests is None or asked.counts is None:
            return Changed(_nothing(self._bits, self._device), {})
        indices, values = self._buffers
        return Changed(Patch(asked.dests, asked.counts, indices[place], values[place]), dict(zip(asked.positions, sums, strict=True)))

    def _table(self, source: torch.dtype, tensors: list[tuple[int, torch.Tensor]]) -> _Table:
        """The table of the tensors of one dtype; made anew only if they have moved."""
        pieces = [
            (tensor.data_ptr(), tensor.numel(), self._snapshots[position].data_ptr(), index)
            for index, (position, tensor) in enumerate(tensors)
        ]
        key = (tensors[0][0], source)
        if key not in self._tables or self._tables[key].source != pieces:
            counts = torch.tensor([-(-count // BLOCK) for _, count, _, _ in pieces], dtype=torch.int64)
            piece_of = torch.repeat_interleave(torch.arange(len(pieces)), counts)
            block_of = torch.arange(len(piece_of)) - (torch.cumsum(counts, 0) - counts)[piece_of]
            itemsize = self._bits.itemsize
            firsts = torch.tensor([self._layout.tensors[position].offset // itemsize for position, _ in tensors], dtype=torch.int64)
            self._tables[key] = _Table(
                source=pieces,
                positions=[position for position, _ in tensors],
                pieces=torch.tensor(pieces, dtype=torch.int64).view(-1, 4).to(self._device),
                programs=torch.stack([piece_of, block_of], dim=1).to(torch.int32).to(self._device),
                dests=(firsts[piece_of] + BLOCK * block_of).to(self._device),
            )
        return self._tables[key]


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


@dataclass(frozen=True)
class _Asked:
    """A part that the device looks for.

    Attributes:
        positions: of its tensors whose checksums are in `head`.
        head: how many elements had changed up to its end, and the checksums.
        dests, counts: of its blocks, in the order in which they took their places; None without any.
        done: when it is there; None on a CPU.
    """

    positions: list[int]
    head: torch.Tensor
    dests: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    done: torch.cuda.Event | None = None

    @classmethod
    def nothing(cls, total: torch.Tensor) -> _Asked:
        """A part without tensors."""
        return cls([], torch.zeros_like(total))

    @classmethod
    def of(cls, launched: list[_Launched], total: torch.Tensor) -> _Asked:
        """What some launches will have found, `total` being counted on until then, on the current stream."""
        if not launched:
            return cls.nothing(total)
        dests, starts, counts = (torch.cat(parts) for parts in zip(*((one.dests, one.starts, one.counts) for one in launched), strict=True))
        # A block without changes shares its place with the next one: which of them is first does not matter.
        order = torch.argsort(starts)
        head = torch.cat([total, *(one.sums for one in launched)])
        done = torch.cuda.Event() if total.device.type == "cuda" else None
        asked = cls([position for one in launched for position in one.positions], head, dests[order], counts[order], done)
        if done is not None:
            done.record(torch.cuda.current_stream(total.device))
        return asked


def _nothing(bits: torch.dtype, device: torch.device) -> Patch:
    return Patch(*(torch.empty(0, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32, torch.int16, bits)))


def _kernel() -> Any:
    """The kernel; a host without a GPU has no Triton."""
    from otj_runtime.weights.patch_kernel import find_changes

    return find_changes
