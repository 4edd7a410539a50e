"""Completions from a vLLM server over loopback HTTP.

Each training rank sends its own prompts, one request per prompt with all completions of its group, and gets token ids,
log-probabilities and the weight versions that produced the tokens:

    rank --POST /otj/generate {token_ids, n, ...}--> vLLM, with `vllm_answers`
         <-- choices: token_ids, logprobs, weight_versions ---

Several batches may be under way, each in a thread of its own with its own event loop. Weights may arrive meanwhile: vLLM freezes
the requests, installs, and goes on, so a completion may hold tokens of several versions; each token keeps the log-probability that
its own sampler gave it. What a batch is asked for under version v may be answered with v or later, never earlier.

A dead generator costs no step. It restarts in place with dummy weights, so two things are checked: a request whose connection
breaks is asked again once the generator serves the trainer's weights, and an answer from any other weights is thrown away and
asked again. Who brings the weights back is not this module's business: `recover` does it and returns when it is done.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.pod.names import ENGINE_HEADER, GENERATE_ROUTE, SERVED_MODEL
from otj_runtime.rollout.load import Load
from otj_runtime.rollout.stragglers import patience
from otj_runtime.rollout.types import Cancelled, Completion, Sampling, Span

REQUEST_SECONDS = 1800.0
"""Deadline of one request: the longest completion of a large model, with room."""

MAX_RECOVERIES = 5
"""Times that one batch of prompts is asked again before the generator counts as lost."""

Recover = Callable[[], None]
"""Returns when the generator serves the current policy version again; raises if it does not in time."""

_FINAL_ONLY = 2  # vLLM's RequestOutputKind: with n > 1 the default drops completions


class StaleAnswer(Exception):
    """The generator answered from other weights than the trainer's."""


