# mypy: ignore-errors
"""The Triton kernels of `changes` and `patch`; imported only where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def find_changes(
    pieces,
    programs,
    sums,
    total,
    starts,
    counts,
    indices,
    values,
    capacity,
    source: tl.constexpr,
    dtype: tl.constexpr,
    wide: tl.constexpr,
    block_size: tl.constexpr,
):
    """One block of one tensor: what differs from its snapshot, the snapshot made the same, and the block added to its checksum.

    `pieces`: [n, 4] int64, address of the tensor, its elements, address of its snapshot, index of its sum; `programs`: [m, 2] piece and
    block. Blocks take their place in `indices` and `values` in any order, noted in `starts`; what does not fit `capacity` is only counted.
    """
    program = tl.program_id(0)
    piece = pieces + tl.load(programs + 2 * program).to(tl.int64) * 4
    lane = tl.arange(0, block_size)
    first = tl.load(programs + 2 * program + 1).to(tl.int64) * block_size
    inside = lane < tl.load(piece + 1) - first
    value = tl.load(tl.load(piece).to(tl.pointer_type(source)) + first + lane, mask=inside, other=0.0).to(dtype)
    if wide:
        bits = value.to(tl.int32, bitcast=True)
        snapshot = tl.load(piece + 2).to(tl.pointer_type(tl.int32)) + first + lane
    else:
        bits = value.to(tl.int16, bitcast=True)
        snapshot = tl.load(piece + 2).to(tl.pointer_type(tl.int16)) + first + lane
    changed = inside & (bits != tl.load(snapshot, mask=inside, other=0))
    # The sum before the places: its numbers of 64 bits are then done with, and the places have the registers.
    mixed = (first + lane) * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) * -4658895280553007687 | 1
    tl.atomic_add(sums + tl.load(piece + 3), tl.sum(tl.where(inside, bits.to(tl.int64) * mixed, 0), axis=0))
    flags = changed.to(tl.int32)
    count = tl.sum(flags, axis=0)
    start = tl.atomic_add(total, count.to(tl.int64))
    tl.store(starts + program, start)
    tl.store(counts + program, count)
    tl.store(snapshot, bits, mask=changed)
    place = tl.cumsum(flags, axis=0) - 1
    kept = changed & (start + place < capacity)
    tl.store(indices + start + place, lane.to(tl.int16), mask=kept)
    tl.store(values + start + place, bits, mask=kept)


@triton.jit
def put_changes(dests, starts, counts, indices, values, slot, length, block_size: tl.constexpr, width: tl.constexpr):
    """One block of a patch into the slot. `starts`: [blocks] int64, where in `indices` and `values` the block's elements begin."""
    program = tl.program_id(0)
    dest = tl.load(dests + program)
    start = tl.load(starts + program)
    count = tl.load(counts + program)
    lane = tl.arange(0, width)
    for offset in range(0, count, width):
        inside = offset + lane < count
        place = dest + (tl.load(indices + start + offset + lane, mask=inside, other=0).to(tl.int64) & (block_size - 1))
        value = tl.load(values + start + offset + lane, mask=inside, other=0)
        tl.store(slot + place, value, mask=inside & (place >= 0) & (place < length))
