"""Finding reward functions and binding their arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api.inputs import RewardSpec
from otj_runtime.pod.errors import DatasetInvalid, RewardImportFailed
from otj_runtime.rewards import load_rewards

MODULE = """
SETTING = 3

def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

def scaled(completions, factor, offset=0.0, **kwargs):
    return [factor * len(text) + offset for text in completions]

def narrow(completions):
    return [0.0 for _ in completions]

def needs_answer(prompts, completions, completion_ids, answer):
    return [float(text == expected) for text, expected in zip(completions, answer)]
"""


@pytest.fixture(autouse=True)
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_rewards.py").write_text(MODULE)
    (tmp_path / "lacks_package.py").write_text("import no_such_dependency\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "exits.py").write_text("raise SystemExit('bye')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("users_rewards", "lacks_package", "raises", "exits"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def totals(specs: list[RewardSpec], *texts: str, **columns: list[Any]) -> list[float]:
    ids = [[0]] * len(texts)
    return load_rewards(specs).score(prompts=["p"] * len(texts), completions=texts, completion_ids=ids, columns=columns).totals


@pytest.mark.parametrize("path", ["users_rewards.length", "users_rewards:length"])
def test_a_function_is_found_by_either_form_of_its_path(path: str) -> None:
    assert totals([RewardSpec(function=path)], "ab", "") == [2.0, 0.0]


def test_arguments_are_bound_and_win_over_a_column_of_their_name() -> None:
    spec = RewardSpec(function="users_rewards.scaled", args={"factor": 2, "offset": 1})
    assert totals([spec], "ab", factor=[100]) == [5.0]


def test_a_function_that_names_its_columns_is_taken() -> None:
    assert totals([RewardSpec(function="users_rewards.needs_answer")], "ab", answer=["ab"]) == [1.0]


@pytest.mark.parametrize("task", ["addition", "copy", "reverse"])
def test_a_job_without_rewards_gets_its_tasks(task: str) -> None:
    assert load_rewards([], task).names[0] in ("last_integer", "position_match")


def test_a_jobs_own_rewards_replace_its_tasks() -> None:
    assert load_rewards([RewardSpec(function="users_rewards.length")], "copy").names == ["length"]


def test_without_rewards_or_task_nothing_can_be_judged() -> None:
    with pytest.raises(RewardImportFailed, match=r"spec\.rewards is empty"):
        load_rewards([], None)
    with pytest.raises(DatasetInvalid, match="no built-in task sorting"):
        load_rewards([], "sorting")


@pytest.mark.parametrize(
    ("path", "args", "words"),
    [
        ("no_such_package.reward", {}, "no module no_such_package"),
        ("users_rewards.deeper.reward", {}, "no module users_rewards.deeper"),
        ("lacks_package.reward", {}, "no module no_such_dependency"),
        ("raises.reward", {}, "RuntimeError: no licence"),
        ("exits.reward", {}, "SystemExit: bye"),
        ("users_rewards.lenght", {}, "no attribute lenght; it has the functions length, narrow"),
        ("users_rewards.SETTING", {}, "SETTING is a int"),
        ("users_rewards.narrow", {}, r"unexpected keyword argument 'prompts'.*accept \*\*kwargs"),
        ("users_rewards.needs_answer", {"sharpness": 2}, "unexpected keyword argument 'sharpness'"),
        ("users_rewards.length", {"completions": []}, "args may not set completions"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_the_fix(path: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(RewardImportFailed, match=words) as caught:
        load_rewards([RewardSpec(function=path, args=args)])
    assert path in str(caught.value)


def test_rewards_need_no_torch() -> None:
    code = "import sys, otj_runtime.rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
