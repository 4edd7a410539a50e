"""Which devices of this machine train and which generate."""

from __future__ import annotations

import os
from pathlib import Path

from otj_runtime.api import Device
from otj_runtime.local.options import UsageError
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.names import GENERATOR_CONTAINER, TRAINER_CONTAINER

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/gpus")


def found_devices() -> list[str]:
    """Names of the devices that may be used: those of CUDA_VISIBLE_DEVICES, else all that the driver lists."""
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(DRIVER.iterdir())] if DRIVER.is_dir() else []


def split(config: PodConfig, devices: list[str]) -> dict[str, dict[str, str]]:
    """Environment by container that gives the last devices to the generator and the first to the trainer; on a CPU, none to all.

    Raises:
        UsageError: if there are fewer devices than the job needs.
    """
    if config.device is Device.CPU:
        return {TRAINER_CONTAINER: {VISIBLE: ""}, GENERATOR_CONTAINER: {VISIBLE: ""}}
    needed = config.training_ranks + config.generator_gpus
    if len(devices) < needed:
        raise UsageError(
            f"spec.gpus: the job needs {needed} GPUs ({config.training_ranks} to train, {config.generator_gpus} to generate), this machine "
            f"has {len(devices)}: lower spec.gpus, or set spec.accelerator.device to cpu"
        )
    return {
        TRAINER_CONTAINER: {VISIBLE: ",".join(devices[: config.training_ranks])},
        GENERATOR_CONTAINER: {VISIBLE: ",".join(devices[config.training_ranks : needed])},
    }
