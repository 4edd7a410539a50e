"""What the trainer makes of the way that was chosen for the weights."""

from __future__ import annotations

from typing import Any

import pytest

from otj_runtime.api import OnlineTrainingJob
from otj_runtime.pod.config import resolve
from otj_runtime.train.generator import pod_generator
from tests.unit.api.specs import changed


@pytest.mark.parametrize(
    ("changes", "delta", "adapter_only", "printed"),
    [
        ({"generation.weightTransfer": "mailbox"}, False, False, "weights: mailbox: asked for\n"),
        ({"generation.weightTransfer": "delta"}, True, False, "weights: delta: asked for"),
        ({"lora.sync": "adapter"}, False, True, "weights: adapter: lora.sync is adapter\n"),
    ],
)
def test_the_trainer_takes_the_way_that_the_status_names_and_prints_it(
    changes: dict[str, Any], delta: bool, adapter_only: bool, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = pod_generator(resolve(OnlineTrainingJob.model_validate(changed(changes))))
    assert (generator.delta, generator.adapter_only) == (delta, adapter_only)
    assert capsys.readouterr().out.startswith(printed)
