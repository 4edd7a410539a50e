"""The pieces of the losses against their formulas. That the whole equals TRL's is test_parity's."""

from __future__ import annotations

import math

import pytest
import torch

from otj_runtime.train.losses import (
    clipped_surrogate,
    divergence,
    importance_ratio,
    preference_loss,
    sampler_weight,
    sum_sequence_means,
    sum_tokens,
    weighted_likelihood,
)


def surrogate_of(ratio: float, advantage: float, *, low: float = 0.2, high: float = 0.2, delta: float | None = None) -> float:
    surrogate = clipped_surrogate(torch.tensor([[ratio]]), torch.tensor([advantage]), epsilon_low=low, epsilon_high=high, delta=delta)
    return float(surrogate.loss)


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
    assert surrogate_of(ratio, advantage) == pytest.approx(expected, rel=1e-5)


def test_the_upper_range_can_be_wider_than_the_lower() -> None:
    assert surrogate_of(1.5, 1.0, low=0.2, high=0.4) == pytest.approx(-1.4)


def test_delta_bounds_what_a_bad_token_that_became_likelier_counts() -> None:
    assert surrogate_of(9.0, -1.0, delta=3.0) == pytest.approx(3.0)


def test_a_clipped_token_has_no_gradient() -> None:
    ratio = torch.tensor([[1.5, 1.0]], requires_grad=True)
    surrogate = clipped_surrogate(ratio, torch.ones(1), epsilon_low=0.2, epsilon_high=0.2)
    surrogate.loss.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [[0.0, -1.0]]
    assert surrogate.high.tolist() == [[True, False]]


def test_a_bounded_likelihood_keeps_the_gradient_of_every_token() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    surrogate = weighted_likelihood(torch.tensor([[9.0, 0.5]]), torch.tensor([2.0]), logprobs, largest=5.0)
    surrogate.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-10.0, -1.0]]
    assert surrogate.high.tolist() == [[True, False]]


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens() -> None:
    new, mask = torch.tensor([[math.log(4.0), 0.0, 99.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert importance_ratio(new, torch.zeros(1, 3), mask=mask, level="sequence").tolist() == [[pytest.approx(2.0)]]


WEIGHTS = torch.tensor([[4.0, 0.5, 1.0]]).log()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [3.0, 0.6, 1.0]),
        ("token_mask", [0.0, 0.0, 1.0]),
        ("sequence_truncate", [2.0]),
        ("sequence_mask", [2.0]),
    ],
)
def test_what_another_program_sampled_carries_a_bounded_weight(mode: str, expected: list[float]) -> None:
    weight = sampler_weight(WEIGHTS, torch.zeros(1, 3), mask=torch.ones(1, 3), mode=mode, smallest=0.6, largest=3.0)
    assert weight.tolist() == [pytest.approx(expected)]


def test_a_token_whose_sampler_is_unknown_counts_as_agreed() -> None:
    sampler = torch.tensor([[math.nan, 0.0]])
    weight = sampler_weight(torch.ones(1, 2), sampler, mask=torch.ones(1, 2), mode="token_mask", smallest=None, largest=None)
    assert weight.tolist() == [[1.0, pytest.approx(math.e)]]


def test_padding_weighs_nothing_in_the_weight_of_a_sequence() -> None:
    mask = torch.tensor([[1.0, 0.0, 0.0]])
    weight = sampler_weight(WEIGHTS, torch.zeros(1, 3), mask=mask, mode="sequence_truncate", smallest=None, largest=None)
    assert weight.tolist() == [[pytest.approx(4.0)]]


def test_the_divergence_is_zero_on_the_reference_and_positive_elsewhere() -> None:
    assert float(divergence(torch.zeros(1, 1), torch.zeros(1, 1))) == 0.0
    assert float(divergence(torch.zeros(1, 1), torch.full((1, 1), -1.0))) == pytest.approx(math.exp(-1))


def test_tokens_or_sequences_are_summed_and_padding_is_not() -> None:
    loss, mask = torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert float(sum_tokens(loss, mask)) == 9.0
    assert float(sum_sequence_means(loss, mask)) == 7.0
    assert float(sum_sequence_means(torch.tensor([[2.0], [5.0]]), mask)) == 7.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: importance_ratio(one, one, mask=one, level="word"), "'word' is unknown; use token or sequence"),
        (lambda one: sampler_weight(one, one, mask=one, mode="token_clip", smallest=None, largest=1.0), "'token_clip' is unknown"),
        (
            lambda one: preference_loss(one, reference_logprobs=one, mask=one, beta=0.1, kind="hinge"),
            "'hinge' is unknown; use sigmoid or ipo",
        ),
    ],
)
def test_an_unknown_choice_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 1))  # type: ignore[operator]


def test_the_sigmoid_loss_prefers_a_larger_margin() -> None:
    reference, mask = torch.zeros(2, 1), torch.ones(2, 1)
    narrow = preference_loss(torch.tensor([[0.1], [0.0]]), reference_logprobs=reference, mask=mask, beta=1.0, kind="sigmoid")
    wide = preference_loss(torch.tensor([[2.0], [0.0]]), reference_logprobs=reference, mask=mask, beta=1.0, kind="sigmoid")
    assert float(wide.loss) < float(narrow.loss)
    assert float(narrow.loss) == pytest.approx(math.log(1 + math.exp(-0.1)), rel=1e-5)
    assert float(wide.margin) == pytest.approx(2.0)


def test_ipo_pulls_the_margin_to_half_the_inverse_of_beta() -> None:
    logprobs = torch.tensor([[5.0], [0.0]])
    at_target = preference_loss(logprobs, reference_logprobs=torch.zeros(2, 1), mask=torch.ones(2, 1), beta=0.1, kind="ipo")
    assert float(at_target.loss) == pytest.approx(0.0)
