"""Checksums of tensors that lie on a GPU, in one pass over many pieces of memory and without a copy to the host.

    checksum of a tensor = sum over its elements of bits(element) * weight(position), modulo 2**64

`bits` are the element's bits in the generator's dtype, `position` its place in the flattened tensor, `weight` an odd number that looks
random. So a swap, a shift or a lost piece shows, and the sum may be collected from pieces in any order: of the trainer's tensors, cast
on the way, and of what was staged.

One launch walks a table of pieces that is made once. What it trades: it is no digest against an adversary, and on a GPU it needs Triton,
which comes with every CUDA build of torch. On a CPU it is slow, and only tests ask for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from otj_runtime.weights.patch import BITS

BLOCK = 4096
"""Elements that one program of the kernel sums."""

MULTIPLIER = -7046029254386353131  # 0x9E3779B97F4A7C15, the odd number next to 2**64 / golden ratio
MIXER = -4658895280553007687  # 0xBF58476D1CE4E5B9


@dataclass(frozen=True)
class Piece:
    """Rows of elements in memory that belong to one tensor.

    Attributes:
        address: of the first element.
        count: number of elements.
        columns: elements of a row.
        stride: elements from one row to the next, in memory.
        position: place of the first element in the flattened tensor.
        position_stride: places from one row to the next.
        target: index of the sum that it adds to.
    """

    address: int
    count: int
    columns: int
    stride: int
    position: int
    position_stride: int
    target: int

    @classmethod
    def flat(cls, address: int, count: int, target: int) -> Piece:
        """A whole tensor that lies in one run."""
        return cls(address, count, max(count, 1), 0, 0, 0, target)


class Checksums:
    """Sums over a fixed set of pieces, recomputed at each call.

    Args:
        pieces: in an order such that `ranges` of it are summed together.
        targets: number of sums.
        source: dtype of the elements in memory.
        dtype: the generator's dtype, which they are cast to.
        device: of the memory.
    """

    def __init__(
        self, pieces: Sequence[Piece], *, targets: int, source: torch.dtype, dtype: torch.dtype, device: torch.device | int
    ) -> None:
        fields = [[p.address, p.count, p.columns, p.stride, p.position, p.position_stride, p.target] for p in pieces]
        blocks = torch.tensor([-(-piece.count // BLOCK) for piece in pieces], dtype=torch.int64)
        self._first = [0, *torch.cumsum(blocks, 0).tolist()]
        piece_of = torch.repeat_interleave(torch.arange(len(pieces)), blocks)
        block_of = torch.arange(self._first[-1]) - torch.tensor(self._first)[piece_of]
        self._pieces = torch.tensor(fields, dtype=torch.int64).view(-1, 7).to(device)
        self._programs = torch.stack([piece_of, block_of], dim=1).to(torch.int32).to(device)
        self.sums = torch.zeros(targets, dtype=torch.int64, device=device)
        self._source, self._dtype = source, dtype
        self._flat = all(piece.count <= piece.columns for piece in pieces)

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], *, dtype: torch.dtype, device: torch.device) -> Checksums:
        """One sum for each of these tensors, which are contiguous, of one dtype, and in memory that `device` can read."""
        pieces = [Piece.flat(tensor.data_ptr(), tensor.numel(), index) for index, tensor in enumerate(tensors)]
        return cls(pieces, targets=len(pieces), source=tensors[0].dtype, dtype=dtype, device=device)

    def add(self, start: int, end: int) -> None:
        """Add pieces `start` to `end` to their sums, on the current stream."""
        first, programs = self._first[start], self._first[end] - self._first[start]
        if self._pieces.device.type == "cpu":
            for piece in (Piece(*fields) for fields in self._pieces[start:end].tolist()):
                self.sums[piece.target] += by_definition(piece, source=self._source, dtype=self._dtype)
        elif programs:
            self.launch(first, programs)

    def launch(self, first: int, programs: int) -> None:
        """Let the kernel add so many blocks, from block `first` on."""
        _kernel()[(programs,)](
            self._pieces,
            self._programs,
            self.sums,
            first,
            self._flat,
            triton_dtype(self._source),
            triton_dtype(self._dtype),
            self._dtype.itemsize == 4,
            BLOCK,
            num_warps=8,
        )

    def compute(self) -> torch.Tensor:
        """All sums anew, on the current stream: int64 on the device, to be read as unsigned."""
        self.sums.zero_()
        self.add(0, len(self._first) - 1)
        return self.sums

    def values(self) -> list[int]:
        """The sums as they are now, unsigned, as the mailbox notes them. Waits for the current stream."""
        return [value % 2**64 for value in self.sums.tolist()]


def by_definition(piece: Piece, *, source: torch.dtype, dtype: torch.dtype) -> int:
    """What a piece of a CPU's memory adds to its sum: slow."""
    rows = -(-piece.count // piece.columns)
    reach = (rows - 1) * piece.stride + piece.columns
    memory = (ctypes.c_char * (reach * source.itemsize)).from_address(piece.address)
    values = torch.frombuffer(memory, dtype=source).as_strided((rows, piece.columns), (piece.stride, 1)).to(dtype).contiguous()
    bits = values.view(BITS[dtype.itemsize]).to(torch.int64)
    position = piece.position + torch.arange(rows)[:, None] * piece.position_stride + torch.arange(piece.columns)
    mixed = position * MULTIPLIER
    mixed = (mixed ^ ((mixed >> 29) & ((1 << 35) - 1))) * MIXER | 1
    return int((bits * mixed).view(-1)[: piece.count].sum())


def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


_compiled: Any = None


def _kernel() -> Any:
    """The kernel; made at first use, because a host without a GPU has no Triton."""
    global _compiled
    if _compiled is None:
        from otj_runtime.weights.checksum_kernel import add_pieces

        _compiled = add_pieces
    return _compiled
