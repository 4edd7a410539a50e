"""Group relative policy optimization (arXiv:2402.03300)."""

from __future__ import annotations

from dataclasses import replace

import torch

from otj_runtime.rollout.types import Group
from otj_runtime.train.advantages import group_advantages
from otj_runtime.train.batch import MicroBatch, Row, Selection
from otj_runtime.train.config import GRPOConfig
from otj_runtime.train.losses import grpo_loss
from otj_runtime.train.trainer import OnlineTrainer


class GRPOTrainer(OnlineTrainer):
    """Every completion counts by how much better it is than the others of its prompt.

    A group whose rewards are all equal teaches nothing: without a KL term it is counted and skipped before the forward pass. Its
    tokens still count in the average, so that a step with few useful groups is a small step.
    """

    config: GRPOConfig

    def select(self, groups: list[Group]) -> Selection:
        """One row per completion whose advantage is not zero; all of them with a KL term."""
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float32)
        advantages = group_advantages(rewards, scale=self.config.scale_rewards)
        rows = [
            Row(group.prompt_ids, completion, advantage=float(advantage))
            for group, row in zip(groups, advantages, strict=True)
            for completion, advantage in zip(group.completions, row, strict=True)
        ]
        if self.config.beta != 0.0:
            return Selection(rows)
        useful = [row for row in rows if row.advantage != 0.0]
        skipped = sum(len(row.completion.token_ids) for row in rows if row.advantage == 0.0)
        return Selection(useful or [replace(rows[0], counts=False)], skipped_tokens=skipped)

    def policy_loss(self, batch: MicroBatch, logprobs: torch.Tensor, reference_logprobs: torch.Tensor | None) -> torch.Tensor:
        """See `grpo_loss`; summed over the tokens that count."""
        config = self.config
        loss = grpo_loss(
            logprobs,
            sampler_logprobs=batch.sampler_logprobs,
            advantages=batch.advantages,
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            reference_logprobs=reference_logprobs,
            beta=config.beta,
        )
        tokens = batch.completion_mask.sum().clamp(min=1)
        self.meters.add({"clip_ratio/region_mean": float((loss.clipped * batch.completion_mask).sum() / tokens)})
        if loss.kl is not None:
            self.meters.add({"kl": float((loss.kl * batch.completion_mask).sum() / tokens)})
        return (loss.per_token * batch.completion_mask).sum()
