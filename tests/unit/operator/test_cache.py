"""The cache: late, doubled and missing events do no harm."""

from __future__ import annotations

import pytest

from otj_operator.controller.cache import Cache, Shelf
from otj_operator.plan import JobView, Key
from tests.unit.operator.objects import job, parent

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
    cache.remove_job(ended)
    assert cache.job_of(parent()) == ended
    cache.forget_gone(KEY)
    assert cache.job_of(parent()) is None


def test_a_job_removed_before_its_end_is_gone() -> None:
    cache = Cache()
    cache.jobs.put(job(version=4))
    cache.remove_job(job(version=5))
    assert cache.job_of(parent()) is None


def test_who_had_a_job_is_bereft_until_that_is_forgotten_and_a_namesake_never() -> None:
    cache = Cache()
    assert not cache.bereft(parent())
    cache.remove_job(job(version=5))
    assert cache.bereft(parent())
    assert not cache.bereft(parent(uid="its-successor"))
    cache.forget_gone(KEY)
    assert not cache.bereft(parent())


def test_of_two_jobs_of_one_name_the_own_one_counts() -> None:
    cache = Cache()
    own, foreign = job(version=4), job(version=9, uid="foreign", owner="somebody")
    cache.jobs.put(own)
    cache.jobs.put(foreign)
    assert cache.job_of(parent()) == own


def test_a_listing_of_one_namespace_says_nothing_about_others(shelf: Shelf[JobView]) -> None:
    shelf.put(job(version=3))
    shelf.begin_listing()
    assert shelf.take([], "10", namespace="elsewhere") == set()
    assert shelf.take([], "10", namespace="default") == {KEY}


def test_the_answer_to_a_write_does_not_bring_back_what_was_deleted_meanwhile(shelf: Shelf[JobView]) -> None:
    listed = job(version=3)
    shelf.put(listed)
    shelf.remove(listed)
    assert not shelf.put(job(version=5))
    assert shelf.of(KEY) == ()


def test_a_job_is_urgent_until_it_has_its_job_or_a_word_in_its_status() -> None:
    cache = Cache()
    assert not cache.unborn(KEY)
    cache.parents.put(parent())
    assert cache.unborn(KEY)
    cache.jobs.put(job())
    assert not cache.unborn(KEY)
