"""Online direct preference optimization (arXiv:2402.04792): the best and the worst completion of a prompt are a preference pair."""

from __future__ import annotations

import torch

from otj_runtime.rollout.types import Group
from otj_runtime.train.batch import MicroBatch, Row, Selection
from otj_runtime.train.config import OnlineDPOConfig
from otj_runtime.train.losses import dpo_loss
from otj_runtime.train.trainer import OnlineTrainer


class OnlineDPOTrainer(OnlineTrainer):
    """Rows come in pairs, chosen first. A group whose rewards are all equal has no preference and is skipped."""

    config: OnlineDPOConfig
    unit = 2

    def select(self, groups: list[Group]) -> Selection:
        """A pair per group that has a best and a worst completion."""
        rows: list[Row] = []
        for group in groups:
            rewards = [self._penalized(group, i) for i in range(len(group.completions))]
            best, worst = max(range(len(rewards)), key=rewards.__getitem__), min(range(len(rewards)), key=rewards.__getitem__)
            if rewards[best] > rewards[worst]:
                rows += [Row(group.prompt_ids, group.completions[i]) for i in (best, worst)]
        if rows:
            return Selection(rows)
        first = groups[0]
        return Selection([Row(first.prompt_ids, completion, counts=False) for completion in first.completions[:2]])

    def _penalized(self, group: Group, index: int) -> float:
        missing = self.config.missing_eos_penalty if not group.completions[index].finished else None
        return group.rewards[index] - (missing or 0.0)

    def countable(self, batch: MicroBatch) -> float:
        """Pairs that count."""
        return float((batch.completion_mask.amax(dim=1)[0::2]).sum())

    def policy_loss(self, batch: MicroBatch, logprobs: torch.Tensor, reference_logprobs: torch.Tensor | None) -> torch.Tensor:
        """See `dpo_loss`; summed over the pairs that count."""
        assert reference_logprobs is not None, "online DPO always has a reference model"
        loss = dpo_loss(
            logprobs,
            reference_logprobs=reference_logprobs,
            mask=batch.completion_mask,
            beta=self.config.beta,
            kind=self.config.loss_type,
        )
        counts = batch.completion_mask.amax(dim=1)[0::2]
        pairs = counts.sum().clamp(min=1)
        self.meters.add(
            {
                "rewards/margins": float((loss.margin * counts).sum() / pairs),
                "rewards/accuracies": float(((loss.margin > 0) * counts).sum() / pairs),
            }
        )
        return (loss.per_pair * counts).sum()
