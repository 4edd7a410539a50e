"""The probe: its tokens, the trainer's scores, the comparison."""

from __future__ import annotations

import copy
import math
import statistics
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from otj_runtime.api import DType
from otj_runtime.pod.commands import PROBE_ROOM
from otj_runtime.weights.errors import WeightsDiverged
from otj_runtime.weights.probe import (
    MEASURED_EVERY,
    Probe,
    TrainerScores,
    compare,
    compare_all,
    prompt_sequences,
    random_sequences,
    trainer_scores,
)

SEQUENCES = [[3, 1, 4], [1, 5, 9]]
TRAINER = TrainerScores(logprobs=[[-1.0, -2.0], [-3.0, -4.0]], rounding=0.01)
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
FLOAT32, ROUNDED = {DType.FLOAT32}, {DType.FLOAT32, DType.BFLOAT16}


def _model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE))


def _kept_in(model: Any, dtype: torch.dtype) -> Any:
    """A copy with parameters in this dtype. Not the buffers: rotary frequencies stay in float32 everywhere."""
    result = copy.deepcopy(model)
    for parameter in result.parameters():
        parameter.data = parameter.data.to(dtype)
    return result


def _shifted(by: float) -> list[list[float]]:
    return [[-1.0, -2.0], [-3.0 + by, -4.0]]


@given(vocabulary=st.integers(1, 300_000))
def test_probe_tokens_are_in_the_vocabulary_and_always_the_same(vocabulary: int) -> None:
    sequences = random_sequences(vocabulary)
    assert all(0 <= token < vocabulary for row in sequences for token in row)
    assert sequences == random_sequences(vocabulary)
    assert 32 <= sum(map(len, sequences)) <= 64


def test_scores_are_the_log_softmax_at_the_next_token() -> None:
    model = _model().eval()
    sequences = random_sequences(50)
    logprobs = torch.log_softmax(model(torch.tensor(sequences)).logits, -1).detach()
    expected = [[float(logprobs[row, i, token]) for i, token in enumerate(ids[1:])] for row, ids in enumerate(sequences)]
    assert trainer_scores(model, sequences, DType.FLOAT32).logprobs == [pytest.approx(row, abs=1e-6) for row in expected]


def test_scoring_leaves_modes_and_gradients_as_they_were() -> None:
    model = _model().train()
    model.model.norm.eval()
    trainer_scores(model, random_sequences(50), DType.FLOAT32)
    assert model.training
    assert not model.model.norm.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_scoring_is_full_precision_although_accelerate_wrapped_the_forward_in_autocast() -> None:
    model = _model()
    exact = trainer_scores(model, random_sequences(50), DType.FLOAT32)
    wrapped = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    model.forward = wrapped  # what accelerate's prepare_model does
    assert trainer_scores(model, random_sequences(50), DType.FLOAT32) == exact
    assert model.forward is wrapped


@pytest.mark.parametrize(
    ("by", "dtypes", "agrees"),
    [
        (0.0, FLOAT32, True),
        (2.9e-4, FLOAT32, True),  # of a log-probability of -3
        (3.1e-4, FLOAT32, False),
        (0.2, ROUNDED, True),  # mean of four: 0.05
        (0.3, ROUNDED, False),
        (0.2, {DType.FLOAT16}, True),
        (math.nan, FLOAT32, False),
        (math.nan, ROUNDED, False),
        (math.inf, ROUNDED, False),
    ],
)
def test_the_bound_depends_on_the_coarsest_dtype(by: float, dtypes: set[DType], agrees: bool) -> None:
    if agrees:
        agreement = compare(TRAINER, _shifted(by), sequences=SEQUENCES, version=7, dtypes=dtypes)
        assert (agreement.max_abs, agreement.mean) == (pytest.approx(by), pytest.approx(by / 4))
    else:
        with pytest.raises(WeightsDiverged):
            compare(TRAINER, _shifted(by), sequences=SEQUENCES, version=7, dtypes=dtypes)


