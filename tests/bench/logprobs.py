"""Memory and time of scoring completions in chunks, against all logits at once: one forward and backward of a small trunk with the
output layer of a large vocabulary.

    python tests/bench/logprobs.py --json logprobs.json                    # CPU, float32
    python tests/bench/logprobs.py --device cuda --dtype bfloat16          # a card, autocast, the 1.5B shape's output layer

Both ways run in one process, one after the other, on the same batch, each several times; medians count. Memory is the peak beyond what
the model, its gradients and the batch take: on a card as its allocator counts it, on a CPU as PyTorch's profiler does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from otj_runtime.rollout.types import Completion
from otj_runtime.train.batch import MicroBatch, Row, collate
from otj_runtime.train.logprobs import Scorer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs as a file, too
from tests.bench.report import Bar, conclude, machine, table

ALL, CHUNKED = "all logits", "in chunks"
MEMORY_SAVED = Bar("memory ratio", 3.0, at_least=True)
"""How many times less memory chunks must take."""

AGREEMENT = Bar("largest difference", 1e-3, at_least=False)
"""Of log-probabilities, float32; in bfloat16 the same rounding hits both."""

FINITE = Bar("finite gradients", 1.0, at_least=True)
"""Share of finite numbers: an attention kernel that cannot bear padding shows here."""


def make_model(vocabulary: int, hidden: int) -> Any:
    """One layer below an output layer of full size: what is measured is the output layer."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def make_batch(*, rows: int, tokens: int, vocabulary: int) -> MicroBatch:
    """Random completions after prompts of different lengths."""
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    completions = [Completion(row, [0.0] * tokens, finished=True, policy_version=0) for row in ids]
    return collate([Row([1] * (1 + i % 8), completion) for i, completion in enumerate(completions)], pad_id=0, mask_truncated=False)


class Measured:
    """Forward and backward of one way.

    Attributes:
        logprobs: of the last run.
    """

    def __init__(self, model: Any, batch: MicroBatch, *, chunked: bool, autocast: bool) -> None:
        self._model, self._batch = model, batch
        self._scorer = Scorer(model, temperature=1.0)
        if not chunked:
            self._scorer._head = None
        self._autocast = autocast
        self.logprobs = torch.empty(0)

    def run(self) -> None:
        """Once."""
        self._model.zero_grad(set_to_none=False)
        kind = self._batch.input_ids.device.type
        with torch.autocast(kind, dtype=torch.bfloat16) if self._autocast else nullcontext():
            logprobs = self._scorer(self._model, self._batch).logprobs
        logprobs.sum().backward()
        self.logprobs = logprobs.detach()
        if kind == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Most memory that one run takes beyond what was there before it. Gradients are there already."""
        self.run()
        if self._batch.input_ids.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.run()
        level = peak = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
        return peak

    def seconds(self, repeats: int) -> float:
        """Median of `repeats` runs."""
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def main() -> int:
    """0 if every bar was reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 runs products under autocast")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    rows, tokens = options.rows, options.tokens
    vocabulary, hidden = options.vocabulary or (151936 if cuda else 32000), options.hidden or (1536 if cuda else 256)
    model = make_model(vocabulary, hidden).to(options.device)
    batch = make_batch(rows=rows, tokens=tokens, vocabulary=vocabulary).to(torch.device(options.device))
    ways = {name: Measured(model, batch, chunked=name == CHUNKED, autocast=options.dtype == "bfloat16") for name in (ALL, CHUNKED)}
    memory = {name: way.peak_bytes() / 2**20 for name, way in ways.items()}
    seconds = {name: way.seconds(options.repeats) for name, way in ways.items()}
    figures = (
        {
            "memory ratio": memory[ALL] / memory[CHUNKED],
            "time ratio": seconds[CHUNKED] / seconds[ALL],
            "finite gradients": min(float(p.grad.isfinite().float().mean()) for p in model.parameters()),
            "largest difference": float((ways[ALL].logprobs - ways[CHUNKED].logprobs).abs().max()),
        }
        | {f"MiB, {name}": value for name, value in memory.items()}
        | {f"s, {name}": value for name, value in seconds.items()}
    )
    print(machine())
    print(f"{rows} x {tokens} tokens, {vocabulary} entries, hidden size {hidden}, {options.dtype}")
    print(table(["", "peak MiB", "seconds"], [[name, memory[name], seconds[name]] for name in ways]))
    workload = {
        "device": options.device,
        "dtype": options.dtype,
        "rows": rows,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "hidden": hidden,
    }
    return 0 if conclude("logprobs", figures, [MEMORY_SAVED, AGREEMENT, FINITE], json_file=options.json, workload=workload) else 1


if __name__ == "__main__":
    sys.exit(main())
