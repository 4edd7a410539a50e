"""Losses of the online methods, as pure functions of tensors. B rows, C completion columns, all float32, log-probabilities in nats.

    new, old log-probabilities --importance_ratio--> r --clipped_surrogate | weighted_likelihood--> loss of each token
    old, sampler log-probabilities --sampler_weight--> w, multiplied onto it
    new, reference log-probabilities --divergence--> KL, added with weight beta
    loss of each token --sum_tokens | sum_sequence_means--> one number

Three policies meet here. The *sampler* produced the tokens: the generator's numerics, perhaps some optimizer steps ago. The *old*
policy is the trainer's own at the first optimizer step on these tokens; trust regions are drawn around it. The *new* one is being
trained. r = new/old moves with training and is clipped; w = old/sampler is fixed and truncated (decoupled PPO, arXiv:2110.00641).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def importance_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, *, mask: torch.Tensor, level: str) -> torch.Tensor:
    """r = new/old: of each token (PPO, arXiv:1707.06347), or the geometric mean over a completion (GSPO, arXiv:2507.18071).

    Args:
        logprobs: [B, C] float32, in nats, under the policy being trained; carries the gradient.
        old_logprobs: [B, C] float32, in nats.
        mask: [B, C] float32, 1 on tokens that count.
        level: token or sequence.

    Returns:
        [B, C] for tokens, [B, 1] for sequences; float32.

    Raises:
        ValueError: if `level` is unknown.
    """
    difference = logprobs - old_logprobs
    if level == "token":
        return difference.exp()
    if level == "sequence":
        return ((difference * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)).exp()
    raise ValueError(f"importance_sampling_level: {level!r} is unknown; use token or sequence")


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The loss of each token, and where clipping decided it: [B, C], or [B, 1] if the ratio belongs to the sequence.

    Attributes:
        loss: float32, in units of the advantage, to be averaged; carries the gradient.
        low: bool, a worse-than-average completion has already become unlikely enough.
        high: bool, a better-than-average completion has already become likely enough.
    """

    loss: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, *, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> Surrogate:
    """-min(r A, clip(r, 1 - e, 1 + e') A): PPO's surrogate (arXiv:1707.06347, eq. 7) with DAPO's separate upper bound (2503.14476).

    Args:
        ratio: [B, C] or [B, 1] float32, new/old.
        advantages: [B] float32.
        epsilon_low: how far below 1 the ratio may fall.
        epsilon_high: how far above 1 it may rise.
        delta: largest ratio with which a worse-than-average token counts (two-sided clipping, arXiv:2505.07291).
    """
    advantage = advantages[:, None]
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(bounded * advantage, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage)
    return Surrogate(loss, low=(bounded < 1 - epsilon_low) & (advantage < 0), high=(bounded > 1 + epsilon_high) & (advantage > 0))


def weighted_likelihood(ratio: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor, *, largest: float) -> Surrogate:
    """-stop_gradient(min(r, largest)) A log p: CISPO (arXiv:2506.13585). No token loses its gradient; its weight is bounded.

    Args:
        ratio: [B, C] or [B, 1] float32, new/old.
        advantages: [B] float32.
        logprobs: [B, C] float32, in nats, under the policy being trained.
        largest: upper bound of the ratio itself, not of its distance from 1.
    """
    advantage = advantages[:, None]
    loss = -ratio.clamp(max=largest).detach() * advantage * logprobs
    high = (ratio > largest) & (advantage > 0)
    return Surrogate(loss, low=torch.zeros_like(high), high=high)


