"""How much better than its group."""

from __future__ import annotations

import math

import pytest
import torch

from otj_runtime.train.advantages import group_advantages


def test_equal_rewards_have_no_advantage_at_all() -> None:
    # 0.7 is not its own mean in float32.
    for scale in ("group", "none"):
        assert group_advantages(torch.full((2, 7), 0.7), scale=scale).tolist() == [[0.0] * 7] * 2


def test_advantages_are_centred_and_scaled_in_their_own_group() -> None:
    advantages = group_advantages(torch.tensor([[0.0, 1.0], [10.0, 30.0]]), scale="group")
    assert advantages.sum(dim=1).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert float(advantages[0, 1]) == pytest.approx(float(advantages[1, 1]), rel=1e-3)


def test_the_batch_that_scales_is_that_of_all_ranks() -> None:
    rewards = torch.tensor([[0.0, 1.0]])
    alone = group_advantages(rewards, scale="batch", all_rewards=rewards)
    beside = group_advantages(rewards, scale="batch", all_rewards=torch.tensor([[0.0, 1.0], [10.0, 30.0]]))
    assert float(beside[0, 1]) < float(alone[0, 1])


def test_a_completion_that_nothing_could_score_moves_nobody() -> None:
    advantages = group_advantages(torch.tensor([[0.0, 1.0, math.nan], [math.nan, math.nan, math.nan]]), scale="none")
    assert advantages.tolist() == [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


def test_an_unknown_scale_is_named() -> None:
    with pytest.raises(ValueError, match="'prompt' is unknown; use group, batch or none"):
        group_advantages(torch.ones(1, 2), scale="prompt")
