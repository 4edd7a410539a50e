"""The split of this machine's devices."""

from __future__ import annotations

import pytest

from otj_runtime.local.devices import VISIBLE, found_devices, split
from otj_runtime.local.options import UsageError
from otj_runtime.pod.config import resolve
from tests.unit.local.jobs import job


def test_the_last_devices_generate_and_the_first_train() -> None:
    config = resolve(job(gpus=4, generation={"gpus": 2}, accelerator={"device": "cuda"}))
    found = split(config, ["0", "1", "2", "GPU-x", "4"])
    assert found["trainer"][VISIBLE] == "0,1"
    assert found["generator"][VISIBLE] == "2,GPU-x"


def test_too_few_devices_are_counted_in_the_message() -> None:
    config = resolve(job(gpus=4, accelerator={"device": "cuda"}))
    with pytest.raises(UsageError, match=r"needs 4 GPUs \(3 to train, 1 to generate\), this machine has 2"):
        split(config, ["0", "1"])


def test_a_cpu_job_sees_no_device_even_where_there_are_some() -> None:
    assert {env[VISIBLE] for env in split(resolve(job()), ["0"]).values()} == {""}


@pytest.mark.parametrize(("value", "found"), [("3, 1", ["3", "1"]), ("", []), ("-1", [])])
def test_devices_are_those_that_the_environment_allows(monkeypatch: pytest.MonkeyPatch, value: str, found: list[str]) -> None:
    monkeypatch.setenv(VISIBLE, value)
    assert found_devices() == found
