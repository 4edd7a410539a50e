"""The patches on top of a slot, in the mailbox file: a region for each rank that writes, in each the steps and their data.

    region        step 1 part 1, part 2, ..., step 2 part 1, ...     sequence, the sequence before, where the data is, how much
                  data of step 1 part 1, of part 2, ...

A patch comes in parts, so that a worker brings one near while the trainer still writes the next.
So the slot and its patches are the latest version together, and a generator that was restarted gets it from the file, as it gets a
whole one. A part counts only if its own digest fits; it is written after its data. When a region or the list of its steps is full, or
another version was sent whole, the log starts anew.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch

from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.layout import PARTS, STEP_BYTES, STEPS_BYTES, Layout, Step, Ticket, digest
from otj_runtime.weights.patch import Patch, stored_bytes
from otj_runtime.weights.receipts import POLL_SECONDS


class PatchLog:
    """The regions of one mailbox file.

    Args:
        memory: the file, mapped so that others see what is stored.
    """

    def __init__(self, memory: mmap.mmap, layout: Layout) -> None:
        self._memory, self._data = memory, memoryview(memory)
        self._layout = layout
        self._itemsize = layout.tensors[0].torch_dtype.itemsize if layout.tensors else 0

    # -- the writer ------------------------------------------------------------------------------------------------------------

    def room(self, region: int, ticket: Ticket) -> int:
        """Bytes that the ticket's patch may take in the region, all parts together."""
        return self._layout.region_bytes - STEPS_BYTES - self._end(region, ticket, 0)

    def place(self, region: int, ticket: Ticket, part: int, *, blocks: int, changed: int) -> Patch:
        """Where a part of the ticket's patch goes; it must fit into the `room`, and the parts before it must be there."""
        return self._patch(region, self._end(region, ticket, part), blocks=blocks, changed=changed)

    def put(self, region: int, ticket: Ticket, part: int, *, previous: int, blocks: int, changed: int) -> None:
        """Say that a part of the ticket's patch is there, and applies to the version of sequence `previous`."""
        offset = self._end(region, ticket, part)
        step = Step(ticket.sequence, previous, offset, blocks, changed, self._digest(region, offset, blocks))
        begin = self._step_offset(region, ticket.steps, part)
        self._data[begin : begin + STEP_BYTES] = step.pack().ljust(STEP_BYTES, b"\0")

    def _end(self, region: int, ticket: Ticket, part: int) -> int:
        """Where the data before a part of the ticket's patch ends."""
        number, last = (ticket.steps, part - 1) if part else (ticket.steps - 1, PARTS - 1)
        if not number:
            return 0
        before = self._step(region, number, last)
        if before is None:
            raise MailboxError(f"patch {number} of region {region} is damaged: the version has to be sent whole")
        return before.offset + stored_bytes(blocks=before.blocks, changed=before.changed, itemsize=self._itemsize)

    # -- the reader ------------------------------------------------------------------------------------------------------------

    def lineage(self, ticket: Ticket, base: int) -> list[int]:
        """Sequences of the versions that lead to the ticket's, from that of its slot, `base`, to its own.

        Raises:
            MailboxError: if a step on the way is missing or damaged.
        """
        steps = [self._step(0, number, 0) for number in range(1, ticket.steps)]
        if None in steps:
            raise MailboxError(f"patch {steps.index(None) + 1} below version {ticket.version} is damaged: it has to be sent whole")
        return [base, *(step.sequence for step in steps if step is not None), ticket.sequence]

    def patches(self, lineage: list[int], *, done: int, stopped: Callable[[], bool], deadline_s: float) -> Iterator[Patch]:
        """The patches of a lineage but the first `done`, part by part, in the file's memory, each as soon as it is there.

        Raises:
            MailboxError: if one is damaged, or is not there in `deadline_s` seconds.
        """
        end = time.monotonic() + deadline_s
        for number, part, region in product(range(done + 1, len(lineage)), range(PARTS), range(self._layout.regions)):
            expected = (lineage[number - 1], lineage[number])
            while (step := self._step(region, number, part)) is None or (step.previous, step.sequence) != expected:
                if stopped() or time.monotonic() > end:
                    raise MailboxError(f"patch {number} of region {region} was not written")
                time.sleep(POLL_SECONDS)
            yield self._read(region, step)

    def _read(self, region: int, step: Step) -> Patch:
        size = stored_bytes(blocks=step.blocks, changed=step.changed, itemsize=self._itemsize)
        if step.offset + size > self._layout.region_bytes - STEPS_BYTES or self._digest(region, step.offset, step.blocks) != step.digest:
            raise MailboxError(f"the patch of region {region} is damaged")
        return self._patch(region, step.offset, blocks=step.blocks, changed=step.changed)

    # -- both ------------------------------------------------------------------------------------------------------------------

    def _step(self, region: int, number: int, part: int) -> Step | None:
        begin = self._step_offset(region, number, part)
        return Step.read(self._data[begin : begin + STEP_BYTES])

    def _step_offset(self, region: int, number: int, part: int) -> int:
        return self._layout.region_offset(region) + ((number - 1) * PARTS + part) * STEP_BYTES

    def _patch(self, region: int, offset: int, *, blocks: int, changed: int) -> Patch:
        begin = self._layout.region_offset(region) + STEPS_BYTES + offset
        size = stored_bytes(blocks=blocks, changed=changed, itemsize=self._itemsize)
        data = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=begin) if size else torch.empty(0, dtype=torch.uint8)
        return Patch.within(data, blocks=blocks, changed=changed, itemsize=self._itemsize)

    def _digest(self, region: int, offset: int, blocks: int) -> int:
        begin = self._layout.region_offset(region) + STEPS_BYTES + offset
        return digest(self._data[begin : begin + stored_bytes(blocks=blocks, changed=0, itemsize=self._itemsize)])
