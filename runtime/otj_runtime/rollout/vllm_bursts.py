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


class StepLogprobs:
    """What a step computed, in the place of vLLM's own. vLLM cuts three arrays out of those for each request that asked; here it gets the
    number of the request's first row instead, and rollouts take plain numbers of whole columns.

    Args:
        made: of the step.
    """

    def __init__(self, made: LogprobsLists) -> None:
        self._made = made
        self.logprobs: list[float] = made.logprobs[:, 0].tolist()
        self.ranks: list[int] = made.sampled_token_ranks.tolist()

    def slice_request(self, index: int, count: int) -> int:
        """The first row of the batch's request `index`."""
        rows = self._made.cu_num_generated_tokens
        return index if rows is None else rows[index]

    def cut(self, row: int, count: int) -> LogprobsLists:
        """What vLLM would have cut out."""
        return self._made._replace(cu_num_generated_tokens=None).slice_request(row, count)


@dataclass(slots=True)
class _Kept:
    """Of one request. Numbers and no arrays: of a few thousand arrays Python's garbage collector makes more work than all of this saves."""

    client: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)

    def joined(self) -> LogprobsLists:
        """As the engine would have made them of all tokens at once: the sampled token of each and no other."""
        ids, logprobs = np.array(self.tokens, dtype=np.int32), np.array(self.logprobs, dtype=np.float32)
        return LogprobsLists(ids[:, None], logprobs[:, None], np.array(self.ranks, dtype=np.int32), None)


class Bursts:
    """What one engine keeps, by request; None for a request that is watched."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept | None] = {}

    def sift(self, outputs: Mapping[int, EngineCoreOutputs], requests: Mapping[str, Any], step: StepLogprobs | None) -> None:
        """Keep of a step's outputs what nobody waits for; what leaves takes along what was kept before.

        Args:
            outputs: by client, changed in place. Where log-probabilities were asked for, they are rows of `step`.
            requests: the scheduler's, by id: those that have not ended.
            step: None if no request of it asked.
        """
        for client, batch in outputs.items():
            batch.outputs = [output for output in batch.outputs if self._leaves(output, client, requests, step)]
        if len(self._kept) > len(requests):  # some have ended, or were called off
            self._kept = {name: kept for name, kept in self._kept.items() if name in requests}

    def _leaves(self, output: EngineCoreOutput, client: int, requests: Mapping[str, Any], step: StepLogprobs | None) -> bool:
        """For each token of each request, between two steps of the GPU: without calls and loops in Python where that can be."""
        name, tokens, row = output.request_id, output.new_token_ids, output.new_logprobs
        try:
            kept = self._kept[name]
        except KeyError:
            request = requests.get(name)
            kept = self._kept[name] = _Kept(client) if request is not None and _unwatched(request) else None
        if kept is None:
            if row is not None and step is not None:
                output.new_logprobs = step.cut(row, len(tokens))
            return True
        if row is not None and step is not None:
            end = row + len(tokens)
            kept.tokens += tokens
            kept.logprobs += step.logprobs[row:end]
            kept.ranks += step.ranks[row:end]
        if len(kept.tokens) < BURST and all(map(is_, _rest(output), _NOTHING)):
            return False
        if kept.tokens:
            output.new_token_ids, output.new_logprobs = kept.tokens, kept.joined()
        if output.finish_reason is None:
            self._kept[name] = _Kept(client)
        else:
            del self._kept[name]
        return True

    def release(self) -> dict[int, list[EngineCoreOutput]]:
        """All that is kept, by client."""
        found: dict[int, list[EngineCoreOutput]] = {}
        for name, kept in self._kept.items():
            if kept is not None and kept.tokens:
                output = EngineCoreOutput(request_id=name, new_token_ids=kept.tokens, new_logprobs=kept.joined())
                found.setdefault(kept.client, []).append(output)
        self._kept = {}
        return found


def _unwatched(request: Any) -> bool:
    parameters = request.sampling_params
    return bool(
        parameters is not None
        and parameters.flat_logprobs
        and parameters.logprobs == 0
        and parameters.output_kind == RequestOutputKind.FINAL_ONLY
        and not parameters.stop
    )


def send_in_bursts() -> None:
    """Make vLLM's engine do so, if it does not yet. In a process without an engine of its own that changes nothing."""
    update, set_version = Scheduler.update_from_output, EngineCore.set_weight_version
    if update.__module__ == __name__:
        return

    def update_from_output(scheduler: Any, scheduled: Any, made: Any) -> Any:
        step = None if made.logprobs is None else StepLogprobs(made.logprobs)
        made.logprobs = step
        outputs = update(scheduler, scheduled, made)
        _bursts(scheduler).sift(outputs, scheduler.requests, step)
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
