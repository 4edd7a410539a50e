"""Rows as tensors, and how they are dealt out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.rollout.types import Completion
from otj_runtime.train.batch import Row, collate, split


def row(prompt: list[int], tokens: list[int], *, finished: bool = True, advantage: float = 1.0, counts: bool = True) -> Row:
    completion = Completion(token_ids=tokens, logprobs=[-0.5] * len(tokens), finished=finished, policy_version=0)
    return Row(prompt, completion, advantage=advantage, counts=counts)


def test_prompts_end_and_completions_begin_in_one_column() -> None:
    batch = collate([row([1], [2, 3]), row([4, 5, 6], [7])], pad_id=0, mask_truncated=False)
    assert batch.input_ids.tolist() == [[0, 0, 1, 2, 3], [4, 5, 6, 7, 0]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.completion_ids.tolist() == [[2, 3], [7, 0]]
    assert batch.completion_mask.tolist() == [[1.0, 1.0], [1.0, 0.0]]


def test_a_truncated_completion_counts_nothing_if_asked() -> None:
    batch = collate([row([1], [2, 3], finished=False), row([1], [2])], pad_id=0, mask_truncated=True)
    assert batch.completion_mask.sum(dim=1).tolist() == [0.0, 1.0]


def test_a_row_that_does_not_count_has_an_empty_mask() -> None:
    assert float(collate([row([1], [2, 3], counts=False)], pad_id=0, mask_truncated=False).completion_mask.sum()) == 0.0


@given(units=st.integers(1, 12), each=st.integers(1, 6), unit=st.integers(1, 3), steps=st.integers(1, 3))
def test_every_micro_batch_gets_whole_units_and_no_row_is_lost(units: int, each: int, unit: int, steps: int) -> None:
    rows = [row([i], [i]) for i in range(units * unit)]
    dealt = split(rows, parts=each * steps, unit=unit, steps=steps)
    counted = [r.prompt_ids[0] for part in dealt for r in part if r.counts]
    assert len(dealt) == each * steps
    assert all(part and len(part) % unit == 0 for part in dealt)
    assert sorted(counted) == list(range(units * unit))
    sizes = [sum(r.counts for r in part) for part in dealt]
    assert max(sizes) - min(sizes) <= unit


def test_rows_of_a_prompt_lie_together_within_a_step_and_every_step_gets_some() -> None:
    rows = [row([prompt], [prompt]) for prompt in (1, 2) for _ in range(4)]
    dealt = [[r.prompt_ids[0] for r in part] for part in split(rows, parts=4, unit=1, steps=2)]
    assert dealt == [[1, 1], [2, 2], [1, 1], [2, 2]]


@pytest.mark.parametrize(("rows", "parts", "unit", "steps"), [(3, 1, 2, 1), (4, 3, 1, 2), (0, 1, 1, 1)])
def test_what_cannot_be_dealt_out_is_refused(rows: int, parts: int, unit: int, steps: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows in units of {unit} cannot be dealt out to {parts} micro-batches of {steps} steps"):
        split([row([1], [1])] * rows, parts=parts, unit=unit, steps=steps)


def test_moving_a_batch_keeps_all_of_it() -> None:
    batch = collate([row([1], [2])], pad_id=0, mask_truncated=False, normalizer=7.0)
    batch.old_logprobs = torch.tensor([[-0.5]])
    moved = batch.to(torch.device("cpu"))
    assert (moved.normalizer, moved.old_logprobs, moved.reference_logprobs) == (7.0, batch.old_logprobs, None)
