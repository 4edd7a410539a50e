"""Several engines behind one server, `generation.gpus > tensorParallelSize`: real vLLM, data parallel, every engine proven.

Nightly: two engines take twice as long to start as one.
"""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from otj_runtime.rollout.types import Sampling
from otj_runtime.train.generator import Connection, connect, pod_generator
from otj_runtime.weights.probe import EXACT_BOUND
from tests.integration.conftest import Generator

pytestmark = [pytest.mark.integration, pytest.mark.nightly]

PROMPTS = [[5 + i, 6, 7, 8, 9, 10 + i, 11, 12] for i in range(8)]
SAMPLING = Sampling(count=4, max_tokens=24)


@pytest.fixture(scope="module")
def server(generator: Callable[..., Generator], tied_model: Path) -> Generator:
    return generator(tied_model, engines=2)


@pytest.fixture(scope="module")
def policy(tied_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def connection(server: Generator, policy: Any) -> Connection:
    """What a training rank has: weights go to both engines, prompts to either."""
    return connect(pod_generator(server.config), model=policy, end_tokens=set(), prompts=PROMPTS)


def _perturb(policy: Any) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.02)


def _tokens(server: Generator) -> list[float]:
    """Tokens that each engine has generated so far."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return [float(value) for _, value in sorted(re.findall(r'^vllm:generation_tokens_total\{engine="(\d)".*\} (\S+)$', text, re.MULTILINE))]


def _push_proven(connection: Connection, server: Generator, version: int) -> None:
    connection.weights.push(version)
    proof = connection.weights.proven(version)
    assert not proof.again
    assert server.control.weight_version() == str(version)  # vLLM answers only if both name the same


def test_a_push_reaches_every_engine_and_each_is_proven(server: Generator, policy: Any, connection: Connection) -> None:
    before = server.control.score(PROMPTS)
    for version in range(2):
        _perturb(policy)
        _push_proven(connection, server, version)
        assert connection.weights.proven(version).metrics["sync/max_abs_logprob_diff"] <= EXACT_BOUND
    first, second = server.control.score(PROMPTS)
    assert first == second
    assert before[0] != first


def test_engines_that_were_held_go_on_with_what_is_installed(server: Generator, policy: Any, connection: Connection) -> None:
    assert [sight.device for sight in server.control.sights()] == ["", ""]
    server.control.hold()
    _perturb(policy)
    _push_proven(connection, server, 10)


def test_prompts_are_shared_out_evenly_and_each_with_all_its_completions(server: Generator, connection: Connection) -> None:
    _push_proven(connection, server, 2)
    before = _tokens(server)
    groups = connection.engine.generate(PROMPTS, SAMPLING, policy_version=2)
    assert [len(group) for group in groups] == [SAMPLING.count] * len(PROMPTS)
    made = [after - earlier for earlier, after in zip(before, _tokens(server), strict=True)]
    assert sum(made) == sum(len(completion.token_ids) for group in groups for completion in group)
    assert len(made) == 2
    assert all(tokens >= sum(made) / 4 for tokens in made)


def test_when_one_engine_dies_all_start_anew_and_get_the_current_version(server: Generator, policy: Any, connection: Connection) -> None:
    _perturb(policy)
    _push_proven(connection, server, 3)
    scores = server.control.score(PROMPTS)
    os.kill(server.engines()[1], signal.SIGKILL)
    end = time.monotonic() + 60
    while server.control.healthy():
        assert time.monotonic() < end, "vLLM goes on with an engine less"
        time.sleep(0.2)
    server.kill()  # what is left of it, as kubelet ends a container whose first process ends
    server.start()
    server.wait()
    assert server.control.weight_version() == "default"
    groups = connection.engine.generate(PROMPTS, SAMPLING, policy_version=3)  # its first answers are of dummy weights
    assert {completion.policy_version for group in groups for completion in group} == {3}
    assert server.control.score(PROMPTS) == scores
