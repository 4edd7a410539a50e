"""Staging on a CPU: tensors are taken and checked while the trainer still writes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from otj_runtime.weights import staging as staging_module
from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter
from otj_runtime.weights.receipts import State
from otj_runtime.weights.staging import HostStaging
from tests.unit.weights.files import layout, push, tensors, write_all


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


def test_a_version_may_be_looked_out_for_before_the_trainer_draws_its_ticket(writer: MailboxWriter, staging: HostStaging) -> None:
    push(writer, 1)
    expected = writer.following(staging.reader.latest(1))
    staging.begin(expected)
    ticket = writer.begin(5)
    staging.begin(ticket)
    write_all(writer, ticket, tensors(5))
    writer.publish(ticket)
    staging.wait()
    assert (ticket.slot, ticket.sequence) == (expected.slot, expected.sequence)
    assert staging.take() == ticket
    assert writer.receipts.get(3).state is State.STAGED


def test_an_installation_does_not_wait_for_what_is_only_looked_out_for(writer: MailboxWriter, staging: HostStaging) -> None:
    push(writer, 1)
    staging.begin(writer.following(staging.reader.latest(1)))
    with pytest.raises(MailboxError, match="version 2 is not published yet"):
        staging.require_published()
    staging.begin(staging.reader.latest(1))
    staging.require_published()


def test_what_was_staged_is_taken_once(writer: MailboxWriter, staging: HostStaging) -> None:
    push(writer, 1)
    staging.begin(staging.reader.latest(1))
    staging.wait()
    staging.take()
    with pytest.raises(MailboxError, match="nothing was staged"):
        staging.take()


def test_the_next_version_may_be_begun_at_once_but_is_staged_after_the_check_of_what_was_installed(
    writer: MailboxWriter, staging: HostStaging
) -> None:
    push(writer, 1)
    staging.begin(staging.reader.latest(1))
    staging.wait()
    published, seen = threading.Event(), list[State]()

    def compare() -> list[str]:
        assert published.wait(60)
        seen.append(writer.receipts.get(3).state)
        return []

    installed = staging.take()
    staging.confirm(installed, compare)
    staging.begin(writer.following(installed))
    push(writer, 2)
    published.set()
    staging.wait()
    assert seen == [State.NONE]
    assert (writer.receipts.get(3).sequence, writer.receipts.get(3).state) == (installed.sequence + 1, State.STAGED)


def test_what_was_given_up_may_be_begun_again_under_the_same_ticket(writer: MailboxWriter, staging: HostStaging) -> None:
    ticket = writer.begin(1)
    staging.begin(ticket)
    staging.stop()
    assert writer.receipts.get(3).state is State.NONE
    staging.begin(ticket)
    write_all(writer, ticket, tensors(1))
    writer.publish(ticket)
    staging.wait()
    assert writer.receipts.get(3).state is State.STAGED


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
