"""The launcher's port: the progress document for everybody, the trainer's reports for holders of the token.

The token keeps other pods, which can reach the port, from writing; reading tells them nothing secret.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from aiohttp import web
from pydantic import ValidationError

from otj_runtime.launch.board import Board
from otj_runtime.pod.errors import RunError
from otj_runtime.pod.metrics import StatusUpdate
from otj_runtime.pod.names import HEALTH_ROUTE, PROGRESS_ROUTE, STATUS_ROUTE

TOKEN_FILE = "token"
BODY_BYTES = 256 * 1024


def write_token(directory: Path) -> str:
    """A fresh token, left in `directory` for the trainer, readable by its owner only."""
    token = secrets.token_urlsafe(32)
    descriptor = os.open(directory / TOKEN_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    return token


def build_app(board: Board, token: str) -> web.Application:
    """The routes over `board`."""

    async def progress(request: web.Request) -> web.Response:
        return web.json_response(board.report().to_wire())

    async def healthy(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def status(request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="replace")
        if not secrets.compare_digest(given, token.encode()):
            raise web.HTTPUnauthorized(text="a bearer token is needed\n")
        try:
            update = StatusUpdate.model_validate_json(await request.read())
        except ValidationError as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from error
        board.absorb(update.trainerStatus, now=time.monotonic())
        return web.Response(text="ok\n")

    app = web.Application(client_max_size=BODY_BYTES)
    app.add_routes([web.get(PROGRESS_ROUTE, progress), web.get(HEALTH_ROUTE, healthy), web.post(STATUS_ROUTE, status)])
    return app


async def serve(app: web.Application, *, host: str, port: int) -> web.AppRunner:
    """Serve `app`; the caller cleans the runner up.

    Raises:
        RunError: if the port cannot be had.
    """
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise RunError(f"cannot serve progress on {host}:{port}: {error}") from error
    return runner
