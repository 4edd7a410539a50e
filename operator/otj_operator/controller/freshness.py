"""Whether the watches still tell: a connection can be open and silent for ever.

    our write, or a listing, knows version v of a kind --expect(v)-->  waiting  --told(w >= v)-->  fresh
                                                                          `--for too long--> stalled: /healthz fails, the kubelet restarts us

A quiet cluster is no stall, because nothing is expected there. Versions of one kind are in one order, so any later change proves that
the watch has passed the expected one; the oldest expectation is enough to remember.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Freshness:
    """Of each watch, named by its kind: when it last told something, and what it owes."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, tuple[int, float]] = {}
        self._owed: dict[str, tuple[int, float]] = {}

    def told(self, kind: str, version: int) -> None:
        """The watch of `kind` told of a change at `version`."""
        newest, _ = self._told.get(kind, (0, 0.0))
        self._told[kind] = (max(newest, version), self._clock())
        if kind in self._owed and version >= self._owed[kind][0]:
            del self._owed[kind]

    def expect(self, kind: str, version: int) -> None:
        """An object of `kind` has `version`, which its watch must tell of sooner or later."""
        newest, _ = self._told.get(kind, (0, 0.0))
        if kind not in self._owed and version > newest:
            self._owed[kind] = (version, self._clock())

    def anew(self, kind: str) -> None:
        """The watch of `kind` begins anew: what was deleted until then it need not tell, and what is there it must tell anyway."""
        self._owed.pop(kind, None)

    def ages(self) -> dict[str, float]:
        """Seconds since the last change that each watch told of."""
        now = self._clock()
        return {kind: now - at for kind, (_, at) in self._told.items()}

    def stalled(self, seconds: float) -> list[str]:
        """The kinds whose watch has owed a change for more than `seconds`."""
        now = self._clock()
        return [kind for kind, (_, since) in self._owed.items() if now - since > seconds]
