"""The built-in rewards."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.rewards import exact_match, format_match, last_integer, length_target, overlong_penalty, position_match


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("The sum is 7.", 7, 1.0),
        ("3 + 4 = 7", "7", 1.0),
        ("7 is 3 + 4", 7, 0.0),
        ("007", 7, 1.0),
        ("-0", 0, 1.0),
        ("it is -7", -7, 1.0),
        ("it is -7", 7, 0.0),
        ("seven", 7, 0.0),
        ("", 7, 0.0),
        ("9" * 5000, 7, 0.0),
        ("\N{ARABIC-INDIC DIGIT SEVEN}", 7, 0.0),
    ],
)
def test_the_last_integer_counts(completion: str, answer: int | str, reward: float) -> None:
    assert last_integer(completions=[completion], answer=[answer]) == [reward]


@given(number=st.integers(), before=st.text(), after=st.text(alphabet="abc .!\n"))
def test_a_number_at_the_end_is_found_behind_any_text(number: int, before: str, after: str) -> None:
    assert last_integer(completions=[f"{before} {number} {after}"], answer=[number]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [("yes", "yes", 1.0), (" yes\n", "yes", 1.0), ("Yes", "yes", 0.0), ("12", 12, 1.0), ("yes, yes", "yes", 0.0)],
)
def test_only_the_answer_itself_matches_exactly(completion: str, answer: Any, reward: float) -> None:
    assert exact_match(completions=[completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("abcd", "abcd", 1.0),
        ("abdc", "abcd", 0.5),
        ("ab", "abcd", 0.5),
        ("", "abcd", 0.0),
        ("abcdabcd", "abcd", 0.5),
        ("bcda", "abcd", 0.0),
    ],
)
def test_each_position_counts_the_same(completion: str, answer: str, reward: float) -> None:
    assert position_match(completions=[completion], answer=[answer]) == [reward]


@given(completion=st.text(), answer=st.text())
def test_the_share_of_positions_lies_between_0_and_1_and_only_the_answer_earns_1(completion: str, answer: str) -> None:
    [reward] = position_match(completions=[completion], answer=[answer])
    assert 0.0 <= reward <= 1.0
    assert (reward == 1.0) == (completion == answer)


@pytest.mark.parametrize("function", [exact_match, last_integer, position_match])
def test_a_message_is_judged_by_its_content(function: Any) -> None:
    messages = [{"role": "assistant", "content": "7"}]
    columns = {"prompts": [""], "completion_ids": [[1]], "other": [None]}
    assert function(completions=[messages], answer=["7"], **columns) == [1.0]


@pytest.mark.parametrize(
    ("text", "whole", "score"),
    [
        ("<think>a\nb</think> <answer>c</answer>\n", True, 1.0),
        ("so <think>a</think><answer>c</answer>", True, 0.0),
        ("so <think>a</think><answer>c</answer>", False, 1.0),
        ("<answer>c</answer>", False, 0.0),
    ],
)
def test_a_format_is_matched_whole_or_in_part(text: str, whole: bool, score: float) -> None:
    assert format_match(completions=[text], pattern=r"<think>.*</think>\s*<answer>.*</answer>", whole=whole) == [score]


def test_lengths_are_rewarded_near_a_target_and_punished_near_the_limit() -> None:
    ids = [[0] * length for length in (0, 5, 10, 15, 20, 30)]
    assert length_target(completion_ids=ids, tokens=10) == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    assert overlong_penalty(completion_ids=ids, max_tokens=20, soft_tokens=10) == [0.0, 0.0, 0.0, -0.5, -1.0, -1.0]
