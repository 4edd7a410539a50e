"""Which way the weights take to the generator, and why. Pure: from the pod's configuration, so that trainer and launcher agree.

Trainer and generator are two containers of a pod with accelerators of their own. vLLM's `ipc` hands over memory of a GPU that both sides
use, and its `nccl` is fast only where one side may map the other's GPU, which a container's device rules withhold. Shared memory needs
neither; what is chosen here is what goes through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from otj_runtime.api import Device, DType
from otj_runtime.pod.config import PodConfig

SMALL_STEPS = 1e-6
"""Learning rate at which about one bfloat16 weight of a hundred changes in a step; more than one of 16 are not sent as deltas."""


@dataclass(frozen=True)
class Transfer:
    """A choice. `reason` is for people."""

    kind: Literal["mailbox", "delta", "adapter"]
    reason: str

    def describe(self, gb_per_s: float | None) -> str:
        """The choice with its measured speed, for the status."""
        speed = "" if gb_per_s is None else f", {gb_per_s:.3g} GB/s"
        return f"{self.kind}{speed}: {self.reason}"


def choose(config: PodConfig) -> Transfer:
    """What goes to the generator after each step."""
    if config.adapter is not None:
        return Transfer("adapter", "lora.sync is adapter")
    if config.weight_transfer == "delta":
        return Transfer("delta", "asked for; everything is sent whole where that is safer, or less")
    if config.weight_transfer == "mailbox":
        return Transfer("mailbox", "asked for")
    if config.device is Device.CPU:
        return Transfer("mailbox", "both sides compute on CPUs and share memory")
    own = "trainer and generator have GPUs of their own, and shared memory needs no access from one to the other"
    rate = config.training.get("learning_rate", SMALL_STEPS)  # neither method's default is higher
    if not config.script and config.generator_dtype is not DType.FLOAT32 and isinstance(rate, (int, float)) and rate <= SMALL_STEPS:
        return Transfer(
            "mailbox", f"{own}; weightTransfer: delta sends less at this learning rate, for a copy of the weights in GPU memory"
        )
    return Transfer("mailbox", own)
