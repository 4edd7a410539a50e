"""Online direct preference optimization (arXiv:2402.04792): the best and the worst completion of a prompt are a preference pair.

rewards (a judge's are the pairwise comparisons that a completion won) - missing_eos_penalty
  -> best and worst of each group; no pair where all are equal
  -> preference_loss: does the policy, against the reference, raise the best over the worst?
"""

from __future__ import annotations

import math
from typing import Any

import torch

from otj_runtime.api import Algorithm
from otj_runtime.rollout.types import Group
from otj_runtime.train.batch import MicroBatch, Row, Selection, counted_tokens
from otj_runtime.train.config import OnlineDPOConfig
from otj_runtime.train.losses import PairLoss, preference_loss
from otj_runtime.train.reference import frozen
from otj_runtime.train.trainer import OnlineTrainer


class OnlineDPOTrainer(OnlineTrainer):
    """Rows come in pairs, chosen first. A group without a preference is counted (`frac_reward_zero_std`) and skipped.

    Args:
        reward_model: older TRL's name of `reward_funcs`.
        reward_processing_class: older TRL's name of `reward_processing_classes`.
        ref_model: the model to compare with. Default: the policy as it is now.
        arguments, keywords: see `OnlineTrainer`. Without rewards and judge, the reward model is that of `args.reward_model_path`.
    """

    algorithm = Algorithm.ONLINE_DPO
    config_class = OnlineDPOConfig
    config: OnlineDPOConfig
    unit = 2
    needs_reference = True

    def __init__(
        self, *arguments: Any, reward_model: Any = None, reward_processing_class: Any = None, ref_model: Any = None, **keywords: Any
    ) -> None:
        if reward_model is not None:
            keywords |= {"reward_funcs": reward_model, "reward_processing_classes": reward_processing_class}
        elif not keywords.keys() & {"reward_funcs", "judge"} and len(arguments) < 2:
            keywords["reward_funcs"] = getattr(keywords.get("args"), "reward_model_path", None)
        self._given_reference = ref_model
        super().__init__(*arguments, **keywords)

    def make_reference(self) -> Any | None:
        """The one that was given, else see `OnlineTrainer`."""
        if self._given_reference is None:
            return super().make_reference()
        return frozen(self._given_reference, device=self.accelerator.device)

    @property
    def beta(self) -> float:
        """The strength of the current epoch; the last one of a list stays."""
        betas = self.config.beta if isinstance(self.config.beta, list) else [self.config.beta]
        return betas[min(int(self.state.epoch or 0), len(betas) - 1)]

    def select(self, groups: list[Group]) -> Selection:
        """A pair per group that has a best and a worst completion. Collective."""
        rows = [row for group in groups for row in self._pair(group)]
        pairs = self.mean_over_ranks(len(rows) / self.unit) / self.config.optimizer_steps_per_iteration
        self._measure_rewards(groups)
        if not rows:
            first = groups[0]
            rows = [Row(first.prompt_ids, completion, counts=False) for completion in first.completions[: self.unit]]
        return Selection(rows, normalizer=max(pairs, 1.0))

    def _pair(self, group: Group) -> list[Row]:
        """The best and the worst that count, or nothing: half of a pair is no preference."""
        rewards = self._penalized(group)
        masked = self.config.mask_truncated_completions
        able = [
            i
            for i, completion in enumerate(group.completions)
            if counted_tokens(completion, mask_truncated=masked) and rewards[i] == rewards[i]
        ]
        if not able:
            return []
        best, worst = max(able, key=rewards.__getitem__), min(able, key=rewards.__getitem__)
        if rewards[best] == rewards[worst]:
            return []
        return [Row(group.prompt_ids, group.completions[i], reward=rewards[i]) for i in (best, worst)]

    def _penalized(self, group: Group) -> list[float]:
        penalty = self.config.missing_eos_penalty or 0.0
        return [
            reward if completion.finished else reward - penalty for reward, completion in zip(group.rewards, group.completions, strict=True)
        ]

    def _measure_rewards(self, groups: list[Group]) -> None:
        rewards = [[reward for reward in self._penalized(group) if not math.isnan(reward)] for group in groups]
        every = [reward for found in rewards for reward in found]
        finished = [completion.finished for group in groups for completion in group.completions]
        self.meters.add(
            {
                "objective/scores": sum(every) / max(1, len(every)),
                "objective/scores_margin": sum(max(found) - min(found) for found in rewards if found) / len(groups),
                "val/contain_eos_token": sum(finished) / len(finished),
                "beta": self.beta,
            }
        )

    def policy_loss(self, batch: MicroBatch, logprobs: torch.Tensor) -> torch.Tensor:
        """The sum over pairs of `preference_loss`. `logprobs`: [2 pairs, C] float32, in nats, with gradient."""
        mask, reference, beta = batch.completion_mask, batch.reference_logprobs, self.beta
        assert reference is not None, "the trainer scores the reference before it asks for a loss"
        pairs = preference_loss(logprobs, reference_logprobs=reference, mask=mask, beta=beta, kind=self.config.loss_type)
        counts = mask.amax(dim=1)[0::2]
        self._measure_pairs(batch, pairs, logprobs.detach(), reference, counts)
        return (pairs.loss * counts).sum()

    def _measure_pairs(
        self, batch: MicroBatch, pairs: PairLoss, logprobs: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor
    ) -> None:
        total = counts.sum()

        def mean(values: torch.Tensor) -> torch.Tensor:
            return (values * counts).sum() / total.clamp(min=1)

        sums = (logprobs * batch.completion_mask).sum(dim=1)
        drift = sums - (reference * batch.completion_mask).sum(dim=1)  # an estimate of the divergence, one sample a completion
        kl = mean((drift[0::2] + drift[1::2]) / 2)
        self.meters.add(
            {
                "rewards/chosen": mean(pairs.chosen),
                "rewards/rejected": mean(pairs.rejected),
                "rewards/margins": mean(pairs.margin),
                "rewards/accuracies": mean((pairs.margin > 0).float()),
                "logps/chosen": mean(sums[0::2]),
                "logps/rejected": mean(sums[1::2]),
                "objective/kl": kl,
                "objective/entropy": -mean((sums[0::2] + sums[1::2]) / 2),
                "objective/non_score_reward": -self.beta * kl,
                "objective/rlhf_reward": mean((batch.rewards[0::2] + batch.rewards[1::2]) / 2) - self.beta * kl,
            },
            weight=total,
        )
