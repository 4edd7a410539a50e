"""Losses of the online methods, as pure functions of tensors. B rows, C completion columns, all float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A loss per token and what happened on the way.

    Attributes:
        per_token: [B, C], to be masked, summed and divided by the step's number of tokens.
        kl: [B, C] estimate of the divergence from the reference model, or None without one.
        clipped: [B, C] bool, where the clipping of the importance ratio decided.
    """

    per_token: torch.Tensor
    kl: torch.Tensor | None
    clipped: torch.Tensor


def grpo_loss(
    logprobs: torch.Tensor,
    *,
    sampler_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    reference_logprobs: torch.Tensor | None = None,
    beta: float = 0.0,
) -> TokenLoss:
    """The clipped surrogate of PPO with group advantages (arXiv:2402.03300, eq. 3): -min(r A, clip(r, 1 - e, 1 + e') A) + beta KL.

    r = exp(logprobs - sampler_logprobs): the sampler itself is the behaviour policy, so no second forward pass is needed and the
    numerical difference between generator and trainer is corrected, not ignored. KL is the k3 estimator (joschu.net/blog/kl-approx).

    Args:
        logprobs: [B, C] under the policy being trained; carries the gradient.
        sampler_logprobs: [B, C] under the policy that sampled the tokens.
        advantages: [B].
        epsilon_low: how far below 1 the ratio may fall.
        epsilon_high: how far above 1 it may rise.
        reference_logprobs: [B, C] under the reference model; needed if `beta` is not 0.
        beta: weight of the KL term.
    """
    ratio = torch.exp(logprobs - sampler_logprobs)
    limited = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    advantage = advantages[:, None]
    loss = -torch.minimum(ratio * advantage, limited * advantage)
    clipped = (ratio * advantage) > (limited * advantage)
    if beta == 0.0:
        return TokenLoss(loss, kl=None, clipped=clipped)
    if reference_logprobs is None:
        raise ValueError(f"beta is {beta}, so reference_logprobs are needed")
    difference = reference_logprobs - logprobs
    kl = torch.exp(difference) - difference - 1
    return TokenLoss(loss + beta * kl, kl=kl.detach(), clipped=clipped)


@dataclass(frozen=True, slots=True)
class PairLoss:
    """A loss per pair, and the implied reward margin of chosen over rejected. Both [pairs]."""

    per_pair: torch.Tensor
    margin: torch.Tensor


def dpo_loss(logprobs: torch.Tensor, *, reference_logprobs: torch.Tensor, mask: torch.Tensor, beta: float, kind: str) -> PairLoss:
    """The preference loss of (online) DPO (arXiv:2305.18290, eq. 7) or IPO (arXiv:2310.12036, eq. 17).

    Args:
        logprobs: [2 pairs, C]; even rows are chosen, the odd row after each is its rejected partner.
        reference_logprobs: [2 pairs, C] under the reference model.
        mask: [2 pairs, C].
        beta: strength; for `ipo` the regularisation.
        kind: sigmoid or ipo.
    """
    advantage = ((logprobs - reference_logprobs) * mask).sum(dim=1)
    margin = advantage[0::2] - advantage[1::2]
    if kind == "sigmoid":
        return PairLoss(-torch.nn.functional.logsigmoid(beta * margin), margin=beta * margin.detach())
    if kind == "ipo":
        return PairLoss((margin - 1 / (2 * beta)) ** 2, margin=beta * margin.detach())
    raise ValueError(f"loss_type: {kind!r} is unknown; use sigmoid or ipo")
