"""What the learning half of a step takes."""

from __future__ import annotations

import pytest
import torch

from otj_runtime.train import throughput
from otj_runtime.train.throughput import StepClock, peak_flops, step_clock


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the clock, in seconds."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("trained", "operations"), [(1000, 6 * 1000), (10, 4 * 1000 + 2 * 10)], ids=["all", "an adapter"])
def test_mfu_is_the_share_of_the_peak_that_the_models_operations_are(later: list[float], trained: int, operations: int) -> None:
    clock = StepClock(parameters=1000, trained=trained, peak=1e6)
    clock.batches_ready()
    clock.count(torch.tensor(5))
    clock.count(torch.tensor(3))
    later[0] += 2.0
    assert clock.read() == {"time/train": 2.0, "mfu": pytest.approx(8 * operations / 2.0 / 1e6)}


def test_a_step_counts_its_own_tokens_only(later: list[float]) -> None:
    clock = StepClock(parameters=1, trained=1, peak=1.0)
    for _ in range(2):
        clock.batches_ready()
        clock.count(torch.tensor(5))
        later[0] += 1.0
    assert clock.read()["mfu"] == 6 * 5


def test_where_the_peak_is_not_known_only_the_seconds_are_told(later: list[float]) -> None:
    clock = step_clock(torch.nn.Linear(2, 2), torch.device("cpu"))
    assert clock.read() == {}
    clock.batches_ready()
    later[0] += 3.0
    assert clock.read() == {"time/train": 3.0}


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("Tesla T4", None)]
)
def test_the_peak_goes_by_the_devices_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
