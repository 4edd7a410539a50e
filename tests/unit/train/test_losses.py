"""The losses against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from otj_runtime.train.advantages import group_advantages
from otj_runtime.train.losses import dpo_loss, grpo_loss


def loss_of(ratio: float, advantage: float, **clip: float) -> float:
    """The GRPO loss of a single token whose importance ratio is `ratio`."""
    loss = grpo_loss(
        torch.tensor([[math.log(ratio)]]),
        sampler_logprobs=torch.zeros(1, 1),
        advantages=torch.tensor([advantage]),
        epsilon_low=clip.get("low", 0.2),
        epsilon_high=clip.get("high", 0.2),
    )
    return float(loss.per_token)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        pytest.param(1.0, 2.0, -2.0, id="an on-policy token counts its advantage"),
        pytest.param(1.1, 2.0, -2.2, id="within the range the ratio counts"),
        pytest.param(1.5, 2.0, -2.4, id="a good token is not pushed beyond the range"),
        pytest.param(0.5, -2.0, 1.6, id="a bad token is not pushed below the range"),
        pytest.param(1.5, -2.0, 3.0, id="a bad token that became likelier counts in full"),
        pytest.param(0.5, 2.0, -1.0, id="a good token that became less likely counts in full"),
    ],
)
def test_the_surrogate_is_clipped_on_the_pessimistic_side(ratio: float, advantage: float, expected: float) -> None:
    assert loss_of(ratio, advantage) == pytest.approx(expected, rel=1e-5)


def test_the_upper_range_can_be_wider_than_the_lower() -> None:
    assert loss_of(1.5, 1.0, low=0.2, high=0.4) == pytest.approx(-1.4)


def test_a_clipped_token_has_no_gradient() -> None:
    logprobs = torch.tensor([[math.log(1.5), 0.0]], requires_grad=True)
    loss = grpo_loss(logprobs, sampler_logprobs=torch.zeros(1, 2), advantages=torch.ones(1), epsilon_low=0.2, epsilon_high=0.2)
    loss.per_token.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, -1.0]]
    assert loss.clipped.tolist() == [[True, False]]


def test_the_kl_term_is_zero_on_the_reference_and_grows_with_beta() -> None:
    arguments = {"sampler_logprobs": torch.zeros(1, 1), "advantages": torch.zeros(1), "epsilon_low": 0.2, "epsilon_high": 0.2}
    same = grpo_loss(torch.zeros(1, 1), reference_logprobs=torch.zeros(1, 1), beta=0.5, **arguments)
    moved = grpo_loss(torch.zeros(1, 1), reference_logprobs=torch.full((1, 1), -1.0), beta=0.5, **arguments)
    assert float(same.per_token) == 0.0
    assert float(moved.per_token) == pytest.approx(0.5 * (math.exp(-1) + 1 - 1))


def test_a_kl_term_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference_logprobs are needed"):
        grpo_loss(
            torch.zeros(1, 1), sampler_logprobs=torch.zeros(1, 1), advantages=torch.zeros(1), epsilon_low=0.2, epsilon_high=0.2, beta=0.1
        )


def test_equal_rewards_have_no_advantage() -> None:
    assert group_advantages(torch.full((2, 4), 0.7), scale=True).abs().max() < 1e-3


def test_advantages_are_centred_and_scaled_in_their_own_group() -> None:
    advantages = group_advantages(torch.tensor([[0.0, 1.0], [10.0, 30.0]]), scale=True)
    assert advantages.sum(dim=1).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert float(advantages[0, 1]) == pytest.approx(float(advantages[1, 1]), rel=1e-3)


def test_the_sigmoid_loss_prefers_a_larger_margin() -> None:
    reference, mask = torch.zeros(2, 1), torch.ones(2, 1)
    narrow = dpo_loss(torch.tensor([[0.1], [0.0]]), reference_logprobs=reference, mask=mask, beta=1.0, kind="sigmoid")
    wide = dpo_loss(torch.tensor([[2.0], [0.0]]), reference_logprobs=reference, mask=mask, beta=1.0, kind="sigmoid")
    assert float(wide.per_pair) < float(narrow.per_pair)
    assert float(narrow.per_pair) == pytest.approx(math.log(1 + math.exp(-0.1)), rel=1e-5)


def test_ipo_pulls_the_margin_to_half_the_inverse_of_beta() -> None:
    at_target = dpo_loss(torch.tensor([[5.0], [0.0]]), reference_logprobs=torch.zeros(2, 1), mask=torch.ones(2, 1), beta=0.1, kind="ipo")
    assert float(at_target.per_pair) == pytest.approx(0.0)


def test_an_unknown_preference_loss_is_named() -> None:
    with pytest.raises(ValueError, match="'hinge' is unknown; use sigmoid or ipo"):
        dpo_loss(torch.zeros(2, 1), reference_logprobs=torch.zeros(2, 1), mask=torch.ones(2, 1), beta=0.1, kind="hinge")
