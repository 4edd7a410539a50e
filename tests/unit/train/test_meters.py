"""What is measured between two log lines."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from otj_runtime.train.meters import Meters


def taken(meters: Meters) -> dict[str, float]:
    return meters.take(Accelerator(cpu=True))


def test_a_micro_batch_counts_by_its_tokens_and_an_empty_one_not_at_all() -> None:
    meters = Meters()
    for value, tokens in ((1.0, 1.0), (4.0, 2.0), (99.0, 0.0)):
        meters.add({"kl": torch.tensor(value)}, weight=torch.tensor(tokens))
    assert taken(meters) == {"kl": pytest.approx(3.0)}


def test_extremes_are_extremes_and_not_means() -> None:
    meters = Meters()
    for value, tokens in ((0.5, 1.0), (2.0, 1.0), (float("inf"), 0.0)):
        meters.add({"weight/min": value, "weight/max": value, "clip_ratio/low_min": value}, weight=tokens)
    assert taken(meters) == {"weight/min": 0.5, "weight/max": 2.0, "clip_ratio/low_min": 0.5}


def test_what_weighed_nothing_is_left_out() -> None:
    meters = Meters()
    meters.add({"kl": float("nan"), "weight/max": 1.0}, weight=0.0)
    assert taken(meters) == {}


def test_counters_run_on_and_the_rest_begins_anew() -> None:
    meters = Meters()
    for _ in range(2):
        meters.add({"num_tokens": 3.0, "reward": 1.0})
        last = taken(meters)
    assert last == {"num_tokens": 6.0, "reward": 1.0}
    assert taken(meters) == {"num_tokens": 6.0}