class VLLMEngine:
    """A `RolloutEngine` on a vLLM server.

    Args:
        url: the server, such as http://127.0.0.1:8000.
        end_tokens: tokens that end a completion; they are part of it.
        recover: see `Recover`. May be called from several threads.
        engines: copies of the model behind the server.
    """

    shares_model = False

    def __init__(self, url: str, *, end_tokens: set[int], recover: Recover, engines: int = 1) -> None:
        self._url = url
        self._end_tokens = sorted(end_tokens)
        self._recover = recover
        self._engines = engines
        self._load = Load(engines)
        self._under_way: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = set()
        self._lock = threading.Lock()

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, policy_version: int) -> list[list[Completion]]:
        """See `RolloutEngine`.

        Raises:
            GeneratorLost: if the generator keeps failing, or refuses a request.
            Cancelled: if `cancel` was called meanwhile.
        """
        try:
            return asyncio.run(self._generate(prompts, sampling, policy_version))
        except asyncio.CancelledError as error:
            raise Cancelled(f"rollouts of policy version {policy_version} were called off") from error

    def busy_seconds(self) -> float:
        """See `RolloutEngine`."""
        return self._load.busy_seconds()

    def cancel(self) -> None:
        """See `RolloutEngine`. Closing its connection makes vLLM drop a request."""
        with self._lock:
            for loop, task in self._under_way:
                loop.call_soon_threadsafe(task.cancel)

    async def _generate(self, prompts: list[list[int]], sampling: Sampling, version: int) -> list[list[Completion]]:
        task = asyncio.current_task()
        assert task is not None
        entry = (asyncio.get_running_loop(), task)
        with self._lock:
            self._under_way.add(entry)
        try:
            return await self._persist(prompts, sampling, version)
        finally:
            with self._lock:
                self._under_way.discard(entry)

    async def _persist(self, prompts: list[list[int]], sampling: Sampling, version: int) -> list[list[Completion]]:
        done: dict[int, list[Completion]] = {}
        for attempt in range(MAX_RECOVERIES + 1):
            missing = [i for i in range(len(prompts)) if i not in done]
            failure = await self._ask(prompts, missing, sampling, version, done)
            if failure is None:
                return [done.get(i, []) for i in range(len(prompts))]
            if attempt == MAX_RECOVERIES:
                raise GeneratorLost(f"the generator failed {attempt + 1} times on the rollouts of policy version {version}: {failure}")
            await asyncio.to_thread(self._recover)
        raise AssertionError("unreachable")

    async def _ask(
        self, prompts: list[list[int]], missing: list[int], sampling: Sampling, version: int, done: dict[int, list[Completion]]
    ) -> Exception | None:
        """Ask for the missing prompts at once, fill `done`, and return one of the failures that recovery can cure. Stragglers are
        dropped: they are missing from `done` although there is no failure."""
        began = time.monotonic()
        durations: list[float] = []
        failure: Exception | None = None
        async with self._session() as session:
            waiting = {asyncio.create_task(self._complete(session, prompts[i], sampling, version)): i for i in missing}
            try:
                while waiting:
                    limit = None if failure else patience(durations, groups=len(missing), factor=sampling.straggler_factor)
                    left = None if limit is None else max(0.0, began + limit - time.monotonic())
                    finished, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                    if not finished:
                        break
                    for task in finished:
                        index = waiting.pop(task)
                        try:
                            done[index] = task.result()
                            durations.append(time.monotonic() - began)
                        except (aiohttp.ClientError, TimeoutError, OSError, StaleAnswer) as error:
                            failure = error
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        return failure

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, connect=30)
        return aiohttp.ClientSession(self._url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))

    async def _complete(self, session: aiohttp.ClientSession, prompt: list[int], sampling: Sampling, version: int) -> list[Completion]:
        with self._load.request(len(prompt) + sampling.count * sampling.max_tokens) as engine:
            headers = {ENGINE_HEADER: str(engine)} if self._engines > 1 else None
            body = request_body(prompt, sampling, self._end_tokens)
            async with session.post(GENERATE_ROUTE, json=body, headers=headers) as response:
                if response.status == 404:  # it serves no policy: it started anew, and waits for the adapter
                    raise StaleAnswer(f"the generator serves no model {SERVED_MODEL}: {(await response.text())[:500]}")
                if response.status in (400, 422):
                    text = await response.text()
                    raise GeneratorLost(f"the generator refused a prompt of {len(prompt)} tokens ({response.status}): {text[:500]}")
                response.raise_for_status()
                answer = await response.json()
        return [parse_choice(choice, version) for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"]))]


def request_body(prompt: list[int], sampling: Sampling, end_tokens: list[int]) -> dict[str, Any]:
    """The request for the completions of one prompt.

    Everything that shapes the distribution is stated, because vLLM fills gaps from the model's generation configuration. There is
    no seed: a seeded prompt kills vLLM's CPU engine once its prefill is split.
    """
    parameters: dict[str, Any] = {
        "n": sampling.count,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": end_tokens,
        "max_tokens": sampling.max_tokens,
        "logprobs": 0,
        "detokenize": False,
        "output_kind": _FINAL_ONLY,
    }
    return {"model": SERVED_MODEL, "token_ids": prompt, "sampling_params": parameters}


def parse_choice(choice: dict[str, Any], version: int) -> Completion:
    """One choice of vLLM's answer to a request that was made under policy version `version`.

    Raises:
        StaleAnswer: if any of its tokens came from weights that are not the trainer's, or older than `version`.
    """
    stated = choice.get("weight_versions") or []
    versions = [str(span["version"]) for span in stated]
    if not versions or not all(name.isdigit() and int(name) >= version for name in versions):
        raise StaleAnswer(f"expected tokens of policy version {version} or later, got {sorted(set(versions)) or 'none stated'}")
    spans = tuple(Span(int(span["version"]), int(span["start"]), int(span["end"])) for span in stated)
    return Completion(
        token_ids=[int(token) for token in choice["token_ids"]],
        logprobs=[float(logprob) for logprob in choice["logprobs"]],
        finished=choice["finish_reason"] == "stop",
        policy_version=min(span.version for span in spans),
        spans=spans if len(spans) > 1 else (),
    )
