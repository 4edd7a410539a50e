"""Leadership by a Lease: one operator acts, the others wait.

    standby --Lease free, released or not renewed for `duration`--> leader --not renewed for `deadline`--> the process ends

The holder's clock is never compared with ours: a standby measures how long *it* has seen no renewal. The leader gives up a third of
`duration` before a standby may take over, and `valid()` is the fence for writes in a process that was stopped meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from otj_operator.kube.cluster import ApiError, Cluster, Object
from otj_operator.kube.resources import LEASES

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0
"""After so long without a renewal a standby takes over."""


class Leadership:
    """A Lease that this process competes for."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str,
        name: str,
        identity: str,
        duration: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._namespace, self._name, self._identity = cluster, namespace, name, identity
        self._duration, self._deadline, self._period, self._clock = duration, duration * 2 / 3, duration / 7.5, clock
        self._seen: tuple[Object, float] | None = None
        self._renewed = float("-inf")

    def valid(self) -> bool:
        """Whether no standby can have taken over yet."""
        return self._clock() - self._renewed < self._deadline

    async def acquire(self) -> None:
        """Wait until this process leads."""
        logger.info("waiting for the lease %s/%s as %s", self._namespace, self._name, self._identity)
        while not await self._try():  # noqa: ASYNC110 - nothing in this process can tell that the Lease became free
            await asyncio.sleep(self._period)
        logger.info("leading")

    async def keep(self) -> None:
        """Renew until that fails for too long; returns when leadership is lost."""
        while self.valid():
            await asyncio.sleep(self._period)
            await self._try()
        logger.error("the lease %s/%s is lost", self._namespace, self._name)

    async def release(self) -> None:
        """Let a standby take over at once."""
        if self._seen is None or not self.valid():
            return
        lease = self._seen[0]
        self._renewed = float("-inf")
        try:
            await self._cluster.replace(LEASES, lease | {"spec": lease["spec"] | {"holderIdentity": "", "leaseDurationSeconds": 1}})
        except ApiError as error:
            logger.warning("the lease could not be released, a standby takes over %.0f s later: %s", self._duration, error)

    async def _try(self) -> bool:
        """Take or renew the Lease if it is free or ours. An error counts as no."""
        started = self._clock()
        try:
            async with asyncio.timeout(self._deadline):
                lease = await self._cluster.get(LEASES, namespace=self._namespace, name=self._name)
                if lease is None:
                    lease = await self._cluster.create(LEASES, self._lease(None))
                elif self._mine_or_free(lease):
                    lease = await self._cluster.replace(LEASES, self._lease(lease))
                else:
                    return False
        except (ApiError, TimeoutError) as error:
            if not (isinstance(error, ApiError) and error.status == 409):  # 409: somebody else was faster
                logger.warning("the lease could not be read or written: %s", error or "no answer in time")
            return False
        # Counted from before the call: a standby may have seen the renewal that early.
        self._seen, self._renewed = (lease, started), started
        return True

    def _mine_or_free(self, lease: Object) -> bool:
        spec = lease.get("spec", {})
        holder = spec.get("holderIdentity", "")
        now = self._clock()
        if self._seen is None or self._seen[0].get("spec") != spec:
            self._seen = (lease, now)
        return holder in ("", self._identity) or now - self._seen[1] > float(spec.get("leaseDurationSeconds", self._duration))

    def _lease(self, previous: Object | None) -> Object:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before = previous.get("spec", {}) if previous else {}
        taken = before.get("holderIdentity") != self._identity
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(self._duration),
            "acquireTime": now if taken else before.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": before.get("leaseTransitions", 0) + (1 if taken and previous else 0),
        }
        metadata = previous["metadata"] if previous else {"namespace": self._namespace, "name": self._name}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
