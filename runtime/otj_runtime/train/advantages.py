"""Advantages of completions relative to their group (GRPO, arXiv:2402.03300, section 4.1.2). Pure functions.

rewards of this rank's groups (and, to scale by the batch, of all ranks') -> one advantage per completion
"""

from __future__ import annotations

import torch

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does, so that a group of nearly equal rewards does not explode."""


def group_advantages(rewards: torch.Tensor, *, scale: str, all_rewards: torch.Tensor | None = None) -> torch.Tensor:
    """How much better each completion is than its group: A = (r - mean(r)) / (std + epsilon).

    Args:
        rewards: [groups, completions of a group], float32; NaN for a completion that nothing could score.
        scale: whose standard deviation divides: `group` (GRPO), `batch` (every reward of the generation, arXiv:2508.08221),
            or `none` (Dr. GRPO, arXiv:2503.20783: dividing favours prompts that are nearly solved or nearly hopeless).
        all_rewards: the rewards of every rank, any shape, float32, NaN as above; needed to scale by the batch.

    Returns:
        Same shape, float32. Exactly zero in a group whose rewards are equal, and where the reward is NaN.

    Raises:
        ValueError: if `scale` is unknown, or `all_rewards` is missing.
    """
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (_deviation(rewards, dim=1) + EPSILON)
    elif scale == "batch":
        if all_rewards is None:
            raise ValueError("scale_rewards: 'batch' needs the rewards of all ranks")
        centred = centred / (_deviation(all_rewards.reshape(1, -1), dim=1) + EPSILON)
    elif scale != "none":
        raise ValueError(f"scale_rewards: {scale!r} is unknown; use group, batch or none")
    # A mean in float32 need not equal the equal numbers that it is made of; the noise must not pass for an advantage.
    return torch.where(equal_groups(rewards)[:, None], 0.0, centred).nan_to_num(nan=0.0)


def equal_groups(rewards: torch.Tensor) -> torch.Tensor:
    """[groups] bool: whether all rewards of a group are the same number (or fewer than two are numbers). `rewards`: [groups, completions of
    a group] float32."""
    low = rewards.nan_to_num(nan=torch.inf).amin(dim=1)
    high = rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
    return low >= high


def _deviation(values: torch.Tensor, *, dim: int) -> torch.Tensor:
    """The standard deviation of the numbers along `dim`, with Bessel's correction, kept as a dimension of one."""
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
