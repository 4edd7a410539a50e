"""Connects a training rank with the pod's generator: weights go there, completions come back, and a lost generator is brought back.

    rank 0      owns the weight sync; after a loss it waits for the generator and installs the current version from the mailbox again
    other ranks write their share of the mailbox; after a loss they wait until the generator serves the expected version

So a generator that died costs the requests it was answering, which are asked again, and no optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otj_runtime.pod.config import PodConfig
from otj_runtime.rollout.vllm_engine import Recover, VLLMEngine, await_version
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.sync import WeightSync

RETURN_SECONDS = 600.0
"""How long a lost generator may take to serve the expected version again: kubelet's back-off plus the start of a large model."""


@dataclass(frozen=True)
class Generator:
    """The two ways to the generator."""

    engine: VLLMEngine
    weights: WeightSync


def connect_generator(config: PodConfig, *, model: Any, end_tokens: set[int], rank: int) -> Generator:
    """Both ways to the generator of `config`; nothing is asked of it yet.

    Args:
        model: the unwrapped policy whose weights are sent.
        end_tokens: tokens that end a completion.
        rank: this training rank.
    """
    control = GeneratorControl(config.generator_url)
    weights = WeightSync(
        model=model,
        directory=Path(config.mailbox),
        control=control,
        dtype=config.generator_dtype,
        ready_timeout_s=float(config.generator_ready_timeout_seconds),
    )
    return Generator(engine=VLLMEngine(config.generator_url, end_tokens=end_tokens, recover=_recovery(control, weights, rank)), weights=weights)


def _recovery(control: GeneratorControl, weights: WeightSync, rank: int) -> Recover:
    def bring_back(version: int) -> None:
        if rank == 0:
            control.wait_healthy(deadline_s=RETURN_SECONDS)
            weights.reinstall()
        await_version(control.weight_version, version, deadline_s=RETURN_SECONDS)

    return bring_back
