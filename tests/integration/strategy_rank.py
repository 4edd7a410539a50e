"""One training rank of a whole run without a generator, under whatever strategy `accelerate launch` was told.

python -m tests.integration.strategy_rank MODEL OUTPUT ARGUMENTS     the last as JSON: `lora` and arguments of GRPOConfig
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState

from otj_runtime.api.inputs import DatasetSpec
from otj_runtime.api.spec import LoRASpec
from otj_runtime.data.load import load_prompts
from otj_runtime.rewards import load_rewards
from otj_runtime.train.checkpoints import newest_checkpoint
from otj_runtime.train.config import GRPOConfig
from otj_runtime.train.export import save_merged
from otj_runtime.train.grpo import GRPOTrainer
from otj_runtime.train.lora import peft_config

BASE: dict[str, Any] = {
    "use_cpu": True,
    "max_steps": 3,
    "save_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
    "num_generations": 16,
    "max_completion_length": 4,
    "disable_tqdm": True,
    "seed": 0,
}


def main() -> None:
    model, output, text = sys.argv[1:]
    changes = json.loads(text)
    lora = changes.pop("lora", None)
    args = GRPOConfig(output_dir=output, **(BASE | changes))
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        _let_a_cpu_count(args)
    trainer = GRPOTrainer(
        model,
        load_rewards([], task="copy"),
        args=args,
        train_dataset=load_prompts(DatasetSpec(task="copy", args={"length": 4}), seed=0),
        peft_config=peft_config(None if lora is None else LoRASpec(**lora)),
    )
    checkpoint = newest_checkpoint(Path(output))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    assert trainer._scorer.shares, "the strategy keeps prompts from being read once"
    trainer.save_model(str(Path(output) / "model"))
    if lora is not None:
        save_merged(trainer, Path(output) / "merged")
    trainer.accelerator.end_training()


def _let_a_cpu_count(args: GRPOConfig) -> None:
    """accelerate shards over accelerators only: told of CPUs it takes DDP, silently. torch and DeepSpeed shard over gloo as well, so let it
    be told that these are accelerators; everything after that is what runs on GPUs."""
    assert args.device.type == "cpu"  # asking makes the state that is changed here
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ["ACCELERATE_USE_CPU"] = "false"


if __name__ == "__main__":
    main()
