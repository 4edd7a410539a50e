"""vLLM's control routes, as typed blocking calls over HTTP on loopback.

Each call is one request on its own connection, with a deadline and the name of its phase, and is never repeated: an update
that was applied although its answer got lost must not be applied again behind the caller's back. What goes wrong ends as
`WeightSyncFailed` with that name. The routes exist only in vLLM's development mode (VLLM_SERVER_DEV_MODE=1).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from otj_runtime.pod.errors import GeneratorLost, GeneratorNotReady
from otj_runtime.pod.names import ENGINE_HEADER, SERVED_MODEL
from otj_runtime.pod.transfer import Sight
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.layout import Ticket
from otj_runtime.weights.loan import Loan

DEADLINES = {
    "init": 60.0,
    "drain": 1800.0,
    "pause": 60.0,
    "start": 60.0,
    "update": 600.0,
    "install": 600.0,
    "finish": 300.0,
    "reset_prefix_cache": 60.0,
    "resume": 60.0,
    "score": 300.0,
    "read": 30.0,
}
"""Seconds that each phase may take. `drain` waits for the requests under way; `update` until all weights are staged; `install` for the engine
step under way, and, where weights have to be packed or quantised again, for that."""

POLL_SECONDS = 0.25

SIGHTS = "/otj/devices"

RELAYED = {"init_weight_transfer_engine": "init", "start_weight_update": "start", "update_weights": "update"}
"""Routes that vLLM's own client calls, and the phases that they are."""

RETURN_SECONDS = 600.0
"""How long a lost generator may take to answer again: kubelet's back-off plus the start of a large model."""


