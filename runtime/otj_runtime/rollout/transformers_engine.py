"""Completions from the training model itself, by transformers' `generate`: the baseline that vLLM is compared with, and the way
to train where no generator runs. The policy is always current, so there is nothing to sync, and nothing to overlap: the model that
samples is the model that learns."""

from __future__ import annotations

import time
from typing import Any

import torch

from otj_runtime.rollout.types import Completion, Sampling


class TransformersEngine:
    """A `RolloutEngine` on a transformers model.

    Args:
        model: the unwrapped model.
        pad_id: token that fills prompts on the left and completions on the right.
        eos_ids: tokens that end a completion.
    """

    shares_model = True

    def __init__(self, model: Any, *, pad_id: int, eos_ids: set[int]) -> None:
        self._model = model
        self._pad_id = pad_id
        self._eos_ids = eos_ids
        self._busy = 0.0

    def busy_seconds(self) -> float:
        """See `RolloutEngine`."""
        return self._busy

    def cancel(self) -> None:
        """See `RolloutEngine`: nothing is ever under way while something else happens."""

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling, *, policy_version: int) -> list[list[Completion]]:
        """See `RolloutEngine`."""
        began = time.monotonic()
        rows = [prompt for prompt in prompts for _ in range(sampling.count)]
        width = max(len(row) for row in rows)
        device = self._model.device
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        training = self._model.training
        self._model.eval()
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_k=0 if sampling.temperature > 0 else None,
            top_p=1.0 if sampling.temperature > 0 else None,
            pad_token_id=self._pad_id,
            eos_token_id=sorted(self._eos_ids) or None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        self._model.train(training)
        logits = torch.stack(output.logits, dim=1).float() / (sampling.temperature or 1.0)  # [rows, new tokens, vocabulary]
        new = output.sequences[:, width:]
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, new[..., None])[..., 0]
        completions = [self._cut(new[i].tolist(), logprobs[i].tolist(), policy_version) for i in range(len(rows))]
        self._busy += time.monotonic() - began
        return [completions[i : i + sampling.count] for i in range(0, len(rows), sampling.count)]

    def _cut(self, tokens: list[int], logprobs: list[float], version: int) -> Completion:
        """A row of `generate` up to its first end-of-sequence token."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._eos_ids), None)
        length = len(tokens) if end is None else end
        return Completion(tokens[:length], logprobs[:length], finished=end is not None, policy_version=version)
