"""Which way the weights take, as a table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api import OnlineTrainingJob
from otj_runtime.pod.config import resolve
from otj_runtime.pod.transfer import Direct, Found, Sight, Transfer, candidate, choose, fallback, settle
from tests.unit.api.specs import changed

OWN = "trainer and generator have GPUs of their own, and shared memory needs no access from one to the other"
SCRIPT = {"dataset": None, "trainer.command": ["python", "/scripts/train.py"]}


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({}, "mailbox", f"{OWN}; weightTransfer: delta sends less at this learning rate"),
        ({"training.learning_rate": 1e-6}, "mailbox", "weightTransfer: delta sends less"),
        ({"training.learning_rate": 1e-5}, "mailbox", f"{OWN}$"),
        ({"generation.dtype": "float32"}, "mailbox", f"{OWN}$"),
        (SCRIPT, "mailbox", f"{OWN}$"),
        ({"accelerator.device": "cpu"}, "mailbox", "both sides compute on CPUs and share memory$"),
        ({"generation.weightTransfer": "mailbox"}, "mailbox", "asked for$"),
        ({"generation.weightTransfer": "delta"}, "delta", "asked for; everything is sent whole where that is safer"),
        ({"generation.weightTransfer": "delta", "accelerator.device": "cpu", "generation.dtype": "bfloat16"}, "delta", "asked for"),
        ({"generation.weightTransfer": "delta", "lora": {}}, "delta", "asked for"),
        ({"lora.sync": "adapter"}, "adapter", "lora.sync is adapter$"),
        ({"generation.weightTransfer": "nccl"}, "nccl", "asked for; tried at the first sync, else the mailbox$"),
        ({"generation.weightTransfer": "ipc"}, "ipc", "asked for; tried at the first sync, else the mailbox$"),
    ],
)
def test_what_goes_to_the_generator_follows_from_the_job_and_says_why(changes: dict[str, Any], kind: str, reason: str) -> None:
    transfer = choose(resolve(OnlineTrainingJob.model_validate(changed(changes))))
    assert transfer.kind == kind
    assert re.search(reason, transfer.reason)
    assert len(transfer.describe(123.456)) <= 256  # what the status takes


def test_the_choice_is_described_with_its_speed_once_that_is_measured() -> None:
    transfer = choose(resolve(OnlineTrainingJob.model_validate(changed({"generation.weightTransfer": "mailbox"}))))
    assert transfer.describe(None) == "mailbox: asked for"
    assert transfer.describe(38.25) == "mailbox, 38.2 GB/s: asked for"


@pytest.mark.parametrize(
    ("wish", "room", "on_gpu", "kind"),
    [
        ("auto", True, True, "ipc"),
        ("auto", True, False, None),
        ("auto", False, True, "nccl"),
        ("nccl", True, True, "nccl"),
        ("ipc", True, True, "ipc"),
        ("mailbox", False, True, None),
        ("delta", False, True, None),
    ],
)
def test_a_way_past_the_host_is_looked_for_where_it_is_asked_for_or_better_than_the_mailbox(
    wish: str, room: bool, on_gpu: bool, kind: str | None
) -> None:
    assert candidate(wish, room=room, on_gpu=on_gpu) == kind


ALL = ("a", "b", "c", "d")


def _gpu(device: str, *, listed: tuple[str, ...] = ALL, peers: tuple[str, ...] = ALL) -> Sight:
    return Sight(device=device, listed=listed, peers=peers)


CPU = Sight(device="")


@pytest.mark.parametrize(
    ("kind", "trainers", "workers", "against"),
    [
        ("nccl", [_gpu("a")], [_gpu("b")], None),
        ("nccl", [_gpu("a"), _gpu("b")], [_gpu("c"), _gpu("d")], None),
        ("nccl", [_gpu("a"), _gpu("b", listed=(), peers=())], [_gpu("c")], None),  # rank 0 alone sends
        ("nccl", [_gpu("a", peers=("b",)), _gpu("b")], [_gpu("c")], "GPU a has no peer access to GPU c"),
        ("nccl", [_gpu("a", listed=("a",))], [_gpu("b")], "the trainer's container does not see the generator's GPU b"),
        ("nccl", [_gpu("a")], [_gpu("b", listed=("b",))], "the generator's container does not see the trainer's GPU a"),
        ("nccl", [_gpu("a")], [_gpu("b"), _gpu("c", listed=("c",))], "the generator's container does not see the trainer's GPU a"),
        ("nccl", [_gpu("a")], [_gpu("a")], "rank 0 and the generator are both on GPU a, and NCCL wants one each; ipc is for that"),
        ("nccl", [CPU], [_gpu("a")], "it goes from GPU to GPU, and one side computes on a CPU"),
        ("nccl", [_gpu("a")], [CPU], "it goes from GPU to GPU, and one side computes on a CPU"),
        ("ipc", [_gpu("a")], [_gpu("a")], None),
        ("ipc", [_gpu("a", listed=("a",), peers=())], [_gpu("a", listed=("a",), peers=())], None),
        ("ipc", [_gpu("a"), _gpu("b")], [_gpu("b"), _gpu("a")], None),
        ("ipc", [_gpu("a")], [_gpu("b")], None),
        ("ipc", [_gpu("a")], [_gpu("a"), _gpu("b")], None),
        ("ipc", [_gpu("a", listed=("a",))], [_gpu("b")], "the trainer's container does not see the generator's GPU b"),
        ("ipc", [_gpu("a")], [_gpu("a"), _gpu("b", listed=("b",))], "the generator's container does not see the trainer's GPU a"),
        ("ipc", [_gpu("a")], [_gpu("b", peers=())], "GPU b has no peer access to GPU a"),
        ("ipc", [_gpu("a", peers=())], [_gpu("b")], "GPU a has no peer access to GPU b"),
        ("ipc", [CPU], [CPU], "it goes from GPU to GPU, and one side computes on a CPU"),
    ],
)
def test_what_both_sides_see_of_the_gpus_decides(kind: Direct, trainers: list[Sight], workers: list[Sight], against: str | None) -> None:
    transfer = settle(kind, kind, Found(tuple(trainers), tuple(workers)))
    if against is None:
        assert transfer.kind == kind
        assert transfer.reason.startswith(f"{kind} was asked for; ")
    else:
        assert transfer == Transfer("mailbox", f"{kind} was asked for, but {kind} is not possible: {against}")


def test_the_reason_of_auto_is_the_room_that_is_missing() -> None:
    found = Found((_gpu("a"),), (_gpu("b"),))
    assert settle("auto", "nccl", found).describe(180.0) == (
        "nccl, 180 GB/s: the mailbox has no room in the shared memory; each side sees the other's GPU, with peer access to 1"
    )


def test_auto_needs_no_excuse_for_a_gpu_that_both_sides_share() -> None:
    found = Found((_gpu("a"),), (_gpu("a"),))
    assert settle("auto", "ipc", found).reason == (
        "trainer and generator share their GPU, and the weights are read where the trainer has them"
    )
    assert fallback("auto", "ipc", "no handles").reason == "ipc is not possible: no handles"


def test_a_long_reason_is_cut_to_what_the_status_takes() -> None:
    text = fallback("nccl", "nccl", "NCCL error: " + 500 * "x").describe(123.456)
    assert len(text) <= 256
    assert text.endswith("...")


def test_the_launcher_finds_the_outcome_that_rank_0_left(tmp_path: Path) -> None:
    assert Transfer.read(tmp_path) is None
    outcome = fallback("ipc", "ipc", "no training rank is on the generator's GPU b")
    outcome.write(tmp_path)
    assert Transfer.read(tmp_path) == outcome
