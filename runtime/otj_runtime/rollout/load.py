"""What is under way in the generator, by engine: whom to ask next, and how long anything was under way at all.

A generator with several engines (data parallel) holds a copy of the model in each. All completions of a prompt go to one of them,
because only there the prompt's keys and values are shared; the engine is the one with the fewest tokens outstanding, counted as
what they may become: prompt plus longest completion. Each rank counts its own requests only. Ranks ask at the same moment with
batches of one size, so their counts agree well enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Load:
    """Outstanding tokens of each engine. May be used by several threads.

    Args:
        engines: how many there are.
        clock: seconds.
    """

    def __init__(self, engines: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._outstanding = [0] * engines
        self._requests = 0
        self._busy = 0.0
        self._busy_since = 0.0
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def outstanding(self) -> list[int]:
        """Tokens, by engine."""
        with self._lock:
            return list(self._outstanding)

    @contextmanager
    def request(self, tokens: int) -> Iterator[int]:
        """Number of the engine to ask for something of at most `tokens` tokens; it counts until the block ends."""
        with self._lock:
            engine = min(range(len(self._outstanding)), key=self._outstanding.__getitem__)
            self._outstanding[engine] += tokens
            if self._requests == 0:
                self._busy_since = self._clock()
            self._requests += 1
        try:
            yield engine
        finally:
            with self._lock:
                self._outstanding[engine] -= tokens
                self._requests -= 1
                if self._requests == 0:
                    self._busy += self._clock() - self._busy_since

    def busy_seconds(self) -> float:
        """Seconds in which at least one request was outstanding."""
        with self._lock:
            return self._busy + (self._clock() - self._busy_since if self._requests else 0.0)
