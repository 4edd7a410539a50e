"""OnlineTrainingJobs that come and go, and what must be true of them and their Jobs whatever happened meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS
from tests.bench.load import Api, run_object

Object = dict[str, Any]
Row = dict[str, Any]

NAMES = 40
PAUSE_SECONDS = 0.1


class Churn:
    """OnlineTrainingJobs that come and go, and come again under the same names."""

    def __init__(self, api: Api, chance: random.Random) -> None:
        self._api, self._chance = api, chance
        self.live: set[str] = set()
        self.made = 0
        self._jobs_of: dict[str, set[str]] = defaultdict(set)
        self._gone: set[str] = set()
        self._late: set[str] = set()

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Keep note of every Job that is ever made, and of those made for an owner that was known to be gone."""

        def job_told(kind: str, job: Object) -> None:
            for owner in job["metadata"].get("ownerReferences", []):
                self._jobs_of[owner["uid"]].add(job["metadata"]["uid"])
                if kind == "ADDED" and owner["uid"] in self._gone:
                    self._late.add(owner["uid"])

        def run_told(kind: str, run: Object) -> None:
            if kind == "DELETED":
                self._gone.add(run["metadata"]["uid"])

        async with self._api.watching(JOBS, job_told), self._api.watching(ONLINE_TRAINING_JOBS, run_told):
            yield

    async def run(self) -> None:
        """Make or delete one, again and again."""
        while True:
            name = f"churn-{self._chance.randrange(NAMES)}"
            if name in self.live:
                self.live.discard(name)  # first: it may be gone although the answer was not waited for
                await self._api.delete(ONLINE_TRAINING_JOBS, name)
            else:
                await self._api.create(ONLINE_TRAINING_JOBS, run_object(name))
                self.live.add(name)
                self.made += 1
            await asyncio.sleep(self._chance.expovariate(1 / PAUSE_SECONDS))

    async def converged(self) -> bool:
        """Whether every job says that it has its Job, and there are no Jobs beside these."""
        found = await self.verdict()
        return not found["lost"] and not found["orphans"]

    async def verdict(self) -> Row:
        """What is wrong now, and what ever was."""
        runs, jobs = await self._api.list(ONLINE_TRAINING_JOBS), await self._api.list(JOBS)
        owners = {job["metadata"]["ownerReferences"][0]["uid"] for job in jobs}
        told = {run["metadata"]["uid"] for run in runs if _says(run, "Created")}
        uids = {run["metadata"]["uid"] for run in runs}
        twice = {uid for uid, made in self._jobs_of.items() if len(made) > 1}
        return {
            "came": self.made,
            "live": len(runs),
            "duplicates": len(twice),
            "duplicates_of_gone_owners": len(twice & self._late),
            "lost": len(self.live - {run["metadata"]["name"] for run in runs}) + len(uids - (owners & told)),
            "orphans": len(owners - uids),
            "failed": sum(_says(run, "Failed") for run in runs),
        }


def _says(run: Object, kind: str) -> bool:
    return any(c["type"] == kind and c["status"] == "True" for c in run.get("status", {}).get("conditions", []))
