"""Advantages of completions relative to their group (GRPO, arXiv:2402.03300, eq. 3). Pure functions."""

from __future__ import annotations

import torch

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does, so that a group of nearly equal rewards does not explode."""


def group_advantages(rewards: torch.Tensor, *, scale: bool) -> torch.Tensor:
    """How much better each completion is than its group: A = (r - mean(r)) / (std(r) + epsilon), the division only with `scale`.

    Args:
        rewards: [groups, completions of a group], float32.
        scale: divide by the group's standard deviation.

    Returns:
        Same shape. All zeros for a group whose rewards are equal.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not scale:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + EPSILON)
