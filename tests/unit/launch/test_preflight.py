"""Rewards and datasets that cannot be had, found before anything large is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api.inputs import DatasetSpec, RewardSpec
from otj_runtime.launch.preflight import check_inputs
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import DatasetInvalid, RewardImportFailed
from tests.unit.launch.test_accelerate import config_of


def config_with(*functions: str, **changes: Any) -> PodConfig:
    """The configuration of a job with these rewards."""
    return config_of().model_copy(update={"rewards": [RewardSpec(function=function) for function in functions]} | changes)


async def test_rewards_that_can_be_loaded_pass() -> None:
    await check_inputs(config_with("otj_runtime.rewards.exact_match"))


async def test_the_reward_of_a_built_in_task_passes() -> None:
    await check_inputs(config_with())


async def test_a_reward_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(RewardImportFailed, match="nowhere"):
        await check_inputs(config_with("otj_runtime.rewards.exact_match", "nowhere.reward"))


async def test_a_task_that_does_not_exist_is_no_reward_error() -> None:
    with pytest.raises(DatasetInvalid, match="juggle"):
        await check_inputs(config_with(dataset=DatasetSpec(task="juggle")))


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("{}\n", "no column prompt"), ("prompt\n", "line 1 is no JSON")])
async def test_a_dataset_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "train.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DatasetInvalid, match=message):
        await check_inputs(config_with("otj_runtime.rewards.exact_match", dataset=DatasetSpec(path=str(file))))


async def test_a_reward_module_that_ends_the_interpreter_harms_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RewardImportFailed, match="ended the interpreter with status 3"):
        await check_inputs(config_with("deadly.reward"))
