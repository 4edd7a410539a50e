"""Cache, queue, workers and the periodic listing, tied together.

watch event --apply--> cache --key--> queue --> worker: reconcile --> API server
listing, each few minutes, heals what watches missed ----^              |
launcher --progress puller--> report ---------------key--^ <--again_after-'
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import aiohttp

from otj_operator.controller.cache import Cache, Shelf, V
from otj_operator.controller.progress import ProgressPuller
from otj_operator.controller.queue import KeyedQueue
from otj_operator.controller.reconcile import Reconciler
from otj_operator.controller.settings import Settings
from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS, PODS, ApiError, Cluster, FencedError, Resource
from otj_operator.plan import JobView, Key, Parent, PodView, WorkloadView
from otj_runtime.pod import names

logger = logging.getLogger(__name__)

Object = dict[str, Any]

OWN = f"{names.MANAGED_BY_LABEL}={names.MANAGED_BY}"
"""Selects the Jobs and pods that this operator made."""


class Controller:
    """Everything that runs while this process leads."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings
        self._cache = Cache()
        self._queue: KeyedQueue[Key] = KeyedQueue()
        self._puller = ProgressPuller(settings, changed=self._queue.add)
        self._reconciler = Reconciler(cluster, self._cache, image=settings.runtime_image, report_of=self._puller.report_of)
        self._listed_at = float("-inf")

    @property
    def healthy(self) -> bool:
        """Whether the listings still succeed: three missed ones mean that this process has lost touch."""
        return time.monotonic() - self._listed_at < 3 * self._settings.resync_seconds

    def parent_changed(self, raw: Object, *, deleted: bool) -> None:
        """A watch told of an OnlineTrainingJob."""
        self._changed(self._cache.parents, Parent.of(raw), deleted)

    def job_changed(self, raw: Object, *, deleted: bool) -> None:
        """A watch told of a Job."""
        view = JobView.of(raw)
        if deleted:
            self._cache.remove_job(view)
            self._queue.add(view.key)
        else:
            self._changed(self._cache.jobs, view, False)

    def pod_changed(self, raw: Object, *, deleted: bool) -> None:
        """A watch told of a pod."""
        if names.JOB_LABEL in raw["metadata"].get("labels", {}):
            self._changed(self._cache.pods, PodView.of(raw), deleted)

    def workload_changed(self, raw: Object, *, deleted: bool) -> None:
        """A watch told of a Workload of Kueue's."""
        view = WorkloadView.of(raw)
        if view.job_uid:
            self._changed(self._cache.workloads, view, deleted)

    @property
    def workloads(self) -> Resource | None:
        """Where the cluster keeps Kueue's Workloads, as of the last listing; None where there is no Kueue."""
        return self._reconciler.workloads

    async def listed(self) -> None:
        """List everything once, take it into the cache and queue what changed by it."""
        parents = await self._list(ONLINE_TRAINING_JOBS, Parent, self._cache.parents, "")
        jobs = await self._list(JOBS, JobView, self._cache.jobs, OWN)
        pods = await self._list(PODS, PodView, self._cache.pods, f"{OWN},{names.JOB_LABEL}")
        # A Kueue that is installed later is noticed here; its Workloads are watched from the operator's next start on.
        version = await self._cluster.preferred_version(names.KUEUE)
        self._reconciler.workloads = Resource(names.KUEUE, version, "workloads") if version is not None else None
        workloads = await self._list(self.workloads, WorkloadView, self._cache.workloads, "") if self.workloads is not None else set()
        for key in parents | jobs | pods | workloads:
            self._queue.add(key)
        self._listed_at = time.monotonic()

    async def run(self) -> None:
        """Work until cancelled. `listed` comes first, so that no worker decides on half a picture."""
        async with aiohttp.ClientSession(trust_env=False) as session, asyncio.TaskGroup() as tasks:
            for _ in range(self._settings.workers):
                tasks.create_task(self._work())
            for _ in range(self._settings.progress_connections):
                tasks.create_task(self._puller.work(session))
            tasks.create_task(self._resync())

    def _changed(self, shelf: Shelf[V], view: V, deleted: bool) -> None:
        if deleted:
            shelf.remove(view)
        elif not shelf.put(view):
            return
        self._queue.add(view.key)

    async def _list(self, resource: Resource, kind: type[V], shelf: Shelf[V], labels: str) -> set[Key]:
        shelf.begin_listing()
        items, version = await self._cluster.list(resource, labels=labels)
        return shelf.take((kind.of(item) for item in items), version)

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._settings.resync_seconds)
            try:
                await self.listed()
            except ApiError as error:
                logger.warning("the listing failed, the next one is due in %.0f s: %s", self._settings.resync_seconds, error)

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            try:
                await self._reconcile(key)
            finally:
                self._queue.done(key)

    async def _reconcile(self, key: Key) -> None:
        try:
            settled = await self._reconciler.reconcile(key)
        except FencedError:
            raise
        except ApiError as error:
            delay = self._queue.retry(key)
            # A conflict means that the cache is a moment behind; the next pass sees the newer object.
            level = logging.DEBUG if error.status == 409 else logging.WARNING
            logger.log(level, "tried again in %.1f s: %s", delay, error, extra={"job": str(key)})
        except Exception:
            # One job that nobody foresaw must not stop the others.
            delay = self._queue.retry(key)
            logger.exception("failed, tried again in %.1f s", delay, extra={"job": str(key)})
        else:
            self._queue.forget(key)
            if settled is None:
                self._queue.drop(key)
                self._puller.forget(key)
                return
            self._puller.follow(key, settled.poll)
            if settled.again_after is not None:
                self._queue.add_after(key, settled.again_after)
