"""Completions from the model itself carry the log-probabilities that the model gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from otj_runtime.data.model import build_tiny
from otj_runtime.rollout.transformers_engine import TransformersEngine
from otj_runtime.rollout.types import Sampling


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_are_those_of_a_forward_pass_whatever_the_models_generation_configuration_says(
    tmp_path: Path, temperature: float
) -> None:
    build_tiny(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    model.generation_config.update(top_k=2, repetition_penalty=1.5, min_p=0.3)
    torch.manual_seed(0)
    sampling = Sampling(count=4, max_tokens=6, temperature=temperature)
    groups = TransformersEngine(model, pad_id=0, eos_ids={0}).generate([[1, 2, 3], [4]], sampling, policy_version=0)
    for prompt, completions in zip([[1, 2, 3], [4]], groups, strict=True):
        for completion in completions:
            logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
            expected = torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-4)
            assert completion.finished == (completion.token_ids[-1] == 0)
    assert max(len(set(completion.token_ids)) for group in groups for completion in group) > 2 or temperature == 0.0
