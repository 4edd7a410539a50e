"""A job's eval split, answered by a real vLLM between optimizer steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from otj_runtime.api.inputs import DatasetSpec, RewardSpec
from otj_runtime.api.spec import RolloutSpec
from otj_runtime.pod.metrics import read_metrics
from otj_runtime.rollout.transformers_engine import TransformersEngine
from otj_runtime.rollout.types import Sampling
from otj_runtime.train.assemble import build_run
from tests.integration.conftest import Generator
from tests.integration.models import mean_id

pytestmark = pytest.mark.integration

STEPS = 3
PROMPTS = {"train": [[first, 6, 7, 8] for first in range(10, 14)], "test": [[9, first, 11, 12] for first in range(20, 28)]}
"""Token ids; the model's tokenizer makes them of words."""

TRAINING: dict[str, Any] = {
    "max_steps": STEPS,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-2,  # so large that every step changes the greedy answers
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 8,
}

TRL = [
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/mean_id/mean",
    "rewards/mean_id/std",
    "completions/clipped_ratio",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
]
"""What TRL's trainer logs of an evaluation, without the prefix."""


class Answering(TrainerCallback):
    """Answers the eval split with the trained model itself, at the moment that it was evaluated."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.lengths: list[float] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        engine = TransformersEngine(model, pad_id=1, eos_ids={1})
        greedy = Sampling(count=1, max_tokens=TRAINING["max_completion_length"], temperature=0.0)
        answers = [answer.token_ids for [answer] in engine.generate(PROMPTS["test"], greedy, policy_version=state.global_step)]
        self.rewards.append(sum(mean_id(answers)) / len(answers))
        self.lengths.append(sum(map(len, answers)) / len(answers))


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_eval_split_is_answered_with_the_current_weights(
    generator: Callable[..., Generator], tied_model: Path, tmp_path: Path, staleness: int
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, prompts in PROMPTS.items():
        lines = [json.dumps({"prompt": " ".join(f"w{token}" for token in prompt)}) for prompt in prompts]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    changes = {
        "dataset": DatasetSpec(path=str(data), eval_split="test"),
        "rewards": [RewardSpec(function="tests.integration.models.mean_id")],
        "training": TRAINING,
        "rollout": RolloutSpec(staleness=staleness),
        "output": str(tmp_path / "output"),
    }
    trainer = build_run(generator(tied_model).config.model_copy(update=changes)).trainer
    model = Answering()
    trainer.add_callback(model)
    trainer.train()
    lines = [line for line in read_metrics(tmp_path / "output" / "metrics.jsonl")[0] if "eval_reward" in line.metrics]
    assert [line.step for line in lines] == [1, 2, 3]
    assert all(f"eval_{name}" in line.metrics for line in lines for name in TRL)
    assert [line.metrics["eval_reward"] for line in lines] == pytest.approx(model.rewards, abs=1e-6)
    assert [line.metrics["eval_completions/mean_length"] for line in lines] == pytest.approx(model.lengths, abs=1e-6)
    assert len(set(model.rewards)) == STEPS, "answers from older weights would have earned as much"
