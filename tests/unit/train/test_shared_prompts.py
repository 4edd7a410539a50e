"""Completions scored with their prompt read once get what they get one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from otj_runtime.rollout.types import Completion
from otj_runtime.train import shared_prompts
from otj_runtime.train.batch import MicroBatch, Row, collate
from otj_runtime.train.logprobs import Scorer
from otj_runtime.train.shared_prompts import install, share_prompts
from tests.unit.train.policies import gradient, moved

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ROWS = [
    ([1, 2, 3, 4, 5], [9, 10, 11]),
    ([1, 2, 3, 4, 5], [12]),
    ([1, 2, 3, 4, 5], [13, 14, 15, 16]),
    ([7, 8], [5, 6]),
    ([7, 8], [7, 1, 2]),
]


def small(kind: type[Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    return ready(moved(AutoModelForCausalLM.from_config(kind(**SIZES | changes)), seed=1))


def ready(model: Any) -> Any:
    """As the trainer's loading leaves it."""
    install(model)
    return model


def batch_of(rows: list[tuple[list[int], list[int]]]) -> MicroBatch:
    completions = [Completion(tokens, [0.0] * len(tokens), finished=True, policy_version=0) for _, tokens in rows]
    return collate([Row(prompt, found) for (prompt, _), found in zip(rows, completions, strict=True)], pad_id=0, mask_truncated=False)


def scored(model: Any, batch: MicroBatch, *, anew: bool = False, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor, Scorer]:
    """Log-probabilities of what counts, the gradient of an arbitrary function of them, and the scorer. `anew` reads each prompt for each row."""
    if anew:
        batch.shared = None
    model.zero_grad()
    scorer = Scorer(model, temperature=0.8)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        found = scorer(model, batch).logprobs
    slopes = torch.linspace(-1, 2, found.numel()).view_as(found)
    (found * slopes * batch.completion_mask).sum().backward()
    return found[batch.completion_mask > 0].detach(), gradient(model), scorer


def compare(model: Any, rows: list[tuple[list[int], list[int]]]) -> None:
    once, slope, scorer = scored(model, batch_of(rows))
    anew, expected, _ = scored(model, batch_of(rows), anew=True)
    assert scorer.shares
    torch.testing.assert_close(once, anew)
    torch.testing.assert_close(slope, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [(LlamaConfig, {}), (Qwen3Config, {}), (Gemma3TextConfig, {}), (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2})],
)
def test_values_and_gradients_are_those_of_the_rows_one_by_one(kind: type[Any], changes: dict[str, Any], attention: str) -> None:
    compare(small(kind, attn_implementation=attention, **changes), ROWS)


def test_attention_with_sinks_keeps_them() -> None:
    compare(small(GptOssConfig, attn_implementation="eager", num_local_experts=4, num_experts_per_tok=2), ROWS)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=2, max_size=4)), min_size=1, max_size=3), st.randoms())
def test_groups_of_any_lengths_agree(groups: list[tuple[int, list[int]]], draw: Any) -> None:
    rows = []
    for width, lengths in groups:
        prompt = [draw.randrange(40) for _ in range(width)]
        rows += [(prompt, [draw.randrange(40) for _ in range(length)]) for length in lengths]
    compare(small(LlamaConfig), rows)


def test_under_autocast_the_same_up_to_its_rounding() -> None:
    model = small(LlamaConfig)
    once, slope, scorer = scored(model, batch_of(ROWS), autocast=True)
    anew, expected, _ = scored(model, batch_of(ROWS), anew=True, autocast=True)
    assert scorer.shares
    assert float((once - anew).abs().max()) < 0.05
    assert float((slope - expected).norm() / expected.norm()) < 0.03


def test_autocast_within_the_model_is_rounding_too() -> None:
    model = small(LlamaConfig)
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # as accelerate does
    scorer = Scorer(model, temperature=1.0)
    scorer(model, batch_of(ROWS))
    assert scorer.shares


