"""The load of the control-plane benchmark: cheap enough to share two cores with the API server, etcd and the operator it measures.

Api        raw requests and watches as admin, one aiohttp session, no models
Launchers  one loopback server that answers as every job's launcher, each on an address of its own in 127.0.0.0/8
Fleet      OnlineTrainingJobs with the pods that a Job controller and a kubelet would give them
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aiohttp
from yarl import URL

from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS, PODS, Resource
from otj_runtime.api import Progress
from otj_runtime.pod import names
from otj_runtime.pod.metrics import LauncherReport
from tests.contract.apiserver import ApiServer
from tests.contract.kubelet import TIME, container
from tests.unit.api.specs import changed

Object = dict[str, Any]

AT_ONCE = 32
NAMESPACE = "default"


class Api:
    """Requests as admin."""

    def __init__(self, server: ApiServer, session: aiohttp.ClientSession) -> None:
        self._url, self._session = server.url, session

    async def call(self, method: str, path: str, body: Object | None = None, *, kind: str = "application/json") -> Object:
        """The answer to a request.

        Raises:
            RuntimeError: if it is no success.
        """
        data = None if body is None else json.dumps(body).encode()
        url = URL(self._url + path, encoded=True)
        async with self._session.request(method, url, data=data, headers={"Content-Type": kind}) as response:
            answer = await response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {answer[:300]!r}")
        found: Object = json.loads(answer)
        return found

    async def create(self, resource: Resource, body: Object) -> Object:
        """Create `body`."""
        return await self.call("POST", resource.path(NAMESPACE), body)

    async def set_status(self, resource: Resource, name: str, status: Object) -> Object:
        """Merge `status` into the status of an object."""
        body = {"status": status}
        return await self.call("PATCH", resource.path(NAMESPACE, name, "status"), body, kind="application/merge-patch+json")

    async def list(self, resource: Resource) -> list[Object]:
        """All objects of one kind."""
        items: list[Object] = (await self.call("GET", resource.path(NAMESPACE)))["items"]
        return items

    async def delete(self, resource: Resource, name: str) -> None:
        """Delete an object, its children in the background."""
        await self.call("DELETE", resource.path(NAMESPACE, name), {"propagationPolicy": "Background"})

    @asynccontextmanager
    async def watching(self, resource: Resource, told: Callable[[str, Object], None]) -> AsyncIterator[None]:
        """Call `told` with type and object of each change while the context is open."""
        version = (await self.call("GET", resource.path(NAMESPACE) + "?limit=1"))["metadata"]["resourceVersion"]

        async def stream() -> None:
            nonlocal version
            query = f"watch=1&allowWatchBookmarks=true&resourceVersion={version}"
            url = URL(f"{self._url}{resource.path(NAMESPACE)}?{query}", encoded=True)
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=None)) as response:
                buffer = b""
                async for chunk in response.content.iter_any():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for event in map(json.loads, lines):
                        assert event["type"] != "ERROR", event
                        version = event["object"]["metadata"]["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            told(event["type"], event["object"])

        async def follow() -> None:
            while True:  # an API server that is short of time ends watches
                await stream()

        task = asyncio.create_task(follow())
        try:
            yield
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def admin(server: ApiServer) -> AsyncIterator[Api]:
    """Requests to `server` as admin."""
    config = json.loads(server.admin.read_text())
    authority = base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"]).decode()
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=authority), limit=0)
    headers = {"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield Api(server, session)


async def in_parallel(works: Iterable[Callable[[], Awaitable[object]]], *, at_once: int = AT_ONCE) -> None:
    """Run `works`, so many at the same time."""
    waiting = iter(works)

    async def worker() -> None:
        for work in waiting:
            await work()

    await asyncio.gather(*(worker() for _ in range(at_once)))


class Launchers(asyncio.Protocol):
    """Answers every request with the progress of a run that makes a step each second."""

    began = 0.0
    answers = 0
    frozen_at: int | None = None
    """The step at which all runs stand still, if they do."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            _, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
            step = int(time.monotonic() - Launchers.began) if Launchers.frozen_at is None else Launchers.frozen_at
            self._transport.write(_answer(step))
            Launchers.answers += 1


def _answer(step: int) -> bytes:
    progress = Progress(step=step, total_steps=100_000, reward=f"0.{step % 1000:03d}", seconds_per_step="1", world_size=3)
    body = json.dumps(LauncherReport(phase="training", generator_ready=True, progress=progress).to_wire()).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@asynccontextmanager
