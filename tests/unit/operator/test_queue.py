"""The work queue: one key in one hand, delays that grow, nothing lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from otj_operator.controller import KeyedQueue
from otj_operator.controller.queue import FAIR
from tests.unit.operator.virtual_time import run_virtually


def now() -> float:
    return asyncio.get_running_loop().time()


def run(work: Coroutine[Any, Any, None]) -> None:
    run_virtually(work)


def test_many_adds_of_a_key_are_one_piece_of_work() -> None:
    async def scenario() -> None:
        queue: KeyedQueue[str] = KeyedQueue()
        for _ in range(5):
            queue.add("a")
        queue.add("b")
        assert [await queue.get(), await queue.get()] == ["a", "b"]
        assert len(queue) == 0

    run(scenario())


def test_a_key_added_during_its_work_comes_again_afterwards_and_not_before() -> None:
    async def scenario() -> None:
        queue: KeyedQueue[str] = KeyedQueue()
        queue.add("a")
        await queue.get()
        queue.add("a")
        queue.add("a")
        assert len(queue) == 0, "two workers would hold one key"
        queue.done("a")
        assert await queue.get() == "a"
        queue.done("a")
        assert len(queue) == 0

    run(scenario())


def test_of_two_delays_the_shorter_one_counts() -> None:
    async def scenario() -> None:
        queue: KeyedQueue[str] = KeyedQueue()
        queue.add_after("a", 30.0)
        queue.add_after("a", 5.0)
        queue.add_after("a", 10.0)
        await queue.get()
        assert now() == 5.0
        queue.done("a")
        await asyncio.sleep(60)
        assert len(queue) == 0

    run(scenario())


def test_retries_wait_longer_each_time_up_to_a_limit_and_start_anew_after_success() -> None:
    async def scenario() -> None:
        queue: KeyedQueue[str] = KeyedQueue(first_delay=1.0, longest_delay=60.0, random_source=random.Random(0))
        delays = []
        for _ in range(12):
            delays.append(queue.retry("a"))
            assert await queue.get() == "a"
            queue.done("a")
        assert all(0.5 * 2.0**n <= delay <= 2.0**n for n, delay in enumerate(delays[:6]))
        assert all(30.0 <= delay <= 60.0 for delay in delays[6:])
        assert len(set(delays)) == len(delays), "without jitter all jobs come back at once"
        queue.forget("a")
        assert queue.retry("a") <= 1.0

    run(scenario())


def test_urgent_keys_go_first_but_do_not_starve_the_others() -> None:
    async def scenario() -> None:
        queue: KeyedQueue[str] = KeyedQueue(urgent=lambda key: key.startswith("new"))
        for number in range(3):
            queue.add(f"old-{number}")
        for number in range(3 * FAIR):
            queue.add(f"new-{number}")
        order = [await queue.get() for _ in range(3 * FAIR)]
        assert order[: FAIR - 1] == [f"new-{number}" for number in range(FAIR - 1)]
        assert [key for key in order if key.startswith("old")] == ["old-0", "old-1", "old-2"]

    run(scenario())


def test_a_retry_waits_as_long_as_the_server_wishes() -> None:
    async def scenario() -> None:
        queue: KeyedQueue[str] = KeyedQueue(first_delay=0.2)
        queue.retry("a", at_least=7.0)
        await queue.get()
        assert 7.0 < now() < 7.3

    run(scenario())


def test_a_dropped_key_does_not_come_back() -> None:
    async def scenario() -> None:
        queue: KeyedQueue[str] = KeyedQueue()
        queue.add_after("a", 1.0)
        queue.drop("a")
        await asyncio.sleep(5)
        assert len(queue) == 0

    run(scenario())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 3)), max_size=40), st.integers(1, 4))
def test_every_wish_is_followed_by_work_and_no_key_is_in_two_hands(wishes: list[tuple[str, float]], workers: int) -> None:
    async def scenario() -> None:
        queue: KeyedQueue[str] = KeyedQueue()
        in_hands: set[str] = set()
        begun: dict[str, float] = {}

        async def work() -> None:
            while True:
                key = await queue.get()
                assert key not in in_hands
                in_hands.add(key)
                begun[key] = now()
                await asyncio.sleep(0.7)
                in_hands.remove(key)
                queue.done(key)

        hands = [asyncio.create_task(work()) for _ in range(workers)]
        last: dict[str, float] = {}
        for key, pause in wishes:
            await asyncio.sleep(pause)
            queue.add(key)
            last[key] = now()
        await asyncio.sleep(100)
        assert all(begun[key] >= moment for key, moment in last.items())
        assert all(not hand.done() for hand in hands)
        for hand in hands:
            hand.cancel()

    run(scenario())
