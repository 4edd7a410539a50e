"""Where a rank's micro-batches come from: weights into the generator, prompts out to it, groups back, tensors to train on.

    Sampler.next(samples, step)
      -> weights.push(step)        the generator takes the current weights; the probe proves it
      -> rollouts.collect(...)     this rank's prompts -> completions -> rewards
      -> build(groups)             the trainer's: what to train on, dealt out evenly, padded
      -> one micro-batch at a time, until the generation is used up

`policy version` is the number of optimizer steps behind the weights: transformers' `global_step`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from otj_runtime.rollout.collect import Rollouts, rollout_metrics
from otj_runtime.rollout.types import Group, Sampling
from otj_runtime.train.batch import MicroBatch
from otj_runtime.train.config import OnlineConfig
from otj_runtime.train.meters import Meters
from otj_runtime.train.report import Reporter


class SyncReport(Protocol):
    """What a weight sync tells of itself."""

    @property
    def metrics(self) -> dict[str, float]: ...


class Weights(Protocol):
    """Brings the policy into the generator. Collective: every rank calls it."""

    def push(self, version: int) -> SyncReport: ...


class Sampler:
    """One rank's source of micro-batches. Collective: every rank makes the same calls in the same order.

    Args:
        config: the method's configuration.
        rollouts: completes and scores prompts.
        weights: brings the policy into the generator; None if the engine uses the model itself.
        meters: takes what is measured.
        reporter: shows a few answers.
        build: groups to the micro-batches of one iteration over them.
    """

    def __init__(
        self,
        *,
        config: OnlineConfig,
        rollouts: Rollouts,
        weights: Weights | None,
        meters: Meters,
        reporter: Reporter,
        build: Callable[[list[Group]], list[MicroBatch]],
    ) -> None:
        self._config = config
        self._rollouts = rollouts
        self._weights = weights
        self._meters = meters
        self._reporter = reporter
        self._build = build
        self._pushed_version: int | None = None
        self._syncs = 0
        self._pending: deque[MicroBatch] = deque()

    def push(self, version: int) -> None:
        """Bring the current policy into the generator as `version`, unless it is there already. Collective."""
        if self._weights is None or self._pushed_version == version:
            return
        self._syncs += 1
        self._meters.add(self._weights.push(version).metrics | {"sync/count": float(self._syncs), "policy_version": float(version)})
        self._pushed_version = version

    def next(self, samples: list[dict[str, Any]], *, step: int) -> MicroBatch:
        """The next micro-batch of optimizer step `step`, sampled now from `samples` if the last generation is used up."""
        if not self._pending:
            self._pending = self._sample(samples, step)
        return self._pending.popleft()

    def _sample(self, samples: list[dict[str, Any]], step: int) -> deque[MicroBatch]:
        self.push(step)
        began = time.monotonic()
        config = self._config
        sampling = Sampling(count=config.num_generations, max_tokens=config.max_completion_length, temperature=config.temperature)
        groups = self._rollouts.collect(samples, sampling, policy_version=step)
        self._meters.add(rollout_metrics(groups) | {"time/generate": time.monotonic() - began})
        self._reporter.answers = self._rollouts.answers(groups)[: config.num_completions_to_print]
        every = self._build(groups) * config.num_iterations
        # A run that resumed in the middle of a generation has made some of its steps already.
        made = (step * config.gradient_accumulation_steps) % len(every)
        return deque(every[made:])
