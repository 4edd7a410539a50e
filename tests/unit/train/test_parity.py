"""Loss and gradient equal TRL's on the same token ids, masks, log-probabilities and rewards.

TRL's trainers are built by their own constructors; only generation and reward functions are replaced, by prepared groups. So its
advantages, old and reference log-probabilities, importance weights and normalizers are TRL's own code.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.import_utils as peer_imports
from datasets import Dataset

from otj_runtime.rollout.types import Completion, Group
from otj_runtime.train.config import GRPOConfig, OnlineDPOConfig
from otj_runtime.train.grpo import GRPOTrainer
from otj_runtime.train.online_dpo import OnlineDPOTrainer
from tests.unit.train.policies import END, gradient, idle_trainer, move, moved

peer_imports.is_vllm_available = lambda *_, **__: False  # importing it takes longer than all of this
from trl import GRPOConfig as TheirGRPOConfig  # noqa: E402
from trl import GRPOTrainer as TheirGRPOTrainer  # noqa: E402
from trl.experimental.online_dpo import OnlineDPOConfig as TheirOnlineDPOConfig  # noqa: E402
from trl.experimental.online_dpo import OnlineDPOTrainer as TheirOnlineDPOTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5
PROMPTS, COMPLETIONS, LONGEST = 3, 4, 5
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "per_device_train_batch_size": PROMPTS * COMPLETIONS,
    "num_generations": COMPLETIONS,
    "max_completion_length": LONGEST,
    "disable_tqdm": True,
}
SKEWED = (0.0, 1.0, 0.25, 0.0), (0.5, 0.5, 0.5, 0.5), (2.0, -1.0, 0.0, 0.125)
"""Rewards: the second group teaches nothing, and is skipped by ours."""


def prepared_groups(rewards: tuple[tuple[float, ...], ...] = SKEWED, *, seed: int = 0, unknown: bool = False) -> list[Group]:
    """Groups of prompts and completions of different lengths, some of them cut off, with what their sampler thought of the tokens."""
    rng = random.Random(seed)
    groups = []
    for row in rewards:
        completions = []
        for _ in row:
            finished = rng.random() < 0.6
            before_last = rng.randint(0, LONGEST - 1) if finished else LONGEST - 1
            tokens = [rng.randint(1, 9) for _ in range(before_last)] + [END if finished else rng.randint(1, 9)]
            logprobs = [rng.gauss(-2.3, 0.4) for _ in tokens]
            if unknown and not completions:
                logprobs[0] = math.nan
            completions.append(Completion(tokens, logprobs, finished=finished, policy_version=0))
        prompt = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
        groups.append(Group({"prompt": "a"}, prompt, completions, texts=["a"] * len(row), rewards=list(row)))
    return groups


Outcome = tuple[float, torch.Tensor, dict[str, float]]
"""Loss, gradient, metrics."""


def compare(ours: Outcome, theirs: Outcome) -> None:
    largest = float(theirs[1].abs().max())
    assert largest > 1e-3, "a gradient of nothing would prove nothing"
    assert ours[0] == pytest.approx(theirs[0], abs=TOLERANCE, rel=TOLERANCE)
    assert float((ours[1] - theirs[1]).abs().max()) < TOLERANCE * max(1.0, largest)


def our_grpo(base: Any, tokenizer: Any, groups: list[Group], output: Path, *, iterations: int, sampler: bool, **arguments: Any) -> Outcome:
    """Loss and gradient of the last of `iterations` on `groups`, each under another policy."""
    args = GRPOConfig(output_dir=str(output), num_iterations=iterations, **(COMMON | arguments))
    model = moved(base, seed=1)
    trainer = idle_trainer(GRPOTrainer, (model, tokenizer), args, copy.deepcopy(base).eval())
    args.use_vllm = sampler
    [batch] = trainer._build_batches(groups)
    for iteration in range(iterations):
        if iteration:
            move(model, seed=1 + iteration)
        trainer.meters.take(trainer.accelerator)
        loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), gradient(model), trainer.meters.take(trainer.accelerator)


def their_grpo(
    base: Any, tokenizer: Any, groups: list[Group], output: Path, *, iterations: int, sampler: bool, **arguments: Any
) -> Outcome:
    """The same by TRL, whose name for gspo is grpo with one ratio per sequence."""
    if arguments.get("loss_type") == "gspo":
        arguments |= {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    args = TheirGRPOConfig(output_dir=str(output), num_iterations=iterations, gradient_checkpointing=False, **(COMMON | arguments))
    model = moved(base, seed=1)
    rows = [(group, completion) for group in groups for completion in group.completions]
    trainer = TheirGRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(rows)}),
        processing_class=tokenizer,
    )
    trainer.use_vllm = sampler
    trainer.current_gradient_accumulation_steps = 1
    generated = (
        [group.prompt_ids for group, _ in rows],
        [completion.token_ids for _, completion in rows],
        None,
        ["a"] * len(rows),
        [completion.logprobs for _, completion in rows] if sampler else None,
        {},
        None,
        None,
    )
    trainer._generate = lambda _: generated
    trainer._calculate_rewards = lambda *_: torch.tensor([[reward] for group in groups for reward in group.rewards])
    batch = trainer._generate_and_score_completions([{"prompt": "a"} for _ in rows])
    for iteration in range(1, iterations):
        move(model, seed=1 + iteration)
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    return loss.item(), gradient(model), {name: values[-1] for name, values in trainer._metrics["train"].items()}


LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "gspo": {"epsilon": 0.05},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {"epsilon_high": 0.28},
    "cispo": {"epsilon_high": 1.5},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "on policy": {},
    "second iteration": {"iterations": 2},
    "truncated masked": {"iterations": 2, "mask_truncated_completions": True},
    "divergence": {"iterations": 2, "beta": 0.3},
    "divergence, plain estimate": {"iterations": 2, "beta": 0.3, "use_bias_correction_kl": False},
    "divergence, truncated masked, sampled elsewhere": {
        "iterations": 2,
        "beta": 0.3,
        "mask_truncated_completions": True,
        "sampler": True,
        "vllm_importance_sampling_mode": "token_truncate",
    },
    "ratio of sequences": {"iterations": 2, "importance_sampling_level": "sequence"},
    "sampled elsewhere, weight of sequences": {"sampler": True},
    "sharper": {"temperature": 0.6, "sampler": True, "vllm_importance_sampling_mode": "token_mask"},
}


@pytest.mark.parametrize(("loss", "setting"), list(itertools.product(LOSSES, SETTINGS)))
def test_every_loss_equals_trl(tiny: tuple[Any, Any], tmp_path: Path, loss: str, setting: str) -> None:
    arguments = {"iterations": 1, "sampler": False, "loss_type": loss} | LOSSES[loss] | SETTINGS[setting]
    groups = prepared_groups()
    compare(our_grpo(*tiny, groups, tmp_path, **arguments), their_grpo(*tiny, groups, tmp_path, **arguments))


@pytest.mark.parametrize("scale", ["group", "batch", "none", True, False])
def test_every_scale_of_rewards_equals_trl(tiny: tuple[Any, Any], tmp_path: Path, scale: str | bool) -> None:
    groups = prepared_groups()
    arguments: dict[str, Any] = {"iterations": 1, "sampler": False, "scale_rewards": scale}
    compare(our_grpo(*tiny, groups, tmp_path, **arguments), their_grpo(*tiny, groups, tmp_path, **arguments))


@pytest.mark.parametrize(
    ("mode", "bounds"),
    list(
        itertools.product(
            ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
            [(None, 1.5), (0.5, 2.0), (0.5, None)],
        )
    ),
)
def test_every_weight_of_sampled_tokens_equals_trl(tiny: tuple[Any, Any], tmp_path: Path, mode: str, bounds: tuple[Any, Any]) -> None:
    groups = prepared_groups(unknown=True)
    low, high = bounds
    arguments: dict[str, Any] = {
        "iterations": 2,
        "sampler": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }
    compare(our_grpo(*tiny, groups, tmp_path, **arguments), their_grpo(*tiny, groups, tmp_path, **arguments))


@pytest.mark.parametrize("loss", ["grpo", "gspo", "bnpo", "dr_grpo", "dapo"])
def test_a_bound_on_both_sides_equals_trl(tiny: tuple[Any, Any], tmp_path: Path, loss: str) -> None:
    groups = prepared_groups()
    arguments: dict[str, Any] = {"iterations": 2, "sampler": False, "loss_type": loss, "delta": 1.3}
    compare(our_grpo(*tiny, groups, tmp_path, **arguments), their_grpo(*tiny, groups, tmp_path, **arguments))


def test_completions_that_nothing_could_score_equal_trl(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    groups = prepared_groups(((0.0, 1.0, math.nan, 0.5), (math.nan,) * 4, (0.0, 0.0, 1.0, math.nan)))
    arguments: dict[str, Any] = {"iterations": 1, "sampler": False}
    compare(our_grpo(*tiny, groups, tmp_path, **arguments), their_grpo(*tiny, groups, tmp_path, **arguments))


DPO_REWARDS = (1.0, 0.0), (0.25, 0.5), (2.0, -1.0), (0.0, 0.1)
DPO: dict[str, Any] = COMMON | {"per_device_train_batch_size": 8, "num_generations": 2}


def padded(rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))

    def fill(row: list[int], pad: int) -> list[int]:
        rest = [pad] * (width - len(row))
        return rest + row if left else row + rest

    return torch.tensor([fill(row, END) for row in rows]), torch.tensor([fill([1] * len(row), 0) for row in rows])


def their_dpo(base: Any, tokenizer: Any, groups: list[Group], output: Path, **arguments: Any) -> Outcome:
    """TRL keeps first completions in the first half of its batch and second ones in the second."""
    args = TheirOnlineDPOConfig(
        output_dir=str(output),
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        temperature=1.0,
        per_device_train_batch_size=len(groups),
        **arguments,
    )
    model = moved(base, seed=1)
    trainer = TheirOnlineDPOTrainer(
        model,
        ref_model=copy.deepcopy(base).eval(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(groups)}),
        processing_class=tokenizer,
    )
    rows = [(group, i) for i in range(2) for group in groups]
    prompts = padded([group.prompt_ids for group, _ in rows], left=True)
    completions = padded([group.completions[i].token_ids for group, i in rows], left=False)
    trainer._generate = lambda *_: (*prompts, *completions, None)
    trainer._calculate_rewards_from_functions = lambda **_: torch.tensor([group.rewards[i] for group, i in rows])
    loss = trainer.training_step(model, {"prompt": ["a"] * len(groups)})
    return loss.item(), gradient(model), {name: values[-1] for name, values in trainer.stats.items() if values}


def our_dpo(base: Any, tokenizer: Any, groups: list[Group], output: Path, **arguments: Any) -> Outcome:
    model = moved(base, seed=1)
    args = OnlineDPOConfig(output_dir=str(output), **(DPO | arguments))
    trainer = idle_trainer(OnlineDPOTrainer, (model, tokenizer), args, copy.deepcopy(base).eval())
    [batch] = trainer._build_batches(groups)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), gradient(model), trainer.meters.take(trainer.accelerator)


@pytest.mark.parametrize(("kind", "beta", "penalty"), list(itertools.product(["sigmoid", "ipo"], [0.1, 1.0], [None, 2.0])))
def test_online_dpo_equals_trl(tiny: tuple[Any, Any], tmp_path: Path, kind: str, beta: float, penalty: float | None) -> None:
    groups = prepared_groups(DPO_REWARDS)
    theirs = their_dpo(*tiny, groups, tmp_path, loss_type=kind, beta=[beta], missing_eos_penalty=penalty)
    compare(our_dpo(*tiny, groups, tmp_path, loss_type=kind, beta=beta, missing_eos_penalty=penalty), theirs)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics_of_the_loss_equal_trls(tiny: tuple[Any, Any], tmp_path: Path, level: str) -> None:
    # With a KL term ours skips no group, and means are over the same tokens.
    arguments: dict[str, Any] = {"iterations": 2, "sampler": False, "loss_type": "grpo", "beta": 0.1, "epsilon": 0.1}
    groups = prepared_groups()
    *_, ours = our_grpo(*tiny, groups, tmp_path, importance_sampling_level=level, **arguments)
    *_, theirs = their_grpo(*tiny, groups, tmp_path, importance_sampling_level=level, **arguments)
    assert {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_max"} <= set(theirs)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-5)
    assert theirs["clip_ratio/region_mean"] > 0


def test_metrics_of_preferences_equal_trls(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    groups = prepared_groups(DPO_REWARDS)
    *_, theirs = their_dpo(*tiny, groups, tmp_path, beta=[0.5])
    *_, ours = our_dpo(*tiny, groups, tmp_path, beta=0.5)
    # TRL sums divergence and entropy over padding, too.
    compared = set(theirs) - {
        "objective/kl",
        "objective/entropy",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "val/contain_eos_token",
    }
    assert len(compared) == 9
    assert {name: ours[name] for name in compared} == pytest.approx({name: theirs[name] for name in compared}, abs=1e-4)
    assert set(theirs) <= set(ours)
