"""The mailbox file, byte by byte. Pure: descriptions and their packing, no I/O.

    0                header       magic, format, where everything lies, digest
    512 to 2560      records      five places: version, sequence, digest of the place's sums, slot, patches, digest
    4096             manifest     JSON: name, dtype, shape, offset of each tensor
    after it         receipts     one per worker of the generator: how far it is, see `receipts`
    after it         sums         per place and tensor: sequence of the write, bytes that have arrived, checksum of the bytes
    page aligned     slot 0       the tensors, each aligned to 256 bytes
    page aligned     slot 1
    page aligned     regions      one per rank that writes patches, see `patch_log`; none where every version is sent whole

A version is either whole, in a slot (places 0 and 1), or a slot and patches on top of it (places 2 and 3, in turn). Place 4 is of one that the
trainer lends from its own memory (`loan`) and copies into its slot afterwards: until then it is not in the file.
Numbers are little endian. Digests, and the tensors' checksums on a CPU, are XXH3-64: 25 ms for 538 MB on one core, where CRC-32
takes 180 to 490 ms. On a GPU the checksums are those of `checksums`, because the bytes never pass a processor.
A record counts only if its own digest fits, so a torn record is no record.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash

from otj_runtime.weights.errors import MailboxError

MAGIC = int.from_bytes(b"OTJMBOX\0", "little")
FORMAT = 6
PAGE = 4096
ALIGNMENT = 256
SLOTS = 2
PLACES = 4
"""Records and tables of checksums of versions that the file holds: one for each slot, two for patched versions."""
LENT = PLACES
"""Place of the record and the checksums of a version that is lent."""
TABLES = PLACES + 1
STEPS = 64
"""Most patches on top of one slot."""
PARTS = 4
"""Parts of a rank's patch: while one is on its way, the next one is still looked for."""
STEP_BYTES = 64
STEPS_BYTES = STEPS * PARTS * STEP_BYTES
"""Start of a region, whole pages."""
PATCH_SHARE = 2
"""The regions hold one byte for so many of a slot. When they are full, the next version is sent whole."""
SUM_BYTES = 24
WORKERS = 64
"""Most workers of one generator."""
RECEIPT_BYTES = 512

_HEADER = struct.Struct("<QQQQQQQQQ")  # magic, format, manifest bytes, its digest, sums offset, slots offset, slot bytes, on a GPU, regions
_RECORD = struct.Struct("<qQQQQ")  # version, sequence, digest of the sums, slot, patches
_STEP = struct.Struct("<QQQQQQ")  # sequence, the one before, offset, blocks, changed elements, digest of the blocks
_DIGEST = struct.Struct("<Q")


def digest(data: bytes | bytearray | memoryview) -> int:
    """XXH3-64 of `data`."""
    return xxhash.xxh3_64_intdigest(data)


