"""The whole loop in one process: real model, tasks and rewards, completions from the model itself instead of a generator."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from otj_runtime.api.inputs import DatasetSpec
from otj_runtime.data.load import load_prompts
from otj_runtime.pod.errors import RewardFailed
from otj_runtime.pod.metrics import MetricsLine, read_metrics
from otj_runtime.rewards import load_rewards
from otj_runtime.rollout.transformers_engine import TransformersEngine
from otj_runtime.train.checkpoints import newest_checkpoint
from otj_runtime.train.config import GRPOConfig, OnlineConfig, OnlineDPOConfig
from otj_runtime.train.grpo import GRPOTrainer
from otj_runtime.train.online_dpo import OnlineDPOTrainer
from otj_runtime.train.trainer import OnlineTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

BASE: dict[str, Any] = {
    "use_cpu": True,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 128,
    "num_generations": 16,
    "max_completion_length": 4,
    "disable_tqdm": True,
    "save_steps": 1000,
    "seed": 0,
}


def trainer_for(tiny_folder: Path, output: Path, *, kind: type[OnlineTrainer] = GRPOTrainer, **changes: Any) -> OnlineTrainer:
    config: type[OnlineConfig] = GRPOConfig if kind is GRPOTrainer else OnlineDPOConfig
    args = config(output_dir=str(output), **(BASE | changes))
    return kind(
        str(tiny_folder),
        load_rewards([], task="copy"),
        args=args,
        train_dataset=load_prompts(DatasetSpec(task="copy", args={"length": 4}), seed=0),
    )


def steps_of(output: Path) -> list[MetricsLine]:
    return [line for line in read_metrics(output / "metrics.jsonl")[0] if line.metrics]


def rewards_of(output: Path) -> list[float]:
    return [line.metrics["reward"] for line in steps_of(output)]


@pytest.mark.parametrize(("kind", "steps", "last"), [(GRPOTrainer, 80, 0.3), (OnlineDPOTrainer, 120, 0.2)])
def test_the_policy_learns_to_copy(tiny_folder: Path, tmp_path: Path, kind: type[OnlineTrainer], steps: int, last: float) -> None:
    trainer_for(tiny_folder, tmp_path, kind=kind, max_steps=steps, beta=0.1 if kind is OnlineDPOTrainer else 0.0).train()
    rewards = rewards_of(tmp_path)
    assert sum(rewards[:5]) / 5 < 0.15
    assert sum(rewards[-5:]) / 5 > last


def test_the_seconds_of_learning_and_of_checkpoints_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    trainer_for(tiny_folder, tmp_path, max_steps=3, save_steps=2).train()
    first, second, third = (line.metrics for line in steps_of(tmp_path))
    for metrics in (first, second, third):
        assert 0.0 < metrics["time/train"] < metrics["step_time"]
    assert ("time/ckpt" in first, "time/ckpt" in second, "time/ckpt" in third) == (False, False, True)


def test_micro_batches_do_not_change_what_is_learned(tiny_folder: Path, tmp_path: Path) -> None:
    whole = trainer_for(tiny_folder, tmp_path / "whole", max_steps=3)
    whole.train()
    parts = trainer_for(tiny_folder, tmp_path / "parts", max_steps=3, per_device_train_batch_size=32, gradient_accumulation_steps=4)
    parts.train()
    assert rewards_of(tmp_path / "whole") == pytest.approx(rewards_of(tmp_path / "parts"), abs=1e-6)
    for ours, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


FOLLOWED: dict[str, Any] = {"beta": 1.0, "sync_ref_model": True, "ref_model_sync_steps": 2}


@pytest.mark.parametrize("changes", [{}, FOLLOWED], ids=["no reference", "a reference that follows"])
def test_a_resumed_run_makes_the_same_steps_as_one_that_never_stopped(tiny_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer_for(tiny_folder, tmp_path / "whole", max_steps=6, **changes).train()
    trainer_for(tiny_folder, tmp_path / "halves", max_steps=3, save_steps=3, **changes).train()
    checkpoint = newest_checkpoint(tmp_path / "halves")
    assert checkpoint is not None
    trainer_for(tiny_folder, tmp_path / "halves", max_steps=6, **changes).train(resume_from_checkpoint=str(checkpoint))
    assert rewards_of(tmp_path / "halves") == rewards_of(tmp_path / "whole")
    assert [line.metrics["loss"] for line in steps_of(tmp_path / "halves")] == [
        line.metrics["loss"] for line in steps_of(tmp_path / "whole")
    ]


def test_a_resume_in_the_middle_of_a_generation_uses_the_prompts_of_that_generation(tiny_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"per_device_train_batch_size": 64, "steps_per_generation": 2, "num_iterations": 2}
    trainer_for(tiny_folder, tmp_path, max_steps=3, save_steps=3, **changes).train()
    checkpoint = newest_checkpoint(tmp_path)
    resumed = trainer_for(tiny_folder, tmp_path, max_steps=5, **changes)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [line.step for line in steps_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_kl_term_holds_the_policy_near_the_base_model(tiny_folder: Path, tmp_path: Path) -> None:
    trainer_for(tiny_folder, tmp_path / "free", max_steps=40).train()
    trainer_for(tiny_folder, tmp_path / "held", max_steps=40, beta=5.0).train()
    assert rewards_of(tmp_path / "held")[-1] < rewards_of(tmp_path / "free")[-1]
    assert steps_of(tmp_path / "held")[-1].metrics["kl"] < 0.05


def test_a_reference_follows_the_policy_by_its_share_every_few_steps(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(tiny_folder, tmp_path, max_steps=3, ref_model_mixup_alpha=0.25, **FOLLOWED)
    base = [parameter.clone() for parameter in trainer.reference.parameters()]
    policies: list[list[torch.Tensor]] = []

    class Seen(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            policies.append([parameter.detach().clone() for parameter in trainer.model.parameters()])

    trainer.add_callback(Seen())
    trainer.train()
    for mixed, before, policy in zip(trainer.reference.parameters(), base, policies[1], strict=True):
        torch.testing.assert_close(mixed, 0.25 * policy + 0.75 * before)


def test_on_policy_tokens_agree_with_their_sampler(tiny_folder: Path, tmp_path: Path) -> None:
    trainer_for(tiny_folder, tmp_path, max_steps=2).train()
    assert max(line.metrics["sampling/sampling_logp_difference/max"] for line in steps_of(tmp_path)) < 1e-4


def losses_of(output: Path) -> list[float]:
    return [line.metrics["loss"] for line in steps_of(output)]


def test_rollouts_in_the_background_change_nothing_at_staleness_0(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_for(tiny_folder, tmp_path / "here", max_steps=4).train()
    monkeypatch.setattr(TransformersEngine, "shares_model", False)
    trainer_for(tiny_folder, tmp_path / "background", max_steps=4).train()
    assert rewards_of(tmp_path / "here") == rewards_of(tmp_path / "background")
    assert losses_of(tmp_path / "here") == losses_of(tmp_path / "background")


@pytest.mark.parametrize(("staleness", "ages"), [(0, [0, 0, 0, 0, 0]), (1, [0, 1, 1, 1, 1]), (2, [0, 1, 2, 2, 2])])
def test_tokens_are_as_many_versions_old_as_the_staleness_allows(
    tiny_folder: Path, tmp_path: Path, staleness: int, ages: list[int]
) -> None:
    trainer_for(tiny_folder, tmp_path, max_steps=5, staleness=staleness).train()
    told = {"async/staleness_max", "async/queue", "async/in_flight", "async/dropped", "idle/trainer", "idle/generator"}
    assert all(told <= set(line.metrics) for line in steps_of(tmp_path))
    assert [line.metrics["async/staleness_max"] for line in steps_of(tmp_path)] == ages
    assert [line.metrics["async/staleness_mean"] for line in steps_of(tmp_path)] == ages


def test_a_resumed_run_asks_again_for_the_prompts_in_flight_and_loses_none(tiny_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"staleness": 1, "num_completions_to_print": 8}
    trainer_for(tiny_folder, tmp_path / "whole", max_steps=6, **changes).train()
    trainer_for(tiny_folder, tmp_path / "halves", max_steps=3, save_steps=3, **changes).train()
    checkpoint = newest_checkpoint(tmp_path / "halves")
    trainer_for(tiny_folder, tmp_path / "halves", max_steps=6, **changes).train(resume_from_checkpoint=str(checkpoint))
    whole, halves = ([[answer.prompt for answer in line.completions] for line in steps_of(tmp_path / name)] for name in ("whole", "halves"))
    assert halves == whole
    assert len(whole) == 6


def test_a_reward_that_breaks_in_the_background_ends_the_run_and_leaves_no_thread(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def breaks(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 3:
            raise ValueError("no more")
        return [float(len(text)) for text in completions]

    monkeypatch.setattr(TransformersEngine, "shares_model", False)
    args = GRPOConfig(output_dir=str(tmp_path), **(BASE | {"max_steps": 9}))
    data = load_prompts(DatasetSpec(task="copy", args={"length": 4}), seed=0)
    with pytest.raises(RewardFailed, match="no more"):
        GRPOTrainer(str(tiny_folder), breaks, args=args, train_dataset=data).train()
    assert [line.step for line in steps_of(tmp_path)] == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]


def test_half_precision_and_checkpointing_leave_tokens_and_sampler_in_agreement(tiny_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 64, "max_steps": 3}
    trainer = trainer_for(tiny_folder, tmp_path, beta=0.1, **changes)
    trainer.train()
    assert all(parameter.dtype is torch.float32 for parameter in trainer.model.parameters())
    for line in steps_of(tmp_path):
        assert line.metrics["sampling/sampling_logp_difference/mean"] < 0.02
        assert 0 < line.metrics["grad_norm"] < 10
