"""How far the trainer and the sampler disagree on the same tokens: the early sign of a stale or mismatched generator. Pure.

Under TRL's names where it has them. A growing mean of the k3 estimate comes before a collapse; on the first step of an on-policy run,
all of it is rounding.
"""

from __future__ import annotations

import torch

NEAR_LOW, NEAR_HIGH = 0.9, 1.1
"""Ratios between these count as near."""


def mismatch(old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics by name, scalars on the tensors' device; means are over tokens.

    Args:
        old_logprobs: [B, C] float32, in nats, under the policy as the trainer scores it.
        sampler_logprobs: [B, C] float32, in nats, as the sampler did; NaN where it said nothing, which counts as agreement.
        mask: [B, C] float32, 1 on tokens that count.
    """
    tokens = mask.sum().clamp(min=1)
    difference = ((old_logprobs - sampler_logprobs) * mask).nan_to_num(nan=0.0)
    ratio = difference.exp()
    # KL(sampler || trainer) by the low-variance estimator of http://joschu.net/blog/kl-approx.html: r - 1 - log r, r = trainer / sampler.
    k3 = ratio - 1 - difference
    outside = ((ratio < NEAR_LOW) | (ratio > NEAR_HIGH)) & (mask > 0)
    # The 99th percentile of the counted ratios without waiting for the device to say how many there are: others sort to the end.
    ordered = torch.where(mask > 0, ratio, torch.inf).flatten().sort().values
    place = (0.99 * (mask.sum() - 1).clamp(min=0)).long()
    return {
        "sampling/sampling_logp_difference/mean": difference.abs().sum() / tokens,
        "sampling/sampling_logp_difference/max": difference.abs().max(),
        "mismatch/kl_k3": (k3 * mask).sum() / tokens,
        "mismatch/ratio_mean": (ratio * mask).sum() / tokens,
        "mismatch/ratio_p99": torch.where(mask.sum() > 0, ordered.gather(0, place[None])[0], 1.0),
        "mismatch/outside_0.9_1.1": outside.sum() / tokens,
    }
