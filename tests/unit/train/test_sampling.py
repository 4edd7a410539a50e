"""What is measured around sampling, and the lock between a push and a recovery."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from otj_runtime.rollout.pipeline import Taken
from otj_runtime.rollout.types import Completion, Group, Span
from otj_runtime.train.config import GRPOConfig
from otj_runtime.train.meters import Meters
from otj_runtime.train.sampling import Exclusive, IdleShares, Measured, Proof, Sampler, Weights, overlap_metrics


def test_idle_is_what_neither_side_used() -> None:
    now, busy = 100.0, 0.0
    shares = IdleShares(lambda: busy, clock=lambda: now)
    shares.take(waited=1.0, tokens=0)
    now, busy = 110.0, 4.0
    assert shares.take(waited=2.5, tokens=500) == {"idle/trainer": 0.25, "idle/generator": 0.6, "tokens_per_second": 50.0}


def test_the_age_of_a_batch_is_that_of_its_tokens() -> None:
    mixed = Completion([1, 2, 3, 4], [0.0] * 4, True, policy_version=5, spans=(Span(5, 0, 1), Span(6, 1, 4)))
    taken = Taken([Group({}, [0], [mixed])], dropped=2, seconds=3.0, waited=1.0, ready=1, in_flight=0)
    found = overlap_metrics(taken, step=7)
    assert (found["async/staleness_mean"], found["async/staleness_max"]) == (1.25, 2.0)
    assert (found["async/dropped"], found["async/queue"], found["time/generate"], found["time/wait_batch"]) == (2.0, 1.0, 3.0, 1.0)


class Slow:
    """Weights whose push lasts until told; notes in which order things happen."""

    metrics: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        self.pushing, self.go_on = threading.Event(), threading.Event()
        self.events: list[str] = []

    def push(self, version: int) -> Measured:
        self.pushing.set()
        assert self.go_on.wait(10)
        self.events.append(f"push {version}")
        return self

    def proven(self, version: int) -> Proof:
        raise AssertionError("not asked for")

    def reinstall(self) -> None:
        self.events.append("reinstall")


def test_a_recovery_waits_for_the_push_that_is_under_way() -> None:
    weights = Slow()
    exclusive = Exclusive(weights, weights.reinstall)
    push = threading.Thread(target=exclusive.push, args=(3,))
    push.start()
    assert weights.pushing.wait(10)
    recovery = threading.Thread(target=exclusive.recover)
    recovery.start()
    weights.go_on.set()
    push.join(10)
    recovery.join(10)
    assert weights.events == ["push 3", "reinstall"]


class Pushed:
    """Weights that note when they are pushed and asked for their proof, which may have taken a second installation.

    Attributes:
        metrics: nothing.
        again: of the proof.
        events: what was called.
    """

    metrics: ClassVar[dict[str, float]] = {}
    version: int | None = None

    def __init__(self, *, again: bool = False) -> None:
        self.again = again
        self.events: list[str] = []

    def push(self, version: int) -> Measured:
        self.version = version
        self.events.append(f"push {version}")
        return self

    def proven(self, version: int) -> Proof:
        self.events.append(f"proven {version}")
        return self


def _sampler(weights: Weights, pending: list[Any]) -> Sampler:
    """A sampler in the midst of a generation."""
    unused: Any = None
    rollouts: Any = SimpleNamespace(busy_seconds=lambda: 0.0, cancel=lambda: None)
    sampler = Sampler(
        config=GRPOConfig(output_dir="unused", use_cpu=True),
        samples=unused,
        rollouts=rollouts,
        weights=weights,
        meters=Meters(),
        reporter=unused,
        stop=unused,
        build=unused,
    )
    sampler.restore({"pending": pending, "syncs": 3})
    return sampler


def test_what_a_resumed_run_pushes_in_the_midst_of_a_generation_is_proven_before_it_trains() -> None:
    weights = Pushed()
    sampler = _sampler(weights, ["first", "second"])
    sampler.push(5)
    assert [sampler.next(step=5, max_steps=9), sampler.next(step=5, max_steps=9)] == ["first", "second"]
    assert weights.events == ["push 5", "proven 5"]


@pytest.mark.parametrize("again", [False, True])
def test_what_an_evaluation_pushes_is_proven_once_and_what_was_sampled_of_unknown_weights_is_told(again: bool) -> None:
    weights = Pushed(again=again)
    sampler = _sampler(weights, ["rest"])
    sampler.push(5)
    assert sampler.settle() is not again
    assert sampler.settle()
    assert weights.events == ["push 5", "proven 5"]