async def launchers() -> AsyncIterator[int]:
    """All launchers on one port of every loopback address; the steps count from now."""
    Launchers.began, Launchers.answers, Launchers.frozen_at = time.monotonic(), 0, None
    server = await asyncio.get_running_loop().create_server(Launchers, "0.0.0.0", 0, backlog=4096)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


def run_object(name: str) -> Object:
    """An OnlineTrainingJob as a user would write it."""
    return changed({"training": {"max_steps": 100_000, "learning_rate": 1e-5}, "backoffLimit": 3}, name=name)


def pod_of(job: Object, port: int) -> Object:
    """A pod that the Job controller could have made."""
    name = job["metadata"]["name"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"], "controller": True}
    labels = {names.JOB_LABEL: name, names.MANAGED_BY_LABEL: names.MANAGED_BY}
    trainer = {"name": names.TRAINER_CONTAINER, "image": "x", "ports": [{"name": names.PROGRESS_PORT_NAME, "containerPort": port}]}
    sidecar = {"name": names.GENERATOR_CONTAINER, "image": "x", "restartPolicy": "Always"}
    spec = {"restartPolicy": "Never", "containers": [trainer], "initContainers": [{"name": names.MODEL_CONTAINER, "image": "x"}, sidecar]}
    metadata = {"name": f"{name}-pod", "namespace": NAMESPACE, "labels": labels, "ownerReferences": [owner]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def running_status(number: int) -> Object:
    """The status of the pod of the job `number`, whose launcher has an address of its own."""
    address = f"127.{1 + number // 62500}.{number // 250 % 250}.{1 + number % 250}"
    return {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": TIME,
        "initContainerStatuses": [
            container(names.MODEL_CONTAINER, terminated={"exitCode": 0, "reason": "Completed"}),
            container(names.GENERATOR_CONTAINER, ready=True, running={"startedAt": TIME}),
        ],
        "containerStatuses": [container(names.TRAINER_CONTAINER, ready=True, running={"startedAt": TIME})],
    }


class Fleet:
    """Jobs that run: made, given pods, and waited for until the operator has nothing to write about them any more."""

    def __init__(self, api: Api, *, port: int) -> None:
        self._api, self._port = api, port
        self.size = 0
        self.states: dict[str, str] = {}
        self.jobs: dict[str, Object] = {}

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Keep `states` and `jobs` up to date."""

        def run_told(kind: str, run: Object) -> None:
            self.states[run["metadata"]["name"]] = run.get("status", {}).get("state", "")

        def job_told(kind: str, job: Object) -> None:
            self.jobs[job["metadata"]["name"]] = job

        async with self._api.watching(ONLINE_TRAINING_JOBS, run_told), self._api.watching(JOBS, job_told):
            yield

    async def grow(self, size: int) -> None:
        """Let there be `size` running jobs, each of which the operator says runs."""
        new = {f"run-{number}": number for number in range(self.size, size)}
        await in_parallel(partial(self._api.create, ONLINE_TRAINING_JOBS, run_object(name)) for name in new)
        await until(f"{size} Jobs", lambda: all(name in self.jobs for name in new))
        await in_parallel(partial(self._start, name, number) for name, number in new.items())
        await until(f"{size} of them run", lambda: all(self.states.get(name) in ("Running", "Starting") for name in new))
        self.size = size

    async def _start(self, name: str, number: int) -> None:
        pod = await self._api.create(PODS, pod_of(self.jobs[name], self._port))
        await self._api.set_status(PODS, pod["metadata"]["name"], running_status(number))
        await self._api.set_status(JOBS, name, {"active": 1, "startTime": TIME})


async def until(what: str, look: Callable[[], bool], *, seconds: float = 300.0) -> float:
    """Wait until `look` is true, and return how long that took.

    Raises:
        AssertionError: that names `what` if the deadline passes.
    """
    began = time.monotonic()
    while not look():
        assert time.monotonic() - began < seconds, f"after {seconds:.0f} s still not: {what}"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def until_async(what: str, look: Callable[[], Awaitable[bool]], *, seconds: float = 300.0) -> float:
    """As `until`, with a question that waits."""
    began = time.monotonic()
    while not await look():
        assert time.monotonic() - began < seconds, f"after {seconds:.0f} s still not: {what}"
        await asyncio.sleep(0.1)
    return time.monotonic() - began
