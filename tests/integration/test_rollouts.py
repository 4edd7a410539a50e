"""Rollouts in a real vLLM while weights arrive and while it dies: nothing lost, nothing repeated, every token by the weights it names."""

from __future__ import annotations

import copy
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from otj_runtime.api import DType
from otj_runtime.rollout.types import Completion, Sampling
from otj_runtime.rollout.vllm_engine import VLLMEngine
from otj_runtime.train.sampling import Exclusive
from otj_runtime.weights.probe import EXACT_BOUND
from otj_runtime.weights.sync import WeightSync
from tests.integration.conftest import Generator

pytestmark = pytest.mark.integration

PROMPTS = [[10 + i, 20 + i, 30 + i] for i in range(8)]
SAMPLING = Sampling(count=4, max_tokens=120)
DEADLINE = 60.0


def in_background(engine: VLLMEngine, *, policy_version: int) -> Future[list[list[Completion]]]:
    """`PROMPTS` asked for in a thread; returns when the generator works on them."""
    future: Future[list[list[Completion]]] = Future()

    def work() -> None:
        try:
            future.set_result(engine.generate(PROMPTS, SAMPLING, policy_version=policy_version))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    end = time.monotonic() + DEADLINE
    while engine.busy_seconds() < 0.05 or not running(engine):
        assert time.monotonic() < end, "the generator does not begin"
        assert not future.done(), "the completions are too short for this test"
        time.sleep(0.01)
    return future


def running(engine: VLLMEngine) -> bool:
    """Whether the generator is decoding."""
    with urllib.request.urlopen(f"{engine._url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return any(float(line.split()[-1]) > 0 for line in lines if line.startswith("vllm:num_requests_running"))


def logprobs_under(model: Any, prompt: list[int], completion: Completion) -> list[float]:
    """Log-probability of each token of the completion, by transformers."""
    ids = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return [float(logits[i, token]) for i, token in enumerate(completion.token_ids)]


def perturbed(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_requests_in_flight_survive_new_weights_and_each_token_names_its_sampler(
    generator: Callable[..., Generator], tied_model: Path
) -> None:
    server = generator(tied_model)
    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    sync = WeightSync(
        model=model, directory=Path(server.config.mailbox), control=server.control, dtype=DType.FLOAT32, ready_timeout_s=240.0
    )
    weights = Exclusive(sync, sync.reinstall)
    engine = VLLMEngine(server.url, end_tokens={1}, recover=weights.recover)
    weights.push(60)
    policies = {60: copy.deepcopy(model)}
    answers = in_background(engine, policy_version=60)
    perturbed(model)
    policies[61] = model
    weights.push(61)
    groups = answers.result(DEADLINE)

    completions = [(prompt, completion) for prompt, group in zip(PROMPTS, groups, strict=True) for completion in group]
    assert [len(group) for group in groups] == [SAMPLING.count] * len(PROMPTS)
    mixed = [completion for _, completion in completions if completion.spans]
    assert mixed, "no completion was under way when the weights arrived"
    for prompt, completion in completions:
        assert len(completion.logprobs) == len(completion.token_ids) == sum(count for _, count in completion.token_ages(61))
        by_version = {version: logprobs_under(policy, prompt, completion) for version, policy in policies.items()}
        for age, start, end in ages_and_places(completion):
            for i in range(start, end):
                assert completion.logprobs[i] == pytest.approx(by_version[61 - age][i], abs=EXACT_BOUND)


def ages_and_places(completion: Completion) -> list[tuple[int, int, int]]:
    """(versions before 61, first token, end) of each span."""
    place, found = 0, []
    for age, count in completion.token_ages(61):
        found.append((age, place, place + count))
        place += count
    return found
