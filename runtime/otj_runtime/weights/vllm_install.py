"""Installs new weights between two engine steps, in one call: the part of vLLM's interface that its own phases lack.

Driven by vLLM's routes, an installation is pause, finish, reset_prefix_cache and resume: four requests during which nothing is
generated, one of which sleeps for 20 ms. Here the engine does the same by itself, as soon as its steps under way are through:

    POST /otj/install {"version"}  ->  engine: no new step; steps under way end, so every token carries the version that made it
                                               finish_weight_update in all workers; set the version; forget cached prefixes; go on

Requests in flight keep the keys and values that older weights computed for their earlier tokens: to compute them again would take longer
than the installation. What they sample is labelled with the new version from here on, and their log-probabilities are those that were
sampled from. Prefixes in the cache are forgotten, so that no request which starts now reads older ones.

    POST /otj/hold                 ->  no new step until an installation, for transfers that write into the model: vLLM's pause(keep)
                                       without the 20 ms for which that sleeps
    POST /otj/generate             ->  rollouts: see `rollout.vllm_answers`
    GET /otj/devices               ->  what each worker can see of the GPUs, by which the trainer judges the ways to it

A call that an engine is to answer never ends where that engine dies: vLLM fails the requests for completions and nothing else, and its server,
which ends then, waits for all calls first. So calls on the way to the engine end with it (`EndWithEngine`): the trainer learns of it at once, and the
server's container restarts.

Two of vLLM's own doors are used: the entry points `vllm.general_plugins`, which adds a method to the engine, and
`vllm.endpoint_plugins`, which adds the route and is open only to plugins that VLLM_PLUGINS names.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from concurrent.futures import Future
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.v1.engine.core import EngineCore

from otj_runtime.weights.vllm_devices import look

METHOD = "otj_install_weights"
LOOK = "otj_look"


LOOK_SECONDS = 0.5
CONTROL = {
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/weight_info",
    "/update_weight_version",
    "/otj/install",
    "/otj/hold",
    "/otj/devices",
    "/pause",
    "/resume",
    "/reset_prefix_cache",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
}
"""Routes that wait for the engine and go on waiting when it is dead."""


class EndWithEngine:
    """ASGI middleware: a call of a control route ends with 500 when the engine dies.

    Args:
        app: what answers.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the call on."""
        if scope["type"] != "http" or scope["path"] not in CONTROL:
            await self._app(scope, receive, send)
            return
        answer = asyncio.ensure_future(self._app(scope, receive, send))
        while not (await asyncio.wait({answer}, timeout=LOOK_SECONDS))[0]:
            if scope["app"].state.engine_client.errored:
                answer.cancel()
                await JSONResponse({"error": {"message": "the engine has died"}}, status_code=500)(scope, receive, send)
                return
        await answer


class InstallEndpoint:
    """vLLM's endpoint plugin: the routes."""

    name = "otj_mailbox"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        from otj_runtime.rollout import vllm_answers  # only the server needs it, and it brings half of the server along

        app.add_middleware(EndWithEngine)
        vllm_answers.attach(app)

        @app.post("/otj/install")
        async def install(request: Request, version: Annotated[str, Body(embed=True)]) -> dict[str, float]:
            seconds = await request.app.state.engine_client.engine_core.call_utility_async(METHOD, version)
            return {"paused_s": float(seconds)}

        @app.post("/otj/hold")
        async def hold(request: Request) -> None:
            await request.app.state.engine_client.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)

        @app.get("/otj/devices")
        async def devices(request: Request) -> list[dict[str, Any]]:
            engines = await request.app.state.engine_client.engine_core.call_utility_all_async(LOOK)
            return [sight for workers in engines for sight in workers]

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Prepare what the routes need; a server without an engine has none to prepare."""
        from otj_runtime.rollout import vllm_answers

        if engine_client is not None:
            vllm_answers.prepare(state)


def offer_installation() -> None:
    """Give vLLM's engine the methods behind the routes."""
    setattr(EngineCore, METHOD, install_weights)
    setattr(EngineCore, LOOK, look_around)


def look_around(engine: Any) -> list[dict[str, Any]]:
    """What each worker of this engine can see."""
    return list(engine.model_executor.collective_rpc(_sight))


def _sight(worker: Any) -> dict[str, Any]:
    return asdict(look(worker.device))


def install_weights(engine: Any, version: str) -> Any:
    """Finish the update in the workers (which installs what they have staged), label it, forget cached prefixes, let requests go on, also
    where they were held before. Seconds for which no step could start.

    Returns a future, as the engine's own `pause_scheduler`: it is done when the steps under way are.
    """
    result: Future[float] = Future()

    def act(paused: Any = None) -> None:
        began = time.perf_counter()
        try:
            engine.model_executor.collective_rpc("finish_weight_update")
            engine.set_weight_version(version)
            forget_prefixes(engine.scheduler)
        except Exception as error:
            engine.resume_scheduler()
            result.set_exception(error)
            return
        engine.resume_scheduler()
        result.set_result(time.perf_counter() - began)

    # A second pause of several engines would wait for steps that none of them makes.
    pausing = None if engine.is_scheduler_paused() else engine.pause_scheduler(mode="keep", clear_cache=False)
    if pausing is None:
        act()
    else:
        pausing.add_done_callback(act)
    return result


def forget_prefixes(scheduler: Any) -> None:
    """Let no request find a block that older weights computed.

    vLLM's own reset refuses while requests run, unless they start over, and visits every block of the cache. Here only the blocks that
    can be found lose their names; those of running requests stay theirs.
    """
    pool = scheduler.kv_cache_manager.block_pool
    found = pool.cached_block_hash_to_block
    for entry in found._cache.values():
        for block in entry.values() if isinstance(entry, dict) else (entry,):
            block.reset_hash()
    pool.cached_block_hash_to_block = type(found)()
    pool.cached_block_hashes_by_block.clear()
