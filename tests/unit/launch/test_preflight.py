"""Rewards and datasets that cannot be had, found before anything large is loaded."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from otj_runtime.api import parse_job
from otj_runtime.api.inputs import DatasetSpec, RewardSpec
from otj_runtime.data.load import load_prompts
from otj_runtime.launch.preflight import check_inputs
from otj_runtime.pod.config import PodConfig, resolve
from otj_runtime.pod.errors import DatasetInvalid, InvalidSpec, RewardImportFailed
from otj_runtime.pod.manifest import build_job
from otj_runtime.rewards import load_rewards
from tests.unit.launch.test_accelerate import config_of

SAMPLES = Path(__file__).parents[3] / "manifests" / "samples"


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
        await check_inputs(config_with(dataset=DatasetSpec(task="reasoning_gym/juggle")))


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("{}\n", "no column prompt"), ("prompt\n", "line 1 is no JSON")])
async def test_a_dataset_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "train.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DatasetInvalid, match=message):
        await check_inputs(config_with("otj_runtime.rewards.exact_match", dataset=DatasetSpec(path=str(file))))


async def test_an_eval_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    data = DatasetSpec(path=str(tmp_path / "train.jsonl"), eval_split="test")
    with pytest.raises(DatasetInvalid, match=r"evalSplit: .* is one split"):
        await check_inputs(config_with("otj_runtime.rewards.exact_match", dataset=data))


async def test_a_strategy_whose_package_is_not_in_the_image_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(device="cuda", strategy="deepspeed-zero3")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InvalidSpec, match=r"deepspeed-zero3 needs the package deepspeed.*spec.image"):
        await check_inputs(config)
    found = ModuleType("deepspeed")
    found.__spec__ = ModuleSpec("deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed", found)
    await check_inputs(config)


async def test_a_reward_module_that_ends_the_interpreter_harms_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RewardImportFailed, match="ended the interpreter with status 3"):
        await check_inputs(config_with("deadly.reward"))


async def test_a_reward_from_a_mounted_config_map_is_found_by_the_jobs_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = list(yaml.safe_load_all((SAMPLES / "own-reward.yaml").read_text()))
    job, config_map = parse_job(documents[0]), documents[1]
    [pod] = [build_job(job, default_image="image")["spec"]["template"]["spec"]]
    [mount] = [mount for mount in job.spec.volume_mounts if mount["name"] == "mine"]
    assert {"name": "mine", "configMap": {"name": config_map["metadata"]["name"]}} in pod["volumes"]
    assert all(mount in container["volumeMounts"] for container in pod["containers"])
    assert all({"name": "PYTHONPATH", "value": mount["mountPath"]} in container["env"] for container in pod["containers"])

    for name, text in config_map["data"].items():  # what the kubelet does
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = resolve(job).model_copy(update={"dataset": DatasetSpec(path=str(tmp_path / "prompts.jsonl"))})
    await check_inputs(config)

    monkeypatch.syspath_prepend(str(tmp_path))
    rows = load_prompts(config.prompts, seed=0)[:]  # type: ignore[index]
    said, hints = ["bcdf", "aaaa", "abcd", "ffff"], [row["hint"] for row in rows]
    table = load_rewards(config.rewards).score(
        prompts=[row["prompt"] for row in rows], completions=said, completion_ids=[[0] * 4] * 4, columns={"hint": hints}
    )
    assert table.scores == {"few_vowels": [1.0, 0.0, 1.0, None], "length_target": [1.0] * 4}
