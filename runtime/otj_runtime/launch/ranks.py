"""The training ranks as one thing: `accelerate launch` and everything below it, started, read, and ended together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import BinaryIO

from otj_runtime.launch.verdict import Tail
from otj_runtime.pod.processes import children, kill_descendants, reap, signal_all, zombies

CHUNK_BYTES = 65536
PIPE_SECONDS = 5.0
REAP_SECONDS = 5.0


class Ranks:
    """Running ranks. Their output passes through unchanged; `tail` keeps its last lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.tail = Tail()
        assert process.stdout is not None
        assert process.stderr is not None
        self._pumps = [
            asyncio.create_task(self._pump(process.stdout, sys.stdout.buffer)),
            asyncio.create_task(self._pump(process.stderr, sys.stderr.buffer)),
        ]
        self._reaper = asyncio.create_task(_reap_orphans())

    @classmethod
    async def start(cls, command: list[str], environment: dict[str, str]) -> Ranks:
        """Run `command` in a session of its own, so that a terminal's Ctrl-C reaches the launcher only."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, env=os.environ | environment, stdout=pipe, stderr=pipe, start_new_session=True
        )
        return cls(process)

    async def wait(self) -> int:
        """The exit status of `accelerate launch`."""
        return await self._process.wait()

    def ask_to_stop(self) -> None:
        """SIGTERM to every rank, past torchrun: that one would give them 30 seconds, and a checkpoint may take longer.

        Before there are ranks, accelerate itself is stopped.
        """
        ranks = children(self._process.pid)
        signal_all(ranks or [self._process.pid], signal.SIGTERM)

    async def end(self) -> None:
        """Kill whatever is left, and read what was still to be printed."""
        self._reaper.cancel()
        await asyncio.to_thread(kill_descendants)
        await self._process.wait()
        reap(zombies())
        _, late = await asyncio.wait(self._pumps, timeout=PIPE_SECONDS)
        for pump in late:
            pump.cancel()

    async def _pump(self, source: asyncio.StreamReader, target: BinaryIO) -> None:
        while chunk := await source.read(CHUNK_BYTES):
            self.tail.feed(chunk)
            with contextlib.suppress(OSError):  # nobody reads any more; the ranks must not block for that
                target.write(chunk)
                target.flush()


async def _reap_orphans() -> None:
    """Wait for orphans, which the first process of a container inherits. A child of asyncio is gone by the second look."""
    before: set[int] = set()
    while True:
        now = zombies()
        reap(now & before)
        before = now - before
        await asyncio.sleep(REAP_SECONDS)