def sampler_weight(
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    *,
    mask: torch.Tensor,
    mode: str,
    smallest: float | None,
    largest: float | None,
) -> torch.Tensor:
    """w = old/sampler, bounded: corrects for tokens that another program, or an older policy, sampled. Without gradient.

    `*_truncate` moves weights outside of the bounds onto them (truncated importance sampling, doi:10.1198/106186008X320456);
    `*_mask` sets them to zero. `token_*` weighs each token by itself, `sequence_*` a completion by the product of its tokens.

    Args:
        old_logprobs: [B, C] float32, in nats.
        sampler_logprobs: [B, C] float32, in nats; where it is NaN, the token counts as if both agreed.
        mask: [B, C] float32, 1 on tokens that count.
        mode: token_truncate, token_mask, sequence_truncate or sequence_mask.
        smallest, largest: the bounds; None for none.

    Returns:
        [B, C] for tokens, [B, 1] for sequences; float32.

    Raises:
        ValueError: if `mode` is unknown.
    """
    level, _, how = mode.partition("_")
    difference = ((old_logprobs - sampler_logprobs) * mask).nan_to_num(nan=0.0)
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True)
    weight = difference.exp()
    if level in ("token", "sequence") and how == "truncate":
        return weight if smallest is None and largest is None else weight.clamp(min=smallest, max=largest)
    if level in ("token", "sequence") and how == "mask":
        outside = torch.zeros_like(weight, dtype=torch.bool)
        outside = outside if smallest is None else outside | (weight < smallest)
        outside = outside if largest is None else outside | (weight > largest)
        return weight.masked_fill(outside, 0.0)
    raise ValueError(f"{mode!r} is unknown; use token_truncate, token_mask, sequence_truncate or sequence_mask")


def divergence(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, *, ratio: torch.Tensor | None = None) -> torch.Tensor:
    """KL(new || reference) of each token, by the estimator that is never negative: q/p - log(q/p) - 1 (GRPO, arXiv:2402.03300, eq. 4).

    Args:
        logprobs: [B, C] float32, in nats, under the policy being trained.
        reference_logprobs: [B, C] float32, in nats.
        ratio: [B, C] or [B, 1] float32, new/old; multiplied on, so that the gradient is that of the reverse KL (arXiv:2512.02556).

    Returns:
        [B, C] float32, in nats.
    """
    difference = reference_logprobs - logprobs
    estimate = difference.exp() - difference - 1
    return estimate if ratio is None else estimate * ratio


def sum_tokens(loss: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over all tokens that count. `loss`: [B, C] or [B, 1] float32; `mask`: [B, C] float32, 1 on these."""
    return (loss * mask).sum()


def sum_sequence_means(loss: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over rows of each row's mean over its tokens that count. `loss`: [B, C] or [B, 1] float32; `mask`: [B, C] float32, 1 on these."""
    return ((loss * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()


@dataclass(frozen=True, slots=True)
class PairLoss:
    """What preference training makes of pairs, all [pairs] float32.

    Attributes:
        loss: carries the gradient.
        chosen: implied reward of the chosen completion, beta (log p - log q) (arXiv:2305.18290, section 4); without gradient, as the next.
        rejected: that of the rejected one.
    """

    loss: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        """How much more reward the chosen one implies."""
        return self.chosen - self.rejected


def preference_loss(logprobs: torch.Tensor, *, reference_logprobs: torch.Tensor, mask: torch.Tensor, beta: float, kind: str) -> PairLoss:
    """The preference loss of (online) DPO (arXiv:2305.18290, eq. 7) or IPO (arXiv:2310.12036, eq. 17).

    Args:
        logprobs: [2 pairs, C] float32, in nats, under the policy being trained; even rows are chosen, the odd row after each is its rejected partner.
        reference_logprobs: [2 pairs, C] float32, in nats, under the reference model.
        mask: [2 pairs, C] float32, 1 on tokens that count.
        beta: strength; for `ipo` the regularisation.
        kind: sigmoid or ipo.

    Raises:
        ValueError: if `kind` is unknown.
    """
    advantage = ((logprobs - reference_logprobs) * mask).sum(dim=1)
    chosen, rejected = advantage[0::2], advantage[1::2]
    if kind == "sigmoid":
        loss = -torch.nn.functional.logsigmoid(beta * (chosen - rejected))
    elif kind == "ipo":
        loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss_type: {kind!r} is unknown; use sigmoid or ipo")
    return PairLoss(loss, chosen=beta * chosen.detach(), rejected=beta * rejected.detach())
