"""The precision that the ranks train in: what the job asks for, unless it asks a CPU for what that CPU has no instructions for.

A matrix product in bfloat16 takes a loop of scalars there, one thread, 30 times as long as in float32: a step of minutes instead of seconds,
which looks like a run that hangs. float32 is at least as exact, so the run goes on in it and says so.
"""

from __future__ import annotations

from pathlib import Path

from otj_runtime.api import Device
from otj_runtime.pod.config import PodConfig

CPU_INFO = Path("/proc/cpuinfo")

_BF16_FLAGS = frozenset({"avx512bw", "amx_bf16", "bf16"})
"""What oneDNN computes in bfloat16 with: on x86 from AVX-512 on, on Arm its own extension."""


def has_bf16(cpu_info: str) -> bool:
    """Whether a processor computes in bfloat16, by the text of /proc/cpuinfo; one that does not say what it has does."""
    lines = [line.partition(":") for line in cpu_info.splitlines()]
    flags = next((words.split() for name, _, words in lines if name.strip() in ("flags", "Features")), None)
    return flags is None or not _BF16_FLAGS.isdisjoint(flags)


def mixed_precision(config: PodConfig) -> str:
    """`no`, `fp16` or `bf16`: what the ranks train in on this machine."""
    asked = config.accelerate.mixed_precision
    if config.device is Device.CPU and asked == "bf16" and not has_bf16(CPU_INFO.read_text()):
        return "no"
    return asked
