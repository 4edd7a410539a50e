"""What leaves vLLM's engine when, and that nothing is lost or changes its place on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from otj_runtime.rollout.vllm_bursts import BURST, Bursts, StepLogprobs

ROLLOUT = {"flat_logprobs": True, "logprobs": 0, "output_kind": RequestOutputKind.FINAL_ONLY}


def request(**parameters: Any) -> Any:
    return SimpleNamespace(sampling_params=SamplingParams(**ROLLOUT | parameters))


def output(name: str, *made: int, **more: Any) -> EngineCoreOutput:
    """One token, or as many as a step with guesses made."""
    return EngineCoreOutput(request_id=name, new_token_ids=list(made), **more)


def step(bursts: Bursts, requests: dict[str, Any], *outputs: EngineCoreOutput, client: int = 0) -> list[EngineCoreOutput]:
    """As vLLM's scheduler goes through a step. Log-probability and rank of each token tell of it."""
    made = np.array([token for output in outputs for token in output.new_token_ids], dtype=np.int32)
    rows = [0, *np.cumsum([len(output.new_token_ids) for output in outputs]).tolist()]
    cut = LogprobsLists(made[:, None], -made[:, None].astype(np.float32), made, None if len(made) == len(outputs) else rows)
    logprobs = StepLogprobs(cut)
    for index, output in enumerate(outputs):
        if output.new_token_ids:
            output.new_logprobs = logprobs.slice_request(index, len(output.new_token_ids))
    batch = EngineCoreOutputs(outputs=list(outputs))
    bursts.sift({client: batch}, requests, logprobs)
    left: list[EngineCoreOutput] = batch.outputs
    return left


def tokens(outputs: list[EngineCoreOutput]) -> list[int]:
    """All tokens, each with its own log-probability and rank."""
    found = [token for output in outputs for token in output.new_token_ids]
    logprobs = [output.new_logprobs for output in outputs if output.new_logprobs is not None]
    assert [int(t) for part in logprobs for (t,) in part.logprob_token_ids] == found
    assert [-int(p) for part in logprobs for (p,) in part.logprobs] == found
    assert [int(r) for part in logprobs for r in part.sampled_token_ranks] == found
    return found


def test_tokens_leave_together() -> None:
    bursts, requests = Bursts(), {"a": request()}
    left = [step(bursts, requests, output("a", token)) for token in range(BURST)]
    assert [len(found) for found in left] == [0] * (BURST - 1) + [1]
    assert tokens(left[-1]) == list(range(BURST))


def test_the_last_token_brings_the_others_along() -> None:
    bursts = Bursts()
    assert step(bursts, {"a": request()}, output("a", 1)) == []
    (found,) = step(bursts, {}, output("a", 2, finish_reason=FinishReason.STOP))
    assert tokens([found]) == [1, 2]
    assert found.finish_reason is FinishReason.STOP


def test_a_request_that_fails_without_a_token_brings_those_along_that_it_made() -> None:
    bursts = Bursts()
    step(bursts, {"a": request()}, output("a", 1), output("b", 5))
    (found,) = step(bursts, {}, output("a", finish_reason=FinishReason.ERROR))
    assert tokens([found]) == [1]
    (nothing,) = step(Bursts(), {"a": request()}, output("a", finish_reason=FinishReason.ERROR))
    assert tokens([nothing]) == []


def test_tokens_of_which_a_step_made_several_keep_their_places() -> None:
    bursts, requests = Bursts(), {"a": request(), "b": request(stop=["end"]), "c": request()}
    left = step(bursts, requests, output("a", 1, 2), output("b", 3), output("c", 4, 5, 6))
    assert tokens(left) == [3]
    assert {found.request_id: tokens([found]) for found in bursts.release()[0]} == {"a": [1, 2], "c": [4, 5, 6]}


@pytest.mark.parametrize("more", [{"prefill_stats": PrefillStats()}, {"num_nans_in_logits": 1}, {"routed_experts": np.zeros((2, 2))}])
def test_an_output_that_carries_more_leaves_at_once_and_in_order(more: dict[str, Any]) -> None:
    bursts, requests = Bursts(), {"a": request()}
    step(bursts, requests, output("a", 1))
    assert tokens(step(bursts, requests, output("a", 2, **more))) == [1, 2]


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"output_kind": RequestOutputKind.DELTA}, id="streams"),
        pytest.param({"stop": ["end"]}, id="the server looks for its stop strings"),
        pytest.param({"flat_logprobs": False}, id="not a rollout"),
        pytest.param({"logprobs": 2}, id="wants more than the sampled token's"),
    ],
)
def test_requests_that_are_watched_get_each_token_at_once(parameters: dict[str, Any]) -> None:
    bursts, requests = Bursts(), {"a": request(**parameters)}
    assert [tokens(step(bursts, requests, output("a", token))) for token in (1, 2)] == [[1], [2]]


def test_what_is_kept_is_released_for_the_client_it_is_for() -> None:
    bursts, requests = Bursts(), {"a": request(), "b": request()}
    step(bursts, requests, output("a", 1), client=0)
    step(bursts, requests, output("b", 2), client=3)
    released = bursts.release()
    assert {client: tokens(found) for client, found in released.items()} == {0: [1], 3: [2]}
    assert bursts.release() == {}


def test_requests_that_are_called_off_are_forgotten() -> None:
    bursts = Bursts()
    step(bursts, {"a": request(), "b": request()}, output("a", 1), output("b", 2))
    step(bursts, {"b": request()}, output("b", 3))
    assert {client: tokens(found) for client, found in bursts.release().items()} == {0: [2, 3]}


@given(lengths=st.lists(st.integers(1, 3 * BURST), min_size=1, max_size=4), releases=st.sets(st.integers(0, 3 * BURST)))
def test_every_request_gets_all_its_tokens_in_order(lengths: list[int], releases: set[int]) -> None:
    bursts = Bursts()
    requests = {str(name): request() for name in range(len(lengths))}
    seen: dict[str, list[EngineCoreOutput]] = {name: [] for name in requests}
    for place in range(max(lengths)):
        outputs = []
        for name, length in enumerate(lengths):
            if place < length:
                last = place == length - 1
                outputs.append(output(str(name), place, finish_reason=FinishReason.LENGTH if last else None))
                if last:
                    del requests[str(name)]
        for found in step(bursts, requests, *outputs):
            seen[found.request_id].append(found)
        if place in releases:
            for found in bursts.release().get(0, []):
                seen[found.request_id].append(found)
    assert [tokens(seen[str(name)]) for name in range(len(lengths))] == [list(range(length)) for length in lengths]
    assert not bursts.release()
