"""Tokens of rollouts leave vLLM's engine in bursts, not one by one.

    each step:  Scheduler.update_from_output -> a token of each request -> kept here
                BURST of them, or the request's end                     -> one output -> the server's process

vLLM's engine hands every token to its server, a process of its own, which works on each; and the engine's Python, which must start the next
step, shares its interpreter with the thread that packs them. A rollout wants its completions whole, and nobody looks at them before.

The server labels the tokens of an output with the weight version that its batch names. So what is kept leaves under the version that made it,
before the engine takes another (`EngineCore.set_weight_version`, between two steps).

Requests that are watched are left alone: those that stream, those with stop strings, which the server looks for, and all that did not ask for
flat log-probabilities, as only `vllm_answers` does. vLLM's metrics see the tokens when they leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import msgspec
import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.outputs import LogprobsLists

BURST = 32
"""Tokens: few enough that the server is not behind when the last ones come."""

_FIELDS = {found.name: found.default for found in msgspec.structs.fields(EngineCoreOutput)}
_REST = [name for name in _FIELDS if name not in ("request_id", "new_token_ids", "new_logprobs", "trace_headers")]
_rest = attrgetter(*_REST)
_NOTHING = tuple(_FIELDS[name] for name in _REST)


@dataclass(slots=True)
class _Kept:
    """Of one request. Numbers and no arrays: of a few thousand arrays Python's garbage collector makes more work than all of this saves."""

    client: int
    tokens: list[int] = field(default_factory=list)
    like: LogprobsLists | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)

    def add(self, tokens: list[int], logprobs: LogprobsLists | None) -> None:
        self.tokens += tokens
        if logprobs is not None:
            self.like = logprobs
            self.ids += logprobs.logprob_token_ids.ravel().tolist()
            self.logprobs += logprobs.logprobs.ravel().tolist()
            self.ranks += logprobs.sampled_token_ranks.tolist()

    def joined(self) -> LogprobsLists | None:
        """As the engine would have made them of all tokens at once."""
        if self.like is None:
            return None
        width = self.like.logprobs.shape[1]
        ids = np.array(self.ids, dtype=self.like.logprob_token_ids.dtype).reshape(-1, width)
        logprobs = np.array(self.logprobs, dtype=self.like.logprobs.dtype).reshape(-1, width)
        return LogprobsLists(ids, logprobs, np.array(self.ranks, dtype=self.like.sampled_token_ranks.dtype), None)


class Bursts:
    """What one engine keeps."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def sift(self, outputs: Mapping[int, EngineCoreOutputs], requests: Mapping[str, Any]) -> None:
        """Keep of a step's outputs what nobody waits for; what leaves takes along what was kept before.

        Args:
            outputs: by client, changed in place.
            requests: the scheduler's, by id: those that have not ended.
        """
        for client, batch in outputs.items():
            batch.outputs = [output for output in batch.outputs if self._leaves(output, client, requests)]
        if len(self._kept) > len(requests):  # some were called off
            self._kept = {name: kept for name, kept in self._kept.items() if name in requests}

    def _leaves(self, output: EngineCoreOutput, client: int, requests: Mapping[str, Any]) -> bool:
        kept = self._kept.get(output.request_id)
        more = all(map(is_, _rest(output), _NOTHING))  # for each token of each request, so without a loop in Python
        if kept is None:
            if not more or not _unwatched(requests.get(output.request_id)):
                return True
            kept = self._kept[output.request_id] = _Kept(client)
        kept.add(output.new_token_ids, output.new_logprobs)
        if more and len(kept.tokens) < BURST:
            return False
        del self._kept[output.request_id]
        output.new_token_ids, output.new_logprobs = kept.tokens, kept.joined()
        return True

    def release(self) -> dict[int, list[EngineCoreOutput]]:
        """All that is kept, by client."""
        found: dict[int, list[EngineCoreOutput]] = {}
        for name, kept in self._kept.items():
            output = EngineCoreOutput(request_id=name, new_token_ids=kept.tokens, new_logprobs=kept.joined())
            found.setdefault(kept.client, []).append(output)
        self._kept = {}
        return found


def _unwatched(request: Any) -> bool:
    parameters = None if request is None else request.sampling_params
    return bool(
        parameters is not None
        and parameters.flat_logprobs
        and parameters.output_kind == RequestOutputKind.FINAL_ONLY
        and not parameters.stop
    )


def send_in_bursts() -> None:
    """Make vLLM's engine do so, if it does not yet. In a process without an engine of its own that changes nothing."""
    update, set_version = Scheduler.update_from_output, EngineCore.set_weight_version
    if update.__module__ == __name__:
        return

    def update_from_output(scheduler: Any, *arguments: Any, **keywords: Any) -> Any:
        outputs = update(scheduler, *arguments, **keywords)
        _bursts(scheduler).sift(outputs, scheduler.requests)
        return outputs

    def set_weight_version(engine: Any, weight_version: str) -> None:
        for client, outputs in _bursts(engine.scheduler).release().items():
            engine.output_queue.put_nowait((client, EngineCoreOutputs(outputs=outputs, weight_version=engine.get_weight_version())))
        set_version(engine, weight_version)

    Scheduler.update_from_output = update_from_output
    EngineCore.set_weight_version = set_weight_version


def _bursts(scheduler: Any) -> Bursts:
    """The scheduler's own: it is kept there because both ends know it."""
    if not hasattr(scheduler, "otj_bursts"):
        scheduler.otj_bursts = Bursts()
    found: Bursts = scheduler.otj_bursts
    return found
