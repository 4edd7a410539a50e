"""Micro-batches: rollouts as tensors.

Prompts are padded on the left and completions on the right, so that completions start in one column and only their logits are
computed. `split` deals rows out so that every micro-batch has one: ranks must make the same number of forward passes, however
many rows each has to train on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from otj_runtime.rollout.types import Completion


@dataclass(frozen=True, slots=True)
class Row:
    """One completion to train on.

    Attributes:
        prompt_ids: token ids of the prompt.
        completion: the sampled completion.
        advantage: how much better than its group (GRPO); unused by losses that read the order of rows.
        counts: False for a row that only keeps a micro-batch from being empty; its mask is zero.
    """

    prompt_ids: list[int]
    completion: Completion
    advantage: float = 0.0
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Selection:
    """What to train on of a generation: rows in whole units, at least one, and the tokens that were left out."""

    rows: list[Row]
    skipped_tokens: int = 0


@dataclass(slots=True)
class MicroBatch:
    """Rows as tensors; B rows, P prompt columns, C completion columns.

    Attributes:
        input_ids: [B, P + C] int64.
        attention_mask: [B, P + C] int64, 1 on tokens.
        completion_mask: [B, C] float32, 1 on the tokens that the loss counts.
        sampler_logprobs: [B, C] float32, log-probabilities of the policy that sampled them.
        advantages: [B] float32.
        skipped_tokens: tokens of rows that were left out because they teach nothing; the average over tokens still counts them.
        normalizer: what the whole optimizer step counts (tokens or pairs), over all micro-batches and ranks, divided by the ranks:
            gradients are averaged over ranks afterwards.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    skipped_tokens: float = 0.0
    normalizer: float = 1.0

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
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            completion_mask=self.completion_mask.to(device),
            sampler_logprobs=self.sampler_logprobs.to(device),
            advantages=self.advantages.to(device),
        )


def split(rows: Sequence[Row], *, parts: int, unit: int) -> list[list[Row]]:
    """Deal `rows` out to `parts` micro-batches, `unit` consecutive rows at a time, as evenly as possible.

    A part that would be empty gets a copy of the first unit that does not count.

    Raises:
        ValueError: if there are no rows at all, or not a whole number of units.
    """
    if not rows or len(rows) % unit:
        raise ValueError(f"{len(rows)} rows cannot be dealt out in units of {unit}")
    units = [list(rows[i : i + unit]) for i in range(0, len(rows), unit)]
    dealt: list[list[Row]] = [[row for u in units[part::parts] for row in u] for part in range(parts)]
    filler = [replace(row, counts=False) for row in units[0]]
    return [part or filler for part in dealt]


def collate(rows: Sequence[Row], *, pad_id: int, mask_truncated: bool) -> MicroBatch:
    """Rows as tensors on the CPU; with `mask_truncated`, completions that hit the length limit count nothing."""
    prompt_width = max(len(row.prompt_ids) for row in rows)
    width = max(len(row.completion.token_ids) for row in rows)
    ids, attention, counted, logprobs = [], [], [], []
    for row in rows:
        tokens = row.completion.token_ids
        left, right = prompt_width - len(row.prompt_ids), width - len(tokens)
        ids.append([pad_id] * left + row.prompt_ids + tokens + [pad_id] * right)
        attention.append([0] * left + [1] * (len(row.prompt_ids) + len(tokens)) + [0] * right)
        counts = row.counts and (row.completion.finished or not mask_truncated)
        counted.append([float(counts)] * len(tokens) + [0.0] * right)
        logprobs.append(row.completion.logprobs + [0.0] * right)
    return MicroBatch(
        input_ids=torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(attention, dtype=torch.long),
        completion_mask=torch.tensor(counted, dtype=torch.float32),
        sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
    )
