"""The cache: late, doubled and missing events do no harm."""

from __future__ import annotations

import pytest

from otj_operator.controller.cache import Cache, Shelf
from otj_operator.plan import JobView, Key
from tests.unit.operator.objects import job, parent, pod

KEY = Key("default", "run")


@pytest.fixture
def shelf() -> Shelf[JobView]:
    return Shelf()


def test_an_older_version_never_replaces_a_newer_one(shelf: Shelf[JobView]) -> None:
    newer = job(version=9, suspend=True)
    assert shelf.put(newer)
    assert not shelf.put(job(version=8))
    assert not shelf.put(job(version=9))
    assert shelf.of(KEY) == (newer,)


def test_the_deletion_of_a_predecessor_does_not_remove_its_successor(shelf: Shelf[JobView]) -> None:
    old, new = job(uid="old", version=1), job(uid="new", version=5)
    shelf.put(old)
    shelf.put(new)
    shelf.remove(old)
    assert shelf.newest(KEY) == new


def test_a_listing_removes_what_was_deleted_unseen(shelf: Shelf[JobView]) -> None:
    shelf.put(job(version=3))
    shelf.begin_listing()
    assert shelf.take([], "10") == {KEY}
    assert shelf.of(KEY) == ()


def test_a_listing_leaves_what_was_made_after_it(shelf: Shelf[JobView]) -> None:
    shelf.begin_listing()
    made = job(version=11)
    shelf.put(made)
    assert shelf.take([], "10") == set()
    assert shelf.of(KEY) == (made,)


def test_a_listing_does_not_bring_back_what_was_deleted_during_it(shelf: Shelf[JobView]) -> None:
    listed = job(version=3)
    shelf.put(listed)
    shelf.begin_listing()
    shelf.remove(listed)
    assert shelf.take([listed], "10") == set()
    assert shelf.of(KEY) == ()


def test_a_listing_that_tells_nothing_new_concerns_nobody(shelf: Shelf[JobView]) -> None:
    shelf.put(job(version=3))
    shelf.begin_listing()
    assert shelf.take([job(version=3)], "10") == set()


def test_the_end_of_a_job_that_was_removed_at_once_is_remembered_until_it_is_written() -> None:
    cache, ended = Cache(), job(version=5, end=("Complete", "CompletionsReached"))
    cache.jobs.put(job(version=4))
    cache.jobs.remove(ended)
    assert cache.job_of(parent()) == ended
    cache.forget_gone(KEY)
    assert cache.job_of(parent()) is None


def test_a_job_removed_before_its_end_is_gone() -> None:
    cache = Cache()
    cache.jobs.put(job(version=4))
    cache.jobs.remove(job(version=5))
    assert cache.job_of(parent()) is None


def test_who_had_a_job_is_bereft_until_that_is_forgotten_and_a_namesake_never() -> None:
    cache = Cache()
    assert not cache.bereft(parent())
    cache.jobs.remove(job(version=5))
    assert cache.bereft(parent())
    assert not cache.bereft(parent(uid="its-successor"))
    cache.forget_gone(KEY)
    assert not cache.bereft(parent())


def test_a_namesakes_job_that_is_gone_too_does_not_hide_that_an_earlier_run_had_one() -> None:
    cache, first = Cache(), parent()
    cache.jobs.remove(job(version=5))
    cache.jobs.remove(job(version=9, uid="job-2", owner="its-successor"))
    assert cache.bereft(first)


def test_a_successor_replaces_the_run_whose_deletion_nobody_told_of() -> None:
    cache, second = Cache(), parent(uid="its-successor", version=7)
    cache.parents.put(parent(version=3))
    assert cache.parents.put(second)
    assert cache.parents.of(KEY) == (second,)


@pytest.mark.parametrize("deleted", [False, True])
def test_what_is_told_late_of_a_predecessor_does_not_bring_it_back(deleted: bool) -> None:
    cache, second = Cache(), parent(uid="its-successor", version=7)
    cache.parents.put(second)
    assert not cache.parents.put(parent(version=3))
    if deleted:
        cache.parents.remove(second)
    assert not cache.parents.put(parent(version=4))
    assert cache.parents.newest(KEY) == (None if deleted else second)


def test_a_job_whose_name_another_one_has_is_gone() -> None:
    cache, foreign = Cache(), job(version=9, uid="foreign", owner="somebody")
    cache.jobs.put(job(version=4))
    cache.jobs.put(foreign)
    assert cache.job_of(parent()) == foreign
    assert cache.bereft(parent())


def test_a_job_that_a_listing_lacks_is_gone() -> None:
    cache = Cache()
    cache.jobs.put(job(version=4))
    cache.jobs.begin_listing()
    cache.jobs.take([], "10")
    assert cache.bereft(parent())


def test_pods_of_one_job_are_there_side_by_side() -> None:
    cache, pods = Cache(), (pod(name="run-1", version=3), pod(name="run-2", version=5))
    for each in pods:
        cache.pods.put(each)
    assert cache.pods.of(KEY) == pods


def test_what_is_older_than_a_listing_that_lacks_it_does_not_come_back(shelf: Shelf[JobView]) -> None:
    shelf.begin_listing()
    shelf.take([], "10")
    assert not shelf.put(job(version=10))
    assert shelf.put(job(version=11))


def test_a_job_that_lost_its_label_and_has_it_again_is_seen_again(shelf: Shelf[JobView]) -> None:
    """To a watch that selects by labels, losing one is a deletion."""
    shelf.put(job(version=3))
    shelf.remove(job(version=5, labelled=False))
    again = job(version=6)
    assert shelf.put(again)
    assert shelf.of(KEY) == (again,)


def test_what_was_held_for_gone_by_mistake_is_there_again_with_the_next_listing(shelf: Shelf[JobView]) -> None:
    there = job(version=3)
    shelf.put(there)
    shelf.remove(there)
    shelf.begin_listing()
    assert shelf.take([there], "10") == {KEY}
    assert shelf.of(KEY) == (there,)


def test_a_listing_of_one_namespace_says_nothing_about_others(shelf: Shelf[JobView]) -> None:
    shelf.put(job(version=3))
    shelf.begin_listing()
    assert shelf.take([], "10", namespace="elsewhere") == set()
    assert shelf.take([], "10", namespace="default") == {KEY}


def test_the_answer_to_a_write_does_not_bring_back_what_was_deleted_meanwhile(shelf: Shelf[JobView]) -> None:
    shelf.put(job(version=3))
    shelf.remove(job(version=6))  # a deletion has a version of its own
    assert not shelf.put(job(version=5))
    assert shelf.of(KEY) == ()


def test_a_job_is_urgent_until_it_has_its_job_or_a_word_in_its_status() -> None:
    cache = Cache()
    assert not cache.unborn(KEY)
    cache.parents.put(parent())
    assert cache.unborn(KEY)
    cache.jobs.put(job())
    assert not cache.unborn(KEY)
