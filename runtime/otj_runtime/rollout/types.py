"""What a rollout is made of, and the interface of the engines that complete prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids: the tokens, the end-of-sequence token included if there is one.
        logprobs: log-probability of each token under the policy that sampled it, after temperature; same length.
        finished: whether it ended by itself; False means that it hit the length limit.
        policy_version: the weights that produced its tokens (all of them: a completion of mixed versions is sampled again).
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    policy_version: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled. Truncated sampling (top-p, top-k) is not offered: it biases the importance ratio."""

    count: int
    max_tokens: int
    temperature: float = 1.0


@dataclass(slots=True)
class Group:
    """The completions of one prompt and what they earned.

    Attributes:
        sample: the dataset's row, every column.
        prompt_ids: token ids of the prompt.
        completions: its completions.
        rewards: one number per completion, in the same order.
    """

    sample: dict[str, Any]
    prompt_ids: list[int]
    completions: list[Completion]
    texts: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class RolloutEngine(Protocol):
    """Completes prompts with the current policy."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, policy_version: int) -> list[list[Completion]]:
        """`sampling.count` completions for each prompt, all sampled from the weights of `policy_version`, in the prompts' order."""
        ...
