"""Completions from a vLLM server over loopback HTTP.

Each training rank sends its own prompts, one request per prompt with all completions of its group, and gets token ids,
log-probabilities and the weight versions that produced the tokens:

    rank --POST /inference/v1/generate {token_ids, n, ...}--> vLLM
         <-- choices: token_ids, logprobs, weight_versions ---

A dead generator costs no step. It restarts in place with dummy weights, so two things are checked: a request whose connection
breaks is asked again once the generator serves the expected version, and an answer that carries another version is thrown
away and asked again. Who brings the weights back is not this module's business: `recover` does it and returns when it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp

from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.pod.names import SERVED_MODEL
from otj_runtime.rollout.types import Completion, Sampling

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
        recover: see `Recover`.
    """

    def __init__(self, url: str, *, end_tokens: set[int], recover: Recover) -> None:
        self._url = url
        self._end_tokens = sorted(end_tokens)
        self._recover = recover

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, policy_version: int) -> list[list[Completion]]:
        """See `RolloutEngine`.

        Raises:
            GeneratorLost: if the generator keeps failing, or refuses a request.
        """
        return asyncio.run(self._generate(prompts, sampling, policy_version))

    async def _generate(self, prompts: list[list[int]], sampling: Sampling, version: int) -> list[list[Completion]]:
        done: dict[int, list[Completion]] = {}
        for attempt in range(MAX_RECOVERIES + 1):
            missing = [i for i in range(len(prompts)) if i not in done]
            failure = await self._ask(prompts, missing, sampling, version, done)
            if failure is None:
                return [done[i] for i in range(len(prompts))]
            if attempt == MAX_RECOVERIES:
                raise GeneratorLost(f"the generator failed {attempt + 1} times on the rollouts of policy version {version}: {failure}")
            await asyncio.to_thread(self._recover)
        raise AssertionError("unreachable")

    async def _ask(
        self, prompts: list[list[int]], missing: list[int], sampling: Sampling, version: int, done: dict[int, list[Completion]]
    ) -> Exception | None:
        """Ask for the missing prompts at once, fill `done`, and return one of the failures that recovery can cure."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, connect=30)
        async with aiohttp.ClientSession(self._url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            answers = await asyncio.gather(
                *(self._complete(session, prompts[i], sampling, version) for i in missing), return_exceptions=True
            )
        failure: Exception | None = None
        for index, answer in zip(missing, answers, strict=True):
            if isinstance(answer, list):
                done[index] = answer
            elif isinstance(answer, (aiohttp.ClientError, TimeoutError, OSError, StaleAnswer)):
                failure = answer
            else:
                raise answer
        return failure

    async def _complete(self, session: aiohttp.ClientSession, prompt: list[int], sampling: Sampling, version: int) -> list[Completion]:
        async with session.post("/inference/v1/generate", json=request_body(prompt, sampling, self._end_tokens)) as response:
            if response.status in (400, 404, 422):
                text = await response.text()
                raise GeneratorLost(f"the generator refused a prompt of {len(prompt)} tokens ({response.status}): {text[:500]}")
            response.raise_for_status()
            body = await response.json()
        return [parse_choice(choice, version) for choice in sorted(body["choices"], key=lambda choice: int(choice["index"]))]


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
    """One choice of vLLM's answer.

    Raises:
        StaleAnswer: if any of its tokens came from other weights than those of `version`.
    """
    versions = {str(span["version"]) for span in choice.get("weight_versions") or []}
    if versions != {str(version)}:
        raise StaleAnswer(f"expected tokens of policy version {version}, got {sorted(versions) or 'none stated'}")
    content = choice["logprobs"]["content"]
    return Completion(
        token_ids=[int(token) for token in choice["token_ids"]],
        logprobs=[float(entry["logprob"]) for entry in content],
        finished=choice["finish_reason"] == "stop",
        policy_version=version,
    )
