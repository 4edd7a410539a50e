"""Patches: bit by bit what the version is, from a mailbox that others read at any time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.layout import PAGE, STEPS, Layout, Ticket
from otj_runtime.weights.mailbox import MailboxReader, MailboxWriter
from otj_runtime.weights.patch import BITS, Patch, apply, encode, joined
from otj_runtime.weights.patch_write import PatchWrite
from otj_runtime.weights.staging import HostStaging
from otj_runtime.weights.tensors import shares
from tests.unit.weights.files import read, same

SHAPES: dict[str, tuple[int, ...]] = {"embed": (100, 70), "norm": (3,), "empty": (0, 3), "scalar": (), "head": (3, 9000)}
NAMES = sorted(SHAPES)


def _random_bits(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits: not numbers and both zeros among them."""
    bits = BITS[dtype.itemsize]
    limits = torch.iinfo(bits)
    values = torch.randint(limits.min, limits.max, (count,), dtype=bits, generator=torch.Generator().manual_seed(seed))
    values[::5] = 0
    return values


@given(
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_a_patch_makes_of_the_old_bits_exactly_the_new_ones(sizes: list[int], dtype: torch.dtype, share: float, seed: int) -> None:
    layout = Layout.of([(f"t{index}", (size,)) for index, size in enumerate(sizes)], dtype)
    bits = BITS[dtype.itemsize]
    old = _random_bits(layout.slot_bytes // dtype.itemsize, dtype, seed)
    new = old.clone()
    patches = []
    for index, entry in enumerate(layout.tensors):
        begin = entry.offset // dtype.itemsize
        place = slice(begin, begin + entry.count)
        chosen = torch.rand(entry.count, generator=torch.Generator().manual_seed(seed + index)) < share
        new[place][chosen] = _random_bits(entry.count, dtype, seed + 7)[chosen]
        patches.append(encode(entry, new[place], old[place]))
    patch = joined(patches)
    assert len(patch.indices) == int((new != old).sum())
    slot = old.view(torch.uint8).clone()
    apply(patch, slot)
    assert torch.equal(slot.view(bits), new)


def test_wrong_indices_reach_nothing_outside_of_the_slot() -> None:
    memory = torch.zeros(3 * 256, dtype=torch.uint8)
    wrong = Patch(
        torch.tensor([100, -5000]),
        torch.tensor([2, 1], dtype=torch.int32),
        torch.tensor([-1, 32767, -32768], dtype=torch.int16),
        torch.ones(3, dtype=torch.int16),
    )
    apply(wrong, memory[256:512])
    assert not memory[:256].any()
    assert not memory[512:].any()


class Ranks:
    """Training ranks that send a policy as patches, and the folder that they share with a generator."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.bfloat16, ranks: int = 1) -> None:
        self.path = folder / "policy.mailbox"
        layout = Layout.of(SHAPES.items(), dtype, regions=ranks)
        self.writers = [MailboxWriter.create(self.path, layout), *(MailboxWriter(self.path, layout) for _ in range(ranks - 1))]
        self.patches = [PatchWrite(writer, region) for region, writer in enumerate(self.writers)]
        self.shares = shares(layout.tensors, ranks=ranks)
        self.values = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
        self.dtype = dtype

    @property
    def sent(self) -> dict[str, torch.Tensor]:
        """What a reader must find."""
        return {name: value.to(self.dtype) for name, value in self.values.items()}

    def change(self, *, every: int = 50, by: float = 1.1) -> None:
        """Change one element of so many."""
        for value in self.values.values():
            value.view(-1)[::every] *= by

    def whole(self, version: int) -> Ticket:
        ticket = self.writers[0].begin(version)
        for writer, patch, share in zip(self.writers, self.patches, self.shares, strict=True):
            writer.write(ticket, patch.remember(ticket, [(name, self.values[name]) for name in share]))
        self.writers[0].publish(ticket)
        return ticket

    def patch(self, version: int) -> Ticket | None:
        """The ticket; None if a rank found its changes too many."""
        ticket = self.writers[0].begin_patch(version)
        found = [
            patch.write(ticket, [(name, self.values[name]) for name in share])
            for patch, share in zip(self.patches, self.shares, strict=True)
        ]
        if None in found:
            return None
        self.writers[0].publish(ticket)
        return ticket


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_version_reads_back_bit_by_bit_whoever_followed_and_whoever_comes_late(
    tmp_path: Path, dtype: torch.dtype, ranks: int
) -> None:
    trainer = Ranks(tmp_path, dtype=dtype, ranks=ranks)
    ticket: Ticket | None = trainer.whole(0)
    follower = HostStaging(MailboxReader(trainer.path), worker=0)
    for version in range(1, 6):
        assert ticket is not None
        follower.begin(ticket)
        follower.wait()
        content = dict(zip(SHAPES, follower.content(ticket), strict=True))
        assert same(content, trainer.sent)
        assert same(read(trainer.path, version - 1), trainer.sent)
        trainer.change(every=200)
        ticket = trainer.whole(version) if version == 4 else trainer.patch(version)


def test_a_patch_is_small(tmp_path: Path) -> None:
    trainer = Ranks(tmp_path)
    trainer.whole(0)
    trainer.change(every=100)
    ticket = trainer.writers[0].begin_patch(1)
    written = trainer.patches[0].write(ticket, trainer.values.items())
    assert written is not None
    assert 0 < written < 0.03 * trainer.writers[0].layout.payload_bytes


def test_what_changed_too_much_is_no_patch_and_what_was_published_stays(tmp_path: Path) -> None:
    trainer = Ranks(tmp_path)
    trainer.whole(0)
    before = trainer.sent
    trainer.change(every=2)
    assert trainer.patch(1) is None
    assert same(read(trainer.path, 0), before)
    assert trainer.patch(2) is None  # nothing has changed since, but the snapshot is of no version that was published
    trainer.whole(3)
    trainer.change()
    assert trainer.patch(4) is not None
    assert same(read(trainer.path, 4), trainer.sent)


def test_when_the_log_is_full_the_next_version_is_whole_and_the_log_begins_anew(tmp_path: Path) -> None:
    trainer = Ranks(tmp_path)
    trainer.whole(0)
    version = 0
    for _ in range(2):
        while True:
            version += 1
            trainer.change(every=20, by=-1.0)
            before = read(trainer.path, version - 1)
            if trainer.patch(version) is None:
                break
        assert version % 100 > 1
        assert same(read(trainer.path, version - 1), before)
        version += 1
        trainer.whole(version)
        assert same(read(trainer.path, version), trainer.sent)


def test_a_slot_carries_a_limited_number_of_patches(tmp_path: Path) -> None:
    trainer = Ranks(tmp_path)
    trainer.whole(0)
    for version in range(1, STEPS + 1):
        assert trainer.patch(version) is not None
    assert same(read(trainer.path, STEPS), trainer.sent)
    with pytest.raises(MailboxError, match="cannot be a patch"):
        trainer.patch(STEPS + 1)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_flipped_bit_anywhere_in_a_patch_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    trainer = Ranks(tmp_path_factory.mktemp("flip"))
    trainer.whole(0)
    trainer.change()
    ticket = trainer.patch(1)
    assert ticket is not None
    writer = trainer.writers[0]
    patches = writer.log.patches([ticket.sequence - 1, ticket.sequence], done=0, stopped=lambda: True, deadline_s=0)
    patch = data.draw(st.sampled_from([patch for patch in patches if len(patch.indices)]))
    part = data.draw(st.sampled_from(patch.parts))
    # A place in a block is of 12 bits; those above are not looked at.
    bit = data.draw(st.integers(0, 11 if part is patch.indices else 8 * part.itemsize - 1))
    index = data.draw(st.integers(0, len(part) - 1))
    part.view(torch.uint8)[index * part.itemsize + bit // 8] ^= 1 << bit % 8
    staging = HostStaging(MailboxReader(trainer.path), worker=0)
    staging.begin(ticket)
    with pytest.raises(MailboxError, match=r"damaged|does not fit its checksum"):
        staging.wait()


def test_a_torn_step_is_no_step(tmp_path: Path) -> None:
    trainer = Ranks(tmp_path)
    trainer.whole(0)
    for version in (1, 2):
        trainer.change()
        assert trainer.patch(version) is not None
    layout = trainer.writers[0].layout
    with trainer.path.open("r+b") as file:
        file.seek(layout.region_offset(0) + 3)
        file.write(b"\xff")
    with pytest.raises(MailboxError, match="patch 1 below version 2 is damaged"):
        read(trainer.path, 2)
    assert layout.file_bytes == layout.region_offset(0) + layout.region_bytes
    assert layout.region_bytes > PAGE


@pytest.mark.parametrize(("source", "dtype"), [("float32", "bfloat16"), ("float32", "float32")])
def test_the_kernel_of_a_gpu_finds_what_torch_finds(source: str, dtype: str) -> None:
    command = [sys.executable, "-m", "tests.unit.weights.interpreted", source, dtype]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
