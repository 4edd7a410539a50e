"""Pulls progress from the launchers of running pods, a few seconds apart, a bounded number at a time.

Pulled and not pushed: pods need no API token, and a pod that hangs cannot make the operator wait, for each pull has a short
deadline. What a pod answers is not trusted: it is read up to a limit, must be a LauncherReport, and redirects are not followed.

All pulls together keep to a rate, so that what they cost, and what their news writes to the API server, does not grow with the jobs:
with many of them each is asked less often. A launcher that does not answer is asked ever less often, up to once a minute.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import aiohttp
from pydantic import ValidationError

from otj_operator.controller.queue import KeyedQueue
from otj_operator.controller.settings import Settings
from otj_operator.metrics import Metrics
from otj_operator.plan import Key, PollTarget, Report
from otj_runtime.pod.metrics import LauncherReport

logger = logging.getLogger(__name__)

ANSWER_LIMIT = 64 * 1024

KEPT_SECONDS = 30.0
"""A connection is kept so long for the next pull; later ones are made anew, for the launchers of thousands of jobs."""


def open_launcher_session() -> aiohttp.ClientSession:
    """A session for `ProgressPuller.work`: connections are kept between pulls. Cookies are not."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS, use_dns_cache=False)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


class ProgressPuller:
    """Follows launchers and keeps the last report of each."""

    def __init__(self, settings: Settings, metrics: Metrics, *, changed: Callable[[Key], None]) -> None:
        self._settings, self._metrics, self._changed = settings, metrics, changed
        self._timeout = aiohttp.ClientTimeout(total=settings.progress_timeout_seconds)
        self._queue: KeyedQueue[Key] = KeyedQueue(first_delay=settings.progress_seconds)
        self._targets: dict[Key, PollTarget] = {}
        self._reports: dict[Key, Report] = {}
        self._unanswered: dict[Key, datetime] = {}

    def report_of(self, key: Key) -> Report | None:
        """The last report of the launcher of `key`."""
        return self._reports.get(key)

    def silent_since(self, key: Key) -> datetime | None:
        """Since when the launcher of `key` has not answered, if that is too long."""
        since = self._unanswered.get(key)
        long = timedelta(seconds=self._settings.silent_seconds)
        return since if since is not None and datetime.now(UTC) - since >= long else None

    def follow(self, key: Key, target: PollTarget | None) -> None:
        """Pull from `target` from now on; None ends it, and keeps the last report."""
        if self._targets.get(key) != target:
            self._unanswered.pop(key, None)
        if target is None:
            if self._targets.pop(key, None) is not None:
                self._queue.drop(key)
        elif self._targets.get(key) != target:
            self._targets[key] = target
            # At a restart there are a thousand new ones at once.
            self._queue.add_after(key, random.uniform(0.0, len(self._targets) / self._settings.progress_rate))

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
            self._metrics.pulls.labels("failed").inc()
            logger.debug("no progress from %s: %s", target.url, error, extra={"job": key})
            if self._targets.get(key) == target:
                self._unanswered.setdefault(key, datetime.now(UTC))
                self._queue.retry(key)
                if self.silent_since(key) is not None:
                    self._changed(key)
            return
        self._metrics.pulls.labels("answered").inc()
        if self._targets.get(key) == target:
            was_silent = self.silent_since(key) is not None
            self._unanswered.pop(key, None)
            if was_silent or self._reports.get(key) != report:
                self._reports[key] = report
                self._changed(key)
        if key in self._targets:
            self._queue.forget(key)
            self._queue.add_after(key, self._pause())

    def _pause(self) -> float:
        """Seconds until a launcher is asked again. Jitter keeps jobs that were started together from being asked together."""
        enough = len(self._targets) / self._settings.progress_rate
        return max(self._settings.progress_seconds, enough) * random.uniform(0.9, 1.1)

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> LauncherReport:
        async with session.get(url, timeout=self._timeout, allow_redirects=False) as response:
            response.raise_for_status()
            body = await response.content.read(ANSWER_LIMIT)
        try:
            return LauncherReport.model_validate_json(body)
        except ValidationError as error:
            raise ValueError(f"no LauncherReport: {error.error_count()} faults") from error
