"""Group relative policy optimization (arXiv:2402.03300) and its relatives: every completion counts by how much better it is than the
others of its prompt.

    rewards --group_advantages--> A of each completion; completions with A = 0 teach nothing and are left out
    policy_loss: ratio new/old -> surrogate -> weight old/sampler -> + beta KL -> sum, to be divided by the step's normalizer

What the relatives share and where they differ, by `loss_type` (sums run over an optimizer step; docs/algorithms.md has the formulas):

    grpo     clipped surrogate, mean over the tokens of each completion, mean over completions
    gspo     the same with one ratio per completion (arXiv:2507.18071)
    bnpo     clipped surrogate, mean over the tokens of this rank (TRL's)
    dr_grpo  clipped surrogate, sum over tokens divided by completions x max_completion_length: no bias to a length (arXiv:2503.20783)
    dapo     clipped surrogate, mean over the tokens of all ranks (arXiv:2503.14476)
    cispo    likelihood weighted with the bounded ratio, mean over the tokens of all ranks (MiniMax-M1, arXiv:2506.13585)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from otj_runtime.api import Algorithm
from otj_runtime.rollout.types import Group
from otj_runtime.train.advantages import group_advantages
from otj_runtime.train.batch import MicroBatch, Row, Selection, counted_tokens
from otj_runtime.train.config import GRPOConfig
from otj_runtime.train.losses import (
    Surrogate,
    clipped_surrogate,
    divergence,
    importance_ratio,
    sampler_weight,
    sum_sequence_means,
    sum_tokens,
    weighted_likelihood,
)
from otj_runtime.train.reference import Following
from otj_runtime.train.trainer import OnlineTrainer


class GRPOTrainer(OnlineTrainer):
    """Trains with the losses above.

    A group whose rewards are all equal is counted (`frac_reward_zero_std`) and, without a KL term, skipped before the forward pass. The
    normalizer still counts it, so that a step with few useful groups is a small step.
    """

    algorithm = Algorithm.GRPO
    config_class = GRPOConfig
    config: GRPOConfig

    @property
    def needs_reference(self) -> bool:
        """Only a KL term looks at the reference."""
        return self.config.beta != 0.0

    def make_reference(self) -> Any | None:
        """See `OnlineTrainer`. With `sync_ref_model` it follows the policy.

        Raises:
            ValueError: if it is to follow, and is the policy without its adapter.
        """
        reference = super().make_reference()
        if self.config.sync_ref_model:
            if reference is None:
                raise ValueError("sync_ref_model: a PEFT model's reference is the model without its adapter, which stays; leave it out")
            self.add_callback(Following(reference, self.accelerator))
        return reference

    def common_state(self) -> dict[str, Any] | None:
        """See `SavingTrainer`: a reference that follows the policy."""
        return self.reference.state_dict() if self.reference is not None and self.config.sync_ref_model else None

    def restore_common_state(self, state: dict[str, Any]) -> None:
        """See `SavingTrainer`."""
        if self.reference is not None:
            self.reference.load_state_dict(state)

    def select(self, groups: list[Group]) -> Selection:
        """One row per completion that teaches something; all of them with a KL term. Collective."""
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float32)
        scale = str(self.config.scale_rewards)
        everyone = self._all_rewards(rewards) if scale == "batch" else None
        advantages = group_advantages(rewards, scale=scale, all_rewards=everyone)
        rows = [
            Row(group.prompt_ids, completion, advantage=float(advantage), reward=reward)
            for group, found in zip(groups, advantages, strict=True)
            for completion, advantage, reward in zip(group.completions, found, group.rewards, strict=True)
        ]
        teaching = rows if self.needs_reference else [row for row in rows if row.advantage != 0.0 and self._counted(row) > 0]
        return Selection(teaching or [replace(rows[0], counts=False)], normalizer=self._normalizer(rows))

    def _all_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """`rewards` of all ranks. Groups that a rank dropped as stragglers are NaN: gathering needs one shape."""
        missing = self.config.prompts_per_rank - len(rewards)
        padded = torch.nn.functional.pad(rewards, (0, 0, 0, missing), value=torch.nan)
        gathered: torch.Tensor = self.accelerator.gather(padded.to(self.accelerator.device))
        return gathered.cpu()

    def _counted(self, row: Row) -> int:
        return counted_tokens(row.completion, mask_truncated=self.config.mask_truncated_completions)

    def _normalizer(self, rows: list[Row]) -> float:
        """See `Selection`: all `rows` of a generation, scaled to one optimizer step."""
        config = self.config
        steps = config.optimizer_steps_per_iteration
        if config.loss_type in ("grpo", "gspo"):
            return len(rows) / steps
        if config.loss_type == "dr_grpo":
            return len(rows) * config.max_completion_length / steps
        tokens = float(sum(self._counted(row) for row in rows))
        if config.loss_type != "bnpo":
            tokens = self.mean_over_ranks(tokens)
        return max(tokens / steps, 1.0)

    def policy_loss(self, batch: MicroBatch, logprobs: torch.Tensor) -> torch.Tensor:
        """The sum over the micro-batch of what `loss_type` averages. `logprobs`: [B, C] float32, in nats, with gradient."""
        config, mask, old = self.config, batch.completion_mask, batch.old_logprobs
        assert old is not None, "the trainer notes the old policy before it asks for a loss"
        ratio = importance_ratio(logprobs, old, mask=mask, level=config.importance_sampling_level)
        surrogate = self._surrogate(ratio, batch.advantages, logprobs)
        loss = surrogate.loss
        if config.corrects_sampler:
            loss = loss * self._sampler_weight(batch, old)
        if batch.reference_logprobs is not None:
            kl = divergence(logprobs, batch.reference_logprobs, ratio=ratio if config.use_bias_correction_kl else None)
            loss = loss + config.beta * kl
            self.meters.add({"kl": (kl.detach() * mask).sum() / mask.sum().clamp(min=1)}, weight=mask.sum())
        self._measure_clipping(surrogate, mask)
        return sum_sequence_means(loss, mask) if config.loss_type in ("grpo", "gspo") else sum_tokens(loss, mask)

    def _surrogate(self, ratio: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor) -> Surrogate:
        config = self.config
        if config.loss_type == "cispo":
            return weighted_likelihood(ratio, advantages, logprobs, largest=config.upper_epsilon)
        return clipped_surrogate(ratio, advantages, epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon, delta=config.delta)

    def _sampler_weight(self, batch: MicroBatch, old_logprobs: torch.Tensor) -> torch.Tensor:
        config, mask = self.config, batch.completion_mask
        weight = sampler_weight(
            old_logprobs,
            batch.sampler_logprobs,
            mask=mask,
            mode=config.vllm_importance_sampling_mode,
            smallest=config.vllm_importance_sampling_clip_min,
            largest=config.vllm_importance_sampling_clip_max,
        )
        # One weight per completion is averaged over completions, one per token over tokens.
        counts = mask if weight.shape == mask.shape else mask.amax(dim=1, keepdim=True)
        total = counts.sum()
        self.meters.add({"sampling/importance_sampling_ratio/mean": (weight * counts).sum() / total.clamp(min=1)}, weight=total)
        self.meters.add(
            {
                "sampling/importance_sampling_ratio/min": torch.where(counts > 0, weight, torch.inf).min(),
                "sampling/importance_sampling_ratio/max": torch.where(counts > 0, weight, -torch.inf).max(),
            },
            weight=total,
        )
        # Truncated weights lie on a bound, masked ones at zero.
        low, high = config.vllm_importance_sampling_clip_min or 0.0, config.vllm_importance_sampling_clip_max or torch.inf
        bounded = ((weight <= low) | (weight >= high)) & (counts > 0)
        self.meters.add({"is/truncated_frac": bounded.sum() / total.clamp(min=1)}, weight=total)
        return weight

    def _measure_clipping(self, surrogate: Surrogate, mask: torch.Tensor) -> None:
        counts = mask if surrogate.high.shape == mask.shape else mask.amax(dim=1, keepdim=True)
        total = counts.sum()

        def share(where: torch.Tensor) -> torch.Tensor:
            return (where * counts).sum() / total.clamp(min=1)

        if self.config.loss_type == "cispo":
            self.meters.add({"cispo_clip_ratio": share(surrogate.high)}, weight=total)
            return
        low, high = share(surrogate.low), share(surrogate.high)
        self.meters.add({"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}, weight=total)
        rows = counts.sum(dim=1)  # of the completion that is clipped least at the bottom, and most at the top
        shares = [(where * counts).sum(dim=1) / rows.clamp(min=1) for where in (surrogate.low, surrogate.high)]
        least, most = torch.where(rows > 0, shares[0], torch.inf).min(), torch.where(rows > 0, shares[1], -torch.inf).max()
        self.meters.add({"clip_ratio/low_min": least, "clip_ratio/high_max": most}, weight=total)
