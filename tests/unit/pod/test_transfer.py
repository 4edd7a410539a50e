"""Which way the weights take, as a table."""

from __future__ import annotations

import re
from typing import Any

import pytest

from otj_runtime.api import OnlineTrainingJob
from otj_runtime.pod.config import resolve
from otj_runtime.pod.transfer import choose
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
