"""A rank's patches: finds what changed in its share and puts it on top of the mailbox's slot.

    remember(ticket, tensors)   passes on what is written whole, and keeps a snapshot of it
    write(ticket, tensors)      finds what differs from the snapshot, part by part, notes checksums; None where the version has to be sent whole

A snapshot counts only for the version that it was whole for. Whatever fails on the way leaves none, so the next version is sent whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from otj_runtime.weights.changes import Changed, Changes, DeviceChanges, HostChanges, TooManyChanges
from otj_runtime.weights.layout import PARTS, Ticket
from otj_runtime.weights.mailbox import MailboxWriter
from otj_runtime.weights.patch import GAP, Patch, stored_bytes

_TENSORS = len(Patch.__dataclass_fields__)


class PatchWrite:
    """One rank's way to write patches.

    Args:
        writer: the mailbox.
        region: the rank's region.
    """

    def __init__(self, writer: MailboxWriter, region: int) -> None:
        self._writer, self._region = writer, region
        layout = writer.layout
        self._itemsize = layout.tensors[0].torch_dtype.itemsize
        self._changes: Changes
        if layout.on_gpu:
            self._changes = DeviceChanges(layout, torch.device("cuda", torch.cuda.current_device()))
        else:
            self._changes = HostChanges(layout, torch.device("cpu"))
        self._sequence: int | None = None

    def remember(self, ticket: Ticket, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, of a version that is written whole."""
        self._sequence = None
        for name, tensor in tensors:
            for position, _ in self._writer.positions([(name, tensor)]):
                self._changes.remember(position, tensor)
            yield name, tensor
        self._sequence = ticket.sequence

    def write(self, ticket: Ticket, tensors: Iterable[tuple[str, torch.Tensor]]) -> int | None:
        """Write what changed since the version before the ticket's and return the number of bytes.

        None if that is too much, or the rank does not know the version before. All tensors are taken in any case: sharded ones are
        gathered by all ranks together.
        """
        previous, self._sequence = self._sequence, None
        if previous is None:
            for _ in tensors:
                pass
            return None
        written = 0
        try:
            for part, found in enumerate(self._changes.find(self._writer.positions(tensors), limit=self._limit(ticket))):
                self._put(ticket, part, found, previous)
                written += found.patch.nbytes
        except TooManyChanges:
            return None
        self._sequence = ticket.sequence
        return written

    def _limit(self, ticket: Ticket) -> int:
        """Most elements that may have changed."""
        room = self._writer.log.room(self._region, ticket)
        left = room - stored_bytes(blocks=self._changes.blocks, changed=0, itemsize=self._itemsize)
        return (left - PARTS * _TENSORS * GAP) // (2 + self._itemsize)  # each tensor of a part may end with a gap

    def _put(self, ticket: Ticket, part: int, found: Changed, previous: int) -> None:
        log, patch = self._writer.log, found.patch
        sizes = {"blocks": len(patch.counts), "changed": len(patch.indices)}
        with self._changes.beside():
            for place, tensor in zip(log.place(self._region, ticket, part, **sizes).parts, patch.parts, strict=True):
                place.copy_(tensor, non_blocking=True)
        # Beside the copies: of a patch nobody looks at what is noted before it is published.
        for position, checksum in found.checksums.items():
            self._writer.note_checksum(ticket, position, checksum)
            self._writer.note(ticket, position, self._writer.layout.tensors[position].nbytes)
        if tensor.device.type == "cuda":
            with self._changes.beside():
                torch.cuda.current_stream(tensor.device).synchronize()
        log.put(self._region, ticket, part, previous=previous, **sizes)
