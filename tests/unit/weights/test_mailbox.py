"""The mailbox through its writer and reader."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.layout import Layout
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter
from otj_runtime.weights.tensors import shares
from tests.unit.weights.files import SHAPES, layout, push, read, same, tensors, write_all


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "otj" / "policy.mailbox"


@pytest.fixture
def writer(path: Path) -> MailboxWriter:
    return MailboxWriter.create(path, layout())


def test_a_published_version_reads_back_bit_by_bit(writer: MailboxWriter, path: Path) -> None:
    values = push(writer, 0)
    assert same(read(path, 0), values)


def test_nothing_is_visible_before_the_first_publication(writer: MailboxWriter, path: Path) -> None:
    write_all(writer, writer.begin(0), tensors(0))
    assert MailboxReader(path).version() is None
    with pytest.raises(MailboxError, match="holds no published version, 0 was asked for"):
        read(path, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_cast_to_the_generators_dtype_on_the_way(path: Path, dtype: torch.dtype) -> None:
    values = push(MailboxWriter.create(path, layout(dtype)), 4)
    assert same(read(path, 4), {name: value.to(dtype) for name, value in values.items()})


def test_tensors_of_any_stride_arrive_in_order(path: Path) -> None:
    writer = MailboxWriter.create(path, Layout.of([("turned", (4, 6))], torch.float32))
    value = torch.rand(6, 4).T
    ticket = writer.begin(1)
    writer.write(ticket, [("turned", value)])
    writer.publish(ticket)
    assert same(read(path, 1), {"turned": value})


def test_a_reader_that_is_open_already_sees_later_versions(writer: MailboxWriter, path: Path) -> None:
    reader = MailboxReader(path)
    for version in range(5):
        values = push(writer, version)
        assert reader.version() == version
        with reader.reading(version) as found:
            assert same(dict(found), values)


def test_only_the_latest_version_can_be_read(writer: MailboxWriter, path: Path) -> None:
    push(writer, 6)
    push(writer, 7)
    with pytest.raises(MailboxError, match="holds version 7, 6 was asked for"):
        read(path, 6)


def test_the_same_version_can_be_published_again_and_an_earlier_one_after_it(writer: MailboxWriter, path: Path) -> None:
    push(writer, 9)
    for version in (9, 2):
        values = push(writer, version)
        assert same(read(path, version), values)


def test_a_version_that_misses_a_tensor_cannot_be_published(writer: MailboxWriter, path: Path) -> None:
    values = push(writer, 0)
    ticket = writer.begin(1)
    write_all(writer, ticket, {name: value for name, value in tensors(1).items() if name != "proj"})
    with pytest.raises(MailboxError, match="version 1 is not whole: 1 tensors were not written, the first is proj"):
        writer.publish(ticket)
    assert same(read(path, 0), values)


@given(order=st.permutations(sorted(SHAPES)), ranks=st.integers(1, 4), versions=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_ranks_may_write_their_shares_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], ranks: int, versions: int
) -> None:
    path = tmp_path_factory.mktemp("ranks") / "policy.mailbox"
    writers = [MailboxWriter.create(path, layout()), *(MailboxWriter(path, layout()) for _ in range(ranks - 1))]
    owner = {name: rank for rank, share in enumerate(shares(layout().tensors, ranks=ranks)) for name in share}
    for version in range(versions):
        values = tensors(version)
        ticket = writers[0].begin(version)
        for name in order:
            writers[owner[name]].write(ticket, [(name, values[name])])
        writers[0].publish(ticket)
        assert same(read(path, version), values)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_flipped_bit_anywhere_in_a_version_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / "policy.mailbox"
    writer = MailboxWriter.create(path, layout())
    push(writer, 0)
    entry = data.draw(st.sampled_from(layout().tensors))
    byte = layout().slots_offset + entry.offset + data.draw(st.integers(0, entry.nbytes - 1))
    _flip(path, byte, data.draw(st.integers(0, 7)))
    with pytest.raises(MailboxError, match=f"tensor {entry.name} of version 0 does not fit its checksum"):
        read(path, 0)


def test_damaged_checksums_are_noticed(writer: MailboxWriter, path: Path) -> None:
    push(writer, 0)
    _flip(path, layout().sums_offset + 9, 3)
    with pytest.raises(MailboxError, match="checksums of version 0 do not fit"):
        read(path, 0)


@pytest.mark.parametrize(
    ("offset", "words"), [(0, "its header is damaged"), (9, "its header is damaged"), (4100, "manifest does not fit its checksum")]
)
def test_a_damaged_head_is_no_mailbox(writer: MailboxWriter, path: Path, offset: int, words: str) -> None:
    _flip(path, offset, 0)
    with pytest.raises(MailboxError, match=words):
        MailboxReader(path)


def test_a_missing_file_and_a_short_one_are_named(writer: MailboxWriter, path: Path) -> None:
    with pytest.raises(MailboxError, match="cannot open the weights mailbox"):
        MailboxReader(path.with_name("absent"))
    os.truncate(path, layout().file_bytes - 1)
    with pytest.raises(MailboxError, match="do not hold what the manifest lists"):
        MailboxReader(path)


def test_a_slot_taken_back_during_a_read_is_noticed(writer: MailboxWriter, path: Path) -> None:
    push(writer, 0)

    def read_while_two_more_versions_come() -> None:
        with MailboxReader(path).reading(0):
            push(writer, 1)
            writer.begin(2)

    with pytest.raises(MailboxError, match="version 0 was overwritten while it was read"):
        read_while_two_more_versions_come()


def test_a_loader_that_works_in_place_does_not_change_the_mailbox(writer: MailboxWriter, path: Path) -> None:
    values = push(writer, 0)
    with MailboxReader(path).reading(0) as found:
        for _, tensor in found:
            tensor.zero_()
    assert same(read(path, 0), values)


def test_a_rank_with_another_model_is_refused(writer: MailboxWriter, path: Path) -> None:
    with pytest.raises(MailboxError, match="all ranks must load the same model"):
        MailboxWriter(path, layout(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "shape", "words"), [("unknown", (3,), "no place for tensor unknown"), ("norm", (4,), r"norm has shape \(4,\)")]
)
def test_a_tensor_that_does_not_fit_is_refused(writer: MailboxWriter, name: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(MailboxError, match=words):
        writer.write(writer.begin(0), [(name, torch.zeros(shape))])


def test_too_little_memory_is_refused_before_anything_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MailboxError, match=r"raise resources\.sharedMemory"):
        MailboxWriter.create(path, layout())
    assert list(path.parent.iterdir()) == []


def test_a_new_mailbox_replaces_an_old_one_without_a_gap(writer: MailboxWriter, path: Path) -> None:
    push(writer, 8)
    old = MailboxReader(path)
    again = MailboxWriter.create(path, layout())
    assert old.version() == 8
    assert MailboxReader(path).version() is None
    values = push(again, 0)
    assert same(read(path, 0), values)


def _flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))
