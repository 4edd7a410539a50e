"""Connects a training rank with the pod's generator: weights go there, completions come back, and a lost generator is brought back.

A generator that died restarts in place with dummy weights. The rank that notices first installs the current version from the
mailbox again, the others find it done; so it costs the requests that were under way, which are asked again, and no optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otj_runtime.pod.config import PodConfig
from otj_runtime.rollout.vllm_engine import VLLMEngine
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.sync import WeightSync


@dataclass(frozen=True)
class Generator:
    """The two ways to the generator."""

    engine: VLLMEngine
    weights: WeightSync


def connect_generator(config: PodConfig, *, model: Any, end_tokens: set[int], prompts: Iterable[list[int]]) -> Generator:
    """Both ways to the generator of `config`; nothing is asked of it yet.

    Args:
        model: the unwrapped policy whose weights are sent.
        end_tokens: tokens that end a completion.
        prompts: token ids of the run's prompts, the same on every rank; the first few are what the weight sync proves itself with.
    """
    weights = WeightSync(
        model=model,
        directory=Path(config.mailbox),
        control=GeneratorControl(config.generator_url),
        dtype=config.generator_dtype,
        ready_timeout_s=float(config.generator_ready_timeout_seconds),
        prompts=prompts,
    )
    engine = VLLMEngine(config.generator_url, end_tokens=end_tokens, recover=weights.reinstall)
    return Generator(engine=engine, weights=weights)
