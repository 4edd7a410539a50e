"""reasoning-gym's tasks as datasets and rewards."""

from __future__ import annotations

from typing import Any

import pytest

from otj_runtime.api.inputs import DatasetSpec
from otj_runtime.data.load import held_out_prompts, load_prompts
from otj_runtime.pod.errors import DatasetInvalid
from otj_runtime.rewards import load_rewards

NAMES = ["basic_arithmetic", "spell_backward", "number_sorting", "countdown"]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_brings_rows_and_the_reward_that_knows_the_right_answer(name: str) -> None:
    task = f"reasoning_gym/{name}"
    rows = load_prompts(DatasetSpec(task=task, args={"size": 4}), seed=0)[:]  # type: ignore[index]
    assert rows[0]["prompt"][-1] == {"role": "user", "content": rows[0]["question"]}
    columns: dict[str, Any] = {column: [row[column] for row in rows] for column in ("question", "answer", "metadata")}
    right = [f"Let me see. <answer>0</answer> No: <answer> {row['answer']} </answer>" for row in rows]

    def totals(said: list[str]) -> list[float]:
        prompts, ids = [row["prompt"] for row in rows], [[0]] * len(rows)
        return load_rewards([], task).score(prompts=prompts, completions=said, completion_ids=ids, columns=columns).totals

    assert totals(right) == [1.0] * 4
    assert max(totals(["<answer>certainly wrong</answer>"] * 4)) < 1.0


def test_rows_depend_on_the_seed_alone_and_the_held_out_ones_are_others() -> None:
    spec = DatasetSpec(task="reasoning_gym/basic_arithmetic", args={"size": 50})
    first, same, other = (load_prompts(spec, seed=seed)[:] for seed in (0, 0, 1))  # type: ignore[index]
    assert first == same != other
    held_out = held_out_prompts(spec)
    assert len(held_out) == 64
    assert not {row["question"] for row in held_out} & {row["question"] for row in first}


def test_a_task_takes_its_own_settings_and_a_chat_without_instruction() -> None:
    args = {"size": 3, "min_terms": 2, "max_terms": 2, "instruction": ""}
    rows = load_prompts(DatasetSpec(task="reasoning_gym/chain_sum", args=args), seed=0)[:]  # type: ignore[index]
    assert all(row["question"].count("+") + row["question"].count(" - ") == 1 for row in rows)
    assert [message["role"] for message in rows[0]["prompt"]] == ["user"]


def test_a_million_rows_cost_nothing_until_they_are_read() -> None:
    assert len(load_prompts(DatasetSpec(task="reasoning_gym/countdown", args={"size": 1_000_000}), seed=0)) == 1_000_000  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "args", "words"),
    [
        ("reasoning_gym/basic_arithmatic", {}, r"no task basic_arithmatic; did you mean reasoning_gym/basic_arithmetic\?"),
        ("reasoning_gym/countdown", {"nonsense": 1}, "task countdown refuses .*nonsense"),
        ("reasoning_gym/chain_sum", {"min_terms": 9, "max_terms": 2}, "task chain_sum refuses"),
    ],
)
def test_what_the_package_does_not_know_is_refused(task: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetInvalid, match=words):
        load_prompts(DatasetSpec(task=task, args=args), seed=0)
