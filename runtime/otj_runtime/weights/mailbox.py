"""The weights mailbox: one file in memory that trainer and generator share, with two slots.

    writer (every rank)  begin(version) -> ticket    rank 0: empties the slot that does not hold the latest version
                         write(ticket, name, tensor) any rank, any order: casts, copies, notes a digest per tensor
                         publish(ticket)             rank 0, when all have written: one small record makes the version visible
    reader               reading(version)            checks every digest first, then hands out the tensors

What it promises: a version is visible only when whole, because the record is written last and names the digest of all digests;
a crash at any byte leaves the previous version readable, because a slot is only ever emptied while the other holds the latest one;
a reader never gets a torn tensor, because it checks each before it hands out the first, and says so if a writer reused the slot
meanwhile. The barrier between the ranks' writes and `publish` is the caller's.

What it trades: memory for safety, two copies of the weights. Nothing is flushed to a disk: the file lives as long as the pod.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.layout import SLOTS, SUM_BYTES, Layout, Record, TensorEntry, digest, newest

_SUM = struct.Struct("<QQ")  # sequence, digest


@dataclass(frozen=True)
class Ticket:
    """Permission to write one version into one slot; rank 0 draws it and the other ranks write under the same one."""

    version: int
    slot: int
    sequence: int


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
        self._index = {entry.name: position for position, entry in enumerate(layout.tensors)}

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

    def begin(self, version: int) -> Ticket:
        """Empty the slot that does not hold the latest version, for `version`. Rank 0 only.

        From here on the slot counts as empty, whatever happens to the writers.
        """
        latest = newest(self._data)
        slot, sequence = (0, 1) if latest is None else (1 - latest[0], latest[1].sequence + 1)
        self._put(Record.offset(slot), bytes(Record.SIZE))
        self._put(self._sums_offset(slot), bytes(self.layout.sums_bytes))
        return Ticket(version=version, slot=slot, sequence=sequence)

    def write(self, ticket: Ticket, name: str, tensor: torch.Tensor) -> int:
        """Copy one tensor into the ticket's slot, cast to the mailbox's dtype, and return the number of bytes.

        Args:
            tensor: any floating dtype, device and stride; the shape that the layout lists.

        Raises:
            MailboxError: if the layout has no such tensor or another shape.
        """
        position = self._index.get(name)
        if position is None:
            raise MailboxError(f"the mailbox has no place for tensor {name}")
        entry = self.layout.tensors[position]
        if tuple(tensor.shape) != entry.shape:
            raise MailboxError(f"tensor {name} has shape {tuple(tensor.shape)}, the mailbox was made for {entry.shape}")
        _view(self._memory, self.layout, ticket.slot, entry).copy_(tensor.detach())
        checksum = digest(_bytes(self._data, self.layout, ticket.slot, entry))
        self._put(self._sums_offset(ticket.slot) + position * SUM_BYTES, _SUM.pack(ticket.sequence, checksum))
        return entry.nbytes

    def publish(self, ticket: Ticket) -> None:
        """Make the ticket's version visible. Rank 0 only, when every rank has written its share.

        Raises:
            MailboxError: if a tensor has not been written under this ticket.
        """
        offset = self._sums_offset(ticket.slot)
        sums = bytes(self._data[offset : offset + self.layout.sums_bytes])
        missing = [
            entry.name
            for entry, (sequence, _) in zip(self.layout.tensors, _SUM.iter_unpack(sums), strict=True)
            if sequence != ticket.sequence
        ]
        if missing:
            raise MailboxError(f"version {ticket.version} is not whole: {len(missing)} tensors were not written, the first is {missing[0]}")
        record = Record(version=ticket.version, sequence=ticket.sequence, sums_digest=digest(sums))
        self._put(Record.offset(ticket.slot), record.pack())

    def _sums_offset(self, slot: int) -> int:
        return self.layout.sums_offset + slot * self.layout.sums_bytes

    def _put(self, offset: int, data: bytes) -> None:
        self._data[offset : offset + len(data)] = data


class MailboxReader:
    """The generator's side. The mapping is private: a weight loader that works in place cannot change what others read.

    Raises:
        MailboxError: if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory = _mapped(path, mmap.ACCESS_COPY)
        self._data = memoryview(self._memory)
        self.layout = Layout.read(self._data, str(path))

    def version(self) -> int | None:
        """The latest version that was published, or None."""
        latest = newest(self._data)
        return None if latest is None else latest[1].version

    @contextmanager
    def reading(self, version: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The tensors of the latest version, which must be `version`, by name. They are views: use them inside the block only.

        Raises:
            MailboxError: before the block, if another version or none is there or a checksum does not fit; after it, if a writer
                took the slot back while it was read.
        """
        slot, record = self._expect(version)
        self._check(slot, record)
        yield [(entry.name, _view(self._memory, self.layout, slot, entry)) for entry in self.layout.tensors]
        if Record.read(self._data, slot) != record:
            raise MailboxError(f"{self._path}: version {version} was overwritten while it was read")

    def _expect(self, version: int) -> tuple[int, Record]:
        latest = newest(self._data)
        if latest is None:
            raise MailboxError(f"{self._path} holds no published version, {version} was asked for")
        if latest[1].version != version:
            raise MailboxError(f"{self._path} holds version {latest[1].version}, {version} was asked for")
        return latest

    def _check(self, slot: int, record: Record) -> None:
        offset = self.layout.sums_offset + slot * self.layout.sums_bytes
        sums = bytes(self._data[offset : offset + self.layout.sums_bytes])
        if digest(sums) != record.sums_digest:
            raise MailboxError(f"{self._path}: the checksums of version {record.version} do not fit its record")
        for entry, (_, checksum) in zip(self.layout.tensors, _SUM.iter_unpack(sums), strict=True):
            if digest(_bytes(self._data, self.layout, slot, entry)) != checksum:
                raise MailboxError(f"{self._path}: tensor {entry.name} of version {record.version} does not fit its checksum")


def _mapped(path: Path, access: int) -> mmap.mmap:
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0, access=access)
    except (OSError, ValueError) as error:
        raise MailboxError(f"cannot open the weights mailbox {path}: {error}") from error


def _slot_offset(layout: Layout, slot: int, entry: TensorEntry) -> int:
    assert 0 <= slot < SLOTS
    return layout.slots_offset + slot * layout.slot_bytes + entry.offset


def _bytes(data: memoryview, layout: Layout, slot: int, entry: TensorEntry) -> memoryview:
    offset = _slot_offset(layout, slot, entry)
    return data[offset : offset + entry.nbytes]


def _view(memory: mmap.mmap, layout: Layout, slot: int, entry: TensorEntry) -> torch.Tensor:
    """The tensor itself, in the file's memory; it keeps the mapping alive."""
    offset = _slot_offset(layout, slot, entry)
    if entry.count == 0:
        return torch.empty(entry.shape, dtype=entry.torch_dtype)
    return torch.frombuffer(memory, dtype=entry.torch_dtype, count=entry.count, offset=offset).view(entry.shape)
