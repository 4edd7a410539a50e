"""/healthz and /readyz: whether the kubelet should end this process, and whether it is up.

A standby is healthy and ready, so that a rolling update can go on while the old process still leads. A leader is healthy as long as its
listings succeed: a port that answers proves nothing about the watches behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def health_server(port: int, *, healthy: Callable[[], bool]) -> AsyncIterator[None]:
    """Answer probes on `port` of every address while the context is open."""

    async def answer(_: web.Request) -> web.Response:
        good = healthy()
        return web.Response(text="ok" if good else "the listings fail", status=200 if good else 503)

    app = web.Application()
    app.router.add_get("/healthz", answer)
    app.router.add_get("/readyz", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host=None, port=port).start()
        yield
    finally:
        await runner.cleanup()