def tensor_digest(tensor: torch.Tensor) -> int:
    """XXH3-64 of a flat tensor on the CPU."""
    data: Any = tensor.view(torch.uint8).numpy()
    return digest(memoryview(data))


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: `dtype` by torch's name without its module, `offset` in bytes from the start of the slot."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @cached_property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * self.torch_dtype.itemsize

    def view(self, slot: torch.Tensor) -> torch.Tensor:
        """The tensor in the bytes of a slot, which it keeps alive."""
        return slot[self.offset : self.offset + self.nbytes].view(self.torch_dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of a mailbox and where everything lies in its file.

    Attributes:
        on_gpu: whether the tensors' checksums are computed on GPUs.
        regions: ranks that write patches; 0 where every version is sent whole.
    """

    tensors: tuple[TensorEntry, ...]
    on_gpu: bool = False
    regions: int = 0

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype, *, on_gpu: bool = False, regions: int = 0) -> Layout:
        """A layout that holds tensors of these names and shapes in `dtype`."""
        entries = []
        offset = 0
        for name, shape in tensors:
            entry = TensorEntry(name=name, dtype=str(dtype).removeprefix("torch."), shape=tuple(shape), offset=offset)
            entries.append(entry)
            offset = _aligned(offset + entry.nbytes, ALIGNMENT)
        return cls(tuple(entries), on_gpu, regions)

    @cached_property
    def manifest(self) -> bytes:
        """The tensors as JSON."""
        return json.dumps([asdict(entry) for entry in self.tensors], separators=(",", ":")).encode()

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all tensors, without gaps."""
        return sum(entry.nbytes for entry in self.tensors)

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return max(_aligned(max((entry.offset + entry.nbytes for entry in self.tensors), default=0), PAGE), PAGE)

    @cached_property
    def receipts_offset(self) -> int:
        """Where the receipt of the first worker lies."""
        return _aligned(PAGE + len(self.manifest), PAGE)

    @cached_property
    def sums_offset(self) -> int:
        """Where the sums of place 0 begin."""
        return self.receipts_offset + WORKERS * RECEIPT_BYTES

    @property
    def sums_bytes(self) -> int:
        """Bytes of one place's sums."""
        return len(self.tensors) * SUM_BYTES

    @cached_property
    def slots_offset(self) -> int:
        """Where slot 0 begins."""
        return _aligned(self.sums_offset + TABLES * self.sums_bytes, PAGE)

    @cached_property
    def region_bytes(self) -> int:
        """Bytes of one rank's region: its steps, then what they describe."""
        return STEPS_BYTES + _aligned(self.slot_bytes // (PATCH_SHARE * self.regions), PAGE) if self.regions else 0

    def region_offset(self, region: int) -> int:
        """Where a region begins."""
        return self.slots_offset + SLOTS * self.slot_bytes + region * self.region_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.region_offset(self.regions)

    def head(self) -> bytes:
        """Header and manifest, as they stand at the start of the file; the records between them are empty."""
        manifest = self.manifest
        places = (self.sums_offset, self.slots_offset, self.slot_bytes)
        fields = (MAGIC, FORMAT, len(manifest), digest(manifest), *places, int(self.on_gpu), self.regions)
        return _sealed(_HEADER.pack(*fields)).ljust(PAGE, b"\0") + manifest

    @classmethod
    def read(cls, data: memoryview, path: str) -> Layout:
        """The layout that a file describes itself with.

        Raises:
            MailboxError: if the file is no mailbox, of another format, damaged or too short.
        """
        fields = _unsealed(data, _HEADER)
        if fields is None or fields[0] != MAGIC:
            raise MailboxError(f"{path} is no mailbox: its header is damaged or missing")
        _, version, size, expected, sums_offset, slots_offset, slot_bytes, on_gpu, regions = fields
        if version != FORMAT:
            raise MailboxError(f"{path} is a mailbox of format {version}, this runtime reads format {FORMAT}: use one image for both sides")
        manifest = data[PAGE : PAGE + size]
        if digest(manifest) != expected:
            raise MailboxError(f"{path}: the manifest does not fit its checksum")
        entries = (TensorEntry(**(entry | {"shape": tuple(entry["shape"])})) for entry in json.loads(bytes(manifest)))
        layout = cls(tuple(entries), bool(on_gpu), regions)
        stated, derived = (sums_offset, slots_offset, slot_bytes), (layout.sums_offset, layout.slots_offset, layout.slot_bytes)
        if stated != derived or len(data) < layout.file_bytes:
            raise MailboxError(f"{path}: {len(data)} bytes laid out as {stated} do not hold what the manifest lists ({derived})")
        return layout


@dataclass(frozen=True)
class Record:
    """A published version. `sequence` counts publications, because a version may be published again or a run may go back."""

    version: int
    sequence: int
    sums_digest: int
    slot: int
    steps: int

    SIZE = _RECORD.size + _DIGEST.size

    @staticmethod
    def offset(place: int) -> int:
        """Where the record of `place` lies. Records are far apart, so that one damaged block cannot hold two."""
        return PAGE // 8 * (place + 1)

    @property
    def ticket(self) -> Ticket:
        """The ticket under which it was written."""
        return Ticket(version=self.version, slot=self.slot, sequence=self.sequence, steps=self.steps)

    def pack(self) -> bytes:
        """The record as it stands in the file."""
        return _sealed(_RECORD.pack(self.version, self.sequence, self.sums_digest, self.slot, self.steps))

    @classmethod
    def read(cls, data: memoryview, place: int) -> Record | None:
        """The record of `place`, or None if there is no whole one."""
        fields = _unsealed(data[cls.offset(place) :], _RECORD)
        return None if fields is None else cls(*fields)


@dataclass(frozen=True)
class Ticket:
    """Permission to write one version; rank 0 draws it and the other ranks write under the same one.

    Attributes:
        slot: where the version is written whole, or what its patches go on top of.
        steps: patches on top of the slot, the one to be written included; 0 for a version that is whole.
        lent: whether the version is to be read where the trainer has it. Its slot is written as well, later, under the same ticket without this.
    """

    version: int
    slot: int
    sequence: int
    steps: int = 0
    lent: bool = False

    @property
    def place(self) -> int:
        """Of its record and its checksums."""
        if self.lent:
            return LENT
        return SLOTS + self.steps % 2 if self.steps else self.slot


@dataclass(frozen=True)
class Step:
    """One of the `PARTS` of one rank's share of one patch.

    Attributes:
        sequence, previous: of the version it makes, and of the one it is to be applied to.
        offset: of its data in the region, behind the steps.
        blocks, changed: lengths of the patch's tensors.
        digest: of its blocks, which say where elements go: wrong ones must not be followed.
    """

    sequence: int
    previous: int
    offset: int
    blocks: int
    changed: int
    digest: int

    def pack(self) -> bytes:
        """The step as it stands in the file."""
        return _sealed(_STEP.pack(self.sequence, self.previous, self.offset, self.blocks, self.changed, self.digest))

    @classmethod
    def read(cls, data: memoryview) -> Step | None:
        """The step at the start of `data`, or None if there is no whole one."""
        fields = _unsealed(data, _STEP)
        return None if fields is None else cls(*fields)


def newest(data: memoryview) -> Record | None:
    """Record of the latest publication, or None."""
    found = [record for place in range(PLACES) if (record := Record.read(data, place)) is not None]
    return max(found, key=lambda record: record.sequence, default=None)


def _sealed(packed: bytes) -> bytes:
    return packed + _DIGEST.pack(digest(packed))


def _unsealed(data: memoryview, form: struct.Struct) -> tuple[int, ...] | None:
    """Fields of a sealed structure, or None if it is too short or its digest does not fit."""
    if len(data) < form.size + _DIGEST.size:
        return None
    packed = bytes(data[: form.size])
    (expected,) = _DIGEST.unpack_from(data, form.size)
    return form.unpack(packed) if digest(packed) == expected else None


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to
