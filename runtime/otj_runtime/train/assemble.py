"""From the pod's configuration to the trainer that a script on a bare machine makes by hand; only the generator is the pod's.

Everything that can be wrong with a user's input is found here, before the first step, and named.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from otj_runtime.api import Algorithm, Device
from otj_runtime.data.load import held_out_prompts, load_prompts
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import InvalidSpec, WorldSizeMismatch
from otj_runtime.pod.precision import mixed_precision
from otj_runtime.pod.split import Split, split_metrics
from otj_runtime.rewards import load_rewards
from otj_runtime.train.config import GRPOConfig, OnlineConfig, OnlineDPOConfig
from otj_runtime.train.generator import pod_generator
from otj_runtime.train.grpo import GRPOTrainer
from otj_runtime.train.lora import peft_config
from otj_runtime.train.online_dpo import OnlineDPOTrainer
from otj_runtime.train.trainer import OnlineTrainer


@dataclass(frozen=True)
class Run:
    """A trainer with what surrounds it."""

    trainer: OnlineTrainer
    held_out: list[dict[str, Any]]


def build_arguments(config: PodConfig) -> OnlineConfig:
    """The method's configuration.

    Raises:
        InvalidSpec: with transformers' words, if a value does not fit.
        WorldSizeMismatch: if another number of ranks came up than the job trains on.
    """
    kind = GRPOConfig if config.algorithm is Algorithm.GRPO else OnlineDPOConfig
    precision = mixed_precision(config)
    try:
        arguments = kind(
            **config.training,
            output_dir=config.output,
            save_steps=config.save_steps,
            use_cpu=config.device is Device.CPU,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_vllm=True,
            vllm_dtype=config.generator_dtype,
            vllm_max_model_len=config.generator_max_model_len,
            model_init_kwargs={"dtype": config.model_dtype.value},
            staleness=config.rollout.staleness,
            straggler_factor=config.rollout.straggler_factor,
            disable_tqdm=True,
        )
    except (TypeError, ValueError) as error:
        raise InvalidSpec(f"spec.training: {error}") from error
    if arguments.world_size != config.training_ranks:
        raise WorldSizeMismatch(
            f"{arguments.world_size} training ranks came up, gpus - generation.gpus is {config.training_ranks}: "
            "check spec.accelerate.config, which may override the number of processes"
        )
    return arguments


def build_run(config: PodConfig) -> Run:
    """Everything loaded and connected; the generator need not answer yet."""
    arguments = build_arguments(config)
    kind = GRPOTrainer if config.algorithm is Algorithm.GRPO else OnlineDPOTrainer
    held_out = held_out_prompts(config.prompts)
    if arguments.eval_strategy != "no" and not held_out:
        raise InvalidSpec("training.eval_strategy: there is nothing to evaluate on; set dataset.evalSplit")
    trainer = kind(
        config.model_path,
        load_rewards(config.rewards, task=config.prompts.task),
        args=arguments,
        train_dataset=load_prompts(config.prompts, seed=arguments.seed),
        eval_dataset=held_out or None,
        peft_config=peft_config(config.lora),
        generator=pod_generator(config),
    )
    trainer.reporter.title = config.name
    trainer.reporter.advise = partial(
        split_metrics,
        Split(training=config.training_ranks, generation=config.generator_gpus),
        per_engine=config.generator_gpus // config.generator_engines,
        staleness=config.rollout.staleness,
    )
    prepared: Any = trainer.eval_dataset or []
    return Run(trainer=trainer, held_out=prepared[: arguments.eval_prompts])
