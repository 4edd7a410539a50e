"""Calling reward functions: what they get, and what happens when they misbehave."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.pod.errors import RewardFailed
from otj_runtime.rewards import Reward, Rewards, RewardTable, scoring
from otj_runtime.rewards.scoring import CONTEXT_KEYWORDS

TEXTS = ["one", "two", "three"]


def rewards(*functions: Any, weights: list[float] | None = None, timeout_s: float = 10.0) -> Rewards:
    weights = weights or [1.0] * len(functions)
    found = enumerate(zip(functions, weights, strict=True))
    return Rewards([Reward(name=f"f{i}", function=f, weight=w, timeout_s=timeout_s) for i, (f, w) in found])


def score(judges: Rewards, texts: list[str] = TEXTS, *, prompt: Any = "say", **columns: list[Any]) -> RewardTable:
    ids = [[len(text)] for text in texts]
    return judges.score(prompts=[prompt] * len(texts), completions=texts, completion_ids=ids, columns=columns)


def returning(values: Any) -> Any:
    return lambda **_: values


def test_a_function_gets_prompts_completions_tokens_and_columns_by_name() -> None:
    seen: dict[str, Any] = {}

    def judge(**keywords: Any) -> list[float]:
        seen.update(keywords)
        return [0.0, 0.0, 0.0]

    score(rewards(judge), answer=[1, 2, 3])
    rows = {"prompts": ["say"] * 3, "completions": TEXTS, "completion_ids": [[3], [3], [5]], "answer": [1, 2, 3]}
    assert {name: value for name, value in seen.items() if name not in CONTEXT_KEYWORDS} == rows


def test_a_function_that_names_it_gets_the_state_of_training_and_a_narrow_one_is_not_bothered() -> None:
    def early(completions: list[str], trainer_state: Any) -> list[float]:
        return [float(trainer_state)] * len(completions)

    def narrow(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [0.5] * len(completions)

    judges = rewards(lambda prompts, completion_ids, **kw: early(kw["completions"], kw["trainer_state"]), narrow)
    table = judges.score(prompts=["p"], completions=["c"], completion_ids=[[1]], columns={}, trainer_state=7)
    assert table.scores == {"f0": [7.0], "f1": [0.5]}


def test_a_function_can_add_a_column_and_a_metric() -> None:
    def judge(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        log_metric("share", 0.5)
        log_metric("share", 1.0)
        return [0.0] * len(completions)

    table = score(rewards(judge))
    assert (table.extra, table.metrics) == ({"length": [3, 3, 5]}, {"share": 0.75})


def test_a_column_of_the_wrong_length_is_refused() -> None:
    def judge(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("length", [1])
        return [0.0] * len(completions)

    with pytest.raises(RewardFailed, match="log_extra got 1 values of column length for 3 completions"):
        score(rewards(judge))


def test_to_a_conversation_the_completion_is_a_message() -> None:
    seen: list[Any] = []

    def judge(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0]

    score(rewards(judge), ["hello"], prompt=[{"role": "user", "content": "hi"}])
    assert seen == [[{"role": "assistant", "content": "hello"}]]


def test_the_total_is_the_weighted_sum_of_what_applies() -> None:
    table = score(rewards(returning([1.0, None, 3.0]), returning([1, 1, 1]), weights=[2.0, 0.5]))
    assert table.totals == [2.5, 0.5, 6.5]
    assert table.scores == {"f0": [1.0, None, 3.0], "f1": [1.0, 1.0, 1.0]}


def test_a_sample_that_no_reward_applies_to_has_none_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        totals = score(rewards(returning([1.0, None, 1.0]))).totals
    assert (totals[0], totals[2]) == (1.0, 1.0)
    assert math.isnan(totals[1])
    assert "sample 1, completion 'two'" in caplog.text


@given(st.data())
def test_totals_are_linear_in_the_weights(data: st.DataObject) -> None:
    values = st.lists(st.floats(-10, 10), min_size=3, max_size=3)
    first, second = data.draw(values), data.draw(values)
    weight = data.draw(st.floats(-5, 5))
    table = score(rewards(returning(first), returning(second), weights=[weight, 1.0]))
    assert table.totals == pytest.approx([weight * a + b for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize(
    "values", [np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), (True, 2, 3.0), [np.float32(1), torch.tensor(2), 3]]
)
def test_numbers_of_any_kind_are_taken(values: Any) -> None:
    assert score(rewards(returning(values))).totals == [1.0, 2.0, 3.0]


def test_coroutines_run_at_the_same_time_and_in_one_loop_for_the_whole_run() -> None:
    loops = set()
    met = threading.Barrier(2, timeout=5)

    async def judge(completions: list[str], **_: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        await asyncio.to_thread(met.wait)
        return [float(len(text)) for text in completions]

    judges = rewards(judge, judge)
    assert [score(judges).totals for _ in range(2)] == [[6.0, 6.0, 10.0]] * 2
    assert len(loops) == 1


def test_the_same_function_twice_is_told_apart() -> None:
    twice = Rewards([Reward(name="f", function=returning([1, 1, 1])), Reward(name="f", function=returning([2, 2, 2]))])
    assert score(twice).scores == {"f": [1.0] * 3, "f#2": [2.0] * 3}


def test_nothing_to_judge_earns_nothing() -> None:
    assert score(rewards(returning([])), []).totals == []


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1.0, 2.0], "returned 2 values for 3 completions .*sample 2, completion 'three'"),
        ([1.0] * 4, "returned 4 values for 3 completions"),
        ([1.0, "2", 3.0], "returned '2', no number, for sample 1, completion 'two'"),
        ([1.0, [2.0], 3.0], "no number, for sample 1"),
        ([1.0, 2.0, float("nan")], "returned nan for sample 2, completion 'three'"),
        ([float("-inf"), 2.0, 3.0], "returned -inf for sample 0"),
        (1.0, "returned a float, not a list"),
        (None, "returned a NoneType, not a list"),
        ("123", "returned a str, not a list"),
        ({"a": 1}, "returned a dict, not a list"),
    ],
)
def test_anything_but_one_finite_number_per_completion_is_refused(result: Any, words: str) -> None:
    with pytest.raises(RewardFailed, match=f"reward f0 {words}" if words.startswith("returned") else f"reward f0.*{words}"):
        score(rewards(returning(result)))


def test_an_error_is_reported_with_the_sample_that_causes_it() -> None:
    def judge(completions: list[str], **_: Any) -> list[float]:
        return [1 / (text != "two") for text in completions]

    with pytest.raises(RewardFailed, match=r"f0 raised ZeroDivisionError: .*raises on sample 1, completion 'two'") as caught:
        score(rewards(judge))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_of_the_whole_batch_is_reported_as_such() -> None:
    def judge(completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 1:
            raise ValueError("too many")
        return [0.0]

    with pytest.raises(RewardFailed, match=r"raised ValueError: too many \(it returns for each of the 3 samples alone"):
        score(rewards(judge))


def test_a_column_that_a_function_lacks_is_named() -> None:
    def judge(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RewardFailed, match="answer"):
        score(rewards(judge))


def test_an_exit_inside_a_function_is_a_failure_of_the_function() -> None:
    def judge(**_: Any) -> list[float]:
        raise SystemExit(3)

    with pytest.raises(RewardFailed, match="raised SystemExit"):
        score(rewards(judge))


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_a_function_that_hangs_is_given_up_with_the_sample_it_hangs_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "DIAGNOSIS_SECONDS", 1.0)
    release = threading.Event()

    def judge(completions: list[str], **_: Any) -> list[float]:
        if "two" in completions:
            release.wait(30)
        return [0.0] * len(completions)

    async def judge_later(completions: list[str], **_: Any) -> list[float]:
        if "two" in completions:
            await asyncio.sleep(30)
        return [0.0] * len(completions)

    began = time.monotonic()
    with pytest.raises(RewardFailed, match=r"longer than 0\.2 s for 3 completions .*does not return within 1 s on sample 1"):
        score(rewards(judge if kind == "thread" else judge_later, timeout_s=0.2))
    release.set()
    assert time.monotonic() - began < 20, "the hanging function was waited for"


def test_a_long_completion_is_quoted_in_part() -> None:
    with pytest.raises(RewardFailed) as caught:
        score(rewards(returning([float("nan")])), ["x" * 10_000])
    assert len(str(caught.value)) < 500
