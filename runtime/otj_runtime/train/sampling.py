"""Where a rank's micro-batches come from: weights into the generator, prompts out to it, groups back, tensors to train on.

    Sampler.next(step)
      -> weights.push(step)        the generator takes the current weights; requests in flight go on with them
      -> pipeline.fill(...)        asks for the generation of this step, and for `staleness` more
      -> pipeline.take(...)        waits for this step's: prompts -> completions -> rewards, in the background
      -> weights.proven(step)      the probe, asked meanwhile, has shown that the generator has them
      -> build(groups)             the trainer's: what to train on, dealt out evenly, padded
      -> one micro-batch at a time, until the generation is used up

`policy version` is the number of optimizer steps behind the weights: transformers' `global_step`. Everything happens at the same
step on every rank, whatever its own rollouts do, because `push` is collective. Requests of this rank may need the generator brought
back at the moment that a push begins; both use the mailbox, so a lock (`Exclusive`) lets one finish before the other starts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from otj_runtime.rollout.collect import Rollouts, reward_metrics, rollout_metrics
from otj_runtime.rollout.pipeline import Pipeline, Taken
from otj_runtime.rollout.types import Group, Sampling
from otj_runtime.train.batch import MicroBatch
from otj_runtime.train.config import OnlineConfig
from otj_runtime.train.meters import Meters
from otj_runtime.train.report import Reporter
from otj_runtime.train.signals import StopOnSignal, StopRequested


class Measured(Protocol):
    """What a weight sync tells of itself."""

    @property
    def metrics(self) -> dict[str, float]: ...


class Proof(Measured, Protocol):
    """The proof that the generator serves a version; `again`: only since it was installed a second time."""

    @property
    def again(self) -> bool: ...


class Weights(Protocol):
    """Brings the policy into the generator. Collective: every rank calls it. `version` is the one that was pushed last."""

    @property
    def version(self) -> int | None: ...

    def push(self, version: int) -> Measured: ...

    def proven(self, version: int) -> Proof: ...


class Exclusive:
    """Push and recovery of one rank, one at a time. A push that finds the lock taken waits for a recovery, which has a deadline.

    Args:
        weights: pushes.
        reinstall: brings the version that was pushed last back into a generator that restarted.
    """

    def __init__(self, weights: Weights, reinstall: Callable[[], None]) -> None:
        self._weights = weights
        self._reinstall = reinstall
        self._lock = threading.Lock()

    @property
    def version(self) -> int | None:
        """See `Weights`."""
        return self._weights.version

    def push(self, version: int) -> Measured:
        """See `Weights`."""
        with self._lock:
            return self._weights.push(version)

    def proven(self, version: int) -> Proof:
        """See `Weights`."""
        return self._weights.proven(version)

    def recover(self) -> None:
        """Return when the generator serves the version that was pushed last."""
        with self._lock:
            self._reinstall()


class Sampler:
    """One rank's source of micro-batches. Collective: every rank makes the same calls in the same order.

    Args:
        config: the method's configuration.
        samples: rows of the dataset that this rank samples in a generation, by its number.
        rollouts: completes and scores prompts.
        weights: brings the policy into the generator; None if the engine uses the model itself.
        meters: takes what is measured.
        reporter: shows a few answers.
        stop: ends a wait for rollouts.
        build: groups to the micro-batches of one iteration over them.
    """

    def __init__(
        self,
        *,
        config: OnlineConfig,
        samples: Callable[[int], list[dict[str, Any]]],
        rollouts: Rollouts,
        weights: Weights | None,
        meters: Meters,
        reporter: Reporter,
        stop: StopOnSignal,
        build: Callable[[list[Group]], list[MicroBatch]],
    ) -> None:
        self._config = config
        self._rollouts = rollouts
        self._weights = weights
        self._meters = meters
        self._reporter = reporter
        self._stop = stop
        self._build = build
        self._syncs = 0
        self._unproven: int | None = None  # version that was pushed and not proven yet
        self._pending: deque[MicroBatch] = deque()
        self._new_pipeline: Callable[[], Pipeline] = lambda: Pipeline(
            rollouts, samples=samples, sampling=_sampling(config), ahead=config.staleness
        )
        self._pipeline = self._new_pipeline()
        self._idle = IdleShares(rollouts.busy_seconds)

    def push(self, version: int) -> None:
        """Bring the current policy into the generator as `version`, unless it is there already. Collective."""
        if self._weights is None or self._weights.version == version:
            return
        self._syncs += 1
        self._unproven = version
        self._meters.add(self._weights.push(version).metrics | {"sync/count": float(self._syncs), "policy_version": float(version)})

    def next(self, *, step: int, max_steps: int) -> MicroBatch:
        """The next micro-batch of optimizer step `step`; at the first one of a generation, its rollouts are waited for.

        Args:
            step: optimizer steps made.
            max_steps: optimizer steps to make in all; nothing is sampled for later ones.

        Raises:
            StopRequested: on every rank, if any was asked to stop.
        """
        if self._pending:
            self.settle()
        else:
            self._pending = self._sample(step, max_steps)
        return self._pending.popleft()

    def settle(self) -> bool:
        """Wait until what was pushed between two generations is proven: by an evaluation, or by a run that resumed in the midst of one.
        The weights must not change before. Whether it was right from the moment that it was pushed. Collective.
        """
        right = self._unproven is None or self._proven(self._unproven)
        if not right:
            self._renew()
        return right

    def cancel(self) -> None:
        """Call off what is in flight: training ends."""
        self._pipeline.cancel()

    def state(self) -> dict[str, Any]:
        """What a resumed run must know: micro-batches that are still to be trained on, and how often weights were pushed."""
        return {"pending": list(self._pending), "syncs": self._syncs}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._pending = deque(state["pending"])
        self._syncs = state["syncs"]

    def _sample(self, step: int, max_steps: int) -> deque[MicroBatch]:
        began = time.monotonic()
        self.push(step)
        config = self._config
        per_step, per_generation = config.gradient_accumulation_steps, config.micro_batches_per_generation
        generation = step * per_step // per_generation
        last = (max_steps * per_step - 1) // per_generation
        taken = self._take(generation, last, step)
        if not self._proven(step):
            self._renew()
            taken = self._take(generation, last, step)
        measured = rollout_metrics(taken.groups) | overlap_metrics(taken, step)
        tokens = measured["tokens_generated"] * config.world_size
        self._meters.add(measured | self._idle.take(waited=time.monotonic() - began, tokens=tokens))
        for name, (value, weight) in reward_metrics(taken.groups).items():
            self._meters.add({name: value}, weight=weight)
        self._reporter.answers = self._rollouts.answers(taken.groups)[: config.num_completions_to_print]
        every = self._build(taken.groups) * config.num_iterations
        # A run that resumed in the middle of a generation has made some of its steps already.
        made = (step * per_step) % len(every)
        return deque(every[made:])

    def _renew(self) -> None:
        """What is in the pipeline was sampled from unknown weights."""
        self._pipeline.cancel()
        self._pipeline = self._new_pipeline()

    def _take(self, generation: int, last: int, step: int) -> Taken:
        """Ask for generations up to `last`, as far as staleness allows, and wait for this one."""
        self._pipeline.fill(generation, last=last, policy_version=step)
        taken = self._stop.attempt(lambda: self._pipeline.take(generation))
        # Building batches is collective, so the ranks agree before it.
        if self._stop.agreed() or taken is None:
            raise StopRequested(f"asked to stop before step {step + 1}")
        return taken

    def _proven(self, version: int) -> bool:
        """Wait until the version is proven; whether it was right from the moment that it was pushed. Collective."""
        if self._weights is None:
            return True
        self._unproven = None
        proof = self._weights.proven(version)
        self._meters.add(proof.metrics)
        return not proof.again


def _sampling(config: OnlineConfig) -> Sampling:
    return Sampling(
        count=config.num_generations,
        max_tokens=config.max_completion_length,
        temperature=config.temperature,
        straggler_factor=config.straggler_factor,
    )


def overlap_metrics(taken: Taken, step: int) -> dict[str, float]:
    """How old the tokens of a generation are at optimizer step `step`, in versions, and how full the pipeline is."""
    ages = [age for group in taken.groups for completion in group.completions for age in completion.token_ages(step)]
    tokens = max(1, sum(count for _, count in ages))
    longest = max(len(completion.token_ids) for group in taken.groups for completion in group.completions)
    seconds = max(1e-9, taken.seconds)
    return {
        "time/generate": taken.seconds,
        "time/wait_batch": taken.waited,
        "gen/tok_s": tokens / seconds,
        "gen/longest_tok_s": longest / seconds,
        "async/staleness_mean": sum(age * count for age, count in ages) / tokens,
        "async/staleness_max": float(max(age for age, _ in ages)),
        "async/queue": float(taken.ready),
        "async/in_flight": float(taken.in_flight),
        "async/dropped": float(taken.dropped),
    }


class IdleShares:
    """How much of the time each side had nothing to do, between two calls of `take`.

    The trainer is idle while it waits for weights to arrive in the generator or for rollouts to come back; the generator while this
    rank has no request under way. (Averaged over ranks that overstates the generator's idleness if ranks end at different times,
    because one that still generates keeps it busy; so the smallest share counts.)

    Args:
        busy_seconds: see `RolloutEngine`.
        clock: seconds.
    """

    def __init__(self, busy_seconds: Callable[[], float], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._busy_seconds = busy_seconds
        self._clock = clock
        self._since: float | None = None
        self._busy = 0.0

    def take(self, *, waited: float, tokens: float) -> dict[str, float]:
        """Both shares since the last call, between 0 and 1, and `tokens` by the seconds since then; the first call has seen nothing but
        its own `waited` seconds."""
        now, busy = self._clock(), self._busy_seconds()
        period = max(1e-9, waited if self._since is None else now - self._since)
        shares = {"idle/trainer": min(1.0, waited / period), "idle/generator": min(1.0, max(0.0, 1.0 - (busy - self._busy) / period))}
        self._since, self._busy = now, busy
        return shares | {"tokens_per_second": tokens / period}
