"""Tokens per second of rollouts through our client, against raw vLLM with the same prompts and concurrency.

    python -m tests.bench.rollout --model build/models/SmolLM2-135M-Instruct        # bar: 0.95 of raw vLLM

Raw vLLM is one POST to /v1/completions per prompt, all at once, without log-probabilities, its answers' text left unread: the least
that anybody could ask for. Ours is what a training rank does: token ids in and out, the log-probability of every token, versions
checked, completions built and decoded for the rewards. Both take turns in one run on one server, which has real weights by a real sync.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from otj_runtime.api import Device, DType
from otj_runtime.api.spec import GenerationSpec
from otj_runtime.data.model import build_tiny
from otj_runtime.data.tokenize import PromptEncoder
from otj_runtime.pod.names import SERVED_MODEL
from otj_runtime.rewards.scoring import Reward, Rewards
from otj_runtime.rollout.collect import Rollouts
from otj_runtime.rollout.types import Sampling
from otj_runtime.train.child import ChildGenerator, ServerPlan
from otj_runtime.train.devices import Placement
from otj_runtime.train.generator import connect
from tests.bench.report import Bar, conclude, machine, table


def plan(device: Device, *, longest: int) -> ServerPlan:
    """A server on the first GPU, or on the CPU."""
    cuda = device is Device.CUDA
    return ServerPlan(
        generation=GenerationSpec(gpus=1, max_model_len=longest, gpu_memory_utilization=0.5),
        dtype=DType.BFLOAT16 if cuda else DType.FLOAT32,
        placement=Placement((0,) if cuda else ()),
    )


async def ask_raw(url: str, prompts: list[list[int]], sampling: Sampling) -> int:
    """Tokens that raw vLLM generates for `prompts`."""
    body = {"model": SERVED_MODEL, "n": sampling.count, "max_tokens": sampling.max_tokens, "temperature": 1.0}

    async def one(session: aiohttp.ClientSession, prompt: list[int]) -> int:
        async with session.post("/v1/completions", json=body | {"prompt": prompt}) as response:
            response.raise_for_status()
            return int((await response.json())["usage"]["completion_tokens"])

    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=1800)) as session:
        return sum(await asyncio.gather(*(one(session, prompt) for prompt in prompts)))


def measure(rollouts: Rollouts, url: str, samples: list[dict[str, Any]], ids: list[list[int]], options: Any) -> dict[str, list[float]]:
    """Tokens per second of each, round by round; the first round of each warms up."""
    sampling = Sampling(count=options.group, max_tokens=options.tokens)
    rates: dict[str, list[float]] = {"raw vLLM": [], "our client": []}
    for _ in range(options.rounds + 1):
        began = time.perf_counter()
        tokens = asyncio.run(ask_raw(url, ids, sampling))
        rates["raw vLLM"].append(tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        groups = rollouts.collect(samples, sampling, policy_version=0)
        tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        rates["our client"].append(tokens / (time.perf_counter() - began))
    return {name: found[1:] for name, found in rates.items()}


def main() -> int:
    """0 if the bar was reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a model; default: the tiny one of the samples")
    parser.add_argument("--device", type=Device, choices=list(Device), default=Device.CPU)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "tiny"
        if options.model is None:
            build_tiny(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device.value)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        words = sorted(token for token in tokenizer.get_vocab() if token.isalpha())[:32]
        samples = [{"prompt": " ".join(words[(i * 7 + j) % len(words)] for j in range(16))} for i in range(options.prompts)]
        encoder = PromptEncoder(tokenizer)
        ids = [encoder.encode(sample["prompt"]) for sample in samples]
        longest = max(map(len, ids)) + options.tokens + 64
        child = ChildGenerator(plan(options.device, longest=longest), model=model, tokenizer=tokenizer, output=Path(scratch))
        try:
            # Completions end where the model ends them, in both.
            connection = connect(child.generator, model=model, end_tokens=set(), prompts=ids, failure=child.failure)
            connection.weights.push(0)
            rewards = Rewards([Reward(name="one", function=lambda completions, **_: [1.0] * len(completions))])
            rollouts = Rollouts(engine=connection.engine, encoder=encoder, rewards=rewards, tokenizer=tokenizer)
            rates = measure(rollouts, child.generator.url, samples, ids, options)
        finally:
            child.close()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(machine())
    print(f"{folder.name} on {options.device}: {options.prompts} prompts x {options.group} completions of {options.tokens} tokens")
    print(table(["client", "tokens/s", "slowest", "fastest"], [[n, medians[n], min(f), max(f)] for n, f in rates.items()]))
    ratios = [ours / raw for ours, raw in zip(rates["our client"], rates["raw vLLM"], strict=True)]
    figures = {f"tokens_per_s[{name}]": found for name, found in medians.items()} | {"ratio": statistics.median(ratios)}
    return 0 if conclude("rollout", figures, [Bar("ratio", 0.95, at_least=True)], json_file=options.json) else 1


if __name__ == "__main__":
    sys.exit(main())
