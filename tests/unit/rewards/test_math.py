"""Answers compared by value, in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from otj_runtime.pod.errors import RewardFailed
from otj_runtime.rewards import build_rewards, builtin, format_match, math_verify, mathematics
from otj_runtime.rewards.worker import WorkerFailed, Workers

WORK = """
import time

def work(item):
    if item == "hang":
        time.sleep(60)
    if item == "exit":
        raise SystemExit(3)
    print("this must not disturb the answers")
    return 10 / item
"""


@pytest.fixture
def workers(tmp_path: Path) -> Workers:
    (tmp_path / "work.py").write_text(WORK)
    return Workers(tmp_path / "work.py", "work", count=1)


def test_numbers_fractions_and_latex_are_compared_by_value() -> None:
    said = ["The answer is $\\frac{1}{2}$.", "\\boxed{0.5}", "so x = 3", "no idea", "[[[{{{"]
    assert math_verify(completions=said, answer=["0.5", "\\frac12", 3, "4", "x^2"]) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert math_verify(completions=["1"], answer=[""]) == [None]


def test_an_answer_that_takes_for_ever_earns_nothing_and_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("import time\ndef work(pair):\n    return 'equal' if pair[1] != 'hang' else time.sleep(60)\n")
    slow = Workers(tmp_path / "work.py", "work", count=1)
    monkeypatch.setattr(mathematics, "_workers", lambda: slow)
    monkeypatch.setattr(mathematics, "ANSWER_SECONDS", 0.2)
    logged: dict[str, float] = {}
    assert math_verify(completions=["1", "hang"], answer=["1", "1"], log_metric=logged.__setitem__) == [1.0, 0.0]
    assert logged == {"math_verify/too_long": 0.5}


def test_a_call_that_hangs_costs_its_worker_and_the_next_gets_another(workers: Workers) -> None:
    assert workers.map([2, 5], timeout_s=30) == [5.0, 2.0]
    assert workers.map(["hang"], timeout_s=0.2) == [None]
    assert workers.map([1], timeout_s=30) == [10.0]


def test_an_error_in_a_worker_is_told(workers: Workers) -> None:
    with pytest.raises(WorkerFailed, match="ZeroDivisionError"):
        workers.map([0], timeout_s=30)
    with pytest.raises(WorkerFailed, match="ended with 3"):
        workers.map(["exit"], timeout_s=30)


def test_a_pattern_that_explodes_is_given_up_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "MATCH_SECONDS", 0.1)

    def judge(**keywords: Any) -> Any:
        return format_match(pattern=r"(a|aa)+$", **keywords)

    with pytest.raises(RewardFailed, match=r"raised TimeoutError.*sample 0"):
        build_rewards(judge).score(prompts=["p"], completions=["a" * 60 + "!"], completion_ids=[[0]], columns={})
