"""A network that breaks and a server that refuses, between the operator and the API server: it converges, and does not hammer.

The long versions, with a minute of outage and a frozen leader, are rows of `tests.bench.control_plane`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS, PODS
from tests.bench.load import Api, admin, run_object, until_async
from tests.bench.survival import Supervised
from tests.contract.apiserver import ApiServer
from tests.contract.proxy import Proxy, proxy

pytestmark = pytest.mark.integration

Object = dict[str, Any]

JOBS_AT_ONCE = 12
CALLS_PER_SECOND = 150


@pytest.fixture
async def api(server: ApiServer) -> AsyncIterator[Api]:
    async with admin(server) as made:
        yield made


@pytest.fixture
async def between(server: ApiServer) -> AsyncIterator[Proxy]:
    async with proxy(server) as made:
        yield made


@pytest.fixture
async def rarely_listing(server: ApiServer, between: Proxy) -> AsyncIterator[Supervised]:
    """An operator whose periodic listing comes too late for any test."""
    async with Supervised(server, name="rarely", url=between.url, resync_seconds=3600.0).kept() as started:
        yield started


@pytest.fixture
async def operator(server: ApiServer, between: Proxy) -> AsyncIterator[Supervised]:
    async with Supervised(server, name="faulty", url=between.url, resync_seconds=2.0).kept() as started:
        yield started


async def _apply(api: Api, prefix: str) -> list[str]:
    names = [f"{prefix}-{number}" for number in range(JOBS_AT_ONCE)]
    for name in names:
        await api.create(ONLINE_TRAINING_JOBS, run_object(name))
    return names


async def _converged(api: Api, names: list[str]) -> bool:
    created = {
        run["metadata"]["name"]
        for run in await api.list(ONLINE_TRAINING_JOBS)
        if any(c["type"] == "Created" and c["status"] == "True" for c in run.get("status", {}).get("conditions", []))
    }
    return created >= set(names) and {job["metadata"]["name"] for job in await api.list(JOBS)} >= set(names)


async def test_cut_watches_and_refused_calls_delay_jobs_and_lose_none(api: Api, between: Proxy, operator: Supervised) -> None:
    between.cut_seconds, between.error_share, began = 1.0, 0.1, time.monotonic()
    names = await _apply(api, "refused")
    await until_async("every job has its Job", lambda: _converged(api, names), seconds=45)
    assert {call.status for call in between.calls} & {409, 429, 500}, "no fault was injected"
    assert between.rate(began) < CALLS_PER_SECOND


async def test_an_api_server_that_is_away_is_waited_for_without_hammering(api: Api, between: Proxy, operator: Supervised) -> None:
    await until_async("it leads", lambda: _leads(operator), seconds=45)
    between.down, began = True, time.monotonic()
    between.cut()
    names = await _apply(api, "away")
    await asyncio.sleep(6)
    assert between.rate(began) < CALLS_PER_SECOND
    between.down = False
    await until_async("every job has its Job", lambda: _converged(api, names), seconds=45)


async def test_deletions_that_no_watch_told_of_are_found_by_the_next_listing(api: Api, between: Proxy, operator: Supervised) -> None:
    names = await _apply(api, "unseen")
    await until_async("every job has its Job", lambda: _converged(api, names), seconds=45)
    await _delete_unseen(api, between, operator, names)


async def test_deletions_between_two_watches_are_found_as_soon_as_the_second_begins(
    api: Api, between: Proxy, rarely_listing: Supervised
) -> None:
    names = await _apply(api, "between")
    await until_async("every job has its Job", lambda: _converged(api, names), seconds=45)
    await _delete_unseen(api, between, rarely_listing, names)


async def _delete_unseen(api: Api, between: Proxy, operator: Supervised, names: list[str]) -> None:
    """Delete jobs while the watches say nothing, let these begin anew, and wait until the operator knows."""
    known = await _known(operator)
    between.muted = True
    for name in names:
        await api.delete(ONLINE_TRAINING_JOBS, name)
    await asyncio.sleep(0.5)
    between.expired = {resource.path() for resource in (ONLINE_TRAINING_JOBS, JOBS, PODS)}
    between.cut()
    between.muted = False

    async def forgotten() -> bool:
        return await _known(operator) <= known - JOBS_AT_ONCE

    await until_async("the deleted jobs are forgotten", forgotten, seconds=20)


async def test_a_run_that_goes_unseen_at_a_start_gets_no_second_job_when_a_namesake_goes_too(
    server: ApiServer, api: Api, between: Proxy
) -> None:
    first = (await api.create(ONLINE_TRAINING_JOBS, run_object("unseen-start")))["metadata"]["uid"]
    deleted, listings = asyncio.Event(), 0

    async def before(method: str, path: str) -> None:
        """Delete it after the operator has listed it, before its Job is made and before a watch could tell."""
        nonlocal listings
        if (method, path) == ("GET", ONLINE_TRAINING_JOBS.path()):
            listings += 1
            if listings == 2:
                await deleted.wait()
        if (method, path) == ("POST", JOBS.path("default")) and not deleted.is_set():
            await api.delete(ONLINE_TRAINING_JOBS, "unseen-start")
            deleted.set()

    owners: list[str] = []

    def told(kind: str, job: Object) -> None:
        if kind == "ADDED":
            owners.append(job["metadata"]["ownerReferences"][0]["uid"])

    between.before = before
    async with api.watching(JOBS, told), Supervised(server, name="start", url=between.url, resync_seconds=3600.0).kept():
        await until_async("the Job of a run that is gone", lambda: _seen(first, owners), seconds=45)
        await api.delete(JOBS, "unseen-start")  # as the garbage collector does
        for _ in range(3):
            namesake = (await api.create(ONLINE_TRAINING_JOBS, run_object("unseen-start")))["metadata"]["uid"]
            await until_async("its namesake's Job", lambda uid=namesake: _seen(uid, owners), seconds=30)
            await api.delete(ONLINE_TRAINING_JOBS, "unseen-start")
            await api.delete(JOBS, "unseen-start")
    assert len(owners) == len(set(owners)), "a second Job"


async def _seen(uid: str, owners: list[str]) -> bool:
    assert len(owners) == len(set(owners)), "a second Job"
    return uid in owners


async def _leads(operator: Supervised) -> bool:
    return operator.process is not None and bool((await operator.running.metrics()).get('otj_reconcile_seconds_count{outcome="done"}'))


async def _known(operator: Supervised) -> float:
    return sum(value for name, value in (await operator.running.metrics()).items() if name.startswith("otj_jobs{"))
