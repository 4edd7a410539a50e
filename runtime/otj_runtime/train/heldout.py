"""Greedy answers to held-out prompts: what the policy has learned, measured on prompts it never trained on."""

from __future__ import annotations

from typing import Any

from otj_runtime.pod.metrics import HeldOut
from otj_runtime.rollout.collect import Rollouts
from otj_runtime.rollout.types import Sampling

SHOWN = 6
"""Answers kept for people."""


def answer_held_out(rollouts: Rollouts, samples: list[dict[str, Any]], *, max_tokens: int, policy_version: int) -> HeldOut:
    """Answer `samples` greedily with the weights of `policy_version` and score the answers."""
    sampling = Sampling(count=1, max_tokens=max_tokens, temperature=0.0)
    groups = rollouts.collect(samples, sampling, policy_version=policy_version)
    accuracy = sum(group.rewards[0] for group in groups) / len(groups)
    return HeldOut(accuracy=accuracy, answers=rollouts.answers(groups)[:SHOWN])
