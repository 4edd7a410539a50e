"""Time and memory of scoring a group's completions with their prompt read once, against reading it anew for each: forward and backward of one
micro-batch.

    python -m tests.bench.shared_prompts --model build/models/SmolLM2-135M-Instruct --bf16       # CPU
    python -m tests.bench.shared_prompts --device cuda --bf16                                   # the 1.5B shape, random weights

Both ways take turns in one process on the same batch; medians count. Memory is the peak beyond weights and gradients, on a card only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from otj_runtime.rollout.types import Completion
from otj_runtime.train.batch import MicroBatch, Row, collate
from otj_runtime.train.logprobs import Scorer
from otj_runtime.train.shared_prompts import install
from tests.bench.report import Bar, conclude, machine, table
from tests.bench.step import SHAPE_15B

ANEW, ONCE = "each row reads its prompt", "prompts read once"
AGREEMENT = Bar("relative difference of gradients", 0.05, at_least=False)
"""Norm of the difference by norm; bfloat16 rounds both."""


def make_batch(*, prompts: int, group: int, prompt_tokens: int, completion_tokens: int) -> MicroBatch:
    """Random completions of random prompts, all of full length."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(prompts):
        prompt = torch.randint(1, 1000, (prompt_tokens,), generator=draw).tolist()
        for _ in range(group):
            tokens = torch.randint(1, 1000, (completion_tokens,), generator=draw).tolist()
            rows.append(Row(prompt, Completion(tokens, [0.0] * completion_tokens, finished=True, policy_version=0)))
    return collate(rows, pad_id=0, mask_truncated=False)


class Run:
    """Forward and backward of one way. `shared` says whether prompts are read once."""

    def __init__(self, model: Any, scorer: Scorer, batch: MicroBatch, *, shared: bool, bf16: bool) -> None:
        self._model, self._scorer, self._bf16 = model, scorer, bf16
        self._batch = batch if shared else replace(batch, shared=None)
        self._cuda = batch.input_ids.device.type == "cuda"
        self.tokens = 0

    def __call__(self) -> float:
        """Seconds of one."""
        self._model.zero_grad(set_to_none=False)
        began = time.perf_counter()
        kind = self._batch.input_ids.device.type
        with torch.autocast(kind, dtype=torch.bfloat16) if self._bf16 else nullcontext():
            scores = self._scorer(self._model, self._batch)
        (scores.logprobs * torch.linspace(-1, 1, scores.logprobs.shape[1], device=scores.logprobs.device)).mean().backward()
        self.tokens = int(scores.tokens)
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def peak(self) -> float:
        """MiB that one takes beyond what is there before; NaN on a CPU."""
        if not self._cuda:
            return float("nan")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def gradient(self) -> list[torch.Tensor]:
        """Of every parameter."""
        self()
        return [parameter.grad.clone() for parameter in self._model.parameters()]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Norm of the difference by the norm."""
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(ours, theirs, strict=True))
    return float((apart / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5)


def main() -> int:
    """0 if both ways agree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", type=Path, help="folder of a model; default: the 1.5B Qwen2 shape with random weights")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--bf16", action="store_true", help="compute under bfloat16 autocast")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--completion-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model is None:
        config = Qwen2Config(**SHAPE_15B)  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_config(config, attn_implementation=options.attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation=options.attention)
    model.to(options.device)
    sizes = {name: getattr(options, name) for name in ("prompts", "group", "prompt_tokens", "completion_tokens")}
    batch = make_batch(**sizes).to(torch.device(options.device))
    install(model)
    scorer = Scorer(model, temperature=1.0)
    ways = {name: Run(model, scorer, batch, shared=name == ONCE, bf16=options.bf16) for name in (ANEW, ONCE)}
    apart = difference(ways[ONCE].gradient(), ways[ANEW].gradient())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            times[name].append(way())
    seconds = {name: statistics.median(found) for name, found in times.items()}
    memory = {name: way.peak() for name, way in ways.items()}
    print(machine())
    print(f"{options.attention}, {sizes}; in use: {scorer.shares}")
    print(table(["", "tokens", "s", "peak MiB"], [[name, way.tokens, seconds[name], memory[name]] for name, way in ways.items()]))
    figures = {
        "time ratio": seconds[ANEW] / seconds[ONCE],
        "tokens ratio": ways[ANEW].tokens / ways[ONCE].tokens,
        "relative difference of gradients": apart,
    } | {f"s, {name}": found for name, found in seconds.items()}
    workload = sizes | {"device": options.device, "attention": options.attention, "bf16": options.bf16}
    return 0 if conclude("shared_prompts", figures, [AGREEMENT], json_file=options.json, workload=workload) else 1


if __name__ == "__main__":
    sys.exit(main())
