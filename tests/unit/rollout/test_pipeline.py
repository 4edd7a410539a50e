"""Which generation is asked for when, and that none is lost, repeated or taken out of order."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.pod.errors import GeneratorLost, RewardFailed
from otj_runtime.rollout.collect import Rollouts
from otj_runtime.rollout.pipeline import Pipeline
from otj_runtime.rollout.types import Cancelled, Completion, Group, Sampling

SAMPLING = Sampling(count=2, max_tokens=4)


class RecordedRollouts:
    """Notes what is asked for, with which version; answers when told."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.futures: list[Future[list[Group]]] = []

    def start(self, samples: list[dict[str, Any]], sampling: Sampling, *, policy_version: int) -> Future[list[Group]]:
        self.asked.append((samples[0]["prompt"], policy_version))
        self.futures.append(Future())
        return self.futures[-1]

    def answer(self, index: int, groups: int = 2) -> None:
        prompt, version = self.asked[index]
        completion = Completion([1], [-0.1], True, version)
        self.futures[index].set_result([Group({"prompt": prompt}, [0], [completion], rewards=[0.0])] * groups)

    def cancel(self) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(Cancelled("called off"))


def pipeline(rollouts: RecordedRollouts, ahead: int) -> Pipeline:
    return Pipeline(cast(Rollouts, rollouts), samples=lambda n: [{"prompt": f"g{n}"}] * 2, sampling=SAMPLING, ahead=ahead)


@given(ahead=st.integers(0, 4), first=st.integers(0, 5), count=st.integers(1, 12))
def test_every_generation_is_asked_once_and_at_most_so_many_versions_early(ahead: int, first: int, count: int) -> None:
    rollouts = RecordedRollouts()
    line = pipeline(rollouts, ahead)
    last = first + count - 1
    for generation in range(first, last + 1):
        line.fill(generation, last=last, policy_version=generation)
        rollouts.answer(generation - first)
        taken = line.take(generation)
        assert taken.groups[0].sample["prompt"] == f"g{generation}"
        assert generation - taken.groups[0].completions[0].policy_version == min(ahead, generation - first)
    assert [prompt for prompt, _ in rollouts.asked] == [f"g{n}" for n in range(first, last + 1)]


def test_a_run_that_resumes_asks_again_for_what_was_in_flight() -> None:
    before, after = RecordedRollouts(), RecordedRollouts()
    line = pipeline(before, 2)
    line.fill(0, last=9, policy_version=0)
    before.answer(0)
    line.take(0)
    line.fill(1, last=9, policy_version=1)  # here the pod dies: 1, 2 and 3 are in flight
    pipeline(after, 2).fill(1, last=9, policy_version=1)
    assert before.asked == [("g0", 0), ("g1", 0), ("g2", 0), ("g3", 1)]
    assert after.asked == [("g1", 1), ("g2", 1), ("g3", 1)]


def test_what_is_ready_in_flight_and_dropped_is_counted() -> None:
    rollouts = RecordedRollouts()
    line = pipeline(rollouts, 2)
    line.fill(0, last=9, policy_version=0)
    rollouts.answer(1)
    rollouts.answer(0, groups=1)
    taken = line.take(0)
    assert (taken.ready, taken.in_flight, taken.dropped) == (1, 1, 1)


def test_a_failure_in_the_background_is_raised_where_it_is_waited_for() -> None:
    rollouts = RecordedRollouts()
    line = pipeline(rollouts, 1)
    line.fill(0, last=9, policy_version=0)
    rollouts.answer(0)
    rollouts.futures[1].set_exception(RewardFailed("reward broke"))
    line.take(0)
    line.fill(1, last=9, policy_version=1)
    with pytest.raises(RewardFailed, match="reward broke"):
        line.take(1)


def test_cancelling_leaves_nothing_in_flight() -> None:
    rollouts = RecordedRollouts()
    line = pipeline(rollouts, 3)
    line.fill(0, last=9, policy_version=0)
    rollouts.answer(0)
    line.cancel()
    assert all(future.done() for future in rollouts.futures)


def test_what_was_being_waited_for_is_called_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = RecordedRollouts()
    line = pipeline(rollouts, 0)
    line.fill(0, last=9, policy_version=0)
    monkeypatch.setattr("otj_runtime.rollout.pipeline.WAIT_SECONDS", 0.01)
    with pytest.raises(GeneratorLost, match="the rollouts of generation 0 were not there"):
        line.take(0)
    line.cancel()
    assert rollouts.futures[0].done()
