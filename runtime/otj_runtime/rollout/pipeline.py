"""Generations in flight: which are asked for when, and in which order they are trained on.

    trainer, generation g                 generator
    push weights                          goes on with g, with the new weights
    fill: ask for generation g + n        g, then g + 1 ... g + n
    take: wait for g, train on it         the others, meanwhile

n is the staleness: what is trained on was asked for n generations ago. With n = 0, asking and waiting are one. With n = 1 and one
generation per optimizer step, tokens are at most one version old, and a step takes as long as the slower of the two sides.

Which prompts a generation has is a function of its number alone, so nothing needs to be saved: a run that resumes at generation g
asks for g ... g + n anew, with the weights of the checkpoint, and no prompt is lost or asked twice. Every rank makes the same calls;
none of them is collective.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.rollout.collect import Rollouts
from otj_runtime.rollout.types import Group, Sampling

WAIT_SECONDS = 6 * 3600.0
"""Longest wait for one generation. The engine's own deadlines, which know the reason, are shorter; this one is for what nobody thought of."""

CANCEL_SECONDS = 5.0
"""How long generations that are called off may take to notice."""

CANCEL_POLL_SECONDS = 0.1


@dataclass(slots=True)
class _Flight:
    """One generation that was asked for; `ended` is None until it is there."""

    generation: int
    asked: int
    began: float
    future: Future[list[Group]]
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """One generation, scored.

    Attributes:
        groups: at least one.
        dropped: groups that were given up as stragglers.
        seconds: from asking for it to the last reward.
        waited: seconds that `take` waited for it.
        ready: generations after it that were scored already when it was taken.
        in_flight: generations after it that were not.
    """

    groups: list[Group]
    dropped: int
    seconds: float
    waited: float
    ready: int
    in_flight: int


class Pipeline:
    """Asks for generations ahead of time and hands them out in order.

    Args:
        rollouts: completes and scores prompts.
        samples: rows of the dataset of a generation, by its number.
        sampling: how each is sampled.
        ahead: generations to ask for beyond the one that is trained on: the staleness.
    """

    def __init__(self, rollouts: Rollouts, *, samples: Callable[[int], list[dict[str, Any]]], sampling: Sampling, ahead: int) -> None:
        self._rollouts = rollouts
        self._samples = samples
        self._sampling = sampling
        self._ahead = ahead
        self._flights: deque[_Flight] = deque()

    def fill(self, generation: int, *, last: int, policy_version: int) -> None:
        """Ask for what is missing of `generation` and those ahead of it, up to generation `last`, from the weights of `policy_version`."""
        following = self._flights[-1].generation + 1 if self._flights else generation
        for number in range(following, min(generation + self._ahead, last) + 1):
            self._flights.append(self._ask(number, policy_version))

    def _ask(self, number: int, policy_version: int) -> _Flight:
        samples = self._samples(number)
        began = time.monotonic()
        flight = _Flight(number, len(samples), began, self._rollouts.start(samples, self._sampling, policy_version=policy_version))

        def note(_: Future[list[Group]]) -> None:
            flight.ended = time.monotonic()

        flight.future.add_done_callback(note)
        return flight

    def take(self, generation: int) -> Taken:
        """Wait for `generation`, the oldest in flight.

        Raises:
            GeneratorLost, RewardFailed: see `Rollouts.collect`.
        """
        flight, *later = self._flights
        if flight.generation != generation:
            raise ValueError(f"generation {generation} is asked for, generation {flight.generation} is next")
        began = time.monotonic()
        ready = sum(other.future.done() for other in later)
        try:
            groups = flight.future.result(WAIT_SECONDS)
        except TimeoutError as error:
            if flight.future.done():
                raise
            raise GeneratorLost(f"the rollouts of generation {generation} were not there after {WAIT_SECONDS:.0f} s") from error
        self._flights.popleft()  # only now: a wait that a signal ends leaves it in flight, to be called off
        now = time.monotonic()
        return Taken(
            groups=groups,
            dropped=flight.asked - len(groups),
            seconds=(flight.ended or now) - flight.began,
            waited=now - began,
            ready=ready,
            in_flight=len(later) - ready,
        )

    def cancel(self) -> None:
        """Call off everything in flight; return when it has ended, or after a few seconds."""
        pending = {flight.future for flight in self._flights if not flight.future.done()}
        self._flights.clear()
        end = time.monotonic() + CANCEL_SECONDS
        while pending and time.monotonic() < end:
            self._rollouts.cancel()  # again and again: a thread may not have come to its first request yet
            pending = wait(pending, timeout=CANCEL_POLL_SECONDS).not_done
