"""Micro-batches: rollouts as tensors.

    groups -> Selection (a method's rows) -> split: one part per micro-batch -> collate: MicroBatch

Prompts are padded on the left and completions on the right, so that completions start in one column and only their logits are
computed. `split` deals rows out so that every micro-batch has one: ranks must make the same number of forward passes, however
many rows each has to train on; and so that completions of one prompt lie together, to be scored with the prompt read once.

A micro-batch is trained on `num_iterations` times; what the first visit learns about its tokens
(the log-probabilities under the policy that the generation began with, and under the reference) it keeps for the later ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from otj_runtime.rollout.types import Completion
from otj_runtime.train.shared_prompts import SharedPrompts, share_prompts


@dataclass(frozen=True, slots=True)
class Row:
    """One completion to train on.

    Attributes:
        prompt_ids: token ids of the prompt.
        completion: the sampled completion.
        advantage: how much better than its group (GRPO); unused by losses that read the order of rows.
        reward: what it earned, penalties included.
        counts: False for a row that only keeps a micro-batch from being empty; its mask is zero.
    """

    prompt_ids: list[int]
    completion: Completion
    advantage: float = 0.0
    reward: float = 0.0
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Selection:
    """What to train on of a generation.

    Attributes:
        rows: in whole units, at least one.
        normalizer: what the loss of one optimizer step, summed over its rows on this rank, is divided by. Gradients are averaged
            over ranks afterwards. It covers the rows that were left out because they teach nothing.
    """

    rows: list[Row]
    normalizer: float


@dataclass(slots=True)
class MicroBatch:
    """Rows as tensors; B rows, P prompt columns, C completion columns.

    Attributes:
        input_ids: [B, P + C] int64.
        attention_mask: [B, P + C] int64, 1 on tokens.
        completion_mask: [B, C] float32, 1 on the tokens that the loss counts.
        sampler_logprobs: [B, C] float32, log-probabilities under the policy that sampled them, in nats; NaN where unknown.
        advantages: [B] float32, in standard deviations of the rewards, or in their own unit if nothing divides them.
        rewards: [B] float32, in the unit of the reward functions' weighted sum.
        shared: the same rows with each prompt once; None where that saves too little.
        normalizer: see `Selection`.
        old_logprobs: [B, C] float32, under the policy that the first optimizer step on this generation started from; None
            before the first visit.
        reference_logprobs: [B, C] float32, under the reference policy; None before the first visit, or if the loss needs none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    rewards: torch.Tensor
    shared: SharedPrompts | None = None
    normalizer: float = 1.0
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None

    @property
    def completion_columns(self) -> int:
        """C."""
        return self.completion_mask.shape[1]

    @property
    def completion_ids(self) -> torch.Tensor:
        """[B, C] int64."""
        return self.input_ids[:, -self.completion_columns :]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor | SharedPrompts) else value

        return MicroBatch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


def counted_tokens(completion: Completion, *, mask_truncated: bool) -> int:
    """Tokens that the loss counts; none of a completion that hit the length limit with `mask_truncated`."""
    return len(completion.token_ids) if completion.finished or not mask_truncated else 0


def split(rows: Sequence[Row], *, parts: int, unit: int, steps: int = 1) -> list[list[Row]]:
    """Deal `rows` out to `parts` micro-batches, as evenly as possible, `unit` consecutive rows at a time.

    Args:
        steps: optimizer steps that the micro-batches make up. Each gets rows of every prompt, as far as there are; within a step, rows of one
            prompt stay together.

    Returns:
        the parts, those of the first step first. One that would be empty gets a copy of the first unit that does not count.

    Raises:
        ValueError: if there are no rows at all, or not a whole number of units, or not a whole number of parts for each step.
    """
    if not rows or len(rows) % unit or parts % steps:
        raise ValueError(f"{len(rows)} rows in units of {unit} cannot be dealt out to {parts} micro-batches of {steps} steps")
    units = [list(rows[i : i + unit]) for i in range(0, len(rows), unit)]
    each = parts // steps
    shares = [units[step::steps] for step in range(steps)]
    bounds = [[len(share) * part // each for part in range(each + 1)] for share in shares]
    dealt = [
        [row for u in share[first:last] for row in u]
        for share, bound in zip(shares, bounds, strict=True)
        for first, last in itertools.pairwise(bound)
    ]
    filler = [replace(row, counts=False) for row in units[0]]
    return [part or filler for part in dealt]


def collate(rows: Sequence[Row], *, pad_id: int, mask_truncated: bool, normalizer: float = 1.0) -> MicroBatch:
    """Rows as tensors on the CPU; see `counted_tokens` for `mask_truncated`."""
    prompt_width = max(len(row.prompt_ids) for row in rows)
    width = max(len(row.completion.token_ids) for row in rows)
    ids, attention, counted, logprobs = [], [], [], []
    for row in rows:
        tokens = row.completion.token_ids
        left, right = prompt_width - len(row.prompt_ids), width - len(tokens)
        ids.append([pad_id] * left + row.prompt_ids + tokens + [pad_id] * right)
        attention.append([0] * left + [1] * (len(row.prompt_ids) + len(tokens)) + [0] * right)
        counts = row.counts and counted_tokens(row.completion, mask_truncated=mask_truncated) > 0
        counted.append([float(counts)] * len(tokens) + [0.0] * right)
        logprobs.append(row.completion.logprobs + [0.0] * right)
    return MicroBatch(
        input_ids=torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(attention, dtype=torch.long),
        completion_mask=torch.tensor(counted, dtype=torch.float32),
        sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        rewards=torch.tensor([row.reward for row in rows], dtype=torch.float32),
        shared=share_prompts([row.prompt_ids for row in rows], [row.completion.token_ids for row in rows], pad_id=pad_id),
        normalizer=normalizer,
    )
