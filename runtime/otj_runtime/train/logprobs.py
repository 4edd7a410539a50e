"""Log-probabilities of completions under a model."""

from __future__ import annotations

from typing import Any

import torch

from otj_runtime.train.batch import MicroBatch


def completion_logprobs(model: Any, batch: MicroBatch, *, temperature: float) -> torch.Tensor:
    """Log-probability of every completion token, in float32, after dividing logits by `temperature` as the sampler did.

    Only the logits of completion columns are computed.

    Returns:
        [B, C] float32; meaningless where `completion_mask` is 0.
    """
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=batch.completion_columns + 1,
    )
    # The logits of a column predict the next one: the last column predicts nothing that was sampled.
    logits = output.logits[:, :-1].float() / temperature
    return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.completion_ids, reduction="none")
