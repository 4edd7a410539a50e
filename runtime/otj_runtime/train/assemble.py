"""From the pod's configuration to a trainer: loads model, tokenizer, prompts and rewards, and connects the generator.

Everything that can be wrong with a user's input is found here, before the first step, and named.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from otj_runtime.api import Algorithm, Device
from otj_runtime.data.load import held_out_prompts, load_prompts
from otj_runtime.data.tokenize import PromptEncoder
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import InvalidSpec, ModelNotFound, WorldSizeMismatch
from otj_runtime.rewards import load_rewards
from otj_runtime.rollout.collect import Rollouts
from otj_runtime.train.config import GRPOConfig, OnlineConfig, OnlineDPOConfig
from otj_runtime.train.generator import connect_generator
from otj_runtime.train.grpo import GRPOTrainer
from otj_runtime.train.online_dpo import OnlineDPOTrainer
from otj_runtime.train.report import Reporter
from otj_runtime.train.signals import StopOnSignal
from otj_runtime.train.trainer import OnlineTrainer


@dataclass(frozen=True)
class Run:
    """A trainer with what surrounds it."""

    trainer: OnlineTrainer
    tokenizer: Any
    reporter: Reporter
    stop: StopOnSignal
    held_out: list[dict[str, Any]]


def build_arguments(config: PodConfig) -> OnlineConfig:
    """The method's configuration.

    Raises:
        InvalidSpec: with transformers' words, if a value does not fit.
        WorldSizeMismatch: if another number of ranks came up than the job trains on.
    """
    kind = GRPOConfig if config.algorithm is Algorithm.GRPO else OnlineDPOConfig
    precision = config.accelerate.mixed_precision
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


def load_model(config: PodConfig) -> Any:
    """The policy, in the dtype of its master weights.

    Raises:
        ModelNotFound: if the folder holds no causal language model that transformers can load.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(config.model_path, dtype=getattr(torch, config.model_dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFound(f"cannot load a causal language model from {config.model_path}: {error}") from error
    model.config.use_cache = False
    return model


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Make every dropout layer pass its input through: with dropout, trainer and generator would be different policies."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def load_tokenizer(config: PodConfig) -> Any:
    """The model's tokenizer, with a padding token (the end of sequence, if it has none of its own).

    Raises:
        ModelNotFound: if there is none, or it knows neither token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFound(f"cannot load a tokenizer from {config.model_path}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelNotFound(f"the tokenizer in {config.model_path} has neither a padding nor an end-of-sequence token")
    return tokenizer


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a completion, by the model's generation configuration and its tokenizer."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ends = {stated} if isinstance(stated, int) else set(stated or ())
    return ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def build_run(config: PodConfig) -> Run:
    """Everything loaded and connected; the generator need not answer yet."""
    arguments = build_arguments(config)
    tokenizer = load_tokenizer(config)
    encoder = PromptEncoder(tokenizer)
    prompts = load_prompts(config.prompts, seed=arguments.seed)
    rewards = load_rewards(config.rewards, task=config.prompts.task)
    model = load_model(config)
    encoder.check_lengths(prompts, max_tokens=_prompt_limit(config, arguments, model))
    if arguments.disable_dropout:
        switch_off_dropout(model)
    encoded = (encoder.encode(prompts[index]["prompt"]) for index in range(len(prompts)))
    generator = connect_generator(config, model=model, end_tokens=end_tokens(model, tokenizer), prompts=encoded)
    rollouts = Rollouts(engine=generator.engine, encoder=encoder, rewards=rewards, tokenizer=tokenizer)
    reporter = Reporter(output=Path(config.output), world_size=arguments.world_size)
    kind = GRPOTrainer if config.algorithm is Algorithm.GRPO else OnlineDPOTrainer
    trainer = kind(
        model,
        args=arguments,
        train_dataset=prompts,
        rollouts=rollouts,
        weights=generator.weights,
        reference=_reference(model, arguments),
        pad_id=tokenizer.pad_token_id,
        reporter=reporter,
    )
    trainer.remove_callback(PrinterCallback)  # the reporter's lines say the same, readably
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    held_out = held_out_prompts(config.prompts)[: arguments.eval_prompts]
    return Run(trainer=trainer, tokenizer=tokenizer, reporter=reporter, stop=stop, held_out=held_out)


def _prompt_limit(config: PodConfig, arguments: OnlineConfig, model: Any) -> int | None:
    """Longest prompt that leaves room for a completion, in tokens; None if nothing limits it."""
    window = config.generator_max_model_len or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [arguments.max_prompt_length, window - arguments.max_completion_length if window is not None else None]
    return min((limit for limit in limits if limit is not None), default=None)


def _reference(model: Any, arguments: OnlineConfig) -> Any | None:
    """A frozen copy of the base model where the loss needs one."""
    if isinstance(arguments, GRPOConfig) and arguments.beta == 0.0:
        return None
    reference = copy.deepcopy(model).to(arguments.device)
    return reference.eval().requires_grad_(False)
