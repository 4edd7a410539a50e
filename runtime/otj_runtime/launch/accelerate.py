"""How `accelerate launch` is called: its configuration file, command line and environment, as pure functions of PodConfig.

`accelerate launch --cpu --num_processes 3` silently starts one process, because its CPU path needs MPI. The path of several GPUs
starts as many as it is told (through torchrun), and ACCELERATE_USE_CPU makes each of them join over gloo. So several CPU ranks
take the GPUs' path with `use_cpu` set; one rank, on whatever device, takes the simple path.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from otj_runtime.api import Device
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.precision import mixed_precision

Settings = dict[str, Any]
"""Keys of accelerate's configuration file."""

CONFIG_FILE = "accelerate.yaml"

_STRATEGIES: dict[str, Settings] = {
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_offload_params": False,
        },
    },
    "deepspeed-zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "zero_stage": 3,
            "zero3_init_flag": False,
            "zero3_save_16bit_model": True,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
        },
    },
}


def settings(config: PodConfig) -> Settings:
    """The configuration file's keys: what follows from the job, and over it what `accelerate.config` of the job says."""
    ranks = config.training_ranks
    derived: Settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if ranks > 1 else "NO",
        "use_cpu": config.device is Device.CPU,
        "num_processes": ranks,
        "num_machines": 1,
        "machine_rank": 0,
        "gpu_ids": "all",
        "mixed_precision": mixed_precision(config),
        "main_process_port": config.rendezvous_port,
        "main_training_function": "main",
    }
    derived |= _STRATEGIES.get(config.accelerate.strategy, {})
    return derived | {key: _over(derived.get(key), value) for key, value in config.accelerate.config.items()}


def _over(derived: Any, given: Any) -> Any:
    """`given`; of two sections, `given` over `derived`, so that one key of a section can be changed."""
    return derived | given if isinstance(derived, dict) and isinstance(given, dict) else given


def write_settings(keys: Settings, directory: Path) -> Path:
    """Write the configuration file into `directory`; its path."""
    path = directory / CONFIG_FILE
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


def command(keys: Settings, *, config_file: Path, threads: int, module: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command line. What must not be guessed is said again, because accelerate fills gaps from the machine."""
    explicit = ("num_processes", "num_machines", "machine_rank", "mixed_precision", "main_process_port")
    flags = [part for key in explicit for part in (f"--{key}", str(keys[key]))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    return [*launch, *flags, "--num_cpu_threads_per_process", str(threads), "--module", module, *arguments]


def environment(keys: Settings, *, threads: int) -> dict[str, str]:
    """What the ranks' environment gets besides the container's own."""
    return {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": str(bool(keys.get("use_cpu"))).lower()}


def threads_per_rank(*, cores: int, ranks: int, asked: str | None) -> int:
    """Threads of one rank: what the user's OMP_NUM_THREADS says, else an equal share of the cores, at least 1."""
    if asked and asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, cores // ranks)


def usable_cores(limit_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this container may use: its affinity mask, and the cgroup's CPU limit if there is one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = limit_file.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
