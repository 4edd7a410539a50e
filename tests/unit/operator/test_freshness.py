"""Watches that fall silent are found, quiet clusters are not taken for them."""

from __future__ import annotations

import pytest

from otj_operator.controller.freshness import Freshness


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fresh(clock: Clock) -> Freshness:
    return Freshness(clock=clock)


def test_a_watch_that_owes_a_change_for_too_long_has_stalled(fresh: Freshness, clock: Clock) -> None:
    fresh.expect("jobs", 5)
    clock.now = 9.0
    assert fresh.stalled(10) == []
    clock.now = 11.0
    assert fresh.stalled(10) == ["jobs"]


def test_a_watch_that_begins_anew_owes_nothing_of_what_may_be_deleted_by_then(fresh: Freshness, clock: Clock) -> None:
    fresh.expect("jobs", 5)
    fresh.expect("pods", 6)
    fresh.anew("jobs")
    clock.now = 11.0
    assert fresh.stalled(10) == ["pods"]


def test_any_later_change_pays_what_is_owed(fresh: Freshness, clock: Clock) -> None:
    fresh.expect("jobs", 5)
    fresh.told("jobs", 4)
    clock.now = 11.0
    assert fresh.stalled(10) == ["jobs"]
    fresh.told("jobs", 6)
    assert fresh.stalled(10) == []


def test_a_quiet_watch_that_owes_nothing_is_well(fresh: Freshness, clock: Clock) -> None:
    fresh.told("jobs", 5)
    fresh.expect("jobs", 5)
    clock.now = 1e6
    assert fresh.stalled(10) == []
    assert fresh.ages() == {"jobs": 1e6}


def test_further_writes_do_not_give_a_silent_watch_more_time(fresh: Freshness, clock: Clock) -> None:
    for moment in range(12):
        clock.now = float(moment)
        fresh.expect("jobs", 5 + moment)
    assert fresh.stalled(10) == ["jobs"]


def test_one_watch_does_not_answer_for_another(fresh: Freshness, clock: Clock) -> None:
    fresh.expect("jobs", 5)
    fresh.told("pods", 9)
    clock.now = 11.0
    assert fresh.stalled(10) == ["jobs"]
