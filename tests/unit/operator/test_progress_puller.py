"""Pulling progress: from real HTTP servers, well-behaved ones and others."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from otj_operator.controller.progress import ANSWER_LIMIT, ProgressPuller
from otj_operator.controller.settings import Settings
from otj_operator.metrics import Metrics
from otj_operator.plan import Key, PollTarget
from otj_runtime.api import Progress
from otj_runtime.pod.metrics import LauncherReport

KEY = Key("default", "run")
SETTINGS = Settings(runtime_image="x", progress_seconds=0.02, progress_timeout_seconds=0.2)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Launcher:
    """A server that answers with `answer`, and tells of each question."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[None] = asyncio.Queue()
        self.answer: Answer = self.step(0)

    def step(self, number: int) -> Answer:
        report = LauncherReport(phase="training", generator_ready=True, progress=Progress(step=number))

        async def answer(_: web.Request) -> web.Response:
            return web.json_response(report.to_wire())

        return answer

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.put_nowait(None)
        return await self.answer(request)


@asynccontextmanager
async def pulling(settings: Settings = SETTINGS) -> AsyncIterator[tuple[ProgressPuller, Launcher, asyncio.Queue[Key], PollTarget]]:
    launcher, changes = Launcher(), asyncio.Queue[Key]()
    app = web.Application()
    app.router.add_get("/progress", launcher.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    puller = ProgressPuller(settings, Metrics(), changed=changes.put_nowait)
    async with aiohttp.ClientSession() as session:
        worker = asyncio.create_task(puller.work(session))
        yield puller, launcher, changes, PollTarget(pod_uid="pod-1", url=f"http://127.0.0.1:{port}/progress")
        assert not worker.done(), "the worker died"
        worker.cancel()
    await runner.cleanup()


async def test_each_new_report_wakes_the_job_and_the_same_one_does_not() -> None:
    async with asyncio.timeout(10), pulling() as (puller, launcher, changes, target):
        puller.follow(KEY, target)
        assert await changes.get() == KEY
        for _ in range(4):
            await launcher.asked.get()
        assert changes.empty()
        launcher.answer = launcher.step(7)
        await changes.get()
        report = puller.report_of(KEY)
        assert report is not None
        assert (report.pod_uid, report.body.progress.step) == ("pod-1", 7)


async def test_a_launcher_that_is_not_followed_any_more_is_not_asked() -> None:
    async with asyncio.timeout(10), pulling() as (puller, launcher, changes, target):
        puller.follow(KEY, target)
        await changes.get()
        puller.follow(KEY, None)
        await asyncio.sleep(0.05)  # one question may be on its way
        asked = launcher.asked.qsize()
        await asyncio.sleep(0.2)
        assert launcher.asked.qsize() == asked
        assert puller.report_of(KEY) is not None, "the last report outlives the launcher"
        puller.forget(KEY)
        assert puller.report_of(KEY) is None


async def test_all_pulls_together_keep_to_a_rate() -> None:
    settings = Settings(runtime_image="x", progress_seconds=0.01, progress_rate=50.0)
    async with asyncio.timeout(10), pulling(settings) as (puller, launcher, _changes, target):
        for number in range(20):
            puller.follow(Key("default", f"run-{number}"), target)
        began = asyncio.get_running_loop().time()
        for _ in range(60):
            await launcher.asked.get()
        assert asyncio.get_running_loop().time() - began > 0.8, "60 pulls at 50 a second, the first 20 spread over 0.4 s"


async def test_a_launcher_that_does_not_answer_is_asked_ever_less_often() -> None:
    async with asyncio.timeout(10), pulling() as (puller, launcher, _changes, target):
        launcher.answer = _broken
        puller.follow(KEY, target)
        moments = []
        for _ in range(5):
            await launcher.asked.get()
            moments.append(asyncio.get_running_loop().time())
        pauses = [later - earlier for earlier, later in itertools.pairwise(moments)]
        assert pauses[-1] > 2 * pauses[0]


async def _slow(_: web.Request) -> web.Response:
    await asyncio.sleep(5)
    return web.Response()


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b" " * (2 * ANSWER_LIMIT))
    return response


async def _text(_: web.Request) -> web.Response:
    return web.Response(text="hello")


async def _elsewhere(_: web.Request) -> web.Response:
    raise web.HTTPFound("http://127.0.0.1:1/metadata")


async def _too_long(_: web.Request) -> web.Response:
    return web.json_response({"phase": "training", "generatorReady": True, "progress": {"reward": "9" * 10_000}})


async def _broken(_: web.Request) -> web.Response:
    raise web.HTTPInternalServerError


@pytest.mark.parametrize("answer", [_slow, _endless, _text, _elsewhere, _too_long, _broken], ids=lambda answer: answer.__name__)
async def test_a_launcher_that_misbehaves_changes_nothing_and_is_asked_again(answer: Answer) -> None:
    async with asyncio.timeout(10), pulling() as (puller, launcher, changes, target):
        launcher.answer = answer
        puller.follow(KEY, target)
        for _ in range(2):
            await launcher.asked.get()
        assert (puller.report_of(KEY), changes.empty()) == (None, True)
        launcher.answer = launcher.step(1)
        assert await changes.get() == KEY


def test_the_report_is_what_the_launcher_is_said_to_write() -> None:
    report = LauncherReport(phase="starting", generator_ready=False)
    assert json.loads(json.dumps(report.to_wire())) == {
        "phase": "starting",
        "generatorReady": False,
        "progress": {},
        "startup": {},
        "metrics": {},
    }


async def test_a_launcher_that_does_not_answer_is_silent_after_a_while_and_no_longer_once_it_does() -> None:
    settings = replace(SETTINGS, silent_seconds=0.1)
    async with asyncio.timeout(10), pulling(settings) as (puller, launcher, changes, target):
        puller.follow(KEY, target)
        await changes.get()
        heard, launcher.answer = launcher.answer, _broken
        await changes.get()
        assert puller.silent_since(KEY) is not None
        launcher.answer = heard
        while puller.silent_since(KEY) is not None:
            await changes.get()


async def _broken(_: web.Request) -> web.StreamResponse:
    raise web.HTTPInternalServerError
