"""Staging from memory that the trainer lends (`loan`), which passes the host by.

    lent, on this worker's GPU     installed from where it lies: nothing is staged, no memory is taken
    lent, on another               copied over NVLink to a buffer, cast on the way, beside decoding; installed from there
    not lent (`Ticket.lent`)       installed from the pinned mailbox's slot: the version that a generator gets back after a restart

The worker sums what it is about to install and compares that with the trainer's checksums, so memory that was mapped wrongly shows
before anything is installed.
"""

from __future__ import annotations

import torch

from otj_runtime.weights.checksums import Checksums
from otj_runtime.weights.layout import Ticket
from otj_runtime.weights.mailbox import MailboxReader
from otj_runtime.weights.staging import Staging


class BorrowedStaging(Staging):
    """Tensors taken where the trainer has them.

    Args:
        lent: the layout's tensors in the trainer's memory, in any dtype.
        far: whether that is another GPU's.
    """

    on_device = True

    def __init__(self, reader: MailboxReader, worker: int, *, device: torch.device, lent: list[torch.Tensor], far: bool) -> None:
        super().__init__(reader, worker)
        self._device = device
        self._lent = lent
        self._far = far
        self._near = lent
        if far:
            buffer = torch.empty(reader.layout.slot_bytes, dtype=torch.uint8, device=device)
            self._near = [entry.view(buffer) for entry in reader.layout.tensors]
        self._near_sums = self._table(self._near)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _stage(self, ticket: Ticket) -> None:
        index = 0
        while index < len(self.reader.layout.tensors):
            index = self._arrived(ticket, index)
        if self._far and ticket.lent:
            with self._beside():
                torch._foreach_copy_(self._near, self._lent)

    def _check(self, ticket: Ticket) -> None:
        with self._beside():
            table = self._near_sums if ticket.lent else self._table(self.reader.tensors(ticket.slot))
            table.compute()
            self.reader.compare(ticket, table.values())

    def content(self, ticket: Ticket) -> list[torch.Tensor]:
        return self._near if ticket.lent else self.reader.tensors(ticket.slot)

    def _table(self, tensors: list[torch.Tensor]) -> Checksums:
        return Checksums.of(tensors, dtype=self.reader.layout.tensors[0].torch_dtype, device=self._device)
