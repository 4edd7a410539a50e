"""Staging without copies on a GPU: tensors are read where they lie, in the trainer's memory, or in the pinned mailbox.

    lent (`Ticket.lent`)    in the memory of this worker's GPU: the training rank's own weights (`loan`)
    not lent                in the slot of the mailbox: the version that a generator gets back after a restart

The worker sums what it sees and compares that with the trainer's checksums before anything is installed, so memory that was mapped
wrongly shows here. It takes no memory of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from otj_runtime.weights.checksums import Checksums, Piece
from otj_runtime.weights.layout import Ticket
from otj_runtime.weights.mailbox import MailboxReader
from otj_runtime.weights.staging import Staging


class BorrowedStaging(Staging):
    """Tensors taken where the trainer has them.

    Args:
        lent: the layout's tensors in the trainer's memory, in any dtype.
    """

    on_device = True

    def __init__(self, reader: MailboxReader, worker: int, *, device: torch.device, lent: list[torch.Tensor]) -> None:
        super().__init__(reader, worker)
        self._device = device
        self._lent = lent
        self._lent_sums = self._table(lent)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _stage(self, ticket: Ticket) -> None:
        index = 0
        while index < len(self.reader.layout.tensors):
            index = self._arrived(ticket, index)

    def _check(self, ticket: Ticket) -> None:
        with self._computing():
            table = self._lent_sums if ticket.lent else self._table(self.reader.tensors(ticket.slot))
            self.reader.compare(ticket, [value % 2**64 for value in table.compute().tolist()])

    def _beside(self) -> AbstractContextManager[object]:
        return self._computing()

    def _computing(self) -> AbstractContextManager[object]:
        """This thread's work goes on a stream of its own, beside decoding."""
        if self._stream is None:
            return nullcontext()
        torch.cuda.set_device(self._device)
        stream: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def content(self, ticket: Ticket) -> list[torch.Tensor]:
        return self._lent if ticket.lent else self.reader.tensors(ticket.slot)

    def near(self, ticket: Ticket) -> list[torch.Tensor]:
        return self.content(ticket)

    def _table(self, tensors: list[torch.Tensor]) -> Checksums:
        pieces = [Piece.flat(tensor.data_ptr(), tensor.numel(), index) for index, tensor in enumerate(tensors)]
        dtype = self.reader.layout.tensors[0].torch_dtype
        return Checksums(pieces, targets=len(pieces), source=tensors[0].dtype, dtype=dtype, device=self._device)
