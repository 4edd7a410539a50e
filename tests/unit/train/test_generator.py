"""What the trainer makes of the way that was chosen for the weights."""

from __future__ import annotations

from typing import Any

import pytest

from otj_runtime.api import OnlineTrainingJob
from otj_runtime.pod.config import resolve
from otj_runtime.train.generator import pod_generator
from tests.unit.api.specs import changed


@pytest.mark.parametrize(
    ("changes", "delta", "adapter_only", "wish", "printed"),
    [
        ({"generation.weightTransfer": "mailbox"}, False, False, "mailbox", "weights: mailbox: asked for\n"),
        ({"generation.weightTransfer": "delta"}, True, False, "delta", "weights: delta: asked for"),
        ({"lora.sync": "adapter"}, False, True, "auto", "weights: adapter: lora.sync is adapter\n"),
        ({}, False, False, "auto", "weights: mailbox: trainer and generator have GPUs of their own"),
        ({"generation.weightTransfer": "nccl"}, False, False, "nccl", "weights: nccl: asked for; tried at the first sync"),
    ],
)
def test_the_trainer_takes_the_way_that_the_status_names_and_prints_it(
    changes: dict[str, Any], delta: bool, adapter_only: bool, wish: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = pod_generator(resolve(OnlineTrainingJob.model_validate(changed(changes))))
    assert (generator.delta, generator.adapter_only, generator.wish) == (delta, adapter_only, wish)
    assert capsys.readouterr().out.startswith(printed)
