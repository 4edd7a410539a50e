"""Log-probabilities in chunks are those from all logits at once."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from otj_runtime.rollout.types import Completion
from otj_runtime.train import logprobs
from otj_runtime.train.batch import MicroBatch, Row, collate
from otj_runtime.train.logprobs import Scorer, Scores
from tests.unit.train.policies import gradient, moved

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks, the last one short."""
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 3)


@pytest.fixture
def batch() -> MicroBatch:
    rows = [([1, 2], [3, 4, 5, 6, 0]), ([7], [8, 0])]
    return collate(
        [Row(prompt, Completion(tokens, [0.0] * len(tokens), finished=True, policy_version=0)) for prompt, tokens in rows],
        pad_id=0,
        mask_truncated=False,
    )


def plain_scorer(model: Any, *, temperature: float) -> Scorer:
    scorer = Scorer(model, temperature=temperature)
    scorer._head = None
    return scorer


def scored(scorer: Scorer, model: Any, batch: MicroBatch, *, autocast: bool = False) -> tuple[Scores, torch.Tensor]:
    """Scores, and the gradient of an arbitrary function of them."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        scores = scorer(model, batch)
    slopes = torch.linspace(-1, 2, scores.logprobs.numel()).view_as(scores.logprobs)
    (scores.logprobs * slopes * batch.completion_mask).sum().backward()
    return scores, gradient(model)


def small(kind: type[Any], **changes: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return moved(AutoModelForCausalLM.from_config(kind(**sizes, **heads, **changes)), seed=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_all_logits(batch: MicroBatch, temperature: float, tied: bool) -> None:
    model = small(LlamaConfig, tie_word_embeddings=tied)
    scorer = Scorer(model, temperature=temperature)
    ours, our_gradient = scored(scorer, model, batch)
    plain, plain_gradient = scored(plain_scorer(model, temperature=temperature), model, batch)
    assert scorer.chunked
    torch.testing.assert_close(ours.logprobs, plain.logprobs)
    torch.testing.assert_close(ours.entropy, plain.entropy)
    torch.testing.assert_close(our_gradient, plain_gradient)


def test_a_bias_of_the_output_layer_counts_and_learns(batch: MicroBatch) -> None:
    model = small(LlamaConfig)
    model.lm_head = torch.nn.Linear(16, 12, bias=True)
    ours, our_gradient = scored(Scorer(model, temperature=1.0), model, batch)
    plain, plain_gradient = scored(plain_scorer(model, temperature=1.0), model, batch)
    torch.testing.assert_close(ours.logprobs, plain.logprobs)
    torch.testing.assert_close(our_gradient, plain_gradient)


def test_a_frozen_output_layer_gets_no_gradient_and_passes_it_on(batch: MicroBatch) -> None:
    model = small(LlamaConfig)
    model.lm_head.weight.requires_grad_(False)
    Scorer(model, temperature=1.0)(model, batch).logprobs.sum().backward()
    assert model.lm_head.weight.grad is None
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.abs().max()) > 0


def test_under_autocast_both_ways_round_alike(batch: MicroBatch) -> None:
    model = small(LlamaConfig)
    ours, our_gradient = scored(Scorer(model, temperature=1.0), model, batch, autocast=True)
    plain, plain_gradient = scored(plain_scorer(model, temperature=1.0), model, batch, autocast=True)
    assert ours.logprobs.dtype is torch.float32
    torch.testing.assert_close(ours.logprobs, plain.logprobs)
    assert float((our_gradient - plain_gradient).norm() / plain_gradient.norm()) < 0.02


def test_gradient_checkpointing_changes_no_gradient(batch: MicroBatch) -> None:
    model = small(LlamaConfig)
    scorer = Scorer(model, temperature=1.0)
    _, without = scored(scorer, model, batch)
    model.gradient_checkpointing_enable()
    scores, within = scored(scorer, model, batch)
    assert scorer.chunked
    assert scores.logprobs.requires_grad
    torch.testing.assert_close(within, without)


def test_a_model_that_caps_its_logits_is_scored_from_all_of_them(batch: MicroBatch, caplog: pytest.LogCaptureFixture) -> None:
    model = small(Gemma2Config, final_logit_softcapping=1.5, attn_implementation="eager")
    scorer = Scorer(model, temperature=1.0)
    ours = scorer(model, batch)
    assert not scorer.chunked
    assert "take the memory of all logits" in caplog.text
    torch.testing.assert_close(ours.logprobs, plain_scorer(model, temperature=1.0)(model, batch).logprobs)


def test_the_output_layer_is_itself_again_after_an_error() -> None:
    model = small(LlamaConfig)
    scoring = logprobs._scoring_head(model.lm_head, torch.zeros(1, 1).long(), 1.0, predictions=lambda hidden: hidden)
    with pytest.raises(RuntimeError, match="in the middle"), scoring:
        raise RuntimeError("in the middle")
    assert model(input_ids=torch.ones(1, 2).long()).logits.shape == (1, 2, 12)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_adapters_are_scored_wherever_they_sit(batch: MicroBatch, target: str) -> None:
    model = small(LlamaConfig)
    plain = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    scorer = Scorer(adapted, temperature=1.0)
    assert scorer.chunked == (target == "q_proj")
    with torch.no_grad():
        scores = scorer(adapted, batch)
        reference = plain_scorer(plain, temperature=1.0)(plain, batch)
        assert not torch.allclose(scores.logprobs, reference.logprobs, atol=1e-3)
        with adapted.disable_adapter():
            torch.testing.assert_close(scorer(adapted, batch).logprobs, reference.logprobs)
