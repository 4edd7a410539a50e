"""How trainer and sampler disagree, in numbers."""

from __future__ import annotations

import math

import pytest
import torch

from otj_runtime.train.mismatch import mismatch


def numbers(old: list[list[float]], sampled: list[list[float]], mask: list[list[float]]) -> dict[str, float]:
    return {name: float(value) for name, value in mismatch(torch.tensor(old), torch.tensor(sampled), torch.tensor(mask)).items()}


def test_agreement_is_zero_everywhere_and_one_in_the_ratios() -> None:
    found = numbers([[-1.0, -2.0], [-3.0, 0.0]], [[-1.0, math.nan], [-3.0, -9.0]], [[1.0, 1.0], [1.0, 0.0]])
    assert {name for name, value in found.items() if value == 1.0} == {"mismatch/ratio_mean", "mismatch/ratio_p99"}
    assert sum(found.values()) == 2.0


def test_disagreement_is_measured_on_the_tokens_that_count() -> None:
    found = numbers([[-1.0, -1.0, -1.0, 0.0]], [[-1.0, -1.0, -1.0 - math.log(2), 50.0]], [[1.0, 1.0, 1.0, 0.0]])
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(2) / 3)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(2))
    assert found["mismatch/kl_k3"] == pytest.approx((2 - 1 - math.log(2)) / 3)
    assert found["mismatch/ratio_mean"] == pytest.approx(4 / 3)
    assert found["mismatch/outside_0.9_1.1"] == pytest.approx(1 / 3)


def test_the_99th_percentile_looks_past_padding() -> None:
    old = torch.zeros(1, 300)
    sampled = torch.cat([-torch.arange(200.0) / 100, torch.full((100,), -30.0)])[None]
    mask = torch.cat([torch.ones(200), torch.zeros(100)])[None]
    assert float(mismatch(old, sampled, mask)["mismatch/ratio_p99"]) == pytest.approx(math.exp(1.97), rel=1e-4)


def test_a_batch_in_which_nothing_counts_has_finite_numbers() -> None:
    found = numbers([[-1.0]], [[-2.0]], [[0.0]])
    assert all(math.isfinite(value) for value in found.values())
