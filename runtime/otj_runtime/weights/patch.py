"""A patch: the elements of a version that differ from the version before it, bit by bit. Pure: tensors in, tensors out, on any device.

    dests    [blocks]  int64   element of the slot at which a block of up to `BLOCK` elements of one tensor begins
    counts   [blocks]  int32   how many elements of the block changed
    indices  [changed] int16   place of each in its block, block after block
    values   [changed] int16 or int32   its new bits

With 16-bit weights a changed element costs 4 bytes and a block 12, so a hundredth of the elements is a fiftieth of the bytes. What it
trades: a patch is worth nothing without the very version that it was made against, so it is never trusted by itself: the checksums
of all tensors are compared after it was applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from otj_runtime.weights.layout import TensorEntry

BLOCK = 4096
"""Elements of a block, a power of two."""

GAP = 16
"""Each tensor of a patch begins at a multiple of so many bytes."""

KERNEL_WIDTH = 256
"""Elements that a program of the kernel puts at once: about as many as change in a block."""

BITS = {2: torch.int16, 4: torch.int32}
"""What elements are compared as, by their size in bytes: as numbers, two zeros would be the same."""


@dataclass(frozen=True)
class Patch:
    """See the module's text."""

    dests: torch.Tensor
    counts: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Its tensors, in the order in which they are stored."""
        return self.dests, self.counts, self.indices, self.values

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts)

    @classmethod
    def within(cls, data: torch.Tensor, *, blocks: int, changed: int, itemsize: int) -> Patch:
        """The tensors of a patch in the first bytes of `data` (uint8, aligned to 8); see `stored_bytes`."""
        forms = ((blocks, torch.int64), (blocks, torch.int32), (changed, torch.int16), (changed, BITS[itemsize]))
        parts, offset = [], 0
        for count, dtype in forms:
            size = count * dtype.itemsize
            parts.append(data[offset : offset + size].view(dtype))
            offset += _aligned(size)
        return cls(*parts)


def stored_bytes(*, blocks: int, changed: int, itemsize: int) -> int:
    """Bytes that a patch of these lengths takes, with gaps."""
    return sum(map(_aligned, (8 * blocks, 4 * blocks, 2 * changed, itemsize * changed)))


def encode(entry: TensorEntry, new: torch.Tensor, old: torch.Tensor) -> Patch:
    """What makes `new` of `old`.

    Args:
        entry: the tensor's place.
        new, old: its bits, flat, of a type of `BITS`.
    """
    changed = (new != old).nonzero().flatten()
    counts = torch.bincount(changed // BLOCK, minlength=-(-entry.count // BLOCK)).to(torch.int32)
    first = entry.offset // new.itemsize
    dests = first + BLOCK * torch.arange(len(counts), device=new.device)
    return Patch(dests, counts, (changed % BLOCK).to(torch.int16), new[changed])


def joined(patches: Sequence[Patch]) -> Patch:
    """One patch of several (at least one) of different tensors."""
    return Patch(*(torch.cat(parts) for parts in zip(*(patch.parts for patch in patches), strict=True)))


def apply(patch: Patch, slot: torch.Tensor) -> None:
    """Put the changed elements into `slot` (uint8, a slot's bytes), on the current stream.

    Wrong indices reach no memory outside of the slot; wrong `counts` must have been refused before.
    """
    flat = slot.view(patch.values.dtype)
    if slot.device.type == "cuda":
        apply_by_kernel(patch, flat)
        return
    places = torch.repeat_interleave(patch.dests, patch.counts, output_size=len(patch.indices))
    places += patch.indices & (BLOCK - 1)
    flat[places.clamp_(0, len(flat) - 1)] = patch.values


def apply_by_kernel(patch: Patch, flat: torch.Tensor) -> None:
    """As `apply`, in one pass over the patch; `flat` is the slot in elements of the patch's kind."""
    from otj_runtime.weights.patch_kernel import put_changes

    if not len(patch.dests):
        return
    starts = torch.cumsum(patch.counts, 0) - patch.counts
    put_changes[(len(starts),)](
        patch.dests, starts, patch.counts, patch.indices, patch.values, flat, len(flat), BLOCK, KERNEL_WIDTH, num_warps=2
    )


def _aligned(size: int) -> int:
    return -(-size // GAP) * GAP
