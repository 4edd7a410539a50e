"""The engine against a server that speaks vLLM's generate route and misbehaves on request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.rollout.types import Sampling
from otj_runtime.rollout.vllm_engine import VLLMEngine, parse_choice

SAMPLING = Sampling(count=2, max_tokens=4)


class ScriptedGenerator:
    """Answers each request with prompt + completion index; `faults` lists what goes wrong first, one entry per request."""

    def __init__(self) -> None:
        self.version = 3
        self.faults: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/inference/v1/generate", self._answer)
        self._runner = web.AppRunner(app)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._started.set()
        self._loop.run_forever()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "drop":
            assert request.transport is not None
            request.transport.close()
        if fault == "refuse":
            return web.Response(status=400, text="prompt too long")
        if fault == "error":
            return web.Response(status=500, text="engine dead")
        version = "default" if fault == "stale" else str(self.version)
        choices = [
            {
                "index": i,
                "token_ids": [*body["token_ids"], i],
                "logprobs": {"content": [{"token_id": t, "logprob": -0.1} for t in [*body["token_ids"], i]]},
                "finish_reason": "stop" if i == 0 else "length",
                "weight_versions": [{"start": 0, "end": 1, "version": version}],
            }
            for i in reversed(range(body["sampling_params"]["n"]))
        ]
        return web.json_response({"choices": choices})

    def close(self) -> None:
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


@pytest.mark.parametrize("fault", ["drop", "error", "stale"])
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


def test_tokens_of_two_versions_are_stale() -> None:
    choice = {"weight_versions": [{"version": "2"}, {"version": "3"}]}
    with pytest.raises(Exception, match="expected tokens of policy version 3, got"):
        parse_choice(choice, 3)
