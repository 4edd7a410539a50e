"""Runs what a GPU finds and applies patches with in Triton's interpreter, on a CPU: python -m tests.unit.weights.interpreted FROM TO.

A process of its own: Triton decides when it is imported whether it interprets. What it finds is compared with what torch finds.
"""

from __future__ import annotations

import sys

import torch

from otj_runtime.weights.changes import DeviceChanges, TooManyChanges
from otj_runtime.weights.checksums import BLOCK, Checksums, Piece, by_definition
from otj_runtime.weights.layout import PARTS, Layout
from otj_runtime.weights.patch import BITS, apply_by_kernel

SHAPES = {"several": (3, 2500), "small": (5,), "exact": (2, 4096), "empty": (0,), "scalar": (), "last": (0, 7)}


def main(source: torch.dtype, dtype: torch.dtype) -> None:
    """Three versions, each a patch of the one before; then one with too many changes."""
    layout = Layout.of(SHAPES.items(), dtype, on_gpu=True, regions=1)
    changes = DeviceChanges(layout, torch.device("cpu"))
    # Numbers that the generator's dtype holds: the interpreter does not round as a GPU does.
    values = [torch.randn(shape).to(dtype).to(source) for shape in SHAPES.values()]
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    for position, value in enumerate(values):
        changes.remember(position, value)
        layout.tensors[position].view(slot).copy_(value)
    for version in range(3):
        for value in values:
            value.view(-1)[version::37] *= -2
        found = list(changes.find(enumerate(values), limit=10**6))
        assert len(found) == PARTS
        checksums = {position: checksum for part in found for position, checksum in part.checksums.items()}
        for part in found:
            apply_by_kernel(part.patch, slot.view(BITS[dtype.itemsize]))
        for position, (entry, value) in enumerate(zip(layout.tensors, values, strict=True)):
            assert position in checksums, (version, entry.name)
            sent = value.to(dtype).view(-1).view(BITS[dtype.itemsize])
            assert torch.equal(entry.view(slot).view(-1).view(sent.dtype), sent), (version, entry.name)
            if entry.count:
                whole = Piece.flat(value.data_ptr(), entry.count, 0)
                assert checksums[position] == by_definition(whole, source=source, dtype=dtype) % 2**64, (version, entry.name)
    for value in values:
        value *= 2
    try:
        list(changes.find(enumerate(values), limit=10**6))
        raise AssertionError("a patch of everything")
    except TooManyChanges:
        pass
    for part in changes.find(enumerate(values), limit=10**6):
        assert not len(part.patch.indices), "the snapshot was not brought up to date"


def sums(source: torch.dtype, dtype: torch.dtype) -> None:
    """Checksums of pieces of one run and of rows with gaps, by the kernel and by definition."""
    memory = torch.randn(30_000).to(dtype).to(source)
    address = memory.data_ptr()
    rows = Piece(address, 6000, 100, 130, 7, 250, 1)
    for pieces in ([Piece.flat(address, 9000, 0), Piece.flat(address, 5, 1)], [Piece.flat(address, 9000, 0), rows]):
        checksums = Checksums(pieces, targets=2, source=source, dtype=dtype, device=torch.device("cpu"))
        expected = checksums.compute().clone()
        checksums.sums.zero_()
        checksums.launch(0, sum(-(-piece.count // BLOCK) for piece in pieces))
        assert torch.equal(checksums.sums, expected), pieces


if __name__ == "__main__":
    sums(getattr(torch, sys.argv[1]), getattr(torch, sys.argv[2]))
    main(getattr(torch, sys.argv[1]), getattr(torch, sys.argv[2]))
