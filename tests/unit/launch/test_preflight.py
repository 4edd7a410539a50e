"""User errors that show before anything large is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from otj_runtime.api.spec import RewardSpec
from otj_runtime.launch.preflight import check_model, check_rewards
from otj_runtime.pod.errors import ModelNotFound, RewardImportFailed


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nowhere does not exist: check spec\.model\.path"):
        check_model(tmp_path / "nowhere")


def test_a_folder_that_is_no_model_shows_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"no config\.json \(found: weights\.gguf\)"):
        check_model(tmp_path)


def test_a_model_folder_passes(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    check_model(tmp_path)


async def test_importable_rewards_pass() -> None:
    await check_rewards([RewardSpec(function="math.sqrt"), RewardSpec(function="os.path:join")])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module.reward", "no_such_module.reward: ModuleNotFoundError"),
        ("math.no_such_function", "math.no_such_function: AttributeError"),
        ("math.pi", "math.pi: TypeError: pi is a float"),
    ],
)
async def test_a_reward_that_cannot_be_imported_is_named(function: str, message: str) -> None:
    with pytest.raises(RewardImportFailed, match=message):
        await check_rewards([RewardSpec(function="math.sqrt"), RewardSpec(function=function)])
