# mypy: ignore-errors
"""The Triton kernel of `changes`; imported only where there is a GPU."""

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
    position = tl.load(programs + 2 * program + 1).to(tl.int64) * block_size + lane
    inside = position < tl.load(piece + 1)
    value = tl.load(tl.load(piece).to(tl.pointer_type(source)) + position, mask=inside, other=0.0).to(dtype)
    if wide:
        bits = value.to(tl.int32, bitcast=True)
        snapshot = tl.load(piece + 2).to(tl.pointer_type(tl.int32)) + position
    else:
        bits = value.to(tl.int16, bitcast=True)
        snapshot = tl.load(piece + 2).to(tl.pointer_type(tl.int16)) + position
    changed = inside & (bits != tl.load(snapshot, mask=inside, other=0))
    tl.store(snapshot, bits, mask=changed)
    flags = changed.to(tl.int32)
    count = tl.sum(flags, axis=0)
    start = tl.atomic_add(total, count.to(tl.int64))
    place = start + tl.cumsum(flags, axis=0) - 1
    kept = changed & (place < capacity)
    tl.store(indices + place, lane.to(tl.int16), mask=kept)
    tl.store(values + place, bits, mask=kept)
    tl.store(starts + program, start)
    tl.store(counts + program, count)
    mixed = position * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) * -4658895280553007687 | 1
    tl.atomic_add(sums + tl.load(piece + 3), tl.sum(tl.where(inside, bits.to(tl.int64) * mixed, 0), axis=0))
