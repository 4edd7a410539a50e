"""Rollouts' answers in few bytes: vLLM generates and checks, and only how its answer is written down is ours.

    POST /otj/generate   as /inference/v1/generate
      -> {"choices": [{"index", "token_ids", "logprobs": one number per token, "finish_reason", "weight_versions"}]}

vLLM's own route makes several objects of each token and writes out all their fields, and its client reads them: all in one thread, and
mostly when a batch ends and nothing is being generated any more. For 128 completions of 256 tokens on an H200 that was a third of the time.

The route and the class ride on vLLM's own serving of tokens, as its server has set it up, so adapters, limits, errors, cancelled requests and the
choice of an engine are handled there.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from otj_runtime.pod.names import GENERATE_ROUTE

LEAST = -9999.0
"""What vLLM writes for a log-probability of minus infinity, or none at all."""


class ShortAnswers(ServingTokens):  # type: ignore[misc]  # vLLM is not typed
    """vLLM's serving of tokens, which answers with bytes of JSON."""

    async def serve_tokens_full_generator(self, request: GenerateRequest, outputs: AsyncIterator[Any], request_id: str, *_: Any) -> bytes:
        """The answer, when all completions have ended."""
        final = None
        async for answer in outputs:
            final = answer
        assert final is not None, "vLLM ended a request without a word"
        for output in final.outputs:
            self._raise_if_error(output.finish_reason, request_id)
        return msgspec.json.encode({"choices": [choice(output) for output in final.outputs]})


def choice(output: Any) -> dict[str, Any]:
    """One completion, as it is written down. `output`: vLLM's, its log-probabilities flat."""
    logprobs = output.logprobs
    return {
        "index": output.index,
        "token_ids": list(output.token_ids),
        # The sampled token comes first of those of its place; a comparison with NaN is false.
        "logprobs": [found if (found := logprobs.logprobs[i]) > LEAST else LEAST for i in logprobs.start_indices],
        "finish_reason": output.finish_reason,
        "weight_versions": output.weight_versions,
    }


def prepare(state: Any) -> None:
    """Note in the server's `state` what answers the route, once vLLM has set up its own."""
    state.otj_answers = copy.copy(state.serving_tokens)
    state.otj_answers.__class__ = ShortAnswers


def attach(app: FastAPI) -> None:
    """Add the route."""

    @app.post(GENERATE_ROUTE)
    @with_cancellation  # type: ignore[untyped-decorator]
    async def generate(request: GenerateRequest, raw_request: Request) -> Response:
        request.sampling_params.flat_logprobs = True
        found = await raw_request.app.state.otj_answers.serve_tokens(request, raw_request)
        if isinstance(found, ErrorResponse):
            return JSONResponse(found.model_dump(), status_code=found.error.code)
        return Response(found, media_type="application/json")
