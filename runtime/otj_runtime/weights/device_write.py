"""The trainer's writes from a GPU: copies by the copy engine, arrival noted while they go on, checksums computed beside them.

    copy stream      tensor after tensor, large ones in parts: cast on the GPU if need be, device to host; an event every `RUN_BYTES`
    this thread      as events pass: note(...) what has arrived, so that the generator stages it already
    checksum stream  one launch over all tensors, where they lie; afterwards the checksums are noted

So the copy engine never waits for a kernel, which matters where trainer and generator share a card and take turns on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from otj_runtime.weights.checksums import Checksums, Piece
from otj_runtime.weights.layout import Ticket

if TYPE_CHECKING:
    from otj_runtime.weights.mailbox import MailboxWriter

RUN_BYTES = 32 << 20
"""Bytes between two events."""

MADE_BYTES = 1 << 30
"""Bytes of tensors made for the occasion (gathered, merged) that may wait for their copies; parameters cost nothing more."""


class DeviceWrite:
    """One rank's writes into one mailbox. It keeps streams and the table of the checksums from one version to the next.

    Args:
        writer: the mailbox, which notes what has arrived.
        device: where the tensors are.
    """

    def __init__(self, writer: MailboxWriter, device: torch.device) -> None:
        self._writer, self._device = writer, device
        self._copying, self._summing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._events: deque[tuple[torch.cuda.Event, list[tuple[int, int]]]] = deque()
        self._run: list[tuple[int, int]] = []  # positions, and how many bytes of each will have arrived
        self._run_bytes = 0
        self._kept: list[tuple[int, torch.Tensor]] = []
        self._places: dict[tuple[int, int], torch.Tensor] = {}
        self._written = 0
        self._tables: dict[torch.dtype, tuple[list[Piece], Checksums]] = {}

    def write(self, ticket: Ticket, tensors: Iterable[tuple[int, torch.Tensor]]) -> int:
        """Write tensors, given by their position in the layout; return their bytes when all have arrived."""
        self._events.clear()
        self._kept, self._run, self._run_bytes, self._written = [], [], 0, 0
        made = 0
        for position, tensor in tensors:
            source = tensor.detach().contiguous()
            if not self._kept or not isinstance(tensor, torch.nn.Parameter):
                self._copying.wait_stream(torch.cuda.current_stream(self._device))  # what made it is work of the current stream
            self._copy(ticket, position, source.view(-1))
            self._kept.append((position, source))
            made += 0 if isinstance(tensor, torch.nn.Parameter) else source.nbytes
            if made >= MADE_BYTES:
                self._settle(ticket)
                made = 0
            self._note_arrived(ticket, block=False)
        self._settle(ticket)
        return self._written

    def _copy(self, ticket: Ticket, position: int, source: torch.Tensor) -> None:
        """Ask for the copies of one tensor, given flat."""
        place = self._place(ticket, position)
        step = RUN_BYTES // place.itemsize
        for start in range(0, max(len(place), 1), step):
            part = place[start : start + step]
            with torch.cuda.stream(self._copying):
                part.copy_(source[start : start + step], non_blocking=True)
            self._run.append((position, (start + len(part)) * place.itemsize))
            self._run_bytes += part.nbytes
            if self._run_bytes >= RUN_BYTES:
                self._mark()

    def _settle(self, ticket: Ticket) -> None:
        """Wait until all that was asked for has arrived, note its checksums, and let go of it."""
        if not self._kept:
            return
        self._mark()
        sums = self._checksums()
        self._note_arrived(ticket, block=True)
        self._summing.synchronize()
        for (position, _), checksum in zip(self._kept, sums.tolist(), strict=True):
            self._writer.note_checksum(ticket, position, checksum % 2**64)
            self._written += self._writer.layout.tensors[position].nbytes
        self._kept = []

    def _place(self, ticket: Ticket, position: int) -> torch.Tensor:
        """Where a tensor goes, flat; made once, because making a view takes as long as asking for a copy."""
        key = (ticket.slot, position)
        if key not in self._places:
            self._places[key] = self._writer.host_view(ticket, position).view(-1)
        return self._places[key]

    def _mark(self) -> None:
        """End the run of copies that have been asked for since the last mark."""
        event = torch.cuda.Event()
        event.record(self._copying)
        self._events.append((event, self._run))
        self._run, self._run_bytes = [], 0

    def _note_arrived(self, ticket: Ticket, *, block: bool) -> None:
        while self._events and (block or self._events[0][0].query()):
            event, run = self._events.popleft()
            event.synchronize()
            for position, nbytes in run:
                self._writer.note(ticket, position, nbytes)

    def _checksums(self) -> torch.Tensor:
        """Checksums of the tensors, in their order."""
        kept = self._kept
        self._summing.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._summing):
            result = torch.zeros(len(kept), dtype=torch.int64, device=self._device)
            for source in {tensor.dtype for _, tensor in kept}:
                result += self._table(source, kept).compute()
        return result

    def _table(self, source: torch.dtype, kept: list[tuple[int, torch.Tensor]]) -> Checksums:
        """The table of the tensors of one dtype; made anew only if they have moved."""
        numbered = enumerate(tensor for _, tensor in kept)
        pieces = [Piece.flat(tensor.data_ptr(), tensor.numel(), index) for index, tensor in numbered if tensor.dtype == source]
        if self._tables.get(source, (None,))[0] != pieces:
            dtype = self._writer.layout.tensors[0].torch_dtype
            table = Checksums(pieces, targets=len(kept), source=source, dtype=dtype, device=self._device)
            self._tables[source] = (pieces, table)
        return self._tables[source][1]
