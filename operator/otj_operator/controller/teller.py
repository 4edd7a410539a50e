"""Posts Kubernetes Events beside the path of the jobs: a pass does not wait for them, and a burst of them does not fill the API server.

Events are courtesy. When more wait than fit, the newest is dropped and counted; conditions and metrics still tell.
"""

from __future__ import annotations

import asyncio
import logging

from otj_operator.kube import EVENTS, ApiError, Cluster
from otj_operator.metrics import Metrics
from otj_operator.plan import Parent
from otj_operator.plan.events import Event, event_object
from otj_runtime.api import API_VERSION, KIND
from otj_runtime.pod.names import MANAGED_BY

logger = logging.getLogger(__name__)

CAPACITY = 10_000
ATTEMPTS = 3
PAUSE_SECONDS = 1.0


class Teller:
    """A line of events, and the worker that posts them one after the other."""

    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        self._cluster, self._metrics = cluster, metrics
        self._waiting: asyncio.Queue[tuple[Parent, Event]] = asyncio.Queue(CAPACITY)

    def tell(self, parent: Parent, event: Event) -> None:
        """Post `event` about `parent` when it is its turn."""
        logger.info("%s: %s", event.reason, event.message, extra={"job": parent.key})
        try:
            self._waiting.put_nowait((parent, event))
        except asyncio.QueueFull:
            self._metrics.events_dropped.inc()

    async def work(self) -> None:
        """Post events, for ever."""
        while True:
            parent, event = await self._waiting.get()
            await self._post(parent, event)
            self._waiting.task_done()

    async def drained(self) -> None:
        """Wait until everything told so far was posted."""
        await self._waiting.join()

    async def _post(self, parent: Parent, event: Event) -> None:
        involved = {"apiVersion": API_VERSION, "kind": KIND, "namespace": parent.key.namespace, "name": parent.key.name, "uid": parent.uid}
        body = event_object(event, involved=involved, component=MANAGED_BY)
        for attempt in range(ATTEMPTS):
            try:
                await self._cluster.create(EVENTS, body)
            except ApiError as error:
                if error.status == 409:
                    return  # told before
                if (0 < error.status < 500 and error.status != 429) or attempt == ATTEMPTS - 1:
                    logger.warning("an event could not be posted: %s", error, extra={"job": parent.key})
                    return
                await asyncio.sleep(max(error.retry_after, PAUSE_SECONDS * 2**attempt))
            else:
                return