def test_recomputed_checkpoints_know_it_too() -> None:
    model = small(LlamaConfig)
    model.gradient_checkpointing_enable()
    compare(model, ROWS)


def test_an_adapter_hands_it_on() -> None:
    adapted = get_peft_model(small(LlamaConfig), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for parameter in adapted.parameters():
        parameter.requires_grad_(True)
    compare(adapted, ROWS)


def test_each_prompt_is_read_once() -> None:
    model = small(LlamaConfig)
    batch = batch_of(ROWS)
    assert int(Scorer(model, temperature=1.0)(model, batch).tokens) == (5 + 2) + 13
    batch.shared = None
    assert int(Scorer(model, temperature=1.0)(model, batch).tokens) == (3 * 5 + 2 * 2) + 13


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        pytest.param([[1, 2], [3, 4], [1, 2]], False, id="no neighbours share"),
        pytest.param([[1] * 40, [1] * 40, [2]], True, id="two of three share"),
        pytest.param([[1], [1], [1]], False, id="prompts are a twentieth of the tokens"),
    ],
)
def test_prompts_are_shared_where_it_is_worth_it(prompts: list[list[int]], shared: bool) -> None:
    assert (share_prompts(prompts, [[1] * 20] * len(prompts), pad_id=0) is not None) == shared


def falcon_h1() -> Any:
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    return small(FalconH1Config, **sizes)


def bloom() -> Any:
    return ready(AutoModelForCausalLM.from_config(BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=4)))


def lfm2() -> Any:
    return small(Lfm2Config, layer_types=["conv", "full_attention"])


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(falcon_h1, id="a state runs through all tokens beside attention"),
        pytest.param(lfm2, id="convolutions look across tokens"),
        pytest.param(bloom, id="attention of its own"),
    ],
)
def test_a_model_that_is_known_not_to_bear_it_is_scored_row_by_row(model: Callable[[], Any]) -> None:
    policy = model()
    once, _, scorer = scored(policy, batch_of(ROWS))
    anew, _, _ = scored(policy, batch_of(ROWS), anew=True)
    assert not scorer.shares
    torch.testing.assert_close(once, anew)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        pytest.param(falcon_h1, "log-probabilities would differ by", id="a state"),
        pytest.param(lfm2, "log-probabilities would differ by", id="convolutions"),
        pytest.param(lambda: small(GPT2Config, attn_pdrop=0.5), "log-probabilities would differ by", id="dropout"),
    ],
)
def test_a_trial_finds_out_where_nobody_knew(
    model: Callable[[], Any], why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = model()
    monkeypatch.setattr(shared_prompts, "ATTENTION_LAYERS", {"conv", "hybrid", *shared_prompts.ATTENTION_LAYERS})
    monkeypatch.setattr(type(policy), "_is_stateful", False, raising=False)
    scorer = Scorer(ready(policy), temperature=1.0)
    before = scorer.shares
    scorer(policy, batch_of(ROWS))
    assert (before, scorer.shares) == (True, False)
    assert why in caplog.text


def test_a_model_that_drops_the_keyword_is_found_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = small(LlamaConfig)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda shared_prompts=None, **keywords: forward(**keywords))
    scorer = Scorer(model, temperature=1.0)
    scorer(model, batch_of(ROWS))
    assert not scorer.shares
    assert "prompts are read anew for each of their completions" in caplog.text


def test_rows_longer_than_the_window_of_attention_are_scored_row_by_row() -> None:
    model = small(MistralConfig, sliding_window=24)
    rows = [(list(range(1, 23)), tokens) for _, tokens in ROWS]
    once, _, scorer = scored(model, batch_of(rows))
    anew, _, _ = scored(model, batch_of(rows), anew=True)
    assert scorer.shares
    torch.testing.assert_close(once, anew, atol=0.0, rtol=0.0)