@pytest.mark.parametrize(("by", "agrees"), [(0.9e-4, True), (1.1e-4, False)])
def test_a_likely_token_may_differ_by_the_bound_itself(by: float, agrees: bool) -> None:
    likely = TrainerScores(logprobs=[[-0.5, -0.1]], rounding=0.0)
    with nullcontext() if agrees else pytest.raises(WeightsDiverged):
        compare(likely, [[-0.5 + by, -0.1]], sequences=[[1, 2, 3]], version=1, dtypes=FLOAT32)


def test_sixteen_bits_may_differ_by_three_times_what_rounding_changes_in_the_trainer() -> None:
    coarse = TrainerScores(logprobs=TRAINER.logprobs, rounding=0.05)
    assert compare(coarse, _shifted(0.59), sequences=SEQUENCES, version=7, dtypes=ROUNDED).bound == pytest.approx(0.15)
    with pytest.raises(WeightsDiverged, match=r"bound 0\.15"):
        compare(coarse, _shifted(0.61), sequences=SEQUENCES, version=7, dtypes=ROUNDED)
    assert compare(coarse, _shifted(0.0), sequences=SEQUENCES, version=7, dtypes=FLOAT32).bound == 1e-4


def test_the_trainer_measures_what_rounding_changes() -> None:
    exact, rounded = (trainer_scores(_model(), random_sequences(50), dtype) for dtype in (DType.FLOAT32, DType.BFLOAT16))
    assert exact.rounding == 0.0
    assert 0.0 < rounded.rounding < 0.1


def test_scores_are_those_of_the_weights_that_16_bits_hold_because_the_generator_has_no_others() -> None:
    model = _model()
    sent = _kept_in(_kept_in(model, torch.bfloat16), torch.float32)
    expected = trainer_scores(sent, random_sequences(50), DType.FLOAT32)
    assert trainer_scores(model, random_sequences(50), DType.BFLOAT16).logprobs == expected.logprobs
    assert trainer_scores(model, random_sequences(50), DType.FLOAT32).logprobs != expected.logprobs


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_scored_with_what_16_bits_hold_of_them(implementation: str) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, experts_implementation=implementation)
    model = Qwen3MoeForCausalLM(config)
    sent = _kept_in(_kept_in(model, torch.bfloat16), torch.float32)
    expected = trainer_scores(sent, random_sequences(50), DType.FLOAT32)
    assert trainer_scores(model, random_sequences(50), DType.BFLOAT16).logprobs == [
        pytest.approx(row, abs=1e-6) for row in expected.logprobs
    ]


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_is_scored_with_what_16_bits_hold_of_the_sum(base: torch.dtype) -> None:
    model = _with_adapter(base)
    merged = _kept_in(_kept_in(_kept_in(model, torch.float32).merge_and_unload(), torch.bfloat16), base)
    expected = trainer_scores(merged, random_sequences(50), DType.BFLOAT16)
    assert trainer_scores(model, random_sequences(50), DType.BFLOAT16) == expected
    assert trainer_scores(model, random_sequences(50), DType.BFLOAT16, adapter_apart=True) != expected


def test_scoring_a_merged_adapter_leaves_its_layers_as_they_were() -> None:
    model = _with_adapter(torch.float32)
    before = model(input_ids=torch.tensor(random_sequences(50))).logits
    trainer_scores(model, random_sequences(50), DType.BFLOAT16)
    assert torch.equal(model(input_ids=torch.tensor(random_sequences(50))).logits, before)


def _with_adapter(base: torch.dtype) -> Any:
    """The model in this dtype, with a LoRA of every linear layer in float32."""
    model = get_peft_model(_kept_in(_model(), base), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def _mean_difference(left: TrainerScores, right: TrainerScores) -> float:
    pairs = zip(left.logprobs, right.logprobs, strict=True)
    return statistics.mean(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16])
def test_rounding_is_that_of_a_model_in_sixteen_bits_all_through_as_the_generator_is(dtype: DType) -> None:
    model = _model()
    scores = trainer_scores(model, random_sequences(50), dtype)
    rounded = trainer_scores(_kept_in(model, getattr(torch, dtype)), random_sequences(50), dtype)
    assert scores.rounding == pytest.approx(_mean_difference(scores, rounded), rel=1e-3)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize("lora", [False, True])
