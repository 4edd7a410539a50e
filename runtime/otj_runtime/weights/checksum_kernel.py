# mypy: ignore-errors
"""The Triton kernel of `checksums`; imported only where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def add_pieces(
    pieces,
    programs,
    sums,
    first,
    flat: tl.constexpr,
    source: tl.constexpr,
    dtype: tl.constexpr,
    wide: tl.constexpr,
    block_size: tl.constexpr,
):
    """Add one block of one piece to its sum. `pieces`: [n, 7] int64, the fields of a `Piece`; `programs`: [m, 2] piece and block.

    `flat` where every piece is one run: without the division by the length of a row it takes less than half of the time.
    """
    program = tl.program_id(0) + first
    piece = pieces + tl.load(programs + 2 * program).to(tl.int64) * 7
    block = tl.load(programs + 2 * program + 1)
    count = tl.load(piece + 1).to(tl.int32)
    columns = tl.load(piece + 2).to(tl.int32)
    index = block * block_size + tl.arange(0, block_size)
    inside = index < count
    if flat:
        place = index.to(tl.int64)
        position = tl.load(piece + 4) + place
    else:
        row = index // columns
        column = (index - row * columns).to(tl.int64)
        row = row.to(tl.int64)
        place = row * tl.load(piece + 3) + column
        position = tl.load(piece + 4) + row * tl.load(piece + 5) + column
    value = tl.load(tl.load(piece).to(tl.pointer_type(source)) + place, mask=inside, other=0.0).to(dtype)
    if wide:  # noqa: SIM108 - an expression would be traced on both sides
        bits = value.to(tl.int32, bitcast=True).to(tl.int64)
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int64)
    mixed = position * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) * -4658895280553007687 | 1
    total = tl.sum(tl.where(inside, bits * mixed, 0), axis=0)
    tl.atomic_add(sums + tl.load(piece + 6), total)
