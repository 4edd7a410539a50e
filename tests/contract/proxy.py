"""Stands between an operator and the API server, and is as unkind as a network and a busy server can be. Notes every request.

    operator --http--> Proxy --https, the operator's own token--> kube-apiserver

Faults are attributes that a test sets while it runs: `error_share` of the calls answered with 409, 429 or 500; watches cut after
`cut_seconds`; `down`: every connection is broken; `muted`: watches stay open and say nothing; `expired`: the next watch of each of these
paths is told 410. `cut()` ends the watches that are open now. `before` is awaited before a request is passed on: what happens at the
worst moment.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from yarl import URL

from tests.contract.apiserver import ApiServer

EXPIRED = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}}
PASSED = ("Authorization", "Content-Type", "Accept", "User-Agent")


@dataclass(frozen=True)
class Call:
    """One request: when, how, what, and the status it got, 0 if its connection was broken."""

    time: float
    method: str
    path: str
    watch: bool
    status: int


class Proxy:
    """See the module."""

    def __init__(self, server: ApiServer, session: aiohttp.ClientSession, chance: random.Random) -> None:
        self._server, self._session, self._chance = server, session, chance
        self.url = ""
        self.calls: list[Call] = []
        self.error_share = 0.0
        self.cut_seconds: float | None = None
        self.down = False
        self.muted = False
        self.expired: set[str] = set()
        self.before: Callable[[str, str], Awaitable[None]] = _at_once
        self._watches: set[asyncio.Transport] = set()

    def cut(self) -> None:
        """Break every open watch."""
        for transport in list(self._watches):
            transport.abort()

    def writes(self) -> list[Call]:
        """Successful writes of anything but the Lease."""
        return [call for call in self.calls if call.method != "GET" and "/leases" not in call.path and 0 < call.status < 300]

    def rate(self, since: float) -> float:
        """The most calls in any one second since then."""
        times = [call.time for call in self.calls if call.time >= since]
        seconds = [int(moment - since) for moment in times]
        return max((seconds.count(second) for second in set(seconds)), default=0)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of the operator."""
        watch = "watch" in request.query
        if self.down:
            self._note(request, watch, 0)
            _break(request)
            return web.Response()
        if not watch and self._chance.random() < self.error_share:
            status = self._chance.choice([409, 429, 500])
            self._note(request, watch, status)
            reason = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError"}[status]
            answer = {"kind": "Status", "code": status, "reason": reason, "message": "injected"}
            return web.json_response(answer, status=status, headers={"Retry-After": "1"} if status == 429 else None)
        try:
            return await self._forward(request, watch)
        except ConnectionResetError:
            return web.Response()  # for nobody: the operator has hung up meanwhile

    async def _forward(self, request: web.Request, watch: bool) -> web.StreamResponse:
        await self.before("WATCH" if watch else request.method, request.path)
        headers = {name: request.headers[name] for name in PASSED if name in request.headers}
        url = URL(self._server.url + request.raw_path, encoded=True)
        timeout = aiohttp.ClientTimeout(total=None if watch else 60)
        async with self._session.request(
            request.method, url, data=await request.read() or None, headers=headers, timeout=timeout
        ) as upstream:
            self._note(request, watch, upstream.status)
            response = web.StreamResponse(status=upstream.status, headers={"Content-Type": upstream.content_type})
            await response.prepare(request)
            if watch and request.path in self.expired:
                self.expired.discard(request.path)
                await response.write(json.dumps(EXPIRED).encode() + b"\n")
                return response
            transport = request.transport
            if watch and transport is not None:
                self._watches.add(transport)
            try:
                with suppress(TimeoutError, ConnectionError):
                    async with asyncio.timeout(self.cut_seconds if watch else None):
                        await self._copy(upstream, response, watch)
                        return response
                _break(request)
                return response
            finally:
                if transport is not None:
                    self._watches.discard(transport)

    async def _copy(self, upstream: aiohttp.ClientResponse, response: web.StreamResponse, watch: bool) -> None:
        async for chunk in upstream.content.iter_any():
            if not (watch and self.muted):
                await response.write(chunk)

    def _note(self, request: web.Request, watch: bool, status: int) -> None:
        self.calls.append(Call(time.monotonic(), request.method, request.path, watch, status))


async def _at_once(method: str, path: str) -> None:
    pass


def _break(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


@asynccontextmanager
async def proxy(server: ApiServer, *, seed: int = 1) -> AsyncIterator[Proxy]:
    """A proxy in front of `server` on a free port."""
    trusted = ssl.create_default_context(cafile=str(server.folder / "pki" / "ca.crt"))
    connector = aiohttp.TCPConnector(ssl=trusted, limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=True) as session:
        made = Proxy(server, session, random.Random(seed))
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", made.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield made
        finally:
            await runner.cleanup()
