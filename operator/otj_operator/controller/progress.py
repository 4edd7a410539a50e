"""Pulls progress from the launchers of running pods, a few seconds apart, a bounded number at a time.

Pulled and not pushed: pods need no API token, and a pod that hangs cannot make the operator wait, for each pull has a short
deadline. What a pod answers is not trusted: it is read up to a limit, must be a LauncherReport, and redirects are not followed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import aiohttp
from pydantic import ValidationError

from otj_operator.controller.queue import KeyedQueue
from otj_operator.controller.settings import Settings
from otj_operator.plan import Key, PollTarget, Report
from otj_runtime.pod.metrics import LauncherReport

logger = logging.getLogger(__name__)

ANSWER_LIMIT = 64 * 1024


class ProgressPuller:
    """Follows launchers and keeps the last report of each."""

    def __init__(self, settings: Settings, *, changed: Callable[[Key], None]) -> None:
        self._settings, self._changed = settings, changed
        self._queue: KeyedQueue[Key] = KeyedQueue()
        self._targets: dict[Key, PollTarget] = {}
        self._reports: dict[Key, Report] = {}

    def report_of(self, key: Key) -> Report | None:
        """The last report of the launcher of `key`."""
        return self._reports.get(key)

    def follow(self, key: Key, target: PollTarget | None) -> None:
        """Pull from `target` from now on; None ends it, and keeps the last report."""
        if target is None:
            if self._targets.pop(key, None) is not None:
                self._queue.drop(key)
        elif self._targets.get(key) != target:
            self._targets[key] = target
            self._queue.add(key)

    def forget(self, key: Key) -> None:
        """The job is gone."""
        self.follow(key, None)
        self._reports.pop(key, None)

    async def work(self, session: aiohttp.ClientSession) -> None:
        """One worker: pulls from launchers that are due, for ever."""
        while True:
            key = await self._queue.get()
            try:
                await self._pull(session, key)
            finally:
                self._queue.done(key)

    async def _pull(self, session: aiohttp.ClientSession, key: Key) -> None:
        target = self._targets.get(key)
        if target is None:
            return
        try:
            report = Report(pod_uid=target.pod_uid, body=await self._ask(session, target.url))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            logger.debug("no progress from %s: %s", target.url, error, extra={"job": str(key)})
        else:
            if self._targets.get(key) == target and self._reports.get(key) != report:
                self._reports[key] = report
                self._changed(key)
        if key in self._targets:
            # Jitter keeps jobs that were started together from being asked together.
            self._queue.add_after(key, self._settings.progress_seconds * random.uniform(0.9, 1.1))

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> LauncherReport:
        timeout = aiohttp.ClientTimeout(total=self._settings.progress_timeout_seconds)
        async with session.get(url, timeout=timeout, allow_redirects=False) as response:
            response.raise_for_status()
            body = await response.content.read(ANSWER_LIMIT)
        try:
            return LauncherReport.model_validate_json(body)
        except ValidationError as error:
            raise ValueError(f"no LauncherReport: {error.error_count()} faults") from error
