"""Completions from the training model itself, by transformers' `generate`: the baseline that vLLM is compared with, and the way
to train where no generator runs. The policy is always current, so there is nothing to sync, and nothing to overlap: the model that
samples is the model that learns."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from otj_runtime.rollout.types import Completion, Sampling


class Recorder(LogitsProcessor):
    """Notes the log-probability of every token as `generate` samples it, so that the logits of one step exist at a time: those of all steps
    take gigabytes.

    Args:
        temperature: logits are divided by it; 1 for greedy answers.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._last: torch.Tensor | None = None
        self._noted: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take in a step's logits, [rows, vocabulary] of any floating point type, and the tokens before it, [rows, tokens] int64; pass the
        logits on as they are."""
        self._note(input_ids[:, -1])
        self._last = torch.log_softmax(scores.float() / self._temperature, dim=-1)
        return scores

    def logprobs(self, last: torch.Tensor) -> torch.Tensor:
        """[rows, new tokens] float32, in nats; `last`: [rows] int64, the tokens of the last step."""
        self._note(last)
        return torch.stack(self._noted, dim=1)

    def _note(self, tokens: torch.Tensor) -> None:
        if self._last is not None:
            self._noted.append(self._last.gather(-1, tokens[:, None])[:, 0])
            self._last = None


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
        recorder = Recorder(sampling.temperature or 1.0)
        sequences = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            # Stated, because the model's own generation configuration would fill the gaps and bend the distribution.
            top_k=0 if sampling.temperature > 0 else None,
            top_p=1.0 if sampling.temperature > 0 else None,
            min_p=None,
            typical_p=None,
            repetition_penalty=1.0,
            num_beams=1,
            pad_token_id=self._pad_id,
            eos_token_id=sorted(self._eos_ids) or None,
            logits_processor=LogitsProcessorList([recorder]),
        )
        self._model.train(training)
        new = sequences[:, width:]
        logprobs = recorder.logprobs(new[:, -1])
        completions = [self._cut(new[i].tolist(), logprobs[i].tolist(), policy_version) for i in range(len(rows))]
        self._busy += time.monotonic() - began
        return [completions[i : i + sampling.count] for i in range(0, len(rows), sampling.count)]

    def _cut(self, tokens: list[int], logprobs: list[float], version: int) -> Completion:
        """A row of `generate` up to its first end-of-sequence token."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._eos_ids), None)
        length = len(tokens) if end is None else end
        return Completion(tokens[:length], logprobs[:length], finished=end is not None, policy_version=version)
