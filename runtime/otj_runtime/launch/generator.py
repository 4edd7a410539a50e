"""Watching the generator: first whether it comes up, then whether it stays."""

from __future__ import annotations

import asyncio
import time

import aiohttp

from otj_runtime.launch.board import Board
from otj_runtime.pod.errors import GeneratorLost, GeneratorNotReady

ANSWER_SECONDS = 5.0
STARTING_POLL_SECONDS = 0.5
SERVING_POLL_SECONDS = 2.0


class GeneratorWatch:
    """Polls `<url>/health`. `ready_at` is the monotonic time of the first good answer."""

    def __init__(self, url: str, board: Board, *, ready_timeout: float, lost_after: float) -> None:
        self._url = f"{url}/health"
        self._board = board
        self._ready_timeout = ready_timeout
        self._lost_after = lost_after
        self._failure = "not asked yet"
        self.ready_at: float | None = None

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            GeneratorNotReady: if there was no good answer before the deadline.
            GeneratorLost: if, later, there was none for too long. A shorter silence is a restart, from which the trainer recovers.
        """
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session:
            await self._become_ready(session)
            await self._stay_ready(session)

    async def _become_ready(self, session: aiohttp.ClientSession) -> None:
        deadline = time.monotonic() + self._ready_timeout
        while not await self._answers(session):
            if time.monotonic() >= deadline:
                raise GeneratorNotReady(
                    f"vLLM did not answer {self._url} within {self._ready_timeout:g} s ({self._failure}): read the log of the generator "
                    "container, or raise generation.readyTimeoutSeconds"
                )
            await asyncio.sleep(STARTING_POLL_SECONDS)
        self.ready_at = time.monotonic()
        self._board.generator_ready = True

    async def _stay_ready(self, session: aiohttp.ClientSession) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(SERVING_POLL_SECONDS)
            if await self._answers(session):
                last = time.monotonic()
            elif (gone := time.monotonic() - last) > self._lost_after:
                raise GeneratorLost(
                    f"vLLM has not answered {self._url} for {gone:.0f} s ({self._failure}): read the log of its previous start"
                )

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(self._url) as response:
                self._failure = f"status {response.status}"
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._failure = str(error) or type(error).__name__
            return False
