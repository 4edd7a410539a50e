"""A writer that stops anywhere leaves the version before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otj_runtime.weights.layout import RECEIPT_BYTES, STEP_BYTES, WORKERS, Layout, Record
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter
from otj_runtime.weights.receipts import Receipts
from tests.unit.weights.files import layout, push, read, same, tensors, write_all
from tests.unit.weights.test_patch import Ranks


class Crash(BaseException):
    """The process is gone."""


class CrashingMemory:
    """A mailbox's memory that takes a number of bytes and then crashes in the middle of a store."""

    def __init__(self, data: memoryview, budget: int) -> None:
        self._data, self._budget = data, budget

    def __getitem__(self, where: slice) -> memoryview:
        return self._data[where]

    def __len__(self) -> int:
        return len(self._data)

    def __setitem__(self, where: slice, value: bytes) -> None:
        taken = min(self._budget, len(value))
        self._data[where.start : where.start + taken] = value[:taken]
        self._budget -= taken
        if taken < len(value):
            raise Crash


def _bytes_of_a_push(writer: MailboxWriter) -> int:
    """Bytes that begin, the checksums and publish store, beside the tensors."""
    return 2 * Record.SIZE + 2 * writer.layout.sums_bytes + WORKERS * RECEIPT_BYTES


@given(version=st.integers(0, 2), share=st.floats(0, 1), written=st.integers(0, 5))
@settings(deadline=None, max_examples=150)
def test_a_crash_at_any_byte_leaves_the_previous_version_readable(
    tmp_path_factory: pytest.TempPathFactory, version: int, share: float, written: int
) -> None:
    torch.manual_seed(version)  # for one seed of 256, the last byte of a record is what lies there already, and its loss is none
    path = tmp_path_factory.mktemp("crash") / "policy.mailbox"
    writer = MailboxWriter.create(path, layout())
    for earlier in range(version + 1):
        values = push(writer, earlier)
    doomed = MailboxWriter(path, layout())
    crashing = CrashingMemory(doomed._data, int(share * (_bytes_of_a_push(doomed) - 1)))
    doomed._data = crashing  # type: ignore[assignment]
    doomed.receipts = Receipts(crashing, doomed.layout)  # type: ignore[arg-type]
    with pytest.raises(Crash):
        push(doomed, version + 1)
    assert same(read(path, version), values)
    # Another writer goes on from what it finds.
    after = MailboxWriter(path, layout())
    write_all(after, after.begin(version + 2), dict(list(tensors(9).items())[:written]))
    assert same(read(path, version), values)
    values = push(after, version + 3)
    assert same(read(path, version + 3), values)


@given(version=st.integers(0, 2), share=st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_a_crash_at_any_byte_of_a_patch_leaves_the_previous_version_readable(
    tmp_path_factory: pytest.TempPathFactory, version: int, share: float
) -> None:
    trainer = Ranks(tmp_path_factory.mktemp("crash"))
    trainer.whole(0)
    for earlier in range(1, version + 1):
        trainer.change(every=200)
        assert trainer.patch(earlier) is not None
    values = trainer.sent
    (doomed,) = trainer.writers
    budget = 2 * Record.SIZE + 2 * doomed.layout.sums_bytes + WORKERS * RECEIPT_BYTES + STEP_BYTES - 1
    crashing = CrashingMemory(doomed._data, int(share * budget))
    doomed._data = doomed.log._data = crashing  # type: ignore[assignment]
    doomed.receipts = Receipts(crashing, doomed.layout)  # type: ignore[arg-type]
    trainer.change(every=200)
    with pytest.raises(Crash):
        trainer.patch(version + 1)
    assert same(read(trainer.path, version), values)


_WRITER = """
import sys, torch
from pathlib import Path
from otj_runtime.weights.layout import RECEIPT_BYTES, WORKERS, Layout
from otj_runtime.weights.mailbox import MailboxWriter
path, layout = Path(sys.argv[1]), Layout.of([(f"t{i}", (512, 512)) for i in range(24)], torch.float32)
writer = MailboxWriter(path, layout)
version = 0
while True:
    version += 1
    ticket = writer.begin(version)
    writer.write(ticket, ((entry.name, torch.full(entry.shape, float(version))) for entry in layout.tensors))
    writer.publish(ticket)
"""


def test_a_writer_killed_while_it_writes_leaves_a_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "policy.mailbox"
    MailboxWriter.create(path, Layout.of([(f"t{i}", (512, 512)) for i in range(24)], torch.float32))
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)]) as process:
        _wait_for_version(path, 20)
        os.kill(process.pid, signal.SIGKILL)
    reader = MailboxReader(path)
    last = reader.version()
    assert last is not None
    with reader.reading(last) as found:
        assert {float(value) for _, tensor in found for value in (tensor.min(), tensor.max())} == {float(last)}


def _wait_for_version(path: Path, version: int) -> None:
    """Until the writer is in full swing."""
    reader, end = MailboxReader(path), time.monotonic() + 120
    while (reader.version() or 0) < version:
        assert time.monotonic() < end, f"version {version} was not published within 120 s"
        time.sleep(0.005)
