"""/healthz and /readyz: whether the kubelet should end this process, and whether it is up. /metrics: what Prometheus collects.

A standby is healthy and ready, so that a rolling update can go on while the old process still leads. A leader is healthy as long as its
listings succeed and its watches tell what they owe: a port that answers proves nothing about the watches behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from otj_operator.metrics import CONTENT_TYPE, Metrics


@asynccontextmanager
async def health_server(port: int, *, troubles: Callable[[], Sequence[str]], metrics: Metrics) -> AsyncIterator[None]:
    """Answer on `port` of every address while the context is open; `troubles` are sentences, none if all is well."""

    async def answer(_: web.Request) -> web.Response:
        found = troubles()
        return web.Response(text="; ".join(found) or "ok", status=503 if found else 200)

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.router.add_get("/healthz", answer)
    app.router.add_get("/readyz", answer)
    app.router.add_get("/metrics", scrape)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host=None, port=port).start()
        yield
    finally:
        await runner.cleanup()
