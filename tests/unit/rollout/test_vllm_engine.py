"""The engine against a server that speaks vLLM's generate route and misbehaves on request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.pod.names import GENERATE_ROUTE
from otj_runtime.rollout.types import Cancelled, Sampling, Span
from otj_runtime.rollout.vllm_engine import StaleAnswer, VLLMEngine, parse_choice

SAMPLING = Sampling(count=2, max_tokens=4)


class ScriptedGenerator:
    """Answers each request with prompt + completion index; `faults` lists what goes wrong first, one entry per request."""

    def __init__(self) -> None:
        self.version = 3
        self.faults: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.engines: list[str | None] = []
        self.hanging = threading.Semaphore(0)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._over = asyncio.Event()
        app = web.Application()
        app.router.add_post(GENERATE_ROUTE, self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._started.set()
        self._loop.run_forever()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.engines.append(request.headers.get("X-data-parallel-rank"))
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "drop":
            assert request.transport is not None
            request.transport.close()
        if fault == "refuse":
            return web.Response(status=400, text="prompt too long")
        if fault == "no policy":
            return web.Response(status=404, text="the model `policy` does not exist")
        if fault == "error":
            return web.Response(status=500, text="engine dead")
        if fault == "hang":
            self.hanging.release()
            await self._over.wait()
        version = "default" if fault == "stale" else str(self.version)
        choices = [
            {
                "index": i,
                "token_ids": [*body["token_ids"], i],
                "logprobs": [-0.1] * (len(body["token_ids"]) + 1),
                "finish_reason": "stop" if i == 0 else "length",
                "weight_versions": [{"start": 0, "end": len(body["token_ids"]) + 1, "version": version}],
            }
            for i in reversed(range(body["sampling_params"]["n"]))
        ]
        return web.json_response({"choices": choices})

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@pytest.fixture
def server() -> Iterator[ScriptedGenerator]:
    generator = ScriptedGenerator()
    yield generator
    generator.close()


def engine(server: ScriptedGenerator, recover: Callable[[], None] = lambda: None) -> VLLMEngine:
    return VLLMEngine(server.url, end_tokens={9, 2}, recover=recover)


def test_completions_come_in_the_order_of_prompts_and_of_their_index(server: ScriptedGenerator) -> None:
    groups = engine(server).generate([[1], [5, 6]], SAMPLING, policy_version=3)
    assert [[c.token_ids for c in group] for group in groups] == [[[1, 0], [1, 1]], [[5, 6, 0], [5, 6, 1]]]
    assert [c.finished for c in groups[0]] == [True, False]
    assert groups[0][0].policy_version == 3


def test_the_request_states_everything_that_shapes_the_distribution(server: ScriptedGenerator) -> None:
    engine(server).generate([[1]], SAMPLING, policy_version=3)
    parameters = server.requests[0]["sampling_params"]
    assert {k: parameters[k] for k in ("top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids")} == {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [2, 9],
    }


@pytest.mark.parametrize("fault", ["drop", "error", "stale", "no policy"])
def test_a_lost_answer_is_asked_again_after_recovery_and_the_others_are_not(server: ScriptedGenerator, fault: str) -> None:
    server.faults = [fault]
    recovered: list[str] = []
    groups = engine(server, lambda: recovered.append("once")).generate([[1], [2], [3]], SAMPLING, policy_version=3)
    assert recovered == ["once"]
    assert [group[0].token_ids for group in groups] == [[1, 0], [2, 0], [3, 0]]
    assert len(server.requests) == 4


def test_a_generator_that_keeps_failing_is_lost(server: ScriptedGenerator) -> None:
    server.faults = ["error"] * 20
    with pytest.raises(GeneratorLost, match="failed 6 times on the rollouts of policy version 3: 500"):
        engine(server).generate([[1]], SAMPLING, policy_version=3)


def test_a_refused_prompt_is_not_asked_again(server: ScriptedGenerator) -> None:
    server.faults = ["refuse"]
    with pytest.raises(GeneratorLost, match=r"refused a prompt of 1 tokens .400.: prompt too long"):
        engine(server).generate([[1]], SAMPLING, policy_version=3)
    assert len(server.requests) == 1


def choice(*versions: tuple[str, int, int]) -> dict[str, Any]:
    length = versions[-1][2] if versions else 1
    return {
        "token_ids": list(range(length)),
        "logprobs": [-0.5] * length,
        "finish_reason": "stop",
        "weight_versions": [{"version": name, "start": start, "end": end} for name, start, end in versions],
    }


def test_tokens_carry_the_versions_that_sampled_them() -> None:
    completion = parse_choice(choice(("3", 0, 5), ("4", 5, 7)), 3)
    assert completion.policy_version == 3
    assert completion.spans == (Span(3, 0, 5), Span(4, 5, 7))
    assert completion.token_ages(5) == [(2, 5), (1, 2)]


@pytest.mark.parametrize("versions", [[("2", 0, 4)], [("2", 0, 1), ("3", 1, 4)], [("3", 0, 1), ("default", 1, 4)], []])
def test_tokens_of_older_or_unknown_weights_are_stale(versions: list[tuple[str, int, int]]) -> None:
    with pytest.raises(StaleAnswer, match="expected tokens of policy version 3 or later, got"):
        parse_choice(choice(*versions), 3)


def test_a_prompt_that_takes_too_long_is_dropped_once_most_are_there(server: ScriptedGenerator) -> None:
    server.faults = ["hang"]
    sampling = replace(SAMPLING, straggler_factor=2.0)
    groups = engine(server).generate([[1], [2], [3], [4]], sampling, policy_version=3)
    assert sorted(len(group) for group in groups) == [0, 2, 2, 2]


def test_what_is_called_off_ends_soon(server: ScriptedGenerator) -> None:
    server.faults = ["hang"] * 2
    hanging = engine(server)
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            hanging.generate([[1], [2]], SAMPLING, policy_version=3)
        except Cancelled as error:
            failures.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    assert server.hanging.acquire(timeout=10)
    hanging.cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert len(failures) == 1


def test_a_prompts_completions_go_to_the_engine_with_the_fewest_tokens(server: ScriptedGenerator) -> None:
    VLLMEngine(server.url, end_tokens={2}, recover=lambda: None, engines=2).generate([[1] * 50, [2], [3]], SAMPLING, policy_version=3)
    assert {tuple(request["token_ids"]): engine for request, engine in zip(server.requests, server.engines, strict=True)} == {
        (1,) * 50: "0",
        (2,): "1",
        (3,): "1",
    }