class GeneratorControl:
    """Control of one vLLM server.

    Args:
        url: where it listens, such as http://127.0.0.1:8000.
        engines: copies of the model behind it. vLLM hands every call that changes weights to all of them.
        failure: says why it will never answer, or None while there is hope; only where somebody knows.
    """

    def __init__(self, url: str, *, engines: int = 1, failure: Callable[[], str | None] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            raise ValueError(f"the generator's URL must look like http://host:port, not {url!r}")
        self._host, self._port = parts.hostname, parts.port
        self.url = url
        self._engines = engines
        self._failure = failure

    # -- its state -------------------------------------------------------------------------------------------------------------

    def healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            self._call("read", "GET", "/health")
        except WeightSyncFailed:
            return False
        return True

    def wait_healthy(self, *, deadline_s: float) -> None:
        """Return as soon as the server answers and its engine lives.

        Raises:
            GeneratorNotReady: when `deadline_s` seconds have passed, or as soon as it is known that it never will.
        """
        end = time.monotonic() + deadline_s
        while not self.healthy():
            if self._failure is not None and (words := self._failure()) is not None:
                raise GeneratorNotReady(words)
            if time.monotonic() > end:
                raise GeneratorNotReady(
                    f"the generator at {self._host}:{self._port} did not answer within {deadline_s:.0f} s: read its log (of container "
                    "generator in a pod, generator.log in the output folder elsewhere); a large model may need a higher "
                    "generation.readyTimeoutSeconds"
                )
            time.sleep(POLL_SECONDS)

    def wait_returned(self) -> None:
        """Return as soon as a generator that may have been lost answers again.

        Raises:
            GeneratorLost: when `RETURN_SECONDS` have passed, or as soon as it is known that it never will.
        """
        try:
            self.wait_healthy(deadline_s=RETURN_SECONDS)
        except GeneratorNotReady as error:
            raise GeneratorLost(str(error)) from error

    def vllm_version(self) -> str:
        """Version of the server, such as 0.32.0."""
        return str(self._call("read", "GET", "/version")["version"])

    def weight_version(self) -> str | None:
        """Version of the weights it serves, as the last installation named it; `default` before that, None while it does not answer."""
        try:
            return str(self._call("read", "GET", "/weight_info")["weight_version"])
        except WeightSyncFailed:
            return None

    # -- the phases of an update -----------------------------------------------------------------------------------------------

    def init_transfer(self, path: str, staging_bytes: int | None = None, loan: Loan | None = None) -> None:
        """Tell the workers where the mailbox is, how much GPU memory staging may take, and where weights are lent."""
        told = {"path": path, "staging_bytes": staging_bytes, "loan": loan}
        self._call("init", "POST", "/init_weight_transfer_engine", {"init_info": told})

    def workers(self) -> int:
        """How many workers install weights."""
        return int(self._call("read", "GET", "/get_world_size")["world_size"])

    def sights(self) -> tuple[Sight, ...]:
        """What each worker of every engine can see."""
        return tuple(
            Sight(**{key: _hashable(value) for key, value in sight.items()}) for sight in self._call("read", "GET", SIGHTS)["answer"]
        )

    def relay(self, route: str, body: dict[str, Any] | None) -> None:
        """A call of vLLM's own client, of one of the phases in `RELAYED`."""
        self._call(RELAYED[route], "POST", f"/{route}", body)

    def hold(self) -> None:
        """Stop decoding between two steps; requests under way stay, and go on after `install`."""
        self._call("pause", "POST", "/otj/hold")

    def drain(self) -> None:
        """Wait until no request is under way; new ones go on after `resume`."""
        self._call("drain", "POST", "/pause?mode=wait")

    def start(self) -> None:
        """Open an update."""
        self._call("start", "POST", "/start_weight_update")

    def update(self, ticket: Ticket) -> None:
        """Let every worker stage what is written under the ticket. Returns at once: the receipts tell when it is done."""
        self._call("update", "POST", "/update_weights", {"update_info": asdict(ticket)})

    def give_up(self) -> None:
        """Close an update that is open: vLLM closes it when it fails, and no version is negative."""
        with suppress(WeightSyncFailed):
            self._call("update", "POST", "/update_weights", {"update_info": {"version": -1}})

    def load_adapter(self, path: str) -> None:
        """Serve the LoRA adapter in folder `path` as the policy, in place of the one before. Nothing may be under way.

        A load in place would keep the name served throughout, but vLLM then reads the folder again at every step.
        """
        served = [entry["id"] for entry in self._call("read", "GET", "/v1/models")["data"]]
        if SERVED_MODEL in served:
            self._call("update", "POST", "/v1/unload_lora_adapter", {"lora_name": SERVED_MODEL})
        self._call("update", "POST", "/v1/load_lora_adapter", {"lora_name": SERVED_MODEL, "lora_path": path})

    def label(self, version: int) -> None:
        """Name the weights without an update."""
        self._call("finish", "POST", "/update_weight_version", {"new_version": str(version)})

    def reset_prefix_cache(self) -> None:
        """Forget what older weights computed.

        Raises:
            WeightSyncFailed: also when vLLM answers that it could not.
        """
        answer = self._call("reset_prefix_cache", "POST", "/reset_prefix_cache?reset_running_requests=true")
        if answer.get("success") is not True:
            raise WeightSyncFailed(
                f"reset_prefix_cache: vLLM could not forget the prefixes of older weights: {answer}", phase="reset_prefix_cache"
            )

    def resume(self) -> None:
        """Go on generating."""
        self._call("resume", "POST", "/resume")

    def install(self, version: int) -> float:
        """Install what is staged, between two engine steps; return the seconds for which generation was paused."""
        return float(self._call("install", "POST", "/otj/install", {"version": str(version)})["paused_s"])

    # -- the probe -------------------------------------------------------------------------------------------------------------

    def score(self, sequences: list[list[int]]) -> list[list[list[float]]]:
        """What every engine gives each sequence: the log-probability of each token but the first, given those before it; raw, at
        temperature 1."""
        return [self._score(sequences, engine) for engine in range(self._engines)]

    def _score(self, sequences: list[list[int]], engine: int) -> list[list[float]]:
        body = {"model": SERVED_MODEL, "prompt": sequences, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        answer = self._call("score", "POST", "/v1/completions", body, headers={ENGINE_HEADER: str(engine)} if self._engines > 1 else None)
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        return [
            [float(position[str(token)]["logprob"]) for token, position in zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)]
            for tokens, choice in zip(sequences, choices, strict=True)
        ]

    # -- HTTP ------------------------------------------------------------------------------------------------------------------

    def _call(
        self, phase: str, method: str, route: str, body: dict[str, Any] | None = None, *, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """One request; its answer as JSON ({} for an empty one)."""
        connection = HTTPConnection(self._host, self._port, timeout=DEADLINES[phase])
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, route, payload, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            status, text = response.status, response.read().decode(errors="replace")
        except TimeoutError as error:
            raise WeightSyncFailed(
                f"{phase}: the generator did not answer {method} {route} in {DEADLINES[phase]:.0f} s", phase=phase
            ) from error
        except (OSError, HTTPException) as error:
            raise WeightSyncFailed(f"{phase}: no connection to the generator for {method} {route}: {error!r}", phase=phase) from error
        finally:
            connection.close()
        if status != 200:
            raise WeightSyncFailed(f"{phase}: the generator answered {method} {route} with {status}: {_brief(text)}", phase=phase)
        try:
            answer = json.loads(text) if text.strip() else {}
        except ValueError:  # the adapter routes answer in words
            answer = text
        return answer if isinstance(answer, dict) else {"answer": answer}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _brief(text: str) -> str:
    """What an error answer says, without its wrapping."""
    try:
        return str(json.loads(text)["error"]["message"])[:1000]
    except (ValueError, KeyError, TypeError):
        return text[:1000]
