"""A judge behind HTTP that speaks the OpenAI chat protocol: a hosted model, or any server of one's own such as vLLM's.

    pair -> the template filled in -> POST <url>/chat/completions, temperature 0 -> "A", "B" or "TIE" -> 0, 1 or -1

At most `max_concurrency` requests are under way. Each attempt has a deadline; one that fails for a reason that may pass (no connection,
a timeout, 408, 409, 429, 5xx) is made again up to `max_retries` times, after the seconds that the server asks for or a growing pause.
Other refusals end the run at once: a wrong key does not become right. An answer that names no winner counts as a draw and is logged; if
not one answer of a call can be read, the template does not fit the model, and that is an error.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import os
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from otj_runtime.api.inputs import JudgeSpec
from otj_runtime.pod.errors import RewardFailed, RewardImportFailed

log = logging.getLogger(__name__)

PASSING = frozenset({408, 409, 429})
"""Client errors that may pass; so may every server error."""

TEMPLATE = """You compare two answers to the same request.

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}

Which answer is better? Reply with one word: A, B, or TIE."""
"""What a judge is asked unless the job says otherwise."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0

_VERDICTS = {"A": 0, "B": 1, "TIE": -1, "C": -1}
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_BRACKETED = re.compile(r"\[\[\s*(A|B|C|TIE)\s*\]\]", re.IGNORECASE)


def parse_verdict(answer: str) -> int | None:
    """0 for A, 1 for B, -1 for a tie, None if the answer names no winner.

    Understood are the bare letter with any punctuation or emphasis around it, and, in longer answers, the last of the form [[A]].
    What a reasoning model wrote between think tags is left out.
    """
    said = _THOUGHT.sub("", answer)
    bracketed = _BRACKETED.findall(said)
    word = bracketed[-1] if bracketed else said.strip(" \t\r\n*_`'\".:()[]<>")
    return _VERDICTS.get(word.upper())


class HttpJudge:
    """Asks a chat model which of two completions is better.

    Args:
        spec: address, model, template and limits, as a job gives them.

    Raises:
        RewardImportFailed: if the variable with the key is not set.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        self.__name__ = f"judge:{spec.model}"
        self._spec = spec
        self._url = spec.url if spec.url.endswith("/chat/completions") else f"{spec.url.rstrip('/')}/chat/completions"
        self._headers = {}
        if spec.api_key_env is not None:
            key = os.environ.get(spec.api_key_env, "").strip()
            if not key:
                raise RewardImportFailed(
                    f"judge {spec.model}: the environment variable {spec.api_key_env} (apiKeyEnv) is not set: bring it from a secret with "
                    "spec.env[].valueFrom.secretKeyRef"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    async def judge(self, prompts: Sequence[Any], pairs: Sequence[Sequence[str]]) -> list[int]:
        """0 or 1 for the better completion of each pair, -1 for a draw or an answer that cannot be read."""
        slots = asyncio.Semaphore(self._spec.max_concurrency)
        timeout = aiohttp.ClientTimeout(total=self._spec.timeout_seconds)
        connector = aiohttp.TCPConnector(limit=self._spec.max_concurrency)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers, connector=connector, trust_env=True) as session:

            async def ask(prompt: Any, pair: Sequence[str]) -> str:
                async with slots:
                    return await self._ask(session, self._body(prompt, pair))

            try:
                async with asyncio.TaskGroup() as group:  # the first failure cancels the others: their answers are of no use
                    asked = [group.create_task(ask(prompt, pair)) for prompt, pair in zip(prompts, pairs, strict=True)]
            except* RewardFailed as failures:
                raise failures.exceptions[0] from None
        return self._read([task.result() for task in asked])

    def _body(self, prompt: Any, pair: Sequence[str]) -> dict[str, Any]:
        template = self._spec.template or TEMPLATE
        filled = _fill(template, {"prompt": _conversation(prompt), "a": pair[0], "b": pair[1]})
        limit = {} if "max_completion_tokens" in self._spec.request else {"max_tokens": self._spec.max_tokens}
        messages = [{"role": "user", "content": filled}]
        return {"model": self._spec.model, "messages": messages, "temperature": 0, **limit, **self._spec.request}

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        problem = ""
        for attempt in range(self._spec.max_retries + 1):
            wanted_s = None
            try:
                async with session.post(self._url, json=body, allow_redirects=False) as response:
                    if response.status == 200:
                        return _content(await response.json(content_type=None))
                    problem = f"status {response.status}: {(await response.text())[:300]}"
                    if response.status < 500 and response.status not in PASSING:
                        raise RewardFailed(f"judge {self._spec.model} at {self._url} refuses, {problem}{self._advice(response.status)}")
                    wanted_s = retry_after_s(response.headers.get("Retry-After"))
            except TimeoutError:
                problem = f"no answer within {self._spec.timeout_seconds:g} s"
            except (aiohttp.ClientError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self._spec.max_retries:
                await asyncio.sleep(pause_s(attempt, wanted_s))
        raise RewardFailed(f"judge {self._spec.model} at {self._url} failed {self._spec.max_retries + 1} times, last with {problem:.500}")

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"; check the key in {self._spec.api_key_env}" if self._spec.api_key_env else "; it may need a key: set apiKeyEnv"
        return "; check judge.url and judge.model" if status == 404 or 300 <= status < 400 else ""

    def _read(self, answers: list[str]) -> list[int]:
        verdicts = [parse_verdict(answer) for answer in answers]
        unread = [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict is None]
        if unread and len(unread) == len(answers):
            raise RewardFailed(
                f"judge {self._spec.model} named no winner in any of {len(answers)} answers, the first {unread[0][:300]!r}: "
                "let the template ask for A, B or TIE alone, or for [[A]] at the end, and give it the maxTokens it needs"
            )
        if unread:
            log.warning("judge %s: %d of %d answers name no winner, such as %.200r", self._spec.model, len(unread), len(answers), unread[0])
        return [-1 if verdict is None else verdict for verdict in verdicts]


def pause_s(attempt: int, wanted_s: float | None) -> float:
    """Seconds before the next attempt: what the server asks for, else a doubling pause with jitter; never more than a minute."""
    if wanted_s is not None:
        return min(max(wanted_s, 0.0), LONGEST_PAUSE_S)
    return float(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))


def retry_after_s(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (RFC 9110, 10.2.3); None without one."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return None


def _content(answer: Any) -> str:
    """The text of a chat completion.

    Raises:
        ValueError: if it is none.
    """
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no chat completion: {answer!r:.200}") from None


def _conversation(prompt: Any) -> str:
    """A prompt as text: of a conversation, every message under its role."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _fill(template: str, values: dict[str, str]) -> str:
    """`template` with {prompt}, {a} and {b} replaced in one pass: braces in a completion mean nothing."""
    return re.sub(r"\{(prompt|a|b)\}", lambda match: values[match[1]], template)
