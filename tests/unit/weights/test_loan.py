"""Lent memory: one staging for what is lent and for its copy in the mailbox, and handles as text. No GPU: CUDA's part is left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from otj_runtime.weights import loan as loan_module
from otj_runtime.weights.borrowed import BorrowedStaging
from otj_runtime.weights.checksums import Checksums
from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.layout import Layout, Ticket
from otj_runtime.weights.loan import Lender, borrow, handles
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter
from otj_runtime.weights.receipts import State
from tests.unit.weights.files import layout, tensors

CPU = torch.device("cpu")


@pytest.fixture
def writer(tmp_path: Path) -> MailboxWriter:
    return MailboxWriter.create(tmp_path / "policy.mailbox", layout(torch.bfloat16))


def _staging(path: Path, lent: list[torch.Tensor], *, far: bool) -> BorrowedStaging:
    return BorrowedStaging(MailboxReader(path / "policy.mailbox"), 0, device=CPU, lent=lent, far=far)


def _keep(writer: MailboxWriter, ticket: Ticket, values: dict[str, torch.Tensor]) -> None:
    """Write the slot as a trainer on a GPU does: with the checksums of its kernel."""
    writer.write(ticket, values.items())
    sums = Checksums.of(list(values.values()), dtype=torch.bfloat16, device=CPU)
    sums.compute()
    for position, checksum in enumerate(sums.values()):
        writer.note_checksum(ticket, position, checksum)
    writer.publish(ticket)


@pytest.mark.parametrize("far", [False, True])
def test_a_version_is_installed_from_the_trainers_memory_and_comes_back_from_its_slot(
    writer: MailboxWriter, tmp_path: Path, far: bool
) -> None:
    values = tensors(1)
    lent = list(values.values())
    staging, lender = _staging(tmp_path, lent, far=far), Lender(writer, lent)
    ticket = writer.begin_lent(1)
    staging.begin(ticket)
    lender.settle(lent)
    assert lender.lend(ticket) == writer.layout.payload_bytes
    writer.publish(ticket)
    staging.wait()
    assert all((near is own) is not far for near, own in zip(staging.near(ticket), lent, strict=True))
    assert all(torch.equal(near.bfloat16(), own.bfloat16()) for near, own in zip(staging.near(ticket), lent, strict=True))

    kept = Ticket(ticket.version, ticket.slot, ticket.sequence)
    _keep(writer, kept, values)
    sent = [tensor.bfloat16() for tensor in lent]
    for tensor in lent:
        tensor.zero_()  # the trainer has moved on
    writer.receipts.clear()
    staging.begin(kept)
    staging.wait()
    assert writer.receipts.get(0).state is State.STAGED
    assert all(torch.equal(near, own) for near, own in zip(staging.near(kept), sent, strict=True))


def test_a_slot_that_is_damaged_is_not_given_back(writer: MailboxWriter, tmp_path: Path) -> None:
    values = tensors(1)
    staging = _staging(tmp_path, list(values.values()), far=False)
    ticket = writer.begin(1)
    _keep(writer, ticket, values)
    writer.host_view(ticket, 1).add_(1)
    staging.begin(ticket)
    with pytest.raises(MailboxError, match="tensor norm of version 1 does not fit its checksum"):
        staging.wait()


def test_handles_travel_as_text_and_open_as_the_layouts_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    shared = (0, b"\x00handle", 4096, 512, b"\xffcounter", 3, b"event", True)

    def rebuild(*known: Any, **fields: Any) -> torch.Tensor:
        opened.append(fields)
        _, shape, stride, start, _, dtype, device = known
        assert device == 0
        return torch.zeros(64, dtype=dtype).as_strided(shape, stride, start)

    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", lambda _: shared)
    monkeypatch.setattr(loan_module, "rebuild_cuda_tensor", rebuild)
    base = torch.zeros(32)
    expected = Layout.of([("a", (3, 4)), ("b", (5,))], torch.bfloat16)
    text = json.dumps({"own": handles([base[2:14].view(3, 4), base[20:25]])})
    for uuid, here in (("GPU-own", True), ("GPU-other", False)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid))
        found, own = borrow(json.loads(text), expected, torch.device("cuda", 0))
        assert own is here
        assert [(tensor.shape, tensor.dtype, tensor.storage_offset()) for tensor in found] == [
            ((3, 4), torch.float32, 2),
            ((5,), torch.float32, 20),
        ]
    assert opened[0] == {
        "storage_handle": b"\x00handle",
        "storage_size_bytes": 4096,
        "storage_offset_bytes": 512,
        "ref_counter_handle": b"\xffcounter",
        "ref_counter_offset": 3,
        "event_handle": b"event",
        "event_sync_required": False,
        "requires_grad": False,
    }
