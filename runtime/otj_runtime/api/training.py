"""`spec.training`: the arguments of GRPOConfig and OnlineDPOConfig, checked without importing torch.

The names, types and defaults live in `training_arguments.json`, written from the configuration classes by
`python -m otj_runtime.train.arguments` and held equal to them by a test. So a misspelt argument is refused by the API server and
by `otj run` within a second, before any pod exists.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any


class Algorithm(StrEnum):
    """Training methods."""

    GRPO = "GRPO"
    ONLINE_DPO = "OnlineDPO"


RESERVED = {
    "output_dir": "spec.output.path",
    "save_steps": "spec.output.saveSteps",
    "resume_from_checkpoint": "nothing: the newest complete checkpoint is used",
    "use_cpu": "spec.accelerator.device",
    "bf16": "spec.accelerate.mixedPrecision",
    "fp16": "spec.accelerate.mixedPrecision",
    "use_vllm": "spec.generation",
    "vllm_device": "spec.generation.gpus",
    "vllm_gpu_memory_utilization": "spec.generation.gpuMemoryUtilization",
    "vllm_dtype": "spec.generation.dtype",
    "vllm_max_model_len": "spec.generation.maxModelLen",
    "vllm_weight_transfer": "spec.generation.weightTransfer",
    "vllm_enable_prefix_caching": "spec.generation.enablePrefixCaching",
    "staleness": "spec.rollout.staleness",
    "straggler_factor": "spec.rollout.stragglerFactor",
    "reward_weights": "spec.rewards[].weight",
    "reward_model_path": "spec.rewards[].model",
    "judge": "spec.rewards[].judge",
    "model_init_kwargs": "spec.model",
    "hub_token": "HF_TOKEN by spec.env[].valueFrom.secretKeyRef",
}
"""Arguments that the job itself decides, and the field that says so."""

NOT_FOR_SCRIPTS = "configures the built-in trainer; give the script of trainer.command its arguments there"

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}


TOO_FEW_IN_A_GROUP = "%d is too few: a completion is judged against others of its prompt; use at least 2"
GROUPS_ARE_TORN = (
    "%d does not divide the %d completions of a rank (per_device_train_batch_size x steps_per_generation, which defaults to "
    "gradient_accumulation_steps): make it a divisor, or the batch a multiple"
)
"""Messages about num_generations; the API server says the same."""


@dataclass(frozen=True)
class Argument:
    """One training argument: the JSON types it may have, and its default under each algorithm that takes it."""

    types: tuple[str, ...]
    defaults: dict[Algorithm, Any]
    description: str

    def accepts(self, value: Any) -> bool:
        """Whether `value` has one of the JSON types. A boolean is no number, though Python says so."""
        if value is None:
            return True
        if isinstance(value, bool):
            return "boolean" in self.types
        return any(isinstance(value, _JSON_TYPES[name]) for name in self.types)


@cache
def _argument_table() -> dict[str, Argument]:
    table = json.loads(resources.files(__package__).joinpath("training_arguments.json").read_text())
    return {
        name: Argument(
            types=tuple(row["types"]),
            defaults={Algorithm(name): value for name, value in row["defaults"].items()},
            description=row["description"],
        )
        for name, row in table.items()
    }


@cache
def training_arguments() -> dict[str, Argument]:
    """Every argument that `spec.training` may carry, by name."""
    return {name: argument for name, argument in _argument_table().items() if name not in RESERVED}


@cache
def reserved_arguments() -> dict[str, Argument]:
    """The arguments in `RESERVED`, by name: the schema knows them, to refuse them with the field that decides instead."""
    return {name: argument for name, argument in _argument_table().items() if name in RESERVED}


def argument_value(name: str, *, algorithm: Algorithm, arguments: dict[str, Any]) -> Any:
    """The value of the argument `name`: the one given, else its default."""
    given = arguments.get(name)
    return training_arguments()[name].defaults[algorithm] if given is None else given


def completions_per_rank(*, algorithm: Algorithm, arguments: dict[str, Any]) -> int:
    """Completions one training rank asks for at a time: the micro-batch times the micro-batches that share one generation."""
    micro_batch, accumulation, shared = (
        argument_value(name, algorithm=algorithm, arguments=arguments)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    )
    return int(micro_batch) * int(shared or accumulation)


def check_training(*, algorithm: Algorithm, arguments: dict[str, Any], ranks: int) -> None:
    """Raise ValueError that names the first argument that is unknown, reserved, mistyped, or does not fit the others."""
    known = training_arguments()
    for name, value in arguments.items():
        if name in RESERVED:
            raise ValueError(f"training.{name}: is decided by the job; set {RESERVED[name]} instead")
        argument = known.get(name)
        if argument is None or algorithm not in argument.defaults:
            names = [n for n, a in known.items() if algorithm in a.defaults]
            close = get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"training.{name}: unknown argument of {algorithm}Config{hint}")
        if not argument.accepts(value):
            raise ValueError(f"training.{name}: {value!r} is no {' or '.join(argument.types)}")
    _check_groups(algorithm=algorithm, arguments=arguments, ranks=ranks)


def _check_groups(*, algorithm: Algorithm, arguments: dict[str, Any], ranks: int) -> None:
    per_rank = completions_per_rank(algorithm=algorithm, arguments=arguments)
    group = argument_value("num_generations", algorithm=algorithm, arguments=arguments)
    if group < 2:
        raise ValueError(f"training.num_generations: {TOO_FEW_IN_A_GROUP % group}")
    if per_rank % group:
        raise ValueError(f"training.num_generations: {GROUPS_ARE_TORN % (group, per_rank)}")
