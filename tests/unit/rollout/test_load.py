"""Choosing an engine, counting busy time, and giving stragglers up."""

from __future__ import annotations

from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.rollout.load import Load
from otj_runtime.rollout.stragglers import patience


class Clock:
    """Seconds that only pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(engines=st.integers(1, 5), sizes=st.lists(st.integers(1, 1000), max_size=40))
def test_no_engine_is_ever_ahead_by_more_than_one_request(engines: int, sizes: list[int]) -> None:
    load = Load(engines)
    with ExitStack() as stack:
        for size in sizes:
            stack.enter_context(load.request(size))
            assert max(load.outstanding) - min(load.outstanding) <= max(sizes)
        assert sum(load.outstanding) == sum(sizes)
    assert load.outstanding == [0] * engines


def test_busy_is_the_time_in_which_anything_is_outstanding() -> None:
    clock = Clock()
    load = Load(2, clock=clock)
    with load.request(1):
        clock.now = 2.0
        with load.request(1):
            clock.now = 3.0
    clock.now = 10.0
    with load.request(1):
        clock.now = 11.0
        assert load.busy_seconds() == 4.0


def test_without_a_factor_every_group_is_finished() -> None:
    assert patience([1.0] * 15, groups=16, factor=None) is None


def test_nothing_is_given_up_before_three_quarters_are_there() -> None:
    assert patience([1.0, 2.0], groups=4, factor=2.0) is None
    assert patience([1.0, 2.0, 3.0], groups=4, factor=2.0) == 6.0


@given(durations=st.lists(st.floats(0.01, 100), min_size=1, max_size=30), groups=st.integers(1, 30), factor=st.floats(1, 10))
def test_the_patience_does_not_end_before_the_quorum_came(durations: list[float], groups: int, factor: float) -> None:
    durations = sorted(durations)[:groups]
    limit = patience(durations, groups=groups, factor=factor)
    assert limit is None or (len(durations) >= groups * 3 / 4 and limit >= durations[int(groups * 3 / 4 - 1e-9)] - 1e-9)
