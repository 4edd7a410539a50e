"""The launcher's port, over real HTTP."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import Application, Request

from otj_runtime.launch.board import Board
from otj_runtime.launch.server import BODY_BYTES, build_app, write_token
from otj_runtime.pod.metrics import LauncherReport

Client = TestClient[Request, Application]

UPDATE: dict[str, Any] = {
    "trainerStatus": {"progressPercentage": 20, "lastUpdatedTime": "now", "metrics": [{"name": "current_step", "value": "2"}]}
}


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with TestClient(TestServer(build_app(Board(), "secret"))) as client:
        yield client


async def progress(client: Client) -> LauncherReport:
    """The progress document."""
    return LauncherReport.model_validate(await (await client.get("/progress")).json())


async def test_a_report_with_the_token_shows_in_the_document(client: Client) -> None:
    answer = await client.post("/status", json=UPDATE, headers={"Authorization": "Bearer secret"})
    assert answer.status == 200
    assert (await progress(client)).progress.step == 2


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \u00fc"}])
async def test_a_report_without_the_token_changes_nothing(client: Client, headers: dict[str, str]) -> None:
    assert (await client.post("/status", json=UPDATE, headers=headers)).status == 401
    assert (await progress(client)).progress.step is None


@pytest.mark.parametrize(
    ("body", "status"), [(b"no json", 400), (b'{"trainerStatus": {"metrics": 1}}', 400), (b" " * (BODY_BYTES + 1), 413)]
)
async def test_a_body_that_is_no_report_is_refused(client: Client, body: bytes, status: int) -> None:
    assert (await client.post("/status", data=body, headers={"Authorization": "Bearer secret"})).status == status


async def test_health_answers(client: Client) -> None:
    assert (await client.get("/healthz")).status == 200


def test_the_token_is_for_its_owner_only(tmp_path: Path) -> None:
    token = write_token(tmp_path)
    assert (tmp_path / "token").read_text() == token
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
