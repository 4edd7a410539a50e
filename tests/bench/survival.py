"""What the operator survives: the rows `faults` and `leader` of `tests.bench.control_plane`.

faults  behind a proxy that cuts watches each second and answers 10 % of the calls with 409, 429 or 500; then the API server is away
        for a minute; then watches are muted while jobs are deleted, and history is gone (410)
leader  two replicas, each behind a proxy that notes its writes; the leader is stopped by SIGSTOP for a minute and wakes up again
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS, PODS
from otj_operator.main import LOST_LEASE
from otj_runtime.pod.ports import free_port
from tests.bench.churn import Churn
from tests.bench.load import Api, until_async
from tests.bench.operators import SYSTEM, Running, arguments, environment
from tests.cluster.host import REPOSITORY
from tests.contract.apiserver import ApiServer, controllers
from tests.contract.proxy import Proxy, proxy

Row = dict[str, Any]

AWAY_SECONDS = 60.0
FROZEN_SECONDS = 60.0
RESYNC_SECONDS = 10.0


class Supervised:
    """An operator that is started again when it ends, as the kubelet does."""

    def __init__(self, server: ApiServer, *, name: str, url: str, restart: bool = True, resync_seconds: float = RESYNC_SECONDS) -> None:
        self._port = free_port()
        self._environment = environment(server, name=name, url=url)
        options = [*arguments(identity=name, port=self._port, progress_seconds=5.0), "--resync-seconds", str(resync_seconds)]
        self._command = [sys.executable, "-m", "otj_operator", *options]
        self._log = (server.folder / f"{name}.log").open("ab")
        self._restart = restart
        self.ends: list[int] = []
        self.process: asyncio.subprocess.Process | None = None

    @property
    def running(self) -> Running:
        """The present process."""
        assert self.process is not None
        return Running(pid=self.process.pid, port=self._port)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[Supervised]:
        """Keep it running while the context is open."""
        task = asyncio.create_task(self._keep())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self.process is not None and self.process.returncode is None:
                self.process.kill()
                await self.process.wait()
            self._log.close()

    async def _keep(self) -> None:
        while True:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment, stdout=self._log, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )
            self.ends.append(await self.process.wait())
            if not self._restart:
                return
            await asyncio.sleep(2)


async def faults(server: ApiServer, api: Api, options: argparse.Namespace) -> Row:
    """See the module."""
    with controllers(server):
        async with proxy(server) as between, Supervised(server, name="faulty", url=between.url).kept() as operator:
            churn = Churn(api, random.Random(options.seed))
            async with churn.followed():
                between.cut_seconds, between.error_share = 1.0, 0.1
                began = time.monotonic()
                await _churn_for(churn, 30)
                under_faults = await until_async("everything converged under faults", churn.converged, seconds=90)
                rate_faults, ended_by_faults = between.rate(began), len(operator.ends)

                between.down, away = True, time.monotonic()
                between.cut()
                await _churn_for(churn, AWAY_SECONDS)
                rate_away = between.rate(away)
                between.down, between.error_share, between.cut_seconds = False, 0.0, None
                after_away = await until_async("everything converged after the API server came back", churn.converged, seconds=120)

                healed = await _missed_deletions(api, between, operator, churn)
                await asyncio.sleep(5)
                quiet = time.monotonic()
                await asyncio.sleep(20)
                found = await churn.verdict()
                return {
                    "converged_under_faults_s": round(under_faults, 1),
                    "calls_per_s_max_under_faults": rate_faults,
                    "converged_after_60_s_away_s": round(after_away, 1),
                    "calls_per_s_max_while_away": rate_away,
                    "missed_deletions_healed_s": None if healed is None else round(healed, 1),
                    "calls_per_s_max_at_rest": between.rate(quiet),
                    "operator_ends": operator.ends,
                    "ends_by_faults": ended_by_faults,
                    **found,
                    "passed": healed is not None
                    and not any((found["duplicates"], found["lost"], found["orphans"], found["failed"]))
                    and max(rate_faults, rate_away) < 200,
                }


async def _churn_for(churn: Churn, seconds: float) -> None:
    task = asyncio.create_task(churn.run())
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _missed_deletions(api: Api, between: Proxy, operator: Supervised, churn: Churn) -> float | None:
    """Delete jobs while the watches say nothing, then tell them that history is gone; seconds until the operator knows better."""
    between.muted = True
    for name in list(churn.live)[:10]:
        await api.delete(ONLINE_TRAINING_JOBS, name)
        churn.live.discard(name)
    left = len(await api.list(ONLINE_TRAINING_JOBS))
    await asyncio.sleep(2)
    between.expired = {resource.path() for resource in (ONLINE_TRAINING_JOBS, JOBS, PODS)}
    between.cut()
    between.muted = False

    async def known() -> bool:
        found = await operator.running.metrics()
        return sum(value for name, value in found.items() if name.startswith("otj_jobs{")) == left

    try:
        return await until_async("the operator forgets what is gone", known, seconds=3 * RESYNC_SECONDS)
    except AssertionError:
        return None


async def leader(server: ApiServer, api: Api, options: argparse.Namespace) -> Row:
    """See the module."""

    async def holder() -> str:
        lease = await api.call("GET", f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/online-training-operator")
        return str(lease["spec"]["holderIdentity"])

    async def leads(name: str) -> bool:
        try:
            return await holder() == name
        except RuntimeError:
            return False

    with controllers(server):
        async with proxy(server) as one, proxy(server) as two, Supervised(server, name="one", url=one.url, restart=False).kept() as first:
            await until_async("the first replica leads", lambda: leads("one"), seconds=60)
            async with Supervised(server, name="two", url=two.url, restart=False).kept():
                churn = Churn(api, random.Random(options.seed))
                async with churn.followed():
                    came = asyncio.create_task(churn.run())
                    await asyncio.sleep(8)
                    assert first.process is not None
                    first.process.send_signal(signal.SIGSTOP)
                    frozen = time.monotonic()
                    await until_async("the second replica leads", lambda: leads("two"), seconds=60)
                    takeover = time.monotonic() - frozen
                    await asyncio.sleep(max(0.0, FROZEN_SECONDS - takeover))
                    first.process.send_signal(signal.SIGCONT)
                    await until_async("the first replica ends", lambda: _ended(first), seconds=30)
                    await asyncio.sleep(5)
                    came.cancel()
                    await asyncio.gather(came, return_exceptions=True)
                    await until_async("everything converged", churn.converged, seconds=60)
                    found = await churn.verdict()
    first_write_of_second = min(call.time for call in two.writes())
    last_write_of_first = max(call.time for call in one.writes())
    return {
        "takeover_s": round(takeover, 1),
        "first_write_of_the_new_leader_s": round(first_write_of_second - frozen, 1),
        "writes_of_two_leaders_overlap": last_write_of_first >= first_write_of_second,
        "old_leader_ended_with": first.ends,
        **found,
        "passed": takeover <= 20
        and last_write_of_first < first_write_of_second
        and first.ends == [LOST_LEASE]
        and not any((found["duplicates"], found["lost"], found["orphans"], found["failed"])),
    }


async def _ended(supervised: Supervised) -> bool:
    return bool(supervised.ends)
