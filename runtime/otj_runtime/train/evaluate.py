"""Evaluation: answers to prompts that are not trained on, from the current weights, by the same engine and rewards as in training.

eval prompts -> this rank's share -> chunks -> rollouts -> metrics under TRL's names, averaged over ranks

Every rank makes as many rounds as the others, one chunk each, with a filler where its share has ended: a sharded model generates on all
ranks together, and between two rounds they agree whether to go on (see `signals`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from otj_runtime.rollout.collect import Rollouts, reward_metrics, rollout_metrics
from otj_runtime.rollout.types import Sampling
from otj_runtime.train.config import OnlineConfig
from otj_runtime.train.meters import SUMMED, Meters
from otj_runtime.train.signals import StopOnSignal, StopRequested

VLLM_CHUNK = 256
"""Prompts that vLLM gets at once; it batches them as it likes."""


def evaluate(
    rollouts: Rollouts,
    prompts: Sequence[dict[str, Any]],
    *,
    config: OnlineConfig,
    accelerator: Any,
    policy_version: int,
    stop: StopOnSignal,
) -> dict[str, float]:
    """Metrics of answers to `prompts`, greedy ones or sampled at `eval_temperature`. Collective: each rank answers its share.

    Raises:
        RewardFailed, GeneratorLost: as in training.
        StopRequested: on every rank, if any was asked to stop.
    """
    began = time.monotonic()
    sampling = Sampling(count=config.num_generations_eval, max_tokens=config.max_completion_length, temperature=config.eval_temperature)
    own = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    chunk = VLLM_CHUNK if config.use_vllm else config.per_device_eval_batch_size
    meters = Meters()
    for first in range(0, math.ceil(len(prompts) / accelerator.num_processes), chunk):
        share = own[first : first + chunk]
        asked = rollouts.start([prompts[i] for i in share or (0,)], sampling, policy_version=policy_version)
        groups = stop.attempt(asked.result)
        if stop.agreed() or groups is None:
            rollouts.cancel()
            raise StopRequested(f"asked to stop in an evaluation after step {policy_version}")
        if not share:
            continue
        completions = sum(len(group.completions) for group in groups)
        meters.add({name: value for name, value in rollout_metrics(groups).items() if name not in SUMMED}, weight=completions)
        for name, (value, weight) in reward_metrics(groups).items():
            meters.add({name: value}, weight=weight)
    metrics = meters.take(accelerator)
    seconds = time.monotonic() - began
    return metrics | {"runtime": seconds, "samples_per_second": len(prompts) / max(1e-9, seconds)}
