"""What the methods make of groups: which completions are trained on, what a step is divided by, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser

from otj_runtime.pod.errors import RewardImportFailed
from otj_runtime.rollout.types import Group
from otj_runtime.train.batch import Selection
from otj_runtime.train.config import GRPOConfig, OnlineConfig, OnlineDPOConfig
from otj_runtime.train.grpo import GRPOTrainer
from otj_runtime.train.online_dpo import OnlineDPOTrainer
from tests.unit.train.policies import gradient, group_of, idle_trainer, moved

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = ["grpo", "gspo", "bnpo", "dr_grpo", "dapo", "cispo"]
UNEVEN = [
    group_of([0.0, 1.0, 0.5, 0.0], lengths=[1, 3, 2, 4]),
    group_of([1.0, 1.0, 1.0, 1.0], lengths=[2, 2, 1, 3]),
    group_of([0.0, 0.0, 0.0, 1.0], lengths=[4, 1, 1, 1]),
    group_of([0.25, 0.0, 1.0, 0.0], lengths=[1, 2, 3, 1]),
]


def grpo(tiny: tuple[Any, Any], output: Path, *, model: Any = None, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 4}
    args = GRPOConfig(output_dir=str(output), use_cpu=True, disable_tqdm=True, **(defaults | arguments))
    return idle_trainer(GRPOTrainer, (model or moved(tiny[0], seed=1), tiny[1]), args, copy.deepcopy(tiny[0]))


def dpo(tiny: tuple[Any, Any], output: Path, *, model: Any = None, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4}
    args = OnlineDPOConfig(output_dir=str(output), use_cpu=True, disable_tqdm=True, **(defaults | arguments))
    return idle_trainer(OnlineDPOTrainer, (model or moved(tiny[0], seed=1), tiny[1]), args, copy.deepcopy(tiny[0]))


def first_tokens(selection: Selection) -> list[int]:
    return [row.completion.token_ids[0] for row in selection.rows]


def step_gradient(trainer: Any, groups: list[Group]) -> torch.Tensor:
    """Gradient of one optimizer step on all micro-batches."""
    for batch in trainer._build_batches(groups):
        trainer.compute_loss(trainer.model, batch).backward()
    return gradient(trainer.model)


def test_equal_rewards_are_skipped_before_the_forward(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    groups = [group_of([1.0, 1.0, 1.0, 1.0]), group_of([0.0, 1.0, 0.0, 0.5])]
    assert len(grpo(tiny, tmp_path).select(groups).rows) == 4
    assert len(grpo(tiny, tmp_path, beta=0.1).select(groups).rows) == 8


def test_truncated_completions_are_skipped_before_the_forward_if_masked(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    groups = [group_of([0.0, 1.0, 0.0, 1.0], finished=[True, False, False, True])]
    assert first_tokens(grpo(tiny, tmp_path, mask_truncated_completions=True).select(groups)) == [1, 4]


def test_a_generation_that_teaches_nothing_makes_one_row_that_does_not_count(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    trainer = grpo(tiny, tmp_path)
    equal = [group_of([1.0, 1.0, 1.0, 1.0])]
    assert [row.counts for row in trainer.select(equal).rows] == [False]
    assert float(step_gradient(trainer, equal).abs().max()) == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_skipping_and_splitting_change_no_gradient(tiny: tuple[Any, Any], tmp_path: Path, loss: str) -> None:
    whole = step_gradient(grpo(tiny, tmp_path, loss_type=loss), UNEVEN)
    parts = step_gradient(grpo(tiny, tmp_path, loss_type=loss, per_device_train_batch_size=4, gradient_accumulation_steps=4), UNEVEN)
    # A reference would keep every row; a weight of nothing leaves only the surrogate.
    everything = step_gradient(grpo(tiny, tmp_path, loss_type=loss, beta=1e-12), UNEVEN)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(everything, whole, atol=1e-5, rtol=1e-4)


def test_later_steps_on_a_generation_know_the_policy_before_the_first(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    trainer = grpo(tiny, tmp_path, per_device_train_batch_size=4, steps_per_generation=4, gradient_accumulation_steps=2)
    first, second, third, fourth = trainer._build_batches(UNEVEN)
    assert first.old_logprobs is second.old_logprobs is None
    trainer.compute_loss(trainer.model, third)
    noted = third.old_logprobs.clone()
    with torch.no_grad():
        next(iter(trainer.model.parameters())).mul_(1.5)
    trainer.compute_loss(trainer.model, third)
    assert torch.equal(third.old_logprobs, noted)
    assert fourth.old_logprobs is not None


def test_the_best_and_the_worst_form_a_pair(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    assert first_tokens(dpo(tiny, tmp_path).select([group_of([0.5, -1.0, 2.0, 0.0])])) == [3, 2]


def test_a_group_without_a_preference_makes_no_pair(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    selection = dpo(tiny, tmp_path).select([group_of([1.0, 1.0, 1.0, 1.0]), group_of([0.0, 1.0, 0.0, 0.0])])
    assert (first_tokens(selection), selection.normalizer) == ([2, 1], 1.0)


def test_an_unfinished_completion_pays_the_penalty(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    group = group_of([0.0, 1.0, 0.5, 0.25], finished=[True, False, True, True])
    assert first_tokens(dpo(tiny, tmp_path).select([group])) == [2, 1]
    assert first_tokens(dpo(tiny, tmp_path, missing_eos_penalty=2.0).select([group])) == [3, 2]


def test_half_a_pair_is_no_pair(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    group = group_of([0.0, 1.0, 0.5, math.nan], finished=[True, False, True, True])
    assert first_tokens(dpo(tiny, tmp_path, mask_truncated_completions=True).select([group])) == [3, 1]
    nothing = dpo(tiny, tmp_path, mask_truncated_completions=True).select([group_of([0.0, 1.0], finished=[True, False])])
    assert [row.counts for row in nothing.rows] == [False, False]


@pytest.mark.parametrize(("epoch", "beta"), [(0.0, 0.3), (0.99, 0.3), (1.0, 0.2), (2.5, 0.1), (9.0, 0.1)])
def test_beta_follows_its_schedule_and_keeps_the_last(tiny: tuple[Any, Any], tmp_path: Path, epoch: float, beta: float) -> None:
    trainer = dpo(tiny, tmp_path, beta=[0.3, 0.2, 0.1])
    trainer.state.epoch = epoch
    assert trainer.beta == beta


@pytest.mark.parametrize("make", [grpo, dpo])
def test_without_adapters_a_policy_is_its_own_reference(tiny: tuple[Any, Any], tmp_path: Path, make: Any) -> None:
    model = get_peft_model(copy.deepcopy(tiny[0]), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = make(tiny, tmp_path, model=model, beta=0.1)
    copied = make(tiny, tmp_path, model=model, beta=0.1)
    trainer.reference = None
    [ours], [theirs] = trainer._build_batches(UNEVEN[:2]), copied._build_batches(UNEVEN[:2])
    assert trainer.compute_loss(model, ours).item() == pytest.approx(copied.compute_loss(model, theirs).item(), abs=1e-6)
    counted = ours.completion_mask > 0  # what stands on padding means nothing, and differs where one reads prompts once
    torch.testing.assert_close(ours.reference_logprobs[counted], theirs.reference_logprobs[counted])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (GRPOConfig, {"top_p": 0.9}, "top_p: 0.9 changes what the generator samples from.*biased; leave it at 1.0"),
        (GRPOConfig, {"top_k": 50}, "top_k: 50 changes"),
        (OnlineDPOConfig, {"min_p": 0.1}, "min_p: 0.1 changes"),
        (GRPOConfig, {"repetition_penalty": 1.1}, "repetition_penalty: 1.1 changes"),
        (GRPOConfig, {"temperature": 0.0}, "temperature: 0.0 leaves nothing to compare"),
        (GRPOConfig, {"loss_type": "ppo"}, "loss_type: 'ppo' is unknown; use grpo, gspo, bnpo, dr_grpo, dapo or cispo"),
        (GRPOConfig, {"scale_rewards": "all"}, "scale_rewards: 'all' is unknown; use group, batch or none"),
        (GRPOConfig, {"loss_type": "cispo", "delta": 4.0}, "delta: cispo bounds the ratio with epsilon_high alone"),
        (GRPOConfig, {"vllm_importance_sampling_mode": "clip"}, "vllm_importance_sampling_mode: 'clip' is unknown"),
        (GRPOConfig, {"vllm_importance_sampling_clip_min": 3.0}, "clip_min: 3.0 is not below vllm_importance_sampling_clip_max, 3.0"),
        (OnlineDPOConfig, {"loss_type": "hinge"}, "loss_type: 'hinge' is unknown; use sigmoid or ipo"),
        (OnlineDPOConfig, {"beta": [0.1, 0.0]}, "beta: .* must be above 0"),
        (OnlineDPOConfig, {"missing_eos_penalty": -1.0}, "missing_eos_penalty: -1.0 must be above 0"),
        (OnlineDPOConfig, {"max_length": 256}, "max_length: 256 leaves no token for a prompt beside a completion of 256"),
        (GRPOConfig, {"beta": [0.1, 0.2]}, "beta: .* is a list, which only Online DPO has"),
        (GRPOConfig, {"sync_ref_model": True}, "sync_ref_model: beta is 0, so there is no reference model"),
        (GRPOConfig, {"sync_ref_model": True, "beta": 0.1, "ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha: 0.0 is no share"),
        (GRPOConfig, {"sync_ref_model": True, "beta": 0.1, "ref_model_sync_steps": 0}, "ref_model_sync_steps: 0 is too few"),
        (GRPOConfig, {"vllm_weight_transfer": "tcp"}, "vllm_weight_transfer: 'tcp' is unknown; use auto, mailbox, nccl, ipc"),
        (GRPOConfig, {"vllm_mode": "server"}, "vllm_mode: rank 0 starts vLLM by itself, on vllm_device"),
        (GRPOConfig, {"vllm_guided_decoding_regex": "a+"}, "vllm_guided_decoding_regex: would change what the generator samples from"),
    ],
)
def test_an_argument_that_cannot_work_is_refused_with_the_reason(kind: type[OnlineConfig], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(output_dir="unused", use_cpu=True, **arguments)


@pytest.mark.parametrize(
    ("kind", "typed", "means"),
    [
        (GRPOConfig, ["--scale_rewards", "false", "--ds3_gather_for_generation", "false"], {"scale_rewards": "none"}),
        (GRPOConfig, ["--beta", "0.04", "--sync_ref_model", "--report_to", "tensorboard"], {"beta": 0.04, "report_to": ["tensorboard"]}),
        (OnlineDPOConfig, ["--beta", "0.2", "0.1", "--judge", "pair_rm"], {"beta": [0.2, 0.1], "judge": "pair_rm"}),
        (OnlineDPOConfig, ["--max_length", "300", "--max_new_tokens", "200", "--dataset_num_proc", "4"], {"max_prompt_length": 100}),
    ],
)
def test_scripts_for_older_trl_bring_their_arguments_on_the_command_line(
    kind: type[OnlineConfig], typed: list[str], means: dict[str, Any]
) -> None:
    args, *_ = HfArgumentParser(kind).parse_args_into_dataclasses(["--output_dir", "unused", "--use_cpu", *typed])
    assert {name: getattr(args, name) for name in means} == means


def test_a_reward_model_may_stand_in_the_arguments(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    args = OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, reward_model_path="/no/such/reward-model")
    with pytest.raises(RewardImportFailed, match="/no/such/reward-model"):
        OnlineDPOTrainer(copy.deepcopy(tiny[0]), args=args, processing_class=tiny[1], train_dataset=[{"prompt": "ab="}])


def test_neutral_sampling_arguments_are_welcome() -> None:
    GRPOConfig(output_dir="unused", use_cpu=True, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0)


def test_ligers_fused_loss_stays_off() -> None:
    args = GRPOConfig(output_dir="unused", use_cpu=True, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert args.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}


@pytest.mark.parametrize(("given", "used"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_rewards_are_scaled_as_a_boolean_or_a_name_says(given: bool | str, used: str) -> None:
    assert GRPOConfig(output_dir="unused", use_cpu=True, scale_rewards=given).scale_rewards == used