def test_a_trainer_with_weights_in_sixteen_bits_measures_how_far_it_is_from_float32(dtype: DType, lora: bool) -> None:
    model = _with_adapter(torch.bfloat16) if lora else _kept_in(_model(), torch.bfloat16)
    scores = trainer_scores(model, random_sequences(50), dtype)
    exact = trainer_scores(_kept_in(model, torch.float32), random_sequences(50), dtype)
    assert scores.rounding == pytest.approx(_mean_difference(scores, exact), rel=1e-3)
    assert scores.rounding > 0


def test_measuring_in_float32_leaves_weights_in_sixteen_bits() -> None:
    model = _model().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    trainer_scores(model, random_sequences(50), DType.BFLOAT16)
    assert all(tensor.dtype is torch.bfloat16 and torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sequences_of_different_lengths_are_scored_as_if_alone() -> None:
    model = _model()
    sequences = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    alone = [trainer_scores(model, [sequence], DType.FLOAT32).logprobs[0] for sequence in sequences]
    assert trainer_scores(model, sequences, DType.FLOAT32).logprobs == [pytest.approx(row, abs=1e-5) for row in alone]


@pytest.mark.parametrize(
    ("lengths", "taken"), [([], []), ([1, 1], []), ([30, 30, 30], [30, 30]), ([200, 30], [64]), ([5] * 40, [5] * 7), ([1, 9], [9])]
)
def test_prompts_are_taken_until_there_are_enough_tokens(lengths: list[int], taken: list[int]) -> None:
    assert [len(row) for row in prompt_sequences([7] * length for length in lengths)] == taken


@given(st.lists(st.lists(st.integers(0, 9), max_size=70), max_size=40))
def test_the_generator_has_room_for_every_probe(prompts: list[list[int]]) -> None:
    assert len(prompt_sequences(prompts)) <= PROBE_ROOM


def test_every_engine_must_agree_and_the_one_that_does_not_is_named() -> None:
    agreement = compare_all(TRAINER, [_shifted(1e-5), _shifted(2e-5)], sequences=SEQUENCES, version=7, dtypes=FLOAT32)
    assert agreement.max_abs == pytest.approx(2e-5)
    with pytest.raises(WeightsDiverged, match="trainer and engine 1 of the generator disagree"):
        compare_all(TRAINER, [_shifted(0.0), _shifted(0.5)], sequences=SEQUENCES, version=7, dtypes=FLOAT32)


def test_the_error_names_version_dtype_token_and_difference() -> None:
    with pytest.raises(WeightsDiverged) as caught:
        compare(TRAINER, _shifted(0.5), sequences=SEQUENCES, version=7, dtypes=FLOAT32)
    text = str(caught.value)
    assert "policy version 7 (float32)" in text
    assert "largest scaled difference 0.167, bound 0.0001" in text
    assert "token 5 at position 1 of sequence 1, trainer -3.000000, generator -2.500000" in text


def test_rounding_is_the_mean_of_what_was_measured_first_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.03, 0.06, 0.09, 0.02])
    monkeypatch.setattr(
        "otj_runtime.weights.probe.trainer_scores",
        lambda *_, rounding, **__: TrainerScores([[-1.0]], next(measured) if rounding is None else rounding),
    )
    probe = Probe(_model(), [[1, 2, 3]], DType.BFLOAT16)
    found = [probe.score().rounding for _ in range(MEASURED_EVERY + 1)]
    assert found[:3] == [pytest.approx(0.03), pytest.approx(0.045), pytest.approx(0.06)]
    assert found[3:-1] == [pytest.approx(0.06)] * (MEASURED_EVERY - 3)
    assert found[-1] == pytest.approx(0.05)


def test_a_probe_without_prompts_is_of_random_tokens() -> None:
    assert Probe(_model(), [], DType.FLOAT32).sequences == random_sequences(50)
    assert Probe(_model(), [[7] * 40], DType.FLOAT32).sequences == [[7] * 40]
