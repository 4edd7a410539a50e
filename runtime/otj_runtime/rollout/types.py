"""What a rollout is made of, and the interface of the engines that complete prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) of a completion were sampled by the weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids: the tokens, the end-of-sequence token included if there is one.
        logprobs: log-probability of each token under the policy that sampled it, after temperature, in nats; same length.
        finished: whether it ended by itself; False means that it hit the length limit.
        policy_version: the oldest weights behind its tokens.
        spans: which weights sampled which tokens, in order; empty if `policy_version` sampled all of them.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    policy_version: int
    spans: tuple[Span, ...] = ()

    def token_ages(self, version: int) -> list[tuple[int, int]]:
        """(versions between sampling and `version`, tokens) for each span."""
        spans = self.spans or (Span(self.policy_version, 0, len(self.token_ids)),)
        return [(version - span.version, span.end - span.start) for span in spans]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled. Truncated sampling (top-p, top-k) is not offered: it biases the importance ratio.

    Attributes:
        count: completions of each prompt.
        max_tokens: longest completion.
        temperature: 0 is greedy.
        straggler_factor: see `stragglers.patience`; None finishes every group, however long it takes.
    """

    count: int
    max_tokens: int
    temperature: float = 1.0
    straggler_factor: float | None = None


@dataclass(slots=True)
class Group:
    """The completions of one prompt and what they earned.

    Attributes:
        sample: the dataset's row, every column.
        prompt_ids: token ids of the prompt.
        completions: its completions.
        texts: the completions decoded.
        rewards: one number per completion, in the same order; NaN where no reward function applies.
        scores: by reward function, what it gave each completion; None where it does not apply.
        extra: columns that reward functions added, by name.
        logged: numbers that reward functions added for the whole batch, by name.
    """

    sample: dict[str, Any]
    prompt_ids: list[int]
    completions: list[Completion]
    texts: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)


class RolloutEngine(Protocol):
    """Completes prompts with the current policy.

    Attributes:
        shares_model: whether it samples from the model being trained; then it can only be asked between two optimizer steps, in the
            trainer's own thread. Others may be asked from several threads at once.
    """

    shares_model: bool

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, policy_version: int) -> list[list[Completion]]:
        """`sampling.count` completions for each prompt, in the prompts' order, sampled from the weights of `policy_version` or later
        ones that arrived meanwhile. A group that was dropped as a straggler is an empty list; at least one is not."""
        ...

    def busy_seconds(self) -> float:
        """Seconds in which anything of this rank's was being generated, since the engine was made."""
        ...

    def cancel(self) -> None:
        """Make every `generate` under way raise `Cancelled`, soon."""
        ...


class Cancelled(Exception):
    """The rollouts were called off: the run ends."""
