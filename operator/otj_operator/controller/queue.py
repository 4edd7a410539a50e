"""A queue of keys with the semantics of client-go's: what makes level-triggered reconciliation cheap and safe.

    add(key) ----> waiting (once) ----get()----> in work ----done()----> idle, or waiting again if it was added meanwhile
    retry(key) --> waiting after a delay that doubles with each retry, with jitter; forget(key) resets it

One key is never in two hands at once, and any number of adds before a get is one piece of work.

Urgent keys go first: in a burst of jobs each wants its Job before any of them wants a word in its status. `FAIR` keeps a stream of
urgent ones from starving the others.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FAIR = 64
"""Of so many keys at least one is the longest waiting that is not urgent."""


class KeyedQueue(Generic[K]):
    """Keys waiting for a worker. For use within one event loop."""

    def __init__(
        self,
        *,
        urgent: Callable[[K], bool] = lambda key: False,
        first_delay: float = 0.2,
        longest_delay: float = 60.0,
        random_source: random.Random | None = None,
    ) -> None:
        self._is_urgent = urgent
        self._urgent: deque[K] = deque()
        self._waiting: deque[K] = deque()
        self._queued: set[K] = set()
        self._taken = 0
        self._in_work: set[K] = set()
        self._dirty: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._retries: dict[K, int] = {}
        self._ready = asyncio.Semaphore(0)
        self._first, self._longest = first_delay, longest_delay
        self._random = random_source or random.Random()

    def __len__(self) -> int:
        return len(self._queued)

    def add(self, key: K) -> None:
        """Ask for work on `key`, as soon as a worker is free. A key that waits already keeps its place."""
        if key in self._in_work:
            self._dirty.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            (self._urgent if self._is_urgent(key) else self._waiting).append(key)
            self._ready.release()

    def add_after(self, key: K, delay: float) -> None:
        """Ask for work on `key` in `delay` seconds. Of two such wishes the earlier one counts."""
        when = asyncio.get_running_loop().time() + delay
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= when:
                return
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_at(when, self._fire, key)

    def retry(self, key: K, *, at_least: float = 0.0) -> float:
        """Ask for work on `key` after a failure, not before `at_least` seconds; returns the delay in seconds."""
        count = self._retries[key] = self._retries.get(key, 0) + 1
        delay = at_least + min(self._longest, self._first * 2.0 ** min(count - 1, 30)) * self._random.uniform(0.5, 1.0)
        self.add_after(key, delay)
        return delay

    def forget(self, key: K) -> None:
        """Work on `key` went well: the next failure starts with the shortest delay."""
        self._retries.pop(key, None)

    def drop(self, key: K) -> None:
        """`key` is gone: no timer may bring it back."""
        self.forget(key)
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    async def get(self) -> K:
        """The next key; the caller ends its work with `done`."""
        await self._ready.acquire()
        self._taken += 1
        others_turn = not self._urgent or (self._taken % FAIR == 0 and bool(self._waiting))
        key = (self._waiting if others_turn else self._urgent).popleft()
        self._queued.remove(key)
        self._in_work.add(key)
        return key

    def done(self, key: K) -> None:
        """End the work on `key` that `get` began."""
        self._in_work.remove(key)
        if key in self._dirty:
            self._dirty.remove(key)
            self.add(key)

    def _fire(self, key: K) -> None:
        del self._timers[key]
        self.add(key)
