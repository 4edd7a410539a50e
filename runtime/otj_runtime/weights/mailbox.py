"""The weights mailbox: one file in memory that trainer and generator share, with two slots.

    writer (every rank)  begin(version) -> ticket    rank 0: empties the slot that does not hold the latest version
                         write(ticket, tensors)      any rank, any order: casts, copies, notes arrival and checksum per tensor
                         publish(ticket)             rank 0, when all have written: one small record makes the version visible
                         begin_patch, log.put        instead of the first two: what changed since the latest version, see `patch_log`
                         begin_lent, Lender.lend     instead of the first two: the trainer's own memory, see `loan`; the slot is written later
    reader               arrived, check_tensor, ...  takes tensors of a version that is still being written, see `staging`
                         reading(version)            checks every digest first, then hands out the tensors

What it promises: a version is visible only when whole, because the record is written last and names the digest of all digests;
a crash at any byte leaves the previous version readable, because a slot is only ever emptied while the other holds the latest one;
a reader never gets a torn tensor, because it checks each before it hands out the first, and says so if a writer reused the slot
meanwhile. The barrier between the ranks' writes and `publish` is the caller's.

On a GPU the memory is pinned on both sides, so that the copy engines move the bytes; see `device_write`.

What it trades: memory for safety, two copies of the weights. Nothing is flushed to a disk: the file lives as long as the pod.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from otj_runtime.weights.device_write import DeviceWrite
from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.layout import (
    PLACES,
    SLOTS,
    STEPS,
    SUM_BYTES,
    TABLES,
    Layout,
    Record,
    TensorEntry,
    Ticket,
    digest,
    newest,
    tensor_digest,
)
from otj_runtime.weights.patch import apply
from otj_runtime.weights.patch_log import PatchLog
from otj_runtime.weights.pinned import pin, unpin
from otj_runtime.weights.receipts import POLL_SECONDS, Receipts

_SUM = struct.Struct("<QQQ")  # sequence, bytes that have arrived, checksum
_WORDS = SUM_BYTES // 8


class MailboxWriter:
    """The trainer's side. Every rank has one; they write disjoint tensors at once.

    Args:
        path: the file, made by `create`.
        layout: the tensors that this rank expects it to hold.

    Raises:
        MailboxError: if the file is missing, damaged, or holds other tensors than `layout`.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._memory = _mapped(path, mmap.ACCESS_WRITE)
        self._data = memoryview(self._memory)
        if Layout.read(self._data, str(path)) != layout:
            raise MailboxError(f"{path} was made for other tensors than this rank's model has: all ranks must load the same model")
        self.layout = layout
        self.receipts = Receipts(self._data, layout)
        self._slots = [_slot(self._memory, layout, slot) for slot in range(SLOTS)]
        self.log = PatchLog(self._memory, layout)
        self._index = {entry.name: position for position, entry in enumerate(layout.tensors)}
        self._sequence = 0
        self._device_write: DeviceWrite | None = None
        if layout.on_gpu:
            pin(self._memory, str(path))
            self._device_write = DeviceWrite(self, torch.device("cuda", torch.cuda.current_device()))

    @classmethod
    def create(cls, path: Path, layout: Layout) -> MailboxWriter:
        """Make the file, whole or not at all, in place of one that may be there. Nothing is published in it yet.

        Raises:
            MailboxError: if the file system has no room for two copies of the tensors.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with draft.open("wb") as file:
                # Memory is taken now: without it, the first write beyond the limit would end the process with SIGBUS.
                os.posix_fallocate(file.fileno(), 0, layout.file_bytes)
                file.write(layout.head())
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC:
                raise
            raise MailboxError(
                f"no room for the weights mailbox in {path.parent}: it takes {layout.file_bytes} bytes (two copies of the weights in the "
                "generator's dtype); raise resources.sharedMemory"
            ) from error
        return cls(path, layout)

    @staticmethod
    def fits(path: Path, layout: Layout) -> bool:
        """Whether `create` would find room now."""
        path.parent.mkdir(parents=True, exist_ok=True)
        found = os.statvfs(path.parent)
        return found.f_bavail * found.f_frsize >= layout.file_bytes

    def begin(self, version: int) -> Ticket:
        """Empty the slot that does not hold the latest version, for `version`. Rank 0 only.

        From here on the slot counts as empty, whatever happens to the writers.
        """
        latest = newest(self._data)
        slot = 0 if latest is None else 1 - latest.slot
        for place in range(SLOTS, PLACES):  # what was on top of this slot goes with it
            if (record := Record.read(self._data, place)) is not None and record.slot == slot:
                self._put(Record.offset(place), bytes(Record.SIZE))
        return self._empty(Ticket(version=version, slot=slot, sequence=self._next(latest)))

    def begin_patch(self, version: int) -> Ticket:
        """Prepare for `version` as a patch of the latest one, which stays. Rank 0 only.

        Raises:
            MailboxError: if there is none, or too many patches are on top of its slot: `begin` starts anew.
        """
        latest = newest(self._data)
        if latest is None or latest.steps == STEPS or not self.layout.regions:
            raise MailboxError(f"version {version} cannot be a patch: it has to be sent whole")
        return self._empty(Ticket(version=version, slot=latest.slot, sequence=self._next(latest), steps=latest.steps + 1))

    def begin_lent(self, version: int) -> Ticket:
        """As `begin`; and prepare for `version` to be lent under the ticket, before the slot is written. Rank 0 only."""
        return self._empty(replace(self.begin(version), lent=True))

    def _next(self, latest: Record | None) -> int:
        """A sequence that was never used: a reader may still wait for what was given up."""
        self._sequence = max(0 if latest is None else latest.sequence, self._sequence) + 1
        return self._sequence

    def _empty(self, ticket: Ticket) -> Ticket:
        self._put(Record.offset(ticket.place), bytes(Record.SIZE))
        self._put(self._sums_offset(ticket.place), bytes(self.layout.sums_bytes))
        self.receipts.clear()
        return ticket

    def following(self, ticket: Ticket) -> Ticket:
        """The ticket that `begin` draws after `ticket` was published, if the version after that is asked for."""
        return replace(ticket, version=ticket.version + 1, slot=1 - ticket.slot, sequence=ticket.sequence + 1, steps=0)

    def write(self, ticket: Ticket, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Copy tensors into the ticket's slot, cast to the mailbox's dtype, and return the number of bytes.

        Args:
            tensors: by name; any floating dtype, device and stride; the shapes that the layout lists.

        Raises:
            MailboxError: if the layout has no such tensor or another shape.
        """
        named = self.positions(tensors)
        if self._device_write is not None:
            return self._device_write.write(ticket, named)
        return sum(self._write_one(ticket, position, tensor) for position, tensor in named)

    def positions(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensors by their position in the layout.

        Raises:
            MailboxError: if the layout has no such tensor or another shape.
        """
        return ((self._place(name, tensor), tensor) for name, tensor in tensors)

    def host_view(self, ticket: Ticket, position: int) -> torch.Tensor:
        """The place of a tensor in the ticket's slot."""
        return self.layout.tensors[position].view(self._slots[ticket.slot])

    def note(self, ticket: Ticket, position: int, nbytes: int) -> None:
        """Say that the first `nbytes` bytes of a tensor have arrived."""
        offset = self._sums_offset(ticket.place) + position * SUM_BYTES
        self._put(offset + 8, nbytes.to_bytes(8, "little"))
        self._put(offset, ticket.sequence.to_bytes(8, "little"))

    def note_checksum(self, ticket: Ticket, position: int, checksum: int) -> None:
        """Say what a tensor's checksum is, before it is published."""
        self._put(self._sums_offset(ticket.place) + position * SUM_BYTES + 16, checksum.to_bytes(8, "little"))

    def _write_one(self, ticket: Ticket, position: int, tensor: torch.Tensor) -> int:
        self.host_view(ticket, position).copy_(tensor.detach())
        entry = self.layout.tensors[position]
        place = self._slots[ticket.slot][entry.offset : entry.offset + entry.nbytes]
        self.note_checksum(ticket, position, tensor_digest(place))
        self.note(ticket, position, entry.nbytes)
        return entry.nbytes

    def _place(self, name: str, tensor: torch.Tensor) -> int:
        position = self._index.get(name)
        if position is None:
            raise MailboxError(f"the mailbox has no place for tensor {name}")
        entry = self.layout.tensors[position]
        if tuple(tensor.shape) != entry.shape:
            raise MailboxError(f"tensor {name} has shape {tuple(tensor.shape)}, the mailbox was made for {entry.shape}")
        return position

    def publish(self, ticket: Ticket) -> None:
        """Make the ticket's version visible. Rank 0 only, when every rank has written its share.

        Raises:
            MailboxError: if a tensor has not been written under this ticket.
        """
        offset = self._sums_offset(ticket.place)
        sums = bytes(self._data[offset : offset + self.layout.sums_bytes])
        missing = [
            entry.name
            for entry, (sequence, nbytes, _) in zip(self.layout.tensors, _SUM.iter_unpack(sums), strict=True)
            if sequence != ticket.sequence or nbytes != entry.nbytes
        ]
        if missing:
            raise MailboxError(f"version {ticket.version} is not whole: {len(missing)} tensors were not written, the first is {missing[0]}")
        record = Record(ticket.version, ticket.sequence, digest(sums), ticket.slot, ticket.steps)
        self._put(Record.offset(ticket.place), record.pack())

    def _sums_offset(self, place: int) -> int:
        return self.layout.sums_offset + place * self.layout.sums_bytes

    def _put(self, offset: int, data: bytes) -> None:
        self._data[offset : offset + len(data)] = data


class MailboxReader:
    """The generator's side. On a CPU the mapping is private: a weight loader that works in place cannot change what others read.

    Raises:
        MailboxError: if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shared = _mapped(path, mmap.ACCESS_WRITE)
        self.layout = Layout.read(memoryview(self._shared), str(path))
        self.receipts = Receipts(memoryview(self._shared), self.layout)
        self.log = PatchLog(self._shared, self.layout)
        self._memory = self._shared if self.layout.on_gpu else _mapped(path, mmap.ACCESS_COPY)
        self._data = memoryview(self._memory)
        # Read in words: a writer stores while we look, and a word is either old or new.
        sums = self._data[self.layout.sums_offset : self.layout.sums_offset + TABLES * self.layout.sums_bytes]
        self._words = sums.cast("Q")
        if self.layout.on_gpu:
            pin(self._memory, str(path))

    def close(self) -> None:
        """Unpin the memory. Nothing may be copying from it."""
        unpin(self._memory)

    def version(self) -> int | None:
        """The latest version that was published, or None."""
        latest = newest(self._data)
        return None if latest is None else latest.version

    # -- while it is being written ---------------------------------------------------------------------------------------------

    def latest(self, version: int) -> Ticket:
        """The ticket under which the latest version was published.

        Raises:
            MailboxError: if that is not `version`.
        """
        return self._expect(version).ticket

    def arrived(self, ticket: Ticket, start: int) -> int:
        """End of the run of tensors, from `start`, that have been written under the ticket."""
        tensors = self.layout.tensors
        end = start
        while end < len(tensors) and self._noted(ticket, end) == tensors[end].nbytes:
            end += 1
        return end

    def progress(self, ticket: Ticket, position: int) -> int:
        """Bytes of a tensor that have been written under the ticket, from its start."""
        return self._noted(ticket, position) or 0

    def _noted(self, ticket: Ticket, position: int) -> int | None:
        """Bytes of a tensor that have arrived; None if none was noted, as an empty tensor's are."""
        word = self._word(ticket, position)
        return self._words[word + 1] if self._words[word] == ticket.sequence else None

    def check_tensor(self, ticket: Ticket, position: int, content: torch.Tensor | None = None) -> None:
        """Check a tensor that has arrived.

        Args:
            content: bytes of a slot, uint8 on the CPU, in which it lies instead of the file.

        Raises:
            MailboxError: if it does not fit its checksum.
        """
        entry = self.layout.tensors[position]
        slot = self.slot_bytes(ticket.slot) if content is None else content
        if tensor_digest(slot[entry.offset : entry.offset + entry.nbytes]) != self._checksum(ticket, position):
            raise self._unfit(entry, ticket.version)

    def compare(self, ticket: Ticket, checksums: list[int]) -> None:
        """Compare checksums that were computed elsewhere, one for each tensor, with the trainer's.

        Raises:
            MailboxError: if one does not fit.
        """
        for position, (entry, checksum) in enumerate(zip(self.layout.tensors, checksums, strict=True)):
            if self._checksum(ticket, position) != checksum:
                raise self._unfit(entry, ticket.version)

    def await_published(self, ticket: Ticket, *, stopped: Callable[[], bool], deadline_s: float) -> None:
        """Return when the ticket's version is published and its table of checksums is whole.

        Raises:
            MailboxError: if it is not in time, or the table does not fit.
        """
        end = time.monotonic() + deadline_s
        while (record := self._published(ticket)) is None:
            if stopped() or time.monotonic() > end:
                raise MailboxError(f"{self._path}: version {ticket.version} was not published in {deadline_s:.0f} s")
            time.sleep(POLL_SECONDS)
        self._check_sums(record, ticket)

    def is_published(self, ticket: Ticket) -> bool:
        """Whether the ticket's version can be read as a whole."""
        return self._published(ticket) is not None

    def _published(self, ticket: Ticket) -> Record | None:
        record = Record.read(self._data, ticket.place)
        return record if record is not None and record.sequence == ticket.sequence else None

    def slot_bytes(self, slot: int) -> torch.Tensor:
        """A slot as bytes, in the file's memory."""
        return _slot(self._memory, self.layout, slot)

    def tensors(self, slot: int) -> list[torch.Tensor]:
        """The tensors of a slot, in the file's memory."""
        content = self.slot_bytes(slot)
        return [entry.view(content) for entry in self.layout.tensors]

    @contextmanager
    def guarding(self, ticket: Ticket) -> Iterator[None]:
        """Say so if a writer took the ticket's slot back during the block.

        Raises:
            MailboxError: after the block.
        """
        yield
        record = Record.read(self._data, ticket.place)
        if record is None or record.sequence != ticket.sequence:
            raise MailboxError(f"{self._path}: version {ticket.version} was overwritten while it was read")

    # -- when it is there ------------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, version: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The tensors of the latest version, which must be `version`, by name. They are views: use them inside the block only.

        Raises:
            MailboxError: before the block, if another version or none is there or a checksum does not fit; after it, if a writer
                took the slot back while it was read.
        """
        record = self._expect(version)
        ticket = record.ticket
        self._check_sums(record, ticket)
        content = self.slot_bytes(ticket.slot)
        if ticket.steps:
            content = content.clone()
            for patch in self.log.patches(self.lineage(ticket), done=0, stopped=lambda: True, deadline_s=0.0):
                apply(patch, content)
        for position in range(len(self.layout.tensors)):
            self.check_tensor(ticket, position, content)
        with self.guarding(ticket):
            yield [(entry.name, entry.view(content)) for entry in self.layout.tensors]

    def lineage(self, ticket: Ticket) -> list[int]:
        """Sequences of the versions that lead to the ticket's by patches, from the one in its slot to its own.

        Raises:
            MailboxError: if something on the way is missing or damaged.
        """
        base = Record.read(self._data, ticket.slot)
        if base is None:
            raise MailboxError(f"{self._path}: version {ticket.version} is a patch of nothing: it has to be sent whole")
        return self.log.lineage(ticket, base.sequence)

    def _expect(self, version: int) -> Record:
        latest = newest(self._data)
        if latest is None:
            raise MailboxError(f"{self._path} holds no published version, {version} was asked for")
        if latest.version != version:
            raise MailboxError(f"{self._path} holds version {latest.version}, {version} was asked for")
        return latest

    def _checksum(self, ticket: Ticket, position: int) -> int:
        return self._words[self._word(ticket, position) + 2]

    def _word(self, ticket: Ticket, position: int) -> int:
        return (ticket.place * len(self.layout.tensors) + position) * _WORDS

    def _sums_offset(self, place: int) -> int:
        return self.layout.sums_offset + place * self.layout.sums_bytes

    def _check_sums(self, record: Record, ticket: Ticket) -> None:
        offset = self._sums_offset(ticket.place)
        if digest(self._data[offset : offset + self.layout.sums_bytes]) != record.sums_digest:
            raise MailboxError(f"{self._path}: the checksums of version {record.version} do not fit its record")

    def _unfit(self, entry: TensorEntry, version: int) -> MailboxError:
        return MailboxError(f"{self._path}: tensor {entry.name} of version {version} does not fit its checksum")


def _mapped(path: Path, access: int) -> mmap.mmap:
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0, access=access)
    except (OSError, ValueError) as error:
        raise MailboxError(f"cannot open the weights mailbox {path}: {error}") from error


def _slot(memory: mmap.mmap, layout: Layout, slot: int) -> torch.Tensor:
    """A slot as bytes, in the file's memory; it keeps the mapping alive."""
    offset = layout.slots_offset + slot * layout.slot_bytes
    return torch.frombuffer(memory, dtype=torch.uint8, count=layout.slot_bytes, offset=offset)
