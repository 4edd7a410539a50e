"""Staging on a CPU: tensors are taken and checked while the trainer still writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from otj_runtime.weights import staging as staging_module
from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter
from otj_runtime.weights.receipts import State
from otj_runtime.weights.staging import HostStaging
from tests.unit.weights.files import layout, push, tensors


@pytest.fixture
def writer(tmp_path: Path) -> MailboxWriter:
    return MailboxWriter.create(tmp_path / "policy.mailbox", layout())


@pytest.fixture
def staging(writer: MailboxWriter, tmp_path: Path) -> HostStaging:
    return HostStaging(MailboxReader(tmp_path / "policy.mailbox"), worker=3)


def test_a_version_is_staged_while_it_is_written_and_acknowledged_when_published(writer: MailboxWriter, staging: HostStaging) -> None:
    ticket = writer.begin(5)
    staging.begin(ticket)
    for entry in tensors(5).items():
        assert writer.receipts.get(3).state is State.NONE
        writer.write(ticket, [entry])
    writer.publish(ticket)
    staging.wait()
    assert (writer.receipts.get(3).sequence, writer.receipts.get(3).state) == (ticket.sequence, State.STAGED)


def test_a_tensor_that_does_not_fit_its_checksum_is_named_in_the_receipt(writer: MailboxWriter, staging: HostStaging) -> None:
    ticket = writer.begin(1)
    writer.write(ticket, tensors(1).items())
    writer.host_view(ticket, 2).add_(1)
    writer.publish(ticket)
    staging.begin(ticket)
    with pytest.raises(MailboxError, match="tensor proj of version 1 does not fit its checksum"):
        staging.wait()
    assert writer.receipts.get(3).state is State.FAILED
    assert "tensor proj" in writer.receipts.get(3).text


def test_what_never_arrives_is_given_up_for_the_next_version(writer: MailboxWriter, staging: HostStaging) -> None:
    staging.begin(writer.begin(1))
    push(writer, 2)
    staging.begin(staging.reader.latest(2))
    staging.wait()
    assert writer.receipts.get(3).state is State.STAGED


def test_a_trainer_that_stops_writing_meets_a_deadline(
    writer: MailboxWriter, staging: HostStaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "ARRIVAL_SECONDS", 0.05)
    ticket = writer.begin(1)
    writer.write(ticket, [("embed", torch.zeros(7, 3))])
    staging.begin(ticket)
    with pytest.raises(MailboxError, match="tensor norm was not written"):
        staging.wait()
