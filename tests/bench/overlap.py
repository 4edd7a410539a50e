"""How well sampling and training overlap, with stages shaped by sleep so that they share no device.

    python -m tests.bench.overlap                     # bar: T_step / max(T_generate, T_train) <= 1.10 at staleness 1

A server that speaks vLLM's generate route decodes a whole batch in T_generate seconds, whatever it is asked: requests take turns on it
as on a GPU that is full. The trainer sleeps for T_train; the weight push sleeps for T_push, in which the server stands still, as a
paused vLLM does. Everything between them is the product's own: engine, pipeline, scoring, version accounting. A step in which nothing
overlaps takes T_generate + T_train + T_push; one that overlaps perfectly takes as long as the longer of the two.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from otj_runtime.pod.names import GENERATE_ROUTE
from otj_runtime.rewards.scoring import Reward, Rewards
from otj_runtime.rollout.collect import Rollouts
from otj_runtime.rollout.pipeline import Pipeline
from otj_runtime.rollout.types import Sampling
from otj_runtime.rollout.vllm_engine import VLLMEngine
from tests.bench.report import Bar, conclude, machine, table

PROMPTS, GROUP, TOKENS = 16, 8, 64


@dataclass
class SleepingGenerator:
    """Answers requests one after the other, each in `seconds_per_request`."""

    seconds_per_request: float
    version: int = 0
    busy: float = 0.0
    url: str = ""
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @contextmanager
    def serving(self) -> Iterator[SleepingGenerator]:
        """Serve on a free port in a thread."""
        started = threading.Event()
        thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post(GENERATE_ROUTE, self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(self._runner.setup())
        self._loop.run_until_complete(web.TCPSite(self._runner, "127.0.0.1", 0).start())
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        started.set()
        self._loop.run_forever()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        async with self._turn:
            await asyncio.sleep(self.seconds_per_request)
            self.busy += self.seconds_per_request
            version = self.version
        count = body["sampling_params"]["n"]
        choice = {
            "token_ids": [1] * TOKENS,
            "logprobs": [-0.5] * TOKENS,
            "finish_reason": "length",
            "weight_versions": [{"version": str(version), "start": 0, "end": TOKENS}],
        }
        return web.json_response({"choices": [choice | {"index": i} for i in range(count)]})

    async def _end(self) -> None:
        await self._runner.cleanup()
        await asyncio.sleep(0.05)  # the handlers' tasks end

    def push(self, version: int, seconds: float) -> None:
        """Take weights: nothing is decoded meanwhile."""

        async def install() -> None:
            async with self._turn:
                await asyncio.sleep(seconds)
                self.version = version

        asyncio.run_coroutine_threadsafe(install(), self._loop).result()


class OneToken:
    """A tokenizer and encoder of the least that rollouts need."""

    def encode_row(self, row: dict[str, Any]) -> list[int]:
        """Always the same prompt."""
        return [1, 2, 3]

    def batch_decode(self, batch: list[list[int]], **_: Any) -> list[str]:
        """Any text."""
        return ["text" for _ in batch]


def run(*, generate_s: float, train_s: float, push_s: float, staleness: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, and the shares in which each side had nothing to do."""
    with SleepingGenerator(generate_s / PROMPTS).serving() as server:
        engine = VLLMEngine(server.url, end_tokens={2}, recover=lambda: None)
        rewards = Rewards([Reward(name="one", function=lambda completions, **_: [1.0] * len(completions))])
        tokenizer: Any = OneToken()
        pipeline = Pipeline(
            Rollouts(engine=engine, encoder=tokenizer, rewards=rewards, tokenizer=tokenizer),
            samples=lambda number: [{"prompt": f"{number}"}] * PROMPTS,
            sampling=Sampling(count=GROUP, max_tokens=TOKENS),
            ahead=staleness,
        )
        ends, waits, busy = [time.perf_counter()], [], [0.0]
        for step in range(steps):
            began = time.perf_counter()
            server.push(step, push_s)
            pipeline.fill(step, last=steps + staleness, policy_version=step)
            taken = pipeline.take(step)
            waits.append(time.perf_counter() - began)
            ages = [age for group in taken.groups for completion in group.completions for age, _ in completion.token_ages(step)]
            if not 0 <= min(ages) <= max(ages) <= staleness:
                raise AssertionError(f"tokens of step {step} are {min(ages)} to {max(ages)} versions old")
            time.sleep(train_s)
            ends.append(time.perf_counter())
            busy.append(server.busy)
        pipeline.cancel()
    counted = range(staleness + 1, steps)  # the first steps fill the pipeline
    durations = [ends[i + 1] - ends[i] for i in counted]
    return {
        "step_s": statistics.median(durations),
        "idle_trainer": statistics.median(waits[i] / (ends[i + 1] - ends[i]) for i in counted),
        "idle_generator": max(0.0, statistics.median(1 - (busy[i + 1] - busy[i]) / (ends[i + 1] - ends[i]) for i in counted)),
    }


def main() -> int:
    """0 if every bar was reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--scale", type=float, default=1.0, help="seconds of the longer stage")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, figures, bars = [], {}, []
    for name, generate, train in (("balanced", 1.0, 1.0), ("generation is slower", 1.0, 0.5), ("training is slower", 0.5, 1.0)):
        for staleness in (0, 1, 2):
            generate_s, train_s = generate * options.scale, train * options.scale
            found = run(generate_s=generate_s, train_s=train_s, push_s=0.02 * options.scale, staleness=staleness, steps=options.steps)
            ratio = found["step_s"] / max(generate_s, train_s)
            figure = f"ratio[{name}, staleness {staleness}]"
            figures[figure] = ratio
            rows.append([name, staleness, generate_s, train_s, found["step_s"], ratio, found["idle_trainer"], found["idle_generator"]])
            if staleness == 1:
                bars.append(Bar(figure, 1.10, at_least=False))
    print(machine())
    print(table(["stages", "staleness", "generate s", "train s", "step s", "step / longer", "trainer idle", "generator idle"], rows))
    return 0 if conclude("overlap", figures, bars, json_file=options.json) else 1


if __name__ == "__main__":
    sys.exit(main())
